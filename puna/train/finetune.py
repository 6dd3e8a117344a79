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
from hashlib import blake2b
from pathlib import Path

import psutil
import torch

from puna.checkpoint import Checkpoint, open_checkpoint
from puna.checkpoint.json_file import read_json, write_json
from puna.errors import TrainingError
from puna.model.shapes import parameter_count
from puna.ops.torch_ops import TorchOps
from puna.store import Manifest, ModelName, ResolvedModel, Store, resolve
from puna.tensor import Adapter
from puna.train.assemble import Teacher, assemble, check_ranks, engine_bytes, find_teacher, other_models
from puna.train.continued import continued
from puna.train.estimate import Estimate, fitted
from puna.train.module import LlamaModule
from puna.train.parallel import ALONE, Ranks
from puna.train.plan import Plan, make_plan, needed_lengths
from puna.train.prepare import OnSource, PreparedData, prepare_data
from puna.train.quantized_base import QuantizedBase
from puna.train.recipe import Recipe, recipe_to_toml
from puna.train.result import check_name, register, save_result
from puna.train.runs import Evaluation, Run, RunFolder, RunInputs
from puna.train.runs.folder import check_same
from puna.train.runs.run import RECORD, STATES, Busy
from puna.train.student import student_of
from puna.train.trainer import StepReport, Trainer
from puna.train.training_state import best_state, read_into

PLAN = "plan.json"


@dataclass(frozen=True)
class Prepared:
    """A run that can begin or, with ``begun``, go on. ``restart``: what is there of an earlier one is deleted first.

    ``start`` is the adapter that is trained further, where the model has one.
    """

    recipe: Recipe
    found: ResolvedModel
    checkpoint: Checkpoint
    data: PreparedData
    plan: Plan
    estimate: Estimate
    folder: Path
    store: Store
    teacher: Teacher | None
    start: Adapter | None
    begun: Run | None
    restart: bool

    @property
    def left_out_documents(self) -> int:
        """How many documents are too long, where such are dropped."""
        dropped = self.plan.truncation == "drop"
        return int((needed_lengths(self.recipe, self.data) > self.plan.length).sum()) if dropped else 0

    @property
    def shows_answers(self) -> bool:
        """Whether held-out prompts are answered before and after, by an engine for which there is room."""
        estimate = self.estimate
        has_room = estimate.total + engine_bytes(self.recipe, self.checkpoint) <= estimate.available
        return self.recipe.rows == "documents" and self.plan.device == "cpu" and has_room

    @property
    def inputs(self) -> RunInputs:
        """What the run is made from, as its folder tells."""
        return RunInputs(
            name=self.recipe.output,
            model=self.recipe.model,
            model_digest=self._model_digest,
            objective=self.recipe.objective_name,
            method=self.recipe.method.type,
            seed=self.recipe.seed,
            steps=self.plan.steps,
            data=tuple(source.facts() for source in self.data.sources),
            device=self.plan.device,
        )

    @property
    def _model_digest(self) -> str:
        """Of the weights, and of the adapter that is trained further."""
        if self.start is None:
            return self.found.identity
        return blake2b(f"{self.found.identity} {self.start.digest}".encode(), digest_size=32).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What was made, where, and what held-out rows measured, ``loss`` or ``reward``; None where no row was held out.

    A reward model is no model that answers, so it is not in the store and has no ``manifest``: it stays at ``path``.
    """

    manifest: Manifest | None
    path: Path
    steps: int
    before: float | None
    after: float | None
    measure: str


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
    ranks: Ranks = ALONE,
) -> Prepared:
    """Check everything and read all data, but no weights; nothing is written.

    ``restart``: as if there were no run yet. ``force``: also where memory seems too small. All ``ranks`` do what the
    first has planned. Raises PunaErrors: of the model, the data, the recipe; TrainingError when the folder holds the
    run of another recipe or other data.
    """
    store = store or Store()
    check_ranks(recipe, ranks)
    folder = run_folder(recipe, store)
    check_name(recipe, folder, store)
    found = resolve(recipe.model, store)
    checkpoint = open_checkpoint(found.path)
    recipe, start = continued(recipe, found, checkpoint.config)
    if recipe.method.layers is not None:
        checkpoint = student_of(checkpoint, recipe.method.layers)
    teacher = find_teacher(recipe, checkpoint.config, store)
    begun = Run.read(folder) if (folder / RECORD).exists() else None
    if begun is not None and begun.busy:
        raise Busy(f"another process trains in {folder} now; wait for it, or choose another --out")
    goes_on = begun is not None and not restart
    plan = _kept_plan(folder) if goes_on else None
    variables = {"date_string": f"{datetime.now():%d %b %Y}"} if plan is None else plan.variables
    variables = ranks.tell(variables)
    data = prepare_data(recipe, found, variables, on_source)
    if plan is None:
        plan = make_plan(recipe, checkpoint.config, data, variables)
    others = other_models(recipe, checkpoint, plan, teacher)
    plan, estimate = ranks.tell(fitted(recipe, checkpoint, plan, force, ranks.count, others))
    plan.settings(recipe)
    prepared = Prepared(
        recipe,
        found,
        checkpoint,
        data,
        plan,
        estimate,
        folder,
        store,
        teacher,
        start,
        begun if goes_on else None,
        restart,
    )
    if prepared.begun is not None:
        check_same(prepared.begun, recipe_to_toml(recipe), prepared.inputs)
    ranks.wait()  # before the first begins to write
    return prepared


def run(
    prepared: Prepared,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_stage: Callable[[str], None] = lambda stage: None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Train to the end, save, and store under the recipe's name what answers. ``on_stage`` hears what is begun.

    Of several ``ranks`` the first has the run's folder and the store to itself. Raises TrainingError, CheckpointError,
    StoreError; the run can be gone on with after any of them, or a kill.
    """
    if not ranks.first:
        ranks.wait()
        return _run(prepared, None, on_step, on_stage, ranks)
    with _open_folder(prepared) as folder:
        ranks.wait()
        return _run(prepared, folder, on_step, on_stage, ranks)


def _run(
    prepared: Prepared,
    folder: RunFolder | None,
    on_step: Callable[[StepReport], None],
    on_stage: Callable[[str], None],
    ranks: Ranks,
) -> Outcome:
    recipe, plan, data = prepared.recipe, prepared.plan, prepared.data
    on_stage("loading the model")
    module = make_module(prepared, ranks)
    shows = prepared.shows_answers and ranks.count == 1
    work = assemble(recipe, plan, data, module, prepared.teacher, prepared.folder, shows_answers=shows, ranks=ranks)
    states = prepared.folder / STATES
    settings = plan.settings(recipe)
    trainer = Trainer(module, work.objective, work.stream, settings, states, work.validation, ranks, work.reward)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    before = ranks.tell(folder.record.before if folder else None)
    if data.held_out_rows and before is None:
        on_stage("measuring on held-out rows before")
        before = work.evaluate()
    if folder:
        parameters = parameter_count(prepared.checkpoint.config)
        folder.note(parameters=parameters, trained_parameters=trained, before=before)

    def log(report: StepReport) -> None:
        if folder:
            folder.log(_numbers(report))
        on_step(report)

    on_stage("training")
    trainer.run(log)
    if recipe.training.keep_best:
        _take_best(module, states)
    after = None
    if data.held_out_rows:
        on_stage("measuring on held-out rows after")
        after = work.evaluate()
    on_stage("saving")
    path = save_result(recipe, prepared.found, prepared.checkpoint, module, prepared.folder, ranks)
    manifest = None
    if folder:
        if not recipe.makes_reward_model:
            manifest = register(recipe, prepared.found, path, prepared.store)
        folder.finish(str(manifest.model_name) if manifest else str(path), after)
    manifest = ranks.tell(manifest)
    return Outcome(
        manifest, path, trainer.step, _value(before, recipe.measure), _value(after, recipe.measure), recipe.measure
    )


def make_module(prepared: Prepared, ranks: Ranks = ALONE) -> LlamaModule:
    """The model as the recipe trains it. Raises TrainingError."""
    recipe, plan = prepared.recipe, prepared.plan
    module = LlamaModule(
        TorchOps(getattr(torch, plan.dtype), plan.device),
        prepared.checkpoint.config,
        QuantizedBase(prepared.checkpoint.tensors, recipe.method),
        recipe.method.trained(),
        recompute=plan.recompute,
        seed=recipe.seed,
        ranks=ranks,
    )
    if prepared.start is not None:
        module.load_adapter(prepared.start)
    return module


def _open_folder(prepared: Prepared) -> RunFolder:
    text, folder = recipe_to_toml(prepared.recipe), prepared.folder
    if prepared.begun is not None:
        opened = RunFolder.resume(text, prepared.inputs, folder)
    else:
        if prepared.restart:
            shutil.rmtree(folder, ignore_errors=True)
        opened = RunFolder.start(text, prepared.inputs, folder)
    if not (folder / PLAN).exists():
        write_json(folder / PLAN, dataclasses.asdict(prepared.plan))
    return opened


def _kept_plan(folder: Path) -> Plan | None:
    """What was chosen when the run began; None where it was cut off before that was written."""
    if not (folder / PLAN).exists():
        return None
    raw = read_json(folder / PLAN)
    if raw.keys() != {field.name for field in dataclasses.fields(Plan)}:
        raise TrainingError(f"{folder / PLAN} is damaged, or of another version of Puna; begin anew with --restart")
    return Plan(**raw)


def _numbers(report: StepReport) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {
        "step": report.step,
        "loss": report.loss,
        "validation_loss": report.validation_loss,
        "validation_reward": report.validation_reward,
        "learning_rate": report.learning_rate,
        "gradient_norm": report.gradient_norm,
        "seconds": report.seconds,
        "memory_bytes": psutil.Process().memory_info().rss,
    }
    return {**numbers, **report.metrics}


def _value(evaluation: Evaluation | None, name: str) -> float | None:
    return None if evaluation is None else evaluation.numbers[name]


def _take_best(module: LlamaModule, states: Path) -> None:
    best = best_state(states)
    if best is not None:
        read_into(best.tensors, {n: p.detach() for n, p in module.named_parameters() if p.requires_grad})
