"""``puna pull``: fetch a model into the store."""

from __future__ import annotations

import click

from puna.cli.progress import TerminalProgress, human_bytes


@click.command()
@click.argument("model")
@click.option("--token", envvar="HF_TOKEN", help="Hugging Face access token for gated models (or HF_TOKEN).")
def pull(model: str, token: str | None) -> None:
    """Fetch MODEL: a catalog name (smollm2, llama-3.2-1b-instruct), hf.co/OWNER/REPO, or an address of a .gguf file.

    An interrupted download goes on where it stopped; every file's checksum is verified where its source states one.
    """
    from puna.store import pull as pull_model

    with TerminalProgress() as progress:
        manifest = pull_model(model, progress=progress, token=token)
    click.echo(f"{manifest.model_name} is ready: {human_bytes(manifest.size)}. Try: puna run {model}", err=True)
