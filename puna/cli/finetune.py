"""``puna finetune``: a model of one's own from rows of one's own, with settings chosen for both."""

from __future__ import annotations

from typing import Any

import click

from puna.cli.options import row_options
from puna.cli.training import run_options, run_recipe


@click.command()
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.option("--out", required=True, metavar="NAME", help="What the trained model is called in the store.")
@click.option(
    "--objective", default="sft", show_default=True, help="What is learnt: sft, pretrain, dpo, … (docs/fine-tuning.md)."
)
@click.option("--teacher", metavar="MODEL", help="The model that is learnt from, for --objective distill.")
@click.option(
    "--reward", metavar="NAME", help="What judges sampled answers, for --objective grpo: exact, number, json."
)
@click.option(
    "--method",
    type=click.Choice(["lora", "qlora", "full"]),
    default="lora",
    show_default=True,
    help="What is trained: low-rank changes, the same over weights kept in 4 bits, or every weight.",
)
@click.option("--rank", type=click.IntRange(1), help="LoRA's rank (default: 16).")
@click.option("--merge", is_flag=True, help="Make a whole model of it, not an adapter beside the one it began with.")
@click.option("--epochs", type=float, help="How often the data is read.")
@click.option("--steps", type=click.IntRange(1), help="Steps, instead of --epochs.")
@click.option("--learning-rate", type=float, help="The highest rate; it rises at the beginning and falls to the end.")
@click.option("--length", type=click.IntRange(8), help="Tokens of one sequence.")
@click.option(
    "--validation", type=click.FloatRange(0, 1), metavar="SHARE", help="Rows to hold out (default: up to 0.1)."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order, the start and the dropout.")
@row_options
@run_options
def finetune(
    model: str,
    data: tuple[str, ...],
    out: str,
    objective: str,
    teacher: str | None,
    reward: str | None,
    method: str,
    rank: int | None,
    merge: bool,
    epochs: float | None,
    steps: int | None,
    learning_rate: float | None,
    length: int | None,
    validation: float | None,
    seed: int,
    form: str | None,
    columns: dict[str, str],
    train_on: str,
    skip_bad: int,
    **options: Any,
) -> None:
    """Train MODEL (a stored model, .gguf file or checkpoint folder) on the rows of DATA, and store it as NAME.

    What is not said is chosen for the model and the data. The same command goes on where an earlier one was cut off.
    `puna train` takes every knob there is from a recipe.
    """
    source = {"format": form, "columns": columns, "validation": validation, "skip_bad": skip_bad}
    if objective not in ("pretrain", "grpo"):  # of which nobody can choose what is learnt
        source["train_on"] = train_on
    training = {"epochs": epochs, "steps": steps, "learning_rate": learning_rate, "length": length}
    raw = {
        "model": model,
        "output": out,
        "data": [{"path": path, **_given(source)} for path in data],
        "objective": _given({"type": objective, "teacher": teacher, "reward": reward}),
        "method": _given({"type": method, "rank": rank}),
        "training": _given(training),
        "save": {"merge": merge},
        "seed": seed,
    }
    run_recipe(lambda: _recipe(raw), **options)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _recipe(raw: dict[str, Any]) -> Any:
    from pathlib import Path

    from puna.train.recipe import recipe_from

    return recipe_from(raw, Path.cwd())
