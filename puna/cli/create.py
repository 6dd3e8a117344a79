"""``puna create``: a model of one's own from a Modelfile."""

from __future__ import annotations

from pathlib import Path

import click

from puna.cli.progress import TerminalProgress, human_bytes


@click.command("create")
@click.argument("name")
@click.option(
    "-f", "--file", "path", type=click.Path(path_type=Path), default=Path("Modelfile"), help="Default: ./Modelfile."
)
@click.option("-q", "--quantize", help="Not in this version.")
def create_model(name: str, path: Path, quantize: str | None) -> None:
    """Store a model as NAME, made as a Modelfile says from a stored model, a .gguf file or a folder."""
    from puna.llm.create import create_from_modelfile, read_modelfile
    from puna.store import Store

    if quantize:
        raise click.UsageError(f"--quantize {quantize}: this version does not quantize; begin FROM quantized weights")
    modelfile = read_modelfile(path)
    with TerminalProgress() as progress:
        manifest = create_from_modelfile(Store(), name, modelfile, path.absolute().parent, progress)
    click.echo(
        f"{manifest.model_name} is ready: {human_bytes(manifest.size)}. Try: puna run {manifest.model_name}", err=True
    )
