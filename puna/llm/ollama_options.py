"""ollama's options: TEMPORARY stand-in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from puna.errors import RequestError

_SAME = {
    "seed",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_last_n",
    "temperature",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
}
_ACCEPTED = {
    "num_keep",
    "num_batch",
    "num_thread",
    "numa",
    "num_gpu",
    "main_gpu",
    "use_mmap",
    "draft_num_predict",
    "penalize_newline",
    "low_vram",
    "f16_kv",
    "use_mlock",
    "vocab_only",
    "logits_all",
    "embedding_only",
}


@dataclass(frozen=True)
class OllamaOptions:
    sampling: Mapping[str, Any] = field(default_factory=dict)
    num_ctx: int | None = None


def parse_options(raw: Mapping[str, Any]) -> OllamaOptions:
    sampling: dict[str, Any] = {}
    num_ctx = None
    for key, value in raw.items():
        if value is None or key in _ACCEPTED:
            continue
        if key in _SAME:
            sampling[key] = value
        elif key == "stop":
            sampling["stop"] = value
        elif key == "num_predict":
            if not isinstance(value, int):
                raise RequestError("options.num_predict")
            if value > 0:
                sampling["max_tokens"] = value
        elif key == "num_ctx":
            if not isinstance(value, int) or value < 1:
                raise RequestError("options.num_ctx must be a whole number of at least 1")
            num_ctx = value
        else:
            raise RequestError(f"options.{key} is not known")
    return OllamaOptions(sampling, num_ctx)
