"""Continuous batching over a paged key/value cache. Integers only: text lives above, arrays below."""

from puna.engine.adapters import LoadedAdapter
from puna.engine.engine import Engine, Stream
from puna.engine.prefix_store import PrefixCache
from puna.engine.request import (
    Constraint,
    ConstraintState,
    Event,
    FinishReason,
    Pooling,
    PromptLogprob,
    Request,
    SamplingParams,
    Timings,
)
from puna.engine.speculation import Speculation

__all__ = [
    "Constraint",
    "ConstraintState",
    "Engine",
    "Event",
    "FinishReason",
    "LoadedAdapter",
    "Pooling",
    "PrefixCache",
    "PromptLogprob",
    "Request",
    "SamplingParams",
    "Speculation",
    "Stream",
    "Timings",
]
