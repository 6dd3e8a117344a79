"""``puna runs``: the training runs of this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from puna.cli.options import json_option

_html_option = click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a page with curves too."
)


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def runs(context: click.Context, as_json: bool) -> None:
    """List training runs, the newest first; show, compare and remove them.

    A RUN is a name of that list, a run's folder, or what the model that it made was to be called: then the newest.
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise click.UsageError(f"put --json behind {context.invoked_subcommand}")
        return
    from puna.cli.list import print_table
    from puna.train.runs.library import list_runs
    from puna.train.runs.summary import overview

    found = [overview(run) for run in list_runs(notify=lambda message: click.echo(f"Warning: {message}", err=True))]
    if as_json:
        _print_json(found)
    elif found:
        print_table([_line(row) for row in found])
    else:
        click.echo("No training runs yet (docs/runs.md).", err=True)


@runs.command()
@click.argument("run")
@_html_option
@json_option
def show(run: str, html: Path | None, as_json: bool) -> None:
    """Show what is known of RUN."""
    from puna.train.runs.library import find_run
    from puna.train.runs.report import run_page
    from puna.train.runs.summary import final_numbers, overview, shown

    found = find_run(run)
    numbers = final_numbers(found)
    if html is not None:
        _write(html, run_page(found))
    if as_json:
        _print_json({**found.record.as_json(), "folder": str(found.folder), "state": found.state, "numbers": numbers})
        return
    record = found.record
    facts = {
        **{name: value for name, value in overview(found).items() if not name.startswith(("steps", "loss", "reward"))},
        "folder": str(found.folder),
        "result": record.result,
        "error": record.error,
        "trained_parameters": record.trained_parameters,
        **{
            shown(f"data {data.name}"): f"{data.rows:,} rows, {data.held_out:,} held out" for data in record.inputs.data
        },
        **numbers,
    }
    _print_columns(
        [(shown(name).replace("_", " "), shown(value)) for name, value in facts.items() if value is not None]
    )


@runs.command()
@click.argument("names", metavar="RUN RUN…", nargs=-1, required=True)
@_html_option
@json_option
def compare(names: tuple[str, ...], html: Path | None, as_json: bool) -> None:
    """Show where the recipes of two or more runs differ, and what they reached."""
    if len(names) < 2:
        raise click.UsageError("name at least two runs")
    from puna.train.runs.library import find_run
    from puna.train.runs.report import comparison_page
    from puna.train.runs.summary import comparison, shown

    found = [find_run(name) for name in names]
    compared = comparison(found)
    if html is not None:
        _write(html, comparison_page(found))
    if as_json:
        _print_json(compared)
        return
    rows: list[Sequence[str]] = [("", *map(shown, compared["runs"])), ("status", *compared["status"])]
    for title in ("recipe", "circumstances", "numbers"):
        rows += [("",), (f"{title}:" if compared[title] else f"{title}: the same",)]
        rows += [(f"  {shown(name)}", *map(shown, row)) for name, row in compared[title].items()]
    _print_columns(rows)


@runs.command()
@click.argument("names", metavar="RUN…", nargs=-1, required=True)
@json_option
def rm(names: tuple[str, ...], as_json: bool) -> None:
    """Remove runs, with their states and curves. The models that they made stay."""
    from puna.train.runs.library import find_run, remove_run

    removed = []
    for run in {run.folder: run for run in map(find_run, names)}.values():
        remove_run(run)
        removed.append(str(run.folder))
        if not as_json:
            click.echo(f"removed {run.folder}")
    if as_json:
        _print_json({"removed": removed})


def _line(row: Mapping[str, Any]) -> dict[str, str]:
    from puna.train.runs.summary import shown

    measure = "loss" if row["reward_before"] is None else "reward"
    return {
        "name": shown(row["name"]),
        "status": row["status"],
        "model": shown(row["model"]),
        "objective": shown(f"{row['objective']}, {row['method']}"),
        "steps": f"{row['steps']}/{row['planned_steps']}",
        "held-out": f"{measure} {shown(row[f'{measure}_before'])} → {shown(row[f'{measure}_after'])}",
        "started": row["started"].replace("T", " ").removesuffix("Z"),
    }


def _print_json(values: Any) -> None:
    from puna.train.runs.record import storable

    click.echo(json.dumps(storable(values), indent=2, ensure_ascii=False))


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    columns = max(map(len, rows))
    widths = [max(len(row[i]) for row in rows if len(row) > max(i, 1)) for i in range(columns)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())


def _write(path: Path, html: str) -> None:
    from puna.checkpoint.atomic import atomic_path

    with atomic_path(path.expanduser()) as fresh:
        fresh.write_text(html, encoding="utf-8")
