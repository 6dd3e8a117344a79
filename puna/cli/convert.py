"""``puna convert``: from any weights format to any other."""

from __future__ import annotations

from pathlib import Path

import click


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
@click.option("--force", is_flag=True, help="Replace the destination if it exists.")
def convert(source: str, destination: Path, format_name: str | None, weight_type: str | None, force: bool) -> None:
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

        def on_tensor(name: str, done: int, total: int) -> None:
            bars.update(task, description=name, completed=done + 1, total=total)

        convert_checkpoint(path, destination, format_name, weight_type, on_tensor, force)
    click.echo(f"wrote {destination}", err=True)
