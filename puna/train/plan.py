"""What a recipe leaves open, chosen for the model and the data: lengths, batches, steps, rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from puna.config import ModelConfig
from puna.errors import DataError
from puna.train.data.tokens import Tokens, Truncation, pack
from puna.train.objectives.grpo import GRPO
from puna.train.prepare import PreparedData
from puna.train.recipe import Recipe
from puna.train.trainer import Settings

LONGEST = {"cpu": 1024, "cuda": 4096}  # of sequences, if nothing else is said
STEP_TOKENS = (128, 8192)  # of one step: the fewest and the most
STEPS_OF_AN_EPOCH = 30  # for which a small set gets smaller steps
FEWEST_STEPS = 60  # for which it gets more epochs, up to:
MOST_EPOCHS = 10
STEP_ANSWERS = 16
MICRO_BATCH_ANSWERS = 4
_SAMPLE = 5000  # documents that are packed to see how well they fill sequences


@dataclass(frozen=True)
class Plan:
    """Every number of a run. ``epochs`` is about how often the data is visited, ``step_tokens`` about what a step
    reads. ``variables`` are pinned for all templates."""

    device: str
    dtype: Literal["float32", "bfloat16", "float64"]
    length: int
    truncation: Truncation
    batch: int
    answers: int
    steps: int
    epochs: float
    step_tokens: int
    learning_rate: float
    warmup: int
    evaluate_every: int
    save_every: int
    recompute: bool
    variables: dict[str, str]

    def settings(self, recipe: Recipe) -> Settings:
        """As the trainer takes it. Raises TrainingError."""
        given = recipe.training
        return Settings(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            final_rate=given.final_rate,
            accumulate=self.batch,
            clip=given.clip,
            weight_decay=given.weight_decay,
            betas=given.betas,
            epsilon=given.epsilon,
            save_every=self.save_every,
            evaluate_every=self.evaluate_every,
            keep=given.keep,
            seed=recipe.seed,
            optimizer=given.optimizer,
        )


def make_plan(recipe: Recipe, config: ModelConfig, data: PreparedData, variables: dict[str, str]) -> Plan:
    """The plan of a run that begins. Raises DataError when no document fits."""
    given = recipe.training
    device = recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
    usual: Truncation = "split" if recipe.objective_name == "pretrain" else "drop"
    truncation = given.truncation or usual
    share = data.train_rows / (data.train_rows + data.held_out_rows)
    length = given.length or _length(recipe, config, data, device, share)
    needed = needed_lengths(recipe, data)
    lengths = shortened(needed, length, truncation)
    answers = given.answers or min(MICRO_BATCH_ANSWERS, data.train_rows)
    if isinstance(recipe.objective, GRPO):
        if not len(lengths):
            raise DataError(
                f"the shortest prompt with {recipe.objective.max_tokens} tokens of answer takes {needed.min()}, more "
                f"than {length}; train with longer sequences (--length), or shorter answers (objective.max_tokens)"
            )
        batch, answers = recipe.objective.prompts, recipe.objective.group
        micro_batches = float(data.train_rows * recipe.objective.updates)
        step_tokens = int(batch * answers * lengths.mean())
    elif data.rows == "documents":
        per_step = _step_tokens(float(lengths.sum()) * share)
        batch = given.batch or max(1, round(per_step / length))
        micro_batches = _packs(lengths, length) * share
        step_tokens = int(batch * min(length, lengths.sum() * share / max(micro_batches, 1e-9)))
    else:
        batch = given.batch or max(1, min(STEP_ANSWERS, data.train_rows // 4) // answers)
        micro_batches = data.train_rows / answers
        step_tokens = int(batch * answers * lengths.sum() * share / max(data.train_rows, 1))
    an_epoch = max(micro_batches / batch, 1e-9)  # in steps
    epochs = given.epochs or _epochs(recipe, data, an_epoch)
    steps = given.steps or max(1, round(epochs * an_epoch))
    warmup = min(steps - 1, max(1, steps // 20)) if given.warmup is None else given.warmup
    evaluate_every = given.evaluate_every or max(1, -(-steps // 5))
    return Plan(
        device=device,
        dtype=recipe.dtype or ("bfloat16" if device.startswith("cuda") else "float32"),
        length=length,
        truncation=truncation,
        batch=batch,
        answers=answers,
        steps=steps,
        epochs=round(steps / an_epoch, 2),
        step_tokens=step_tokens,
        learning_rate=given.learning_rate or _learning_rate(recipe, config),
        warmup=warmup,
        evaluate_every=evaluate_every,
        save_every=given.save_every or evaluate_every,
        recompute=bool(given.recompute),
        variables=variables,
    )


def needed_lengths(recipe: Recipe, data: PreparedData) -> NDArray[np.int32]:
    """int32[D]: the tokens of each document, or of each prompt with the longest answer that may be sampled."""
    if isinstance(recipe.objective, GRPO):
        sizes: NDArray[np.int32] = data.lengths - data.trained + np.int32(recipe.objective.max_tokens)
        return sizes
    return data.lengths


def shortened(lengths: NDArray[np.int32], length: int, truncation: Truncation) -> NDArray[np.int32]:
    """int32[...]: the lengths of what truncation leaves of documents of these lengths."""
    long = lengths > length
    if truncation == "drop":
        return lengths[~long]
    if truncation != "split":
        return np.minimum(lengths, length)
    whole, rest = np.divmod(lengths[long], length)
    return np.concatenate([lengths[~long], np.full(int(whole.sum()), length, np.int32), rest[rest > 1]])


def _length(recipe: Recipe, config: ModelConfig, data: PreparedData, device: str, share: float) -> int:
    """The longest document's, in whole 64s, but no more than a usual machine holds; short ones are packed."""
    most = min(config.max_position_embeddings, LONGEST[torch.device(device).type])
    needed = -(-int(needed_lengths(recipe, data).max()) // 64) * 64
    if data.rows != "documents":
        return min(most, needed)
    enough = min(512, _step_tokens(float(data.lengths.sum()) * share))
    return min(most, max(needed, enough))


def _step_tokens(tokens: float) -> int:
    least, most = STEP_TOKENS
    return int(min(most, max(least, tokens / STEPS_OF_AN_EPOCH)))


def _packs(lengths: NDArray[np.int32], length: int) -> float:
    """About how many sequences the documents fill."""
    if not len(lengths):
        return 0.0
    # As PackedStream does, which fills the last sequence of a small set with the next epoch's documents.
    some = np.resize(lengths[:: max(1, len(lengths) // _SAMPLE)], max(256, min(len(lengths), _SAMPLE)))
    packs = pack([Tokens(np.empty(size, np.int32), np.zeros(size, np.bool_)) for size in some], length)
    return len(packs) * float(lengths.sum()) / float(some.sum())


def _epochs(recipe: Recipe, data: PreparedData, steps: float) -> float:
    """Three, one of what is large, read for its knowledge or answered, more of what is small."""
    usual = 1.0 if recipe.objective_name in ("pretrain", "grpo") or data.train_rows > 20_000 else 3.0
    return min(max(usual, FEWEST_STEPS / steps), max(usual, MOST_EPOCHS))


def _learning_rate(recipe: Recipe, config: ModelConfig) -> float:
    """Usual rates of models of 4,096 numbers a token, more for narrower ones (as in Yang et al. 2022, but by the root),
    a tenth where answers are compared; two digits."""
    rate = 2e-5 if recipe.method.type == "full" else 2e-4
    rate *= math.sqrt(4096 / config.hidden_size) * (1 if recipe.rows == "documents" else 0.1)
    return float(f"{rate:.1e}")
