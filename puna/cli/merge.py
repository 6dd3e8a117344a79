"""``puna merge``: one model of a model and its LoRA adapter."""

from __future__ import annotations

from pathlib import Path

import click

from puna.cli.fidelity import Deriving, deriving_options


@click.command()
@click.argument("base")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--type", "type_name", metavar="TYPE", help="F16, BF16, F32, Q8_0, Q4_K_M, …, or INT8, INT4, GPTQ, AWQ, …"
)
@click.option(
    "--calibrate", type=click.Path(path_type=Path), metavar="TEXT", help="Quantize by what the merged model reads here."
)
@deriving_options(report=True)
def merge(
    base: str, adapter: Path, destination: Path, type_name: str | None, calibrate: Path | None, deriving: Deriving
) -> None:
    """Merge ADAPTER into BASE, and write DESTINATION.

    ADAPTER is a folder that PEFT saved, a GGUF LoRA, or the name of one that BASE has in the store.
    A destination ending in .gguf is GGUF, any other a folder. Without --type the changed matrices keep their type, or
    become F16 where that is quantized. The report compares with BASE and the adapter unmerged.
    """
    from puna.checkpoint.lora import read_mergeable_adapter
    from puna.quantize import Source, merge_adapter
    from puna.store import resolve

    source = Source.open(base)
    changes = read_mergeable_adapter(resolve(base).adapter_path(adapter), source.checkpoint.config)
    with deriving.watched(base, destination, changes, f"{base} with {adapter.name}") as (progress, review):
        merge_adapter(
            source,
            changes,
            destination,
            type_name,
            calibrate=calibrate,
            overwrite=deriving.force,
            threads=deriving.threads,
            progress=progress,
            check=review,
        )
    click.echo(f"wrote {destination}", err=True)
    deriving.keep(review, destination)
