"""From a user's choice of speculative decoding to the engine's options."""

from __future__ import annotations

from pathlib import Path

from puna.checkpoint import open_checkpoint
from puna.engine import Speculation
from puna.errors import RequestError
from puna.llm.packing import bind_model
from puna.ops.protocol import Ops
from puna.store import resolve
from puna.tokenizer import Tokenizer


def speculation(
    choice: str | Speculation | None, draft_model: str | Path | None, ops: Ops, tokenizer: Tokenizer, *, packed: bool
) -> Speculation | None:
    """What the engine is to do; None for no speculation. A draft model is loaded onto the same ops.

    Raises RequestError when the choice is none or the models' vocabularies differ, and what loading raises.
    """
    if draft_model is None:
        if choice is None or choice == "off":
            return None
        if choice == "model":
            raise RequestError("speculative='model' needs a draft_model")
        return choice if isinstance(choice, Speculation) else Speculation(choice)
    if choice not in (None, "model"):
        raise RequestError(f"a draft_model is for speculative='model', found speculative={choice!r}")
    found = resolve(draft_model)
    checkpoint = open_checkpoint(found.path)
    if checkpoint.tokenizer is not None and not _same_vocabulary(checkpoint.tokenizer, tokenizer):
        raise RequestError(
            f"{found.path} can't draft: its vocabulary is not the model's; choose one of the same family"
        )
    return Speculation("model", draft_model=bind_model(ops, found, checkpoint, packed=packed))


def _same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    return one.vocab_size == other.vocab_size and all(
        one.token_bytes(i) == other.token_bytes(i) for i in range(one.vocab_size)
    )
