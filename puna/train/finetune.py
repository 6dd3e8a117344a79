"""From a recipe to a stored model: the data, the module, the objective and the trainer, joined.

``prepare`` opens everything but the weights and says what a run will be; ``run`` trains, saves and stores. A run has a
folder, where the same recipe goes on after a kill.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from puna.checkpoint import Checkpoint, open_checkpoint
from puna.checkpoint.atomic import atomic_path
from puna.checkpoint.json_file import read_json, write_json
from puna.errors import StoreError, TrainingError
from puna.ops.torch_ops import TorchOps
from puna.store import Manifest, ModelName, ResolvedModel, Store, resolve
from puna.train.estimate import Estimate, fitted
from puna.train.module import LlamaModule
from puna.train.plan import Plan, make_plan
from puna.train.prepare import OnSource, PreparedData, prepare_data
from puna.train.quantized_base import QuantizedBase
from puna.train.recipe import Recipe, recipe_to_toml
from puna.train.result import check_name, register, save_result
from puna.train.trainer import StepReport, Trainer, evaluate
from puna.train.training_state import best_state

RECIPE, RUN, STATES = "recipe.toml", "run.json", "states"


@dataclass(frozen=True)
class Prepared:
    """A run that can begin or, with ``resumed``, go on. ``before``: the held-out loss at its beginning, if known."""

    recipe: Recipe
    found: ResolvedModel
    checkpoint: Checkpoint
    data: PreparedData
    plan: Plan
    estimate: Estimate
    folder: Path
    store: Store
    resumed: bool
    before: float | None = None

    @property
    def left_out_documents(self) -> int:
        """How many documents are too long, where such are dropped."""
        dropped = self.plan.truncation == "drop"
        return int((self.data.lengths > self.plan.length).sum()) if dropped else 0

    def facts(self) -> dict[str, Any]:
        """What must be as it was for the run to go on, and what was chosen when it began, for ``run.json``."""
        return {
            "base": self.found.identity,
            "data": self.data.digest,
            "plan": dataclasses.asdict(self.plan),
            "held_out_loss_before": self.before,
        }


@dataclass(frozen=True)
class Outcome:
    """What was made, where, and the held-out losses; None where no row was held out."""

    manifest: Manifest
    path: Path
    steps: int
    before: float | None
    after: float | None


def run_folder(recipe: Recipe, store: Store) -> Path:
    """Where a recipe's run is kept: one for each name."""
    name = ModelName.parse(recipe.output)
    return store.home / "runs" / f"{name.name.replace('/', '--')}-{name.tag}".removesuffix("-latest")


def prepare(
    recipe: Recipe,
    store: Store | None = None,
    *,
    restart: bool = False,
    force: bool = False,
    on_source: OnSource = lambda path: None,
) -> Prepared:
    """Check everything and read all data, but no weights; nothing is written.

    ``restart``: as if there were no run yet. ``force``: also where memory seems too small. Raises PunaErrors: of the
    model, the data, the recipe; TrainingError when the folder holds the run of another recipe or other data.
    """
    store = store or Store()
    folder = run_folder(recipe, store)
    check_name(recipe, folder, store)
    found = resolve(recipe.model, store)
    if found.adapters:
        raise StoreError(
            f"{recipe.model} is a model with an adapter; train the model that it belongs to, or a merged one"
        )
    checkpoint = open_checkpoint(found.path)
    begun = None if restart else _begun(folder, recipe)
    variables = begun["plan"]["variables"] if begun else {"date_string": datetime.now().strftime("%d %b %Y")}
    data = prepare_data(recipe, found, variables, on_source)
    if begun is None:
        plan = make_plan(recipe, checkpoint.config, data, variables)
    else:
        plan = _same_plan(begun, folder, found, data)
    plan, estimate = fitted(recipe, checkpoint, plan, force)
    plan.settings(recipe)
    before = begun["held_out_loss_before"] if begun else None
    return Prepared(recipe, found, checkpoint, data, plan, estimate, folder, store, begun is not None, before)


def run(
    prepared: Prepared,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Outcome:
    """Train to the end, save, and store under the recipe's name. ``on_stage`` hears what is begun.

    Raises TrainingError, CheckpointError, StoreError; the run can be gone on with after any of them, or a kill.
    """
    recipe, plan, data = prepared.recipe, prepared.plan, prepared.data
    if not prepared.resumed:
        _begin(prepared)
    on_stage("loading the model")
    module = make_module(prepared)
    objective = recipe.objective.objective(module)
    held_out = data.held_out(plan.length, plan.truncation, plan.answers)
    stream = data.stream(recipe.seed, plan.length, plan.truncation, plan.answers)
    trainer = Trainer(module, objective, stream, plan.settings(recipe), prepared.folder / STATES, held_out)
    before = prepared.before
    if held_out and before is None:
        on_stage("measuring the held-out loss before")
        before = evaluate(module, objective, held_out)
        _write_facts(dataclasses.replace(prepared, before=before))
    on_stage("training")
    trainer.run(on_step)
    if recipe.training.keep_best:
        _take_best(module, prepared.folder / STATES)
    on_stage("measuring the held-out loss after")
    after = evaluate(module, objective, held_out) if held_out else None
    on_stage("saving")
    path = save_result(recipe, prepared.found, prepared.checkpoint, module, prepared.folder)
    manifest = register(recipe, prepared.found, path, prepared.store)
    return Outcome(manifest, path, trainer.step, before, after)


def make_module(prepared: Prepared) -> LlamaModule:
    """The model as the recipe trains it. Raises TrainingError."""
    recipe, plan = prepared.recipe, prepared.plan
    return LlamaModule(
        TorchOps(getattr(torch, plan.dtype), plan.device),
        prepared.checkpoint.config,
        QuantizedBase(prepared.checkpoint.tensors, recipe.method),
        recipe.method.trained(),
        recompute=plan.recompute,
        seed=recipe.seed,
    )


def _begin(prepared: Prepared) -> None:
    shutil.rmtree(prepared.folder, ignore_errors=True)
    prepared.folder.mkdir(parents=True)
    _write_facts(prepared)
    # Last, for with it the run has begun.
    with atomic_path(prepared.folder / RECIPE) as temporary:
        temporary.write_text(recipe_to_toml(prepared.recipe), encoding="utf-8")


def _write_facts(prepared: Prepared) -> None:
    with atomic_path(prepared.folder / RUN) as temporary:
        write_json(temporary, prepared.facts())


def _begun(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The facts of the run in the folder; None where there is none. Raises TrainingError when it is another's."""
    if not (folder / RECIPE).exists():
        return None
    if (folder / RECIPE).read_text(encoding="utf-8") != recipe_to_toml(recipe):
        raise _another(folder, "recipe")
    return read_json(folder / RUN)


def _same_plan(begun: dict[str, Any], folder: Path, found: ResolvedModel, data: PreparedData) -> Plan:
    if begun["base"] != found.identity:
        raise _another(folder, "model")
    if begun["data"] != data.digest:
        raise _another(folder, "data")
    return Plan(**begun["plan"])


def _another(folder: Path, what: str) -> TrainingError:
    return TrainingError(
        f"{folder} holds a run that began with another {what}; go on with what it began with, choose another --out, "
        "or begin anew with --restart, which deletes that run"
    )


def _take_best(module: LlamaModule, states: Path) -> None:
    best = best_state(states)
    if best is None:
        return
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(best.tensors[name])
