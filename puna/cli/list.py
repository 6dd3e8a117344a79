"""``puna list``: the models that are here, or that could be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

import click

from puna.cli.options import json_option
from puna.cli.progress import file_size, human_bytes


@click.command("list")
@click.option("--available", is_flag=True, help="List the catalog of models that can be pulled instead.")
@json_option
def list_models(available: bool, as_json: bool) -> None:
    """List the models in the store."""
    rows = _available() if available else _stored()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo("No models yet. Try: puna pull smollm2", err=True)
        return
    print_table(rows)


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Rows of equal fields, for people."""
    columns = list(rows[0])
    shown = [[_cell(name, row[name]) for name in columns] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in shown)) for i, name in enumerate(columns)]
    for line in ([name.replace("_", " ").upper() for name in columns], *shown):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _stored() -> list[dict[str, object]]:
    from puna.store import Store

    store = Store()
    return [
        {
            "name": str(manifest.model_name),
            "digest": manifest.content_digest[:12],
            "size": manifest.size,
            "packed": file_size(store.packs.path(manifest.content_digest)),
            "created": manifest.created,
            "licence": manifest.licence or "",
        }
        for manifest in store.models()
    ]


def _available() -> list[dict[str, object]]:
    from puna import catalog

    return [
        {
            "name": entry.name,
            "parameters": entry.parameters,
            "context": entry.context_length,
            "licence": entry.licence.identifier,
            "gated": entry.gated,
            "runs": entry.runnable,
        }
        for entry in catalog.entries()
    ]


def _cell(column: str, value: object) -> str:
    if column in ("size", "packed") and isinstance(value, int):
        return human_bytes(value)
    if column == "parameters" and isinstance(value, int):
        return f"{value / 1e9:.1f}B" if value >= 1e9 else f"{value / 1e6:.0f}M"
    if column == "created" and isinstance(value, str):
        return _age(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _age(created: str) -> str:
    try:
        then = datetime.strptime(created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError:
        return created
    seconds = (datetime.now(timezone.utc) - then).total_seconds()
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
