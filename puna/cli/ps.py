"""``puna ps``: what a server has in memory."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import click

from puna.cli.list import print_table
from puna.cli.options import host_option, json_option
from puna.cli.progress import human_bytes


@click.command()
@host_option
@json_option
def ps(host: str | None, as_json: bool) -> None:
    """List the models that a running server has in memory."""
    from puna.cli.remote import Remote, server_url

    models = Remote(server_url(host, "PUNA_HOST", "OLLAMA_HOST")).loaded()
    if as_json:
        click.echo(json.dumps(models, indent=2))
    elif models:
        print_table([_row(model) for model in models])
    else:
        click.echo("No model is loaded.", err=True)


def _row(model: dict[str, Any]) -> dict[str, object]:
    return {
        "name": model.get("name", ""),
        "digest": str(model.get("digest", ""))[:12],
        "memory": human_bytes(model.get("size", 0)),
        "context": model.get("context_length", ""),
        "until": _until(str(model.get("expires_at", ""))),
    }


def _until(moment: str) -> str:
    try:
        # Fractions of a second may have more digits than Python 3.10 reads.
        left = (datetime.fromisoformat(moment[:19] + "+00:00") - datetime.now(timezone.utc)).total_seconds()
    except ValueError:
        return moment
    if left > 10 * 365 * 86400:
        return "for ever"
    if left <= 0:
        return "now"
    return f"{left / 60:.0f} minutes from now" if left >= 90 else f"{left:.0f} seconds from now"
