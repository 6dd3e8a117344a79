"""What a recipe's objective is joined with: a teacher, the stream to learn from, what held-out rows measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.checkpoint import Checkpoint
from puna.config import ModelConfig
from puna.errors import TrainingError
from puna.model.shapes import parameter_count
from puna.ops.registry import make_ops
from puna.store import ResolvedModel, Store, resolve
from puna.train.estimate import weight_bytes
from puna.train.module import LlamaModule
from puna.train.objectives.distill import Distill
from puna.train.objectives.grpo import GRPO
from puna.train.objectives.labelled import KTO
from puna.train.objectives.objective import MeasuredObjective
from puna.train.objectives.pairs import DPO, IPO
from puna.train.parallel import ALONE, Ranks
from puna.train.plan import Plan
from puna.train.policy import Policy
from puna.train.prepare import PreparedData
from puna.train.recipe import Recipe
from puna.train.rollouts import Prompt, RolloutStream, mean_reward
from puna.train.runs import Evaluation, Sample
from puna.train.trainer import Stream, measure

TEACHER = "teacher"  # its cache, in the run's folder
SAMPLES, SAMPLE_TOKENS = 2, 64  # answers in the run's page, and how long they may be


@dataclass(frozen=True)
class Teacher:
    """Where the model is whose logits are learnt, opened without its weights."""

    found: ResolvedModel
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Work:
    """What the trainer takes beside the module. ``evaluate`` measures what the module has learnt by now on held-out
    rows, and gives None where there are none; ``reward`` is of the answers to them, where a loss says little."""

    objective: MeasuredObjective
    stream: Stream
    validation: Sequence[Any]
    evaluate: Callable[[], Evaluation | None]
    reward: Callable[[], float] | None = None


def check_ranks(recipe: Recipe, ranks: Ranks) -> None:
    """Raises TrainingError for a recipe that one process alone can train by."""
    if ranks.count > 1 and recipe.rows == "prompts":
        raise TrainingError(
            f"{recipe.objective_name} samples answers by an engine that one process has, but {ranks.count} were "
            "started; start one, without torchrun"
        )


def find_teacher(recipe: Recipe, config: ModelConfig, store: Store) -> Teacher | None:
    """The recipe's, if it distils. Raises StoreError, CheckpointError, TrainingError for one that cannot be it."""
    knobs = recipe.objective
    if not isinstance(knobs, Distill):
        return None
    found = resolve(knobs.teacher, store)
    return Teacher(found, knobs.open_teacher(found, config))


def other_models(recipe: Recipe, checkpoint: Checkpoint, plan: Plan, teacher: Teacher | None) -> int:
    """Bytes of the models that are read beside the one in training, with the cache of the engine that samples."""
    knobs, config = recipe.objective, checkpoint.config
    if teacher is not None:
        return weight_bytes(teacher.checkpoint)
    trained_whole = recipe.method.type == "full"
    reference = weight_bytes(checkpoint) if trained_whole and isinstance(knobs, (DPO, IPO, KTO, GRPO)) else 0
    if not isinstance(knobs, GRPO):
        return reference
    cache = knobs.prompts * knobs.group * plan.length * make_ops().kv_bytes_per_token(config, None)
    return reference + engine_bytes(recipe, checkpoint) + cache


def engine_bytes(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """Of the weights from which an engine answers while the model is trained: as they are in the file, beside which it
    has the adapter, or all of them in float32."""
    whole = recipe.method.type == "full" or recipe.method.dora
    return 4 * parameter_count(checkpoint.config) if whole else weight_bytes(checkpoint)


def assemble(
    recipe: Recipe,
    plan: Plan,
    data: PreparedData,
    module: LlamaModule,
    teacher: Teacher | None,
    folder: Path,
    *,
    shows_answers: bool = False,
    ranks: Ranks = ALONE,
) -> Work:
    """``folder`` is the run's, where a teacher's logits are kept if the recipe does not say. ``shows_answers``: also to
    held-out prompts. To be called before the trainer is made, as ``Knobs.objective``."""
    knobs = recipe.objective
    if isinstance(knobs, GRPO):
        return _rollouts(knobs, recipe, plan, data, module)
    if isinstance(knobs, Distill):
        assert teacher is not None
        cache = folder / TEACHER if knobs.cache is None else Path(knobs.cache)
        objective: MeasuredObjective = knobs.with_teacher(module, teacher.found, cache if knobs.can_cache else None)
    else:
        objective = knobs.objective(module)
    held_out = data.held_out(plan.length, plan.truncation, plan.answers)
    most = min(plan.length, module.config.max_position_embeddings - SAMPLE_TOKENS)
    asked = data.prompts_to_show(SAMPLES, most) if shows_answers else []
    stream = data.stream(recipe.seed, plan.length, plan.truncation, plan.answers)

    def evaluate() -> Evaluation | None:
        if not held_out:
            return None
        measured = measure(module, objective, held_out, ranks)
        numbers = {name.removeprefix("validation_"): value for name, value in measured.items()}
        if not asked:
            return Evaluation(numbers)
        length = max(len(prompt.ids) for prompt in asked) + SAMPLE_TOKENS
        policy = Policy(module, length, len(asked))  # let go of again: the training needs the memory
        texts = policy.greedy([prompt.ids for prompt in asked], data.tokenizer, SAMPLE_TOKENS)
        return Evaluation(numbers, _samples(data, asked, texts))

    return Work(objective, stream, held_out, evaluate)


def _rollouts(knobs: GRPO, recipe: Recipe, plan: Plan, data: PreparedData, module: LlamaModule) -> Work:
    """Held-out prompts are answered greedily: the mean reward is what counts."""
    stream = RolloutStream(
        module,
        knobs,
        data.order(recipe.seed),
        data.prompt,
        data.tokenizer,
        length=plan.length,
        seed=recipe.seed,
    )
    objective, held_out = knobs.objective(module), stream.fitting(data.held_out_prompts())
    if not held_out:
        return Work(objective, stream, (), lambda: None)

    def evaluate() -> Evaluation:
        answers = stream.answered(held_out)
        shown = answers[:SAMPLES]
        samples = _samples(data, [answer.prompt for answer in shown], [answer.text for answer in shown])
        return Evaluation({"reward": mean_reward(answers)}, samples)

    return Work(objective, stream, (), evaluate, lambda: mean_reward(stream.answered(held_out)))


def _samples(data: PreparedData, prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[Sample, ...]:
    """Prompts are shown as the model reads them."""
    return tuple(
        Sample(data.tokenizer.decode(prompt.ids).decode("utf-8", "replace"), text, prompt.expected)
        for prompt, text in zip(prompts, texts, strict=True)
    )
