"""``puna stop``: unload a model from a server."""

from __future__ import annotations

import click

from puna.cli.options import host_option


@click.command()
@click.argument("model")
@host_option
def stop(model: str, host: str | None) -> None:
    """Have a running server drop MODEL from memory, as soon as nobody uses it."""
    from puna.cli.remote import Remote, server_url

    Remote(server_url(host, "PUNA_HOST", "OLLAMA_HOST")).unload(model)
