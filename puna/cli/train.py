"""``puna train``: a training with every knob, from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puna.cli.training import run_options, run_recipe

if TYPE_CHECKING:
    from puna.train.recipe import Recipe


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@run_options
def train(recipe: Path, **options: Any) -> None:
    """Train as the TOML file RECIPE says (docs/fine-tuning.md), and store the model under its output's name.

    The same command goes on where an earlier one was cut off.
    """

    def read() -> Recipe:
        from puna.train.recipe import read_recipe

        return read_recipe(recipe)

    run_recipe(read, **options)
