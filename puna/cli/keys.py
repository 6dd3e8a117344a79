"""``puna keys``: who may use the server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from puna.cli.options import json_option

if TYPE_CHECKING:
    from puna.server.keys import KeyFile

_limit = click.IntRange(1)


@click.group()
def keys() -> None:
    """Make, list and remove the keys that clients of ``puna serve`` send.

    A running server follows every change at once. Once there is a key, every request needs one.
    """


@keys.command()
@click.argument("name")
@click.option("--scope", type=click.Choice(["inference", "admin"]), default="inference", show_default=True)
@click.option("--requests-per-minute", type=_limit, help="Requests to models.")
@click.option("--tokens-per-minute", type=_limit, help="Tokens of prompts and answers together.")
@click.option("--max-tokens", type=_limit, help="Tokens of one answer.")
def add(
    name: str,
    scope: str,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    max_tokens: int | None,
) -> None:
    """Make a key and print it: the only time that it can be seen.

    inference: use the models. admin: also pull, create, copy and delete them, and see everybody's files.
    """
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_tokens": max_tokens,
    }
    secret = _file().add(name, "admin" if scope == "admin" else "inference", **limits)
    click.echo(f"The key {name} ({scope}). Keep it now, only its hash is stored:", err=True)
    click.echo(secret)


@keys.command("list")
@json_option
def list_keys(as_json: bool) -> None:
    """List the keys and their limits."""
    from puna.cli.list import print_table
    from puna.server.keys import describe

    rows = [describe(key) for key in _file().read()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        print_table(rows)
    else:
        click.echo("No keys. Try: puna keys add NAME", err=True)


@keys.command()
@click.argument("name")
def rm(name: str) -> None:
    """Remove a key; requests with it are refused from now on."""
    _file().remove(name)


def _file() -> KeyFile:
    from puna.server.keys import KeyFile
    from puna.store import Store

    return KeyFile(Store())
