"""``puna convert``: from any weights format to any other."""

from __future__ import annotations

from pathlib import Path

import click

from puna.cli.fidelity import Deriving, deriving_options


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
@deriving_options(report=False)
def convert(
    source: str, destination: Path, format_name: str | None, weight_type: str | None, deriving: Deriving
) -> None:
    """Convert SOURCE (a stored model, .gguf file or checkpoint folder) to DESTINATION.

    A destination ending in .gguf becomes GGUF, any other a safetensors folder; --format meta writes Meta's layout.
    """
    from puna.checkpoint.convert import convert as convert_checkpoint
    from puna.store import resolve

    path = resolve(source).path
    with deriving.watched(source, destination) as (progress, review):
        convert_checkpoint(path, destination, format_name, weight_type, progress, deriving.force, check=review)
    click.echo(f"wrote {destination}", err=True)
    deriving.keep(review, destination)
