"""A run's folder, for the process that trains: it begins or goes on, logs steps, and ends finished or failed.

    with RunFolder.start(recipe_text, inputs) as run:
        trainer = Trainer(..., folder=run.states)
        trainer.run(lambda report: run.log({"step": report.step, "loss": report.loss}))
        run.finish(result="support-bot", after=evaluation)

An exception inside fails the run with its sentence. What is interrupted or killed, or has failed, can be resumed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from puna.checkpoint.atomic import atomic_folder, atomic_path
from puna.checkpoint.json_file import write_json
from puna.errors import PunaError, TrainingError
from puna.store.store import default_home
from puna.train.runs.differences import differing, recipe_values
from puna.train.runs.environment import now, this_start
from puna.train.runs.metrics import Row, append_metrics, cut_metrics
from puna.train.runs.record import DataFacts, Evaluation, RunInputs, RunRecord
from puna.train.runs.report import run_page
from puna.train.runs.run import EVENTS, METRICS, RECIPE, RECORD, REPORT, STATES, Run, lock
from puna.train.runs.tensorboard import append_event, begin_events


def runs_home() -> Path:
    """Where run folders lie that were given no other place: ``runs`` in Puna's data folder."""
    return default_home() / "runs"


class RunFolder:
    """Made by ``start`` or ``resume``. One process has it at a time."""

    def __init__(self, folder: Path) -> None:
        """Take the folder of a run. Raises TrainingError when there is none, or another process trains there."""
        Run.read(folder)
        self._open = ExitStack()
        self._open.enter_context(lock(folder))
        self.folder, self.record = folder, Run.read(folder).record
        self._last_step: int | None = None
        self._events: Path | None = None

    @classmethod
    def start(cls, recipe: str, inputs: RunInputs, folder: Path | None = None) -> RunFolder:
        """A new run, in ``folder``, which is made or empty, or else in ``runs_home()/NAME-TIMESTAMP``.

        Raises TrainingError when the folder holds another run or anything else, or ``recipe`` is not TOML; and
        CheckpointError when the disk refuses.
        """
        recipe_values(recipe, "the recipe")
        folder = _new_folder(inputs.name) if folder is None else folder.expanduser().absolute()
        if (folder / RECORD).exists():
            raise TrainingError(f"{folder} holds a training run already; resume that, or choose another folder")
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise TrainingError(f"{folder} is there already and holds no training run; choose another folder")
        with atomic_folder(folder) as fresh:
            (fresh / RECIPE).write_text(recipe, encoding="utf-8", newline="\n")
            write_json(fresh / RECORD, RunRecord(inputs, (this_start(),)).as_json())
        return cls(folder)

    @classmethod
    def resume(cls, recipe: str, inputs: RunInputs, folder: Path) -> RunFolder:
        """Go on with a run that did not finish; what is known of it stays.

        Raises TrainingError when the recipe, the model or the data are not those it began with, when it has finished,
        or when another process trains there.
        """
        run = cls(folder.expanduser().absolute())
        try:
            check_same(Run.read(run.folder), recipe, inputs)
            starts = (*run.record.starts, this_start())
            run._save(replace(run.record, starts=starts, status="running", error=None, ended=None))
        except BaseException:
            run.close()
            raise
        return run

    @property
    def name(self) -> str:
        """What ``puna runs`` calls it."""
        return self.folder.name

    @property
    def states(self) -> Path:
        """The folder for the trainer's states."""
        return self.folder / STATES

    def log(self, numbers: Mapping[str, float | None]) -> None:
        """Keep the numbers of one step, ``step`` among them; metrics.py has the names. None is left out.

        Call it once a step, after the step and before its state is saved. The first call after ``resume`` cuts what the
        earlier process logged from that step on, so that the curve has every step once. Raises ValueError when ``step``
        is not above the last one's, and TrainingError or CheckpointError when the disk refuses.
        """
        step = numbers["step"]
        if not isinstance(step, int) or step < 0 or (self._last_step is not None and step <= self._last_step):
            raise ValueError(f"step {step} cannot follow step {self._last_step}")
        known = {name: value for name, value in numbers.items() if value is not None}
        row: Row = {name: value if isinstance(value, int) else float(value) for name, value in known.items()}
        row["time"] = round(time.time(), 3)
        metrics = self.folder / METRICS
        if self._events is None:
            cut_metrics(metrics, step)
            self._events = begin_events(self.folder / EVENTS, step)
        append_metrics(metrics, row)
        append_event(self._events, row)
        self._last_step = step

    def note(
        self,
        *,
        data: Sequence[DataFacts] | None = None,
        parameters: int | None = None,
        trained_parameters: int | None = None,
        before: Evaluation | None = None,
    ) -> None:
        """Keep what became known: the data with its tokens counted, the model's numbers, its evaluation untrained."""
        known: dict[str, Any] = {
            "parameters": parameters,
            "trained_parameters": trained_parameters,
            "before": before,
            "inputs": None if data is None else replace(self.record.inputs, data=tuple(data)),
        }
        self._save(replace(self.record, **{name: value for name, value in known.items() if value is not None}))

    def finish(self, result: str, after: Evaluation | None = None) -> None:
        """The run is done: ``result`` is the name or path of what it made. Writes the report, after letting go."""
        self._save(replace(self.record, status="finished", result=result, after=after, ended=now()))
        self.close()
        self._write_report()

    def fail(self, error: str) -> None:
        """The run cannot go on: ``error`` is the sentence that the user saw. It may be resumed."""
        self._save(replace(self.record, status="failed", error=error, ended=now()))
        self.close()
        with suppress(PunaError):  # the error at hand says more
            self._write_report()

    def close(self) -> None:
        """Let go of the folder. A run that neither finished nor failed is then an interrupted one."""
        self._open.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """An exception fails the run; Ctrl-C only interrupts it."""
        if isinstance(error, Exception) and self.record.status == "running":
            self.fail(str(error) if isinstance(error, PunaError) else f"{type(error).__name__}: {error}")
        self.close()

    def _write_report(self) -> None:
        with atomic_path(self.folder / REPORT) as temporary:
            temporary.write_text(run_page(Run.read(self.folder)), encoding="utf-8")

    def _save(self, record: RunRecord) -> None:
        with atomic_path(self.folder / RECORD) as temporary:
            write_json(temporary, record.as_json())
        self.record = record


def _new_folder(name: str) -> Path:
    """NAME-TIMESTAMP, and a number where that is taken."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "run"
    stem = f"{plain}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    folder, number = runs_home() / stem, 1
    while folder.exists():
        number += 1
        folder = runs_home() / f"{stem}-{number}"
    return folder


def check_same(run: Run, recipe: str, inputs: RunInputs) -> None:
    """Raises TrainingError that names the first difference, or says that there is nothing to resume."""
    if run.record.status == "finished":
        raise TrainingError(f"the run in {run.folder} has finished already; choose another folder for a new one")
    for key, (was, now_) in differing([run.recipe_values(), recipe_values(recipe, "the recipe")]).items():
        raise TrainingError(
            f"{run.folder} cannot be resumed: {key} was {_shown(was)} and is {_shown(now_)} in this recipe; "
            "resume with the recipe that is kept there, or choose another folder"
        )
    for what, (was, now_) in differing([_digests(run.record.inputs), _digests(inputs)]).items():
        raise TrainingError(
            f"{run.folder} cannot be resumed: {what} changed since it began (digest {was!s:.16}, now "
            f"{now_!s:.16}); restore that, or choose another folder"
        )


def _digests(inputs: RunInputs) -> dict[str, str]:
    rows = {f"data set {number} ({data.name})": data.digest for number, data in enumerate(inputs.data, start=1)}
    return {f"the model {inputs.model}": inputs.model_digest, **rows}


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
