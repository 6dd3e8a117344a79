"""``puna cp``: a second name for a stored model."""

from __future__ import annotations

import click


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--force", is_flag=True, help="Replace TARGET if it exists.")
def cp(source: str, target: str, force: bool) -> None:
    """Give the stored model SOURCE the second name TARGET; no bytes are copied."""
    from puna.store import Store

    manifest = Store().copy(source, target, replace=force)
    click.echo(f"copied {source} to {manifest.model_name}")
