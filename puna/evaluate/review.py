"""Looking at a model that was just derived from another one, before it takes its name."""

from __future__ import annotations

from pathlib import Path

import psutil

from puna.checkpoint import open_checkpoint
from puna.errors import DriftError
from puna.evaluate.compare import WINDOW, Progress, compare
from puna.evaluate.limits import drift
from puna.evaluate.report import Report
from puna.evaluate.sides import Side
from puna.llm.memory import estimate_memory
from puna.ops.protocol import Ops
from puna.store import ResolvedModel, resolve

WINDOWS = 1


class Review:
    """Called with the path of the finished model, measures it against ``source`` on Puna's sample text.

    ``report`` is None until then, and ``drift`` says afterwards what speaks against the model. Raises DriftError when
    something does, unless ``accept`` is true, and what ``compare`` raises.
    """

    def __init__(
        self,
        source: Side,
        name: str,
        ops: Ops,
        *,
        accept: bool = False,
        max_divergence: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.report: Report | None = None
        self.drift: list[str] = []
        self._source, self._name, self._ops = source, name, ops
        self._accept, self._max_divergence, self._progress = accept, max_divergence, progress

    def __call__(self, path: Path) -> None:
        derived = Side.open(self._name, resolve(path))
        self.report = compare(self._source, derived, self._ops, windows=WINDOWS, progress=self._progress)
        self.drift = drift(self.report, self._max_divergence)
        if self.drift and not self._accept:
            raise DriftError(
                f"{self._name} is too far from {self._source.name}: {'; '.join(self.drift)}. It was not kept; --force "
                "accepts it as it is"
            )


def obstacle(found: ResolvedModel, ops: Ops) -> str | None:
    """Why a model can't be run here to be compared with: a sentence, or None. Raises CheckpointError, ConfigError."""
    if open_checkpoint(found.path).tokenizer is None:
        return "it has no tokenizer"
    needed, free = estimate_memory(ops, found, WINDOW).total, psutil.virtual_memory().available
    if needed > free:
        return f"running it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
    return None
