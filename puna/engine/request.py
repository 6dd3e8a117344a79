"""What is asked of the engine, and what it answers: plain values."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from puna.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]
Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``typical_p`` 1 are off. Penalties look back
    over the last ``repeat_last_n`` tokens of prompt and answer (0: off, -1: all). ``logit_bias`` adds to the logits of
    token ids. A ``seed`` of None draws one for each request, recorded in Request.seed. The defaults are ollama's, save
    for ``repeat_penalty``: its 1.1 punishes code and lists for repeating themselves as they must, so it is off (1.0).

    The answer ends at one of the request's end-of-sequence ids, at one of ``stop_token_ids``, after ``max_tokens``
    tokens (None: when the context is full), or when its constraint is complete. ``ignore_eos`` forbids the
    end-of-sequence ids; ``min_tokens`` forbids them and ``stop_token_ids`` until that many tokens are there. ``stop``
    (texts) is for the text layer above: the engine only carries it. ``logprobs`` asks for the log probability of each
    token, ``top_logprobs`` for that and for those of that many of the most probable ones.

    ``allowed_token_ids``: no others are chosen, end-of-sequence ids included. ``bad_words_ids``: sequences of tokens
    that the answer never completes. ``prompt_logprobs``: the log probability of each token of the prompt, and that many
    of the most probable ones at its place; then ``max_tokens`` may be 0. Raises RequestError naming the field.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    allowed_token_ids: Sequence[int] | None = None
    bad_words_ids: Sequence[Sequence[int]] = ()
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0)
        _check_whole("top_k", self.top_k, 0)
        for name in ("top_p", "min_p", "typical_p"):
            _check_number(name, getattr(self, name), 0, 1)
        _check_number("repeat_penalty", self.repeat_penalty, 0)
        if self.repeat_penalty == 0:
            raise RequestError("repeat_penalty must be more than 0; 1 switches it off")
        _check_whole("repeat_last_n", self.repeat_last_n, -1)
        _check_number("presence_penalty", self.presence_penalty)
        _check_number("frequency_penalty", self.frequency_penalty)
        if self.seed is not None:
            _check_whole("seed", self.seed)
        _check_whole("top_logprobs", self.top_logprobs, 0)
        _check_whole("min_tokens", self.min_tokens, 0)
        if self.prompt_logprobs is not None:
            _check_whole("prompt_logprobs", self.prompt_logprobs, 0)
        if self.max_tokens is not None:
            _check_whole("max_tokens", self.max_tokens, 1 if self.prompt_logprobs is None else 0)
            if self.min_tokens > self.max_tokens:
                raise RequestError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        for name in ("logprobs", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, found {getattr(self, name)!r}")
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias must map token ids to numbers, found {self.logit_bias!r}")
        for token, value in self.logit_bias.items():
            _check_whole("logit_bias: a token id", token, 0)
            if not _is_number(value) or math.isnan(value):
                raise RequestError(f"logit_bias of token {token} must be a number, found {value!r}")
        _check_tokens("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            _check_tokens("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty, so no token could be chosen; leave it out to allow all")
        if not isinstance(self.bad_words_ids, Collection):
            raise RequestError(f"bad_words_ids must be lists of token ids, found {self.bad_words_ids!r}")
        for word in self.bad_words_ids:
            _check_tokens("bad_words_ids", word)
            if not word:
                raise RequestError("bad_words_ids has a sequence without tokens, which every answer would complete")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not (isinstance(stop, Collection) and all(isinstance(text, str) and text for text in stop)):
            raise RequestError(f"stop must be texts of at least one character, found {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stop))


class ConstraintState(Protocol):
    """How far one answer has come under a constraint. RequestError says that it can't be followed any further."""

    @property
    def complete(self) -> bool:
        """Whether nothing more may follow."""

    def allowed(self) -> NDArray[np.uint32]:
        """The tokens that may come next: the bit mask of SamplingRow. Asking again gives the same."""

    def accept(self, token: int) -> None:
        """Take a token that was allowed."""

    def fork(self) -> ConstraintState:
        """A copy that goes its own way, to look ahead along a draft."""


class Constraint(Protocol):
    """What an answer must look like. Immutable, so that any number of requests may share it."""

    def start(self) -> ConstraintState:
        """The state before the first token."""


@dataclass(frozen=True)
class Request:
    """One prompt, as token ids, and what to do with it.

    ``eos_ids`` end the answer. Prompts share cached keys and values only under an equal ``cache_salt``. ``adapter`` is
    the name of a loaded one (Engine.load_adapter), None for the bare model. ``tenant`` is whom it is for: each gets an
    equal share of the work (FairQueue). ``seed`` is the one that is used: ``params.seed``, or a random one.

    With ``shift``, a full context is no end: the older half of the tokens after the first ``num_keep`` is forgotten and
    the rest computed again, at the places that it has then (Timings.shifts counts). With ``pooling`` (``mean`` or
    ``last``) nothing is generated: the last event has the mean of the prompt's final hidden states, or the last one.
    Raises RequestError naming the field.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: Collection[int] = ()
    constraint: Constraint | None = None
    cache_salt: str = ""
    tenant: str = ""
    shift: bool = False
    num_keep: int = 0
    pooling: Pooling | None = None
    adapter: str | None = None
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        _check_whole("num_keep", self.num_keep, 0)
        if self.pooling not in (None, "mean", "last"):
            raise RequestError(f"pooling must be 'mean' or 'last', found {self.pooling!r}")
        if self.pooling is not None and self.params.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs can't be had together with pooling; make two requests")
        seed = self.params.seed
        object.__setattr__(self, "seed", secrets.randbits(32) if seed is None else seed)


class PromptLogprob(NamedTuple):
    """A token of the prompt, its log probability (None for the first), and the most probable ones at its place."""

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


class Event(NamedTuple):
    """One step of one request's answer: a token, the end, or both.

    ``token`` is part of the answer, None when there is none. An id that only ends the answer is in ``stop_id`` instead.
    ``logprob`` and ``top`` (token, log probability), where asked for, belong to whichever of the two there is.
    ``finish_reason`` is None until the end; ``error`` explains the reason "error". The first event has the
    ``prompt_logprobs`` that were asked for, one for each token; that of a request with ``pooling`` has the
    ``embedding``, float32[D], not normalised.
    """

    request_id: int
    token: int | None = None
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    error: str | None = None
    prompt_logprobs: Sequence[PromptLogprob] | None = None
    embedding: NDArray[np.float32] | None = None


@dataclass
class Timings:
    """Where one request's time went, in seconds, and its tokens. ``generated_tokens`` counts the stop id too.

    Waiting for a place, and reading a prefix from disk, is ``queue_seconds``, from there to the first token
    ``prefill_seconds``, from there to the last ``decode_seconds``. ``cached_tokens`` of the prompt's tokens were not
    computed because an earlier request had them. Of ``drafted_tokens`` that speculation proposed, ``accepted_tokens``
    became part of the answer. ``shifts`` counts how often older tokens were forgotten.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    shifts: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    if not (_is_number(value) and math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name} must be a number{_range(low, high)}, found {value!r}")


def _check_whole(name: str, value: Any, low: float = -math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise RequestError(f"{name} must be a whole number{_range(low, math.inf)}, found {value!r}")


def _check_tokens(name: str, tokens: Any) -> None:
    if not isinstance(tokens, Collection) or isinstance(tokens, (str, bytes)):
        raise RequestError(f"{name} must be a list of token ids, found {tokens!r}")
    for token in tokens:
        _check_whole(f"{name}: a token id", token, 0)


def _range(low: float, high: float) -> str:
    if high < math.inf:
        return f" from {low} to {high}"
    return f" of at least {low}" if low > -math.inf else ""
