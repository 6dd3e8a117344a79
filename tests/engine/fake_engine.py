"""An engine on the fake model, what it must say, and a constraint for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fake_model import FakeModel, fake_logits

from puna.engine import Engine, Event, SamplingParams
from puna.errors import RequestError

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def greedy(**overrides: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, **overrides})


def make_engine(model: FakeModel | None = None, **overrides: Any) -> Engine:
    return Engine(model or FakeModel(), **{"num_blocks": 64, "block_size": 4, **overrides})


def expected_greedy(prompt: Sequence[int], count: int, vocab_size: int = 50, banned: Sequence[int] = ()) -> list[int]:
    """The most probable continuation, computed without any engine."""
    history = list(prompt)
    for _ in range(count):
        logits = fake_logits(np.array(history), vocab_size)
        logits[list(banned)] = -np.inf
        history.append(int(logits.argmax()))
    return history[len(prompt) :]


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def assert_all_free(engine: Engine) -> None:
    assert not engine.has_work
    engine.check_idle()


class OneToken:
    """A constraint that allows one fixed token at a time, and fails where asked to."""

    def __init__(self, tokens: Sequence[int], fail_at: int = -1, reject_at: int = -1, broken: bool = False) -> None:
        self.tokens, self.fail_at, self.reject_at, self.broken = tokens, fail_at, reject_at, broken

    def start(self) -> OneTokenState:
        if self.broken:
            raise RequestError("cannot start")
        return OneTokenState(self)


class OneTokenState:
    def __init__(self, constraint: OneToken) -> None:
        self.constraint = constraint
        self.accepted: list[int] = []

    @property
    def complete(self) -> bool:
        return len(self.accepted) == len(self.constraint.tokens)

    def allowed(self) -> Any:
        if len(self.accepted) == self.constraint.fail_at:
            raise RequestError("no way on")
        mask = np.zeros(2, np.uint32)
        token = self.constraint.tokens[len(self.accepted)]
        mask[token // 32] |= np.uint32(1 << token % 32)
        return mask

    def accept(self, token: int) -> None:
        if len(self.accepted) == self.constraint.reject_at:
            raise RequestError("not that one")
        self.accepted.append(token)

    def fork(self) -> OneTokenState:
        state = OneTokenState(self.constraint)
        state.accepted = self.accepted[:]
        return state
