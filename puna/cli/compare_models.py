"""``puna compare``: how far two models of one vocabulary are apart."""

from __future__ import annotations

import json
from pathlib import Path

import click

from puna.cli.fidelity import html_option, write_page
from puna.cli.options import json_option, threads_option


@click.command("compare")
@click.argument("source")
@click.argument("derived")
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="Compare on this text, not Puna's own.")
@click.option(
    "--windows", type=click.IntRange(1), default=8, show_default=True, help="Read at most so many times 512 tokens."
)
@html_option
@threads_option
@json_option
def compare_models(
    source: str,
    derived: str,
    text: Path | None,
    windows: int,
    html: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare DERIVED with SOURCE: stored models, .gguf files or checkpoint folders of the same vocabulary.

    Says how far their predictions and states are apart, whether they read texts and write prompts alike, and what each
    takes in size and time.
    """
    from rich.console import Console
    from rich.progress import Progress

    from puna.evaluate import compare
    from puna.evaluate.sides import Side
    from puna.evaluate.text import report_lines
    from puna.ops.registry import make_ops
    from puna.store import resolve

    a, b = (Side.open(name, resolve(name)) for name in (source, derived))
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("opening", total=None)

        def on_progress(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        report = compare(a, b, make_ops(None, threads), text, windows, on_progress)
    if html is not None:
        write_page(report, html, b.found.path.parent)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(report_lines(report)))
