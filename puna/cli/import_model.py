"""``puna import``: take a file that lies here into the store."""

from __future__ import annotations

from pathlib import Path

import click

from puna.cli.progress import TerminalProgress, human_bytes


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="Name in the store (default: the file's).")
@click.option("--copy", is_flag=True, help="Copy instead of linking in place.")
@click.option("--force", is_flag=True, help="Replace the model of that name.")
def import_model(path: Path, name: str | None, copy: bool, force: bool) -> None:
    """Store the .gguf file or checkpoint folder at PATH; on the same disk it is linked, not copied.

    The report that `puna quantize` wrote beside it is stored with it.
    """
    from puna.checkpoint import open_checkpoint
    from puna.evaluate.store import load_report
    from puna.store import import_file, resolve

    checkpoint = open_checkpoint(path)  # a file that can't be read as a model is refused before it is stored
    report = load_report(resolve(path), checkpoint)
    facts = report.as_json() if report else None
    with TerminalProgress() as progress:
        manifest = import_file(path, name, progress=progress, copy=copy, replace=force, report=facts)
    click.echo(
        f"{manifest.model_name} is ready: {human_bytes(manifest.size)}. Try: puna run {manifest.model_name}", err=True
    )
