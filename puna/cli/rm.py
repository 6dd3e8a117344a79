"""``puna rm``: remove models from the store."""

from __future__ import annotations

import click

from puna.cli.progress import human_bytes


@click.command()
@click.argument("models", nargs=-1, required=True)
def rm(models: tuple[str, ...]) -> None:
    """Remove MODELS and every file that no other model needs."""
    from puna.store import Store

    store = Store()
    for model in models:
        freed = store.remove(model)
        click.echo(f"removed {model}, {human_bytes(freed)} freed")
