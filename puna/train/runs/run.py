"""A run's folder, for those who look at it."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import TrainingError
from puna.store.lock import file_lock
from puna.train.runs.differences import recipe_values
from puna.train.runs.metrics import Row, read_metrics
from puna.train.runs.record import RunRecord

RECIPE, RECORD, METRICS, LOCK, REPORT = "recipe.toml", "run.json", "metrics.jsonl", "run.lock", "report.html"
EVENTS, STATES = "tensorboard", "states"
_MAX_BYTES = 10_000_000


class Busy(TrainingError):
    """A process trains in this folder now."""


def lock(folder: Path) -> AbstractContextManager[None]:
    """Holds a run's folder for this process. Raises Busy where another one has it."""

    def refuse() -> None:
        raise Busy(f"another process trains in {folder} now; wait for it, or choose another folder")

    return file_lock(folder / LOCK, refuse)


@dataclass(frozen=True)
class Run:
    """What a folder says of its run."""

    folder: Path
    record: RunRecord

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises TrainingError when the folder holds no run, or a damaged one."""
        path = folder / RECORD
        if not path.is_file():
            raise TrainingError(f"{folder} holds no training run (no {RECORD}); `puna runs` lists those there are")
        try:
            raw = json.loads(_text(path))
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict):
            raise TrainingError(
                f"{path} is damaged: it is no JSON object; remove the run's folder, or restore the file"
            )
        return cls(folder, RunRecord.from_json(raw, str(path)))

    @property
    def name(self) -> str:
        """What commands call it: the folder's name."""
        return self.folder.name

    @property
    def state(self) -> str:
        """finished, failed, running, or interrupted: begun, but no process works on it."""
        if self.record.status != "running":
            return self.record.status
        return "running" if self.busy else "interrupted"

    @property
    def busy(self) -> bool:
        """Whether a process trains here now."""
        try:
            with lock(self.folder):
                return False
        except Busy:
            return True
        except OSError:
            return False  # a folder that may only be read: nobody trains there

    @property
    def recipe(self) -> str:
        """The TOML text. Raises TrainingError when it cannot be read."""
        return _text(self.folder / RECIPE)

    def recipe_values(self) -> dict[str, Any]:
        """By dotted keys. Raises TrainingError when the recipe is damaged."""
        return recipe_values(self.recipe, str(self.folder / RECIPE))

    def metrics(self) -> list[Row]:
        """The numbers of every step so far. Raises TrainingError when they are damaged."""
        return read_metrics(self.folder / METRICS)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TrainingError(f"{path} is larger than {_MAX_BYTES // 1_000_000} MB; expected a small text file")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TrainingError(f"{path} is damaged: it is not UTF-8 text") from None
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}") from None
