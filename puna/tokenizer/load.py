"""Open a tokenizer from whatever file holds it."""

from __future__ import annotations

from pathlib import Path

from puna.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Being written."""
    raise NotImplementedError
