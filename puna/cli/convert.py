"""``puna convert``: from any weights format to any other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from puna.cli.fidelity import Deriving, deriving_options

if TYPE_CHECKING:
    from puna.store import ResolvedModel


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
    "--adapter",
    type=click.Path(path_type=Path),
    help="Convert this LoRA of SOURCE instead: its name in the store, or a folder or file.",
)
@deriving_options(report=False)
def convert(
    source: str,
    destination: Path,
    format_name: str | None,
    weight_type: str | None,
    adapter: Path | None,
    deriving: Deriving,
) -> None:
    """Convert SOURCE (a stored model, .gguf file or checkpoint folder) to DESTINATION.

    A destination ending in .gguf becomes GGUF, any other a safetensors folder; --format meta writes Meta's layout.
    An adapter becomes a GGUF LoRA or a folder as PEFT saves it, by the destination's name.
    """
    from puna.checkpoint.convert import convert as convert_checkpoint
    from puna.store import resolve

    found = resolve(source)
    if adapter is not None:
        if format_name or weight_type or deriving.report or deriving.html or deriving.max_drift is not None:
            raise click.UsageError("--adapter goes with no --format, --type or report: its numbers stay as they are")
        _convert_adapter(found, source, adapter, destination, deriving.force)
        return
    with deriving.watched(source, destination) as (progress, review):
        convert_checkpoint(found.path, destination, format_name, weight_type, progress, deriving.force, check=review)
    click.echo(f"wrote {destination}", err=True)
    deriving.keep(review, destination)


def _convert_adapter(base: ResolvedModel, base_name: str, adapter: Path, destination: Path, overwrite: bool) -> None:
    from puna.checkpoint import open_checkpoint
    from puna.checkpoint.convert import check_destination, put
    from puna.checkpoint.lora import read_mergeable_adapter
    from puna.checkpoint.lora_writer import write_gguf_adapter, write_peft

    source, config = base.adapter_path(adapter), open_checkpoint(base.path).config
    changes = read_mergeable_adapter(source, config)
    check_destination(source, destination, overwrite)

    def write(path: Path) -> None:
        if destination.suffix == ".gguf":
            write_gguf_adapter(path, changes, config)
        else:
            write_peft(path, changes, config, base_model=base_name, magnitudes=changes.magnitudes)

    put(destination, write)
    click.echo(f"wrote {destination}", err=True)
