"""``puna convert``: from any weights format to any other."""

from __future__ import annotations

from pathlib import Path

import click

from puna.cli.fidelity import html_option, keep_report, make_review, report_options
from puna.cli.options import threads_option


@click.command()
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["gguf", "safetensors", "meta"]),
    help="Default: by the destination's name.",
)
@click.option("--type", "weight_type", help="Re-encode the matrices: F32, F16, BF16, and for GGUF Q8_0, Q4_0, …")
@click.option(
    "--force", is_flag=True, help="Replace the destination if it exists; keep the result whatever its report says."
)
@report_options(default=False)
@html_option
@threads_option
def convert(
    source: str,
    destination: Path,
    format_name: str | None,
    weight_type: str | None,
    force: bool,
    report: bool,
    max_drift: float | None,
    html: Path | None,
    threads: int | None,
) -> None:
    """Convert SOURCE (a stored model, .gguf file or checkpoint folder) to DESTINATION.

    A destination ending in .gguf becomes GGUF, any other a safetensors folder; --format meta writes Meta's layout.
    """
    from rich.console import Console
    from rich.progress import Progress

    from puna.checkpoint.convert import convert as convert_checkpoint
    from puna.store import resolve

    path = resolve(source).path
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("converting", total=None)

        def on_progress(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        def on_tensor(name: str, done: int, total: int) -> None:
            on_progress(name, done + 1, total)

        review = make_review(
            source,
            destination,
            report=report,
            html=html,
            force=force,
            max_drift=max_drift,
            threads=threads,
            progress=on_progress,
        )
        convert_checkpoint(path, destination, format_name, weight_type, on_tensor, force, check=review)
    click.echo(f"wrote {destination}", err=True)
    keep_report(review, destination, html)
