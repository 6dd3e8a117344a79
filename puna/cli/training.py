"""What ``puna finetune`` and ``puna train`` share: the preview, the question, the live line, the result."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from puna.cli.options import json_option, threads_option
from puna.cli.preview import example_preview, print_example
from puna.cli.progress import human_bytes
from puna.errors import TrainingError

if TYPE_CHECKING:
    from rich.console import Console

    from puna.train.finetune import Outcome, Prepared
    from puna.train.recipe import Recipe
    from puna.train.trainer import StepReport

_EXAMPLES = 2


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of how a training is run, which change nothing of what it makes."""
    for option in (
        json_option,
        threads_option,
        click.option("-y", "--yes", is_flag=True, help="Don't ask before it begins."),
        click.option("--force", is_flag=True, help="Begin even where memory seems too small."),
        click.option("--restart", is_flag=True, help="Delete the run of that name that was begun, and begin anew."),
        click.option("--dry-run", is_flag=True, help="Check everything, show what would be done, and write nothing."),
    ):
        function = option(function)
    return function


def run_recipe(
    read: Callable[[], Recipe],
    *,
    dry_run: bool,
    restart: bool,
    force: bool,
    yes: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Prepare, show, ask, train, and say what was made."""
    _check_torch()
    from rich.console import Console

    from puna.ops.threads import default_threads
    from puna.train.finetune import prepare, run
    from puna.train.parallel import launched

    recipe = read()
    console = Console(stderr=True, highlight=False)
    with launched(recipe.device) as ranks:
        ranks.compute_with(threads or max(1, default_threads() // ranks.count))
        # Only the first of several processes speaks, and none asks: their input is the launcher's.
        console.quiet = not ranks.first
        yes = yes or ranks.count > 1
        with console.status("reading the data"):
            prepared = prepare(recipe, restart=restart, force=force, ranks=ranks)
        if ranks.first and not as_json:
            _show(prepared, console)
        if dry_run:
            if as_json and ranks.first:
                click.echo(json.dumps(_facts(prepared), indent=2, ensure_ascii=False))
            return
        asks = not (yes or as_json) and console.is_terminal and sys.stdin is not None and sys.stdin.isatty()
        if asks and not click.confirm("Go on?" if prepared.begun else "Begin?", default=True, err=True):
            return
        try:
            with _LiveLine(prepared, console, quiet=as_json or not ranks.first) as line:
                outcome = run(prepared, line.on_step, line.on_stage, ranks)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from the last saved state")
            raise
        if not ranks.first:
            return
        if as_json:
            facts = {**_facts(prepared), "result": _result(outcome)}
            click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        else:
            _show_outcome(outcome, console)


def _check_torch() -> None:
    if find_spec("torch") is None:
        raise TrainingError("training needs torch, which is not installed; pip install 'puna[torch]'")


def _facts(prepared: Prepared) -> dict[str, Any]:
    from puna.train.recipe import recipe_to_toml

    data, estimate = prepared.data, prepared.estimate
    return {
        "model": prepared.recipe.model,
        "output": prepared.recipe.output,
        "folder": str(prepared.folder),
        "resumed": prepared.begun is not None,
        "recipe": recipe_to_toml(prepared.recipe),
        "plan": asdict(prepared.plan),
        "data": {
            "rows": data.train_rows,
            "held_out_rows": data.held_out_rows,
            "bad_rows": data.bad_rows,
            "tokens": int(data.lengths.sum()),
            "trained_tokens": int(data.trained.sum()),
            "left_out_documents": prepared.left_out_documents,
            "digest": data.digest,
        },
        "estimate": {**asdict(estimate), "total": estimate.total},
        "preview": _previews(prepared),
    }


def _result(outcome: Outcome) -> dict[str, Any]:
    return {
        "model": str(outcome.manifest.model_name) if outcome.manifest else None,
        "path": str(outcome.path),
        "steps": outcome.steps,
        f"held_out_{outcome.measure}_before": outcome.before,
        f"held_out_{outcome.measure}_after": outcome.after,
    }


def _previews(prepared: Prepared) -> list[dict[str, Any]]:
    found = []
    for source in prepared.data.sources:
        numbers = source.train.numbers[: max(1, _EXAMPLES // len(prepared.data.sources))]
        found += [example_preview(source.renderer, source.dataset, int(number)) for number in numbers]
    return found[:_EXAMPLES]


def _show(prepared: Prepared, console: Console) -> None:
    from puna.train.recipe import RANK

    recipe, plan, data, estimate = prepared.recipe, prepared.plan, prepared.data, prepared.estimate
    samples = recipe.rows == "prompts"
    learnt = "expected" if samples else "learnt"
    for example in _previews(prepared):
        print_example(console, example, learnt)
    tokens, trained = int(data.lengths.sum()), int(data.trained.sum())
    held_out = f", {data.held_out_rows:,} of them held out" if data.held_out_rows else ", none of them held out"
    lines = [
        "",
        f"data      {data.train_rows + data.held_out_rows:,} rows{held_out}; {tokens:,} tokens, of which "
        f"{100 * trained / max(tokens, 1):.0f}% are {learnt}",
    ]
    if data.bad_rows:
        lines.append(f"          {len(data.bad_rows):,} bad rows are left out: {'; '.join(data.bad_rows[:3])}")
    if prepared.left_out_documents:
        lines.append(
            f"          {prepared.left_out_documents:,} documents are longer than {plan.length:,} tokens and left out "
            "(--length)"
        )
    kind = {"lora": "LoRA", "qlora": "QLoRA"}.get(recipe.method.type)
    what = f"{kind} of rank {recipe.method.rank or RANK}" if kind else "every weight"
    if prepared.start is not None:
        what += ", on from the model's adapter"
    lines += [
        f"training  {recipe.objective_name}, {what}: {estimate.trained_parameters:,} numbers, in {plan.dtype} on "
        f"{plan.device}",
        f"          {plan.steps:,} steps of about {plan.step_tokens:,} tokens ({plan.epochs:g} epochs), sequences of "
        f"at most {plan.length:,}, learning rate {plan.learning_rate:g}",
        f"cost      about {human_bytes(estimate.total)} of memory ({human_bytes(estimate.available)} are free), "
        f"about {_duration(estimate.seconds)}" + (", and what sampling the answers takes" if samples else ""),
        f"folder    {prepared.folder}" + (", where a run goes on" if prepared.begun else ""),
        "",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _show_outcome(outcome: Outcome, console: Console) -> None:
    if outcome.before is not None and outcome.after is not None:
        console.print(f"held-out {outcome.measure}: {outcome.before:.4f} before, {outcome.after:.4f} after")
    if outcome.manifest is None:
        console.print(
            f"the reward model lies in {outcome.path}, as transformers loads it", markup=False, soft_wrap=True
        )
        return
    name = str(outcome.manifest.model_name).removesuffix(":latest")
    console.print(f"{name} is ready. Try: puna run {name}", markup=False)


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"


class _LiveLine:
    """The loss and the time that remains: one line that changes, or on no terminal a line for each evaluation."""

    def __init__(self, prepared: Prepared, console: Console, *, quiet: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console, self._quiet, self._steps = console, quiet, prepared.plan.steps
        self._held_out = ""
        self._live = not quiet and console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=self._steps)

    def __enter__(self) -> _LiveLine:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_stage(self, stage: str) -> None:
        """What is begun now."""
        if self._live:
            self._bar.update(self._task, description=stage)
        elif not self._quiet:
            self._console.print(stage)

    def on_step(self, report: StepReport) -> None:
        """What a step found."""
        speed = report.count / max(report.seconds, 1e-9)
        measured = report.validation_loss if report.validation_reward is None else report.validation_reward
        if measured is not None:
            self._held_out = f", held-out {measured:.4f}"
        reward = f"  reward {report.metrics['reward']:.4f}" if "reward" in report.metrics else ""
        loss_held_out, reward_held_out = ("", self._held_out) if reward else (self._held_out, "")
        found = f"step {report.step}/{self._steps}  loss {report.loss:.4f}{loss_held_out}{reward}{reward_held_out}"
        text = f"{found}  {speed:,.0f} learnt a second"
        if self._live:
            self._bar.update(self._task, completed=report.step, description=text)
        elif not self._quiet and (report.step in (1, self._steps) or measured is not None):
            self._console.print(text, soft_wrap=True)
