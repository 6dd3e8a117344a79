"""Prompts turned into answers of the model in training, judged and compared: what GRPO learns from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from puna.engine import SamplingParams
from puna.errors import DataError
from puna.tokenizer import Tokenizer
from puna.train.data.examples import Continuation, Conversation, Example
from puna.train.data.order import Order
from puna.train.data.render import Renderer
from puna.train.data.tokens import Tokens, concatenate
from puna.train.module import LlamaModule
from puna.train.objectives.documents import policy_logprobs
from puna.train.objectives.frozen import Reference
from puna.train.objectives.grpo import GRPO, Rollouts, group_advantages
from puna.train.policy import Policy, answer_text, end_ids
from puna.train.rewards import reward_named


@dataclass(frozen=True)
class Prompt:
    """``ids`` that ask for an answer, and the text that was ``expected`` of it."""

    ids: list[int]
    expected: str


@dataclass(frozen=True)
class Answered:
    """An answer to a prompt, and its reward."""

    prompt: Prompt
    text: str
    reward: float


def mean_reward(answers: Sequence[Answered]) -> float:
    """Of at least one answer."""
    return sum(answer.reward for answer in answers) / len(answers)


def prompt_of(renderer: Renderer, example: Example) -> Prompt:
    """An example's last answer is what is expected, and all before it the prompt. Raises DataError for preferences."""
    if not isinstance(example, (Conversation, Continuation)):
        raise DataError("prompts come from rows with one answer; give it conversations, or prompt and completion")
    document = renderer.render_answer(example)
    trained = document.trained.nonzero()[0]
    before = (~document.trained[: trained[-1]]).nonzero()[0]  # of several answers the last one's prompt
    ids = document.ids[: before[-1] + 1].tolist() if len(before) else []
    if not ids:
        raise DataError("the row has no prompt to answer; give it rows of prompt and completion, or of messages")
    text = example.text if isinstance(example, Continuation) else example.messages[example.trained[-1]].text
    return Prompt(ids, text)


class RolloutStream:
    """A stream of Rollouts for the trainer, sampled with the weights that the module has when more are needed.

    A rollout answers ``knobs.prompts`` prompts, in the order's order, and gives a micro-batch of each of them,
    ``knobs.updates`` times; a trainer that accumulates ``knobs.prompts`` makes one step of each time. Prompts that
    leave no room for ``knobs.max_tokens`` in ``length`` are left out and counted. What is sampled depends on ``seed``
    and the weights alone. Raises DataError when no prompt is short enough.
    """

    def __init__(
        self,
        module: LlamaModule,
        knobs: GRPO,
        order: Order,
        prompt: Callable[[int, int], Prompt],
        tokenizer: Tokenizer,
        *,
        length: int,
        seed: int = 0,
    ) -> None:
        self.left_out = 0
        self._module, self._knobs, self._order, self._prompt = module, knobs, order, prompt
        self._tokenizer, self._length, self._seed = tokenizer, length, seed
        self._eos_ids = end_ids(module, tokenizer)
        self._reward = reward_named(knobs.reward, knobs.pattern, knobs.schema)
        self._policy = Policy(module, length, knobs.prompts * knobs.group)
        self._reference = Reference(module)
        self._rollout = 0
        self._pending: list[Rollouts] = []

    def __iter__(self) -> RolloutStream:
        return self

    def __next__(self) -> Rollouts:
        if not self._pending:
            self._pending = self._sample() * self._knobs.updates
        return self._pending.pop(0)

    def fitting(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those that leave room for an answer."""
        return [prompt for prompt in prompts if self._has_room(prompt)]

    def answered(self, prompts: Sequence[Prompt]) -> list[Answered]:
        """The module's most probable answers, now, to prompts that leave room, with their rewards."""
        texts = self._policy.greedy([p.ids for p in prompts], self._tokenizer, self._knobs.max_tokens)
        return [
            Answered(p, text, float(self._reward(text, p.expected))) for p, text in zip(prompts, texts, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint, with the rollouts that are not used up yet."""
        pending = [{name: array.tolist() for name, array in vars(batch).items()} for batch in self._pending]
        return {
            "order": self._order.state(),
            "left_out": self.left_out,
            "rollout": self._rollout,
            "pending": pending,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises DataError when that was of other data."""
        self._order.restore(state["order"])
        self.left_out, self._rollout = state["left_out"], state["rollout"]
        self._pending = [Rollouts(**{n: np.array(v, _DTYPES[n]) for n, v in b.items()}) for b in state["pending"]]

    def _sample(self) -> list[Rollouts]:
        prompts = self._prompts()
        if not prompts:
            raise StopIteration
        group = self._knobs.group
        several = [prompt for prompt in prompts for _ in range(group)]
        answers = self._policy.sample([p.ids for p in several], self._params(len(several)), self._eos_ids)
        self._rollout += 1
        return [
            self._judged(prompt, answers[number * group : (number + 1) * group])
            for number, prompt in enumerate(prompts)
        ]

    def _has_room(self, prompt: Prompt) -> bool:
        return len(prompt.ids) + self._knobs.max_tokens <= self._length

    def _prompts(self) -> list[Prompt]:
        found: list[Prompt] = []
        fruitless = 0
        while len(found) < self._knobs.prompts and (place := next(self._order, None)) is not None:
            prompt = self._prompt(*place)
            if self._has_room(prompt):
                found.append(prompt)
                fruitless = 0
                continue
            self.left_out += 1
            fruitless += 1
            if fruitless >= sum(self._order.sizes):
                raise DataError(
                    f"no prompt leaves room for {self._knobs.max_tokens} tokens of answer in {self._length}; train "
                    "with longer sequences, or shorter answers"
                )
        return found

    def _params(self, count: int) -> list[SamplingParams]:
        """The policy as it is, without what makes answers better: top_k and top_p are off."""
        seeds = np.random.SeedSequence([self._seed, self._rollout]).generate_state(count)
        return [
            SamplingParams(
                temperature=self._knobs.temperature,
                top_k=0,
                top_p=1.0,
                seed=int(seed),
                max_tokens=self._knobs.max_tokens,
            )
            for seed in seeds
        ]

    def _judged(self, prompt: Prompt, answers: list[list[int]]) -> Rollouts:
        start, rewards = len(prompt.ids), []
        for answer in answers:
            text = answer_text(self._tokenizer, answer, self._eos_ids)
            rewards.append(float(self._reward(text, prompt.expected)))
        packed = concatenate([Tokens.of([*prompt.ids, *a], [(start, start + len(a))]) for a in answers])
        temperature, training = self._knobs.temperature, self._module.training
        self._module.eval()
        with torch.no_grad():
            sampled = policy_logprobs(self._module, packed, temperature)[0]
        reference = self._reference.token_logprobs(packed, temperature)
        self._module.train(training)
        judged = np.array(rewards)
        return Rollouts(
            **vars(packed),
            rewards=judged,
            advantages=group_advantages(judged),
            sampled=_host(sampled),
            reference=_host(reference),
        )


_DTYPES = {field.name: np.float64 for field in dataclasses.fields(Rollouts)} | {
    "ids": np.int32,
    "trained": np.bool_,
    "seq_starts": np.int32,
}


def _host(values: torch.Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = values.double().cpu().numpy()
    return array
