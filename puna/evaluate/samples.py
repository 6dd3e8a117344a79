"""Texts and conversations at which tokenizers and templates differ when they differ at all."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

TEXTS = (
    "Hello world",
    " leading and trailing spaces  ",
    "tabs\tand\n\nnew lines\r\n",
    "I'll we've DON'T it's",
    "3.14159 1,000,000 2024-02-29 0x1F",
    "def f(x):\n    return x ** 2  # square\n",
    "naïve café, Zürich, coöperation, e\u0301",
    "Привет, мир. 你好，世界。こんにちは 안녕하세요 שלום مرحبا नमस्ते",
    "🙂👩‍👩‍👧🇨🇭 \u200b\ufeff",
    "a" * 40 + " " * 20 + "!?" * 10,
    "<s></s><|begin_of_text|><|eot_id|><|im_start|>",
    "antidisestablishmentarianism Donaudampfschifffahrtsgesellschaft",
)

_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}

# Messages and tools of each conversation.
CONVERSATIONS: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]] | None], ...] = (
    ([{"role": "user", "content": "What is 2+2?"}], None),
    (
        [
            {"role": "system", "content": "Answer in  one word. "},
            {"role": "user", "content": "Größe?\n"},
            {"role": "assistant", "content": "Klein. "},
            {"role": "user", "content": " And now?"},
        ],
        None,
    ),
    ([{"role": "user", "content": "Is it raining in Bern?"}], [_TOOL]),
)


def sample_text() -> str:
    """The text that models are measured on when none is given: prose, a dialogue, code, facts, other languages."""
    return (files("puna.evaluate") / "sample.txt").read_text(encoding="utf-8")
