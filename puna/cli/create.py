"""``puna create``: a model of one's own from a Modelfile."""

from __future__ import annotations

from pathlib import Path

import click

from puna.cli.options import threads_option
from puna.cli.progress import TerminalProgress, human_bytes


@click.command("create")
@click.argument("name")
@click.option(
    "-f", "--file", "path", type=click.Path(path_type=Path), default=Path("Modelfile"), help="Default: ./Modelfile."
)
@click.option("-q", "--quantize", metavar="TYPE", help="Quantize a base of 16 or 32 bits: Q4_K_M, Q8_0, …")
@threads_option
def create_model(name: str, path: Path, quantize: str | None, threads: int | None) -> None:
    """Store a model as NAME, made as a Modelfile says from a stored model, a .gguf file or a folder."""
    from puna.llm.create import create_from_modelfile, read_modelfile
    from puna.store import Store

    modelfile = read_modelfile(path)
    quantizing = None
    if quantize:
        from puna.quantize import quantizer

        quantizing = quantizer(quantize, threads)
    with TerminalProgress() as progress:
        manifest = create_from_modelfile(Store(), name, modelfile, path.absolute().parent, progress, quantizing)
    click.echo(
        f"{manifest.model_name} is ready: {human_bytes(manifest.size)}. Try: puna run {manifest.model_name}", err=True
    )
