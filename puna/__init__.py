"""Puna: the whole life of the Llama model family on your own hardware."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puna.engine.request import SamplingParams
    from puna.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

_LAZY = {"LLM": "puna.llm", "SamplingParams": "puna.engine.request"}
_ROOMS = ("catalog", "model", "tokenizer")


def __getattr__(name: str) -> Any:
    """Public names, and the rooms that scripts use, are imported on first use, so that ``import puna`` stays fast."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _ROOMS:
        return import_module(f"puna.{name}")
    raise AttributeError(f"module 'puna' has no attribute {name!r}")
