"""A renderer for a model by its name, with its tokenizer, its template and what it brings along, as it is served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.chat.builtin import builtin_template
from puna.chat.go_template import chat_template
from puna.chat.messages import Message
from puna.checkpoint import open_checkpoint
from puna.errors import TemplateError
from puna.store import ResolvedModel, resolve
from puna.tokenizer import Tokenizer
from puna.train.data.render import Renderer, TrainOn


def renderer_for(
    model: str | Path | ResolvedModel,
    *,
    train_on: TrainOn = "assistant",
    variables: Mapping[str, Any] | None = None,
) -> Renderer:
    """Only the model's description is read, not its weights. Raises StoreError, CheckpointError, TokenizerError,
    TemplateError for a broken template."""
    found = model if isinstance(model, ResolvedModel) else resolve(model)
    checkpoint = open_checkpoint(found.path)
    tokenizer = checkpoint.needed_tokenizer(found.path)
    manifest = found.manifest
    source = (manifest.template if manifest else None) or checkpoint.chat_template or _builtin(tokenizer)
    return Renderer(
        tokenizer,
        None if source is None else chat_template(source, tokenizer),
        train_on=train_on,
        system=manifest.system if manifest else None,
        history=[Message(role, text) for role, text in manifest.messages] if manifest else [],
        variables=variables,
    )


def _builtin(tokenizer: Tokenizer) -> str | None:
    try:
        return builtin_template(tokenizer)
    except TemplateError:
        return None
