"""What a row of training data means, whatever format it came in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from puna.chat.messages import Message


@dataclass(frozen=True)
class Conversation:
    """Messages through the model's chat template. ``trained`` are the numbers of the assistant messages to learn.

    ``tools`` are in OpenAI's shape.
    """

    messages: tuple[Message, ...]
    trained: tuple[int, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Continuation:
    """Raw text, without any template: ``text`` is learnt, after a ``prompt`` that is not (it may be empty)."""

    text: str
    prompt: str = ""


Sample = Conversation | Continuation


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first is the better."""

    chosen: Sample
    rejected: Sample


@dataclass(frozen=True)
class Labelled:
    """An answer that is to become likelier (``desirable``) or less likely, for KTO."""

    sample: Sample
    desirable: bool


Example = Conversation | Continuation | Preference | Labelled


def samples_of(example: Example) -> tuple[Sample, ...]:
    """What is rendered of an example: one sample, or chosen and rejected."""
    if isinstance(example, Preference):
        return (example.chosen, example.rejected)
    return (example.sample,) if isinstance(example, Labelled) else (example,)
