"""The training loop: steps of any objective over any stream of packs, which can be stopped and resumed anywhere.

What a step does depends on the recipe's seed, the step's number and the state alone, so a run that was killed and
resumed is bit for bit the run that was not, on the same CPU with as many threads.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.checkpoint.atomic import atomic_path
from puna.errors import TrainingError
from puna.ops.torch_ops import document_batch
from puna.train.losses import cross_entropy, prediction_rows
from puna.train.module import LlamaModule
from puna.train.optimizers import make_optimizer
from puna.train.parallel import ALONE, Ranks, add_sums, release, whole
from puna.train.training_state import TrainingState, newest_state, save_state, shapes_of, shared_out


class Pack(Protocol):
    """Documents in one sequence: ids int32[T], targets bool[T], and where documents begin and end, int32[D + 1]."""

    @property
    def ids(self) -> NDArray[np.int32]: ...
    @property
    def trained(self) -> NDArray[np.bool_]: ...
    @property
    def seq_starts(self) -> NDArray[np.int32]: ...


class Stream(Protocol):
    """What hands out the micro-batches, one after the other, and can go on from a small state of plain values."""

    def __next__(self) -> Any: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


class Objective(Protocol):
    """What is minimised: a mean over the things that a step counts, whatever micro-batches they come in."""

    def count(self, micro_batch: Any) -> int:
        """How many things a micro-batch adds to the mean."""

    def loss(self, module: LlamaModule, micro_batch: Any, total: int) -> Tensor:
        """Its part of the mean over ``total`` things: the sum of their losses / total.

        Every micro-batch must run the module as often as any other: several ranks gather its weights together.
        """


class Metrics(Protocol):
    """Other means, which an objective measures while it computes its loss."""

    def take(self) -> dict[str, tuple[float, int]]:
        """The sum and the count of each, by name, since the last call."""


@runtime_checkable
class Measuring(Protocol):
    """An objective that has them."""

    metrics: Metrics


class NextToken:
    """Cross entropy by trained token: pretraining, and SFT where only answers are trained. Micro-batches are Packs."""

    def count(self, micro_batch: Pack) -> int:
        return len(prediction_rows(micro_batch.trained, micro_batch.seq_starts))

    def loss(self, module: LlamaModule, micro_batch: Pack, total: int) -> Tensor:
        index = prediction_rows(micro_batch.trained, micro_batch.seq_starts)
        device = module.ops.device
        rows = torch.from_numpy(index).to(device)
        targets = torch.from_numpy(micro_batch.ids[index + 1].astype(np.int64)).to(device)
        hidden = module.hidden(document_batch(micro_batch.ids, micro_batch.seq_starts))[rows]
        weights = torch.full((len(index),), 1 / max(total, 1), dtype=torch.float64, device=device)
        return cross_entropy(hidden, module.head(), targets, weights)


@dataclass(frozen=True)
class Settings:
    """How to train.

    The learning rate rises over ``warmup`` steps and falls along a cosine to ``final_rate`` of itself at ``steps``
    (Loshchilov & Hutter 2016). A step takes ``accumulate`` micro-batches. Gradients longer than ``clip`` are shortened
    to it. AdamW decays matrices only (Loshchilov & Hutter 2017). Every ``save_every`` steps, and at the end, the state
    is saved; the newest ``keep`` are kept, and the best by held-out rows, measured every ``evaluate_every`` steps.
    """

    steps: int
    learning_rate: float
    warmup: int = 0
    final_rate: float = 0.1
    accumulate: int = 1
    clip: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    save_every: int = 100
    evaluate_every: int = 100
    keep: int = 2
    seed: int = 0
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that makes no sense."""
        for name in ("steps", "accumulate", "save_every", "evaluate_every", "keep"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("learning_rate", "clip", "epsilon"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise TrainingError(f"{name} must be a number above 0, found {getattr(self, name)}")
        if not 0 <= self.warmup <= self.steps:
            raise TrainingError(f"warmup must be from 0 to the {self.steps} steps of the training, found {self.warmup}")
        if not 0 <= self.final_rate <= 1:
            raise TrainingError(f"final_rate is a part of the learning rate, from 0 to 1, found {self.final_rate}")

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``, from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True)
class StepReport:
    """One step, numbered from 1: its mean loss, of how many things, and the length of the gradient before clipping.

    ``validation_loss`` or ``validation_reward`` are of held-out rows, where they were measured after the step.
    ``metrics`` are what the objective measures, ``seconds`` how long the step took, its data included.
    """

    step: int
    loss: float
    count: int
    learning_rate: float
    gradient_norm: float
    validation_loss: float | None = None
    validation_reward: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)


class Trainer:
    """Trains a module and keeps its state under ``folder``. Seeds torch's global random numbers in every step.

    ``run`` goes on from the newest state in the folder. Raises TrainingError when that is of another module. Over
    several ``ranks``, whose module was made with them, each takes its share of a step's micro-batches; all of them read
    the whole stream, and only the first reports. Where a loss says little, ``reward`` measures the module in place of
    ``validation``: the best state is then that of the highest.
    """

    def __init__(
        self,
        module: LlamaModule,
        objective: Objective,
        stream: Stream,
        settings: Settings,
        folder: Path,
        validation: Sequence[Any] = (),
        ranks: Ranks = ALONE,
        reward: Callable[[], float] | None = None,
    ) -> None:
        module.shard()
        self.module, self.objective, self.stream, self.settings = module, objective, stream, settings
        self.folder, self.validation, self.ranks, self.reward = folder, validation, ranks, reward
        self.step = 0
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._optimizer = make_optimizer(
            settings.optimizer,
            self._parameters,
            betas=settings.betas,
            epsilon=settings.epsilon,
            weight_decay=settings.weight_decay,
        )

    def run(self, on_step: Callable[[StepReport], object] = lambda report: None) -> None:
        """Train to the end, or to the end of the stream, or until ``on_step`` returns True.

        Raises TrainingError when a loss or gradient is no longer a finite number: the model is then as before that
        step, and the step's micro-batches lie in the folder, as ``failed-step-N.npz``.
        """
        self._resume()
        saved, ended = self.step, False
        while not ended and self.step < self.settings.steps:
            started = time.perf_counter()
            micro_batches = self._next_batches()
            if not micro_batches:
                break
            report = self._train(micro_batches)
            report = dataclasses.replace(report, seconds=time.perf_counter() - started)
            last = self.step == self.settings.steps
            if last or self.step % self.settings.evaluate_every == 0:
                report = self._validated(report)
            ended = self.ranks.tell(self.ranks.first and on_step(report) is True)
            if ended or last or self.step % self.settings.save_every == 0:
                self._save(_cost(report))
                saved = self.step
        if saved < self.step:
            self._save(None)

    def _next_batches(self) -> list[Any]:
        """Those of one step; fewer at the stream's end, and none behind it."""
        found: list[Any] = []
        while len(found) < self.settings.accumulate:
            try:
                found.append(next(self.stream))
            except StopIteration:
                break
        return found

    def _train(self, micro_batches: Sequence[Any]) -> StepReport:
        settings, rate = self.settings, self.settings.rate(self.step)
        self.module.train()
        seed = (settings.seed * 1_000_003 + self.step) * settings.accumulate
        loss, count, metrics = _pass(self.module, self.objective, micro_batches, self.ranks, seed)
        norm = whole(torch.nn.utils.clip_grad_norm_(self._parameters.values(), settings.clip)).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._failure(micro_batches, loss, norm)
        self._optimizer.step(rate)
        self._optimizer.zero_grad()
        self.step += 1
        return StepReport(self.step, loss, count, rate, norm, metrics=metrics)

    def _validated(self, report: StepReport) -> StepReport:
        if self.reward is not None:
            return dataclasses.replace(report, validation_reward=self.reward())
        if not self.validation:
            return report
        measured = measure(self.module, self.objective, self.validation, self.ranks)
        loss = measured.pop("loss")
        return dataclasses.replace(report, validation_loss=loss, metrics={**report.metrics, **measured})

    def _failure(self, micro_batches: Sequence[Any], loss: float, norm: float) -> TrainingError:
        """Keeps all arrays of the micro-batches for study."""
        self._optimizer.zero_grad()
        arrays = {
            f"{number}.{name}": value
            for number, micro_batch in enumerate(micro_batches)
            for name, value in vars(micro_batch).items()
            if isinstance(value, np.ndarray)
        }
        path = self.folder / f"failed-step-{self.step + 1}.npz"
        if self.ranks.first:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
        return TrainingError(
            f"step {self.step + 1} gave a loss of {loss} and a gradient of length {norm}, so training stopped; "
            f"its data lies in {path}. Try a lower learning rate or a longer warmup, or look for damaged data"
        )

    def _save(self, cost: float | None) -> None:
        tensors = {name: parameter.detach() for name, parameter in self._parameters.items()} | self._optimizer.state()
        state = TrainingState(self.step, self.stream.state(), cost, tensors)
        save_state(self.folder, state, self.settings.keep, self.ranks)

    def _resume(self) -> None:
        state = newest_state(self.folder)
        if state is None:
            return
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        if {name: shape for name, shape in shapes_of(state.tensors).items() if ":" not in name} != shapes:
            raise TrainingError(
                f"{self.folder} holds the state of another training: its trained tensors differ; continue with the "
                "same recipe, or choose another folder"
            )
        tensors = shared_out(state.tensors, self._parameters)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])
        self._optimizer.restore(state.step, tensors)
        self.stream.restore(state.stream)
        self.step = state.step


def _cost(report: StepReport) -> float | None:
    """By which the best state is told from others."""
    return report.validation_loss if report.validation_reward is None else -report.validation_reward


def evaluate(module: LlamaModule, objective: Objective, micro_batches: Sequence[Any], ranks: Ranks = ALONE) -> float:
    """The mean loss over all of them, without dropout; each rank takes its share."""
    return measure(module, objective, micro_batches, ranks)["loss"]


def measure(
    module: LlamaModule, objective: Objective, micro_batches: Sequence[Any], ranks: Ranks = ALONE
) -> dict[str, float]:
    """The same ``loss``, and the means of what else the objective measures, by name."""
    module.shard()
    training = module.training
    module.eval()
    with torch.no_grad():
        loss, _, metrics = _pass(module, objective, micro_batches, ranks, None)
    release(module)
    module.train(training)
    return {"loss": loss, **metrics}


def _pass(
    module: LlamaModule, objective: Objective, micro_batches: Sequence[Any], ranks: Ranks, seed: int | None
) -> tuple[float, int, dict[str, float]]:
    """All ranks' mean loss, of how many things, and what else the objective measures.

    With a ``seed`` gradients are made. It is the micro-batch's, not the rank's: dropout is the same on any number.
    """
    count, loss = sum(map(objective.count, micro_batches)), 0.0
    measured: dict[str, tuple[float, int]] = {}
    for number, micro_batch, counts in ranks.passes(micro_batches):
        if seed is not None:
            torch.manual_seed(seed + number)
        part = objective.loss(module, micro_batch, count) * float(counts)
        if seed is not None:
            part.backward()  # type: ignore[no-untyped-call]
        loss += part.item()
        taken = objective.metrics.take() if isinstance(objective, Measuring) else {}
        if counts:
            measured = add_sums(measured, taken)
    measured = ranks.sums(measured)
    return ranks.sum(loss), count, {name: total / number for name, (total, number) in measured.items() if number}
