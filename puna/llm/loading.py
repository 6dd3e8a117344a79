"""From a stored model, a file or a folder to what an LLM is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.checkpoint import open_checkpoint
from puna.engine import PrefixCache, Speculation
from puna.llm.identity import model_identity
from puna.llm.ollama_options import parse_options
from puna.llm.packing import bind_model
from puna.llm.speculative import speculation
from puna.model.model import Model
from puna.ops.protocol import Ops
from puna.ops.registry import make_ops
from puna.store import ResolvedModel
from puna.tokenizer import Tokenizer


@dataclass(frozen=True)
class Parts:
    """Arguments of ``LLM``: the model on its ops, what it brings along, and what was asked for beside it."""

    model: Model
    tokenizer: Tokenizer
    chat_template: str | None
    system: str | None
    history: Sequence[tuple[str, str]]
    defaults: Mapping[str, Any]
    context_length: int | None
    speculation: Speculation | None
    prefix_cache: PrefixCache | None


def load_parts(
    found: ResolvedModel,
    *,
    context_length: int | None,
    threads: int | None,
    ops: str | Ops | None,
    speculative: str | Speculation | None,
    draft_model: str | Path | None,
    packed: bool | str | Path,
    cache_dir: str | Path | None,
    cache_size: int,
) -> Parts:
    """Read the model. The options and errors are those of ``LLM.load``; a stored model's own fill the open ones."""
    checkpoint = open_checkpoint(found.path)
    tokenizer = checkpoint.needed_tokenizer(found.path)
    manifest = found.manifest
    stored = parse_options(manifest.parameters if manifest else {})
    if context_length is None and stored.num_ctx is not None:
        context_length = min(stored.num_ctx, checkpoint.config.max_position_embeddings)
    if ops is None or isinstance(ops, str):
        ops = make_ops(ops, stored.num_thread if threads is None else threads)
    if not isinstance(packed, bool):
        packed = Path(packed).expanduser()
    cache = None
    if cache_dir is not None:
        cache = PrefixCache(Path(cache_dir).expanduser(), model_identity(found), cache_size)
    return Parts(
        # The draft model first: a choice that cannot be is refused before the large model is read.
        speculation=speculation(speculative, draft_model, ops, tokenizer, packed=packed is not False),
        model=bind_model(ops, found, checkpoint, packed=packed),
        tokenizer=tokenizer,
        chat_template=(manifest.template if manifest else None) or checkpoint.chat_template,
        system=manifest.system if manifest else None,
        history=manifest.messages if manifest else (),
        defaults=stored.sampling,
        context_length=context_length,
        prefix_cache=cache,
    )
