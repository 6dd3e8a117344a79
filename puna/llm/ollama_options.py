"""ollama's generation options: the one table of their names, and what each becomes here.

A Modelfile's PARAMETERs, a stored model's parameters and the ``options`` of ollama's API are all read by this page.
Source: ollama's documentation of Modelfiles and of its API.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from puna.errors import RequestError


@dataclass(frozen=True)
class Option:
    """``kind`` is what a value must be; ``off`` is what a refused option may be, since it then does nothing."""

    kind: Literal["whole", "number", "switch", "texts"]
    status: Literal["honoured", "accepted", "refused"]
    note: str
    off: Sequence[Any] = ()


OPTIONS: dict[str, Option] = {
    "num_ctx": Option("whole", "honoured", "the context's length in tokens, at most the model's"),
    "num_predict": Option("whole", "honoured", "the answer's most tokens; 0 and below: until the context is full"),
    "num_thread": Option("whole", "honoured", "threads, where it is a stored model's parameter; 0: physical cores"),
    "temperature": Option("number", "honoured", "0 is greedy"),
    "top_k": Option("whole", "honoured", "0 is off"),
    "top_p": Option("number", "honoured", "1 is off"),
    "min_p": Option("number", "honoured", "0 is off"),
    "typical_p": Option("number", "honoured", "1 is off"),
    "repeat_last_n": Option("whole", "honoured", "how far penalties look back; 0 is off, -1 the whole context"),
    "repeat_penalty": Option("number", "honoured", "1 is off, and the default here"),
    "presence_penalty": Option("number", "honoured", "0 is off"),
    "frequency_penalty": Option("number", "honoured", "0 is off"),
    "seed": Option("whole", "honoured", "-1 draws one for each request"),
    "stop": Option("texts", "honoured", "may be given several times"),
    "num_keep": Option("whole", "accepted", "tokens kept when a context shifts; without a shift it has no meaning"),
    "num_batch": Option("whole", "accepted", "the engine forms its own batches; results don't depend on them"),
    "num_gpu": Option("whole", "accepted", "layers on a GPU; there are none"),
    "num_gqa": Option("whole", "accepted", "the model's file says it"),
    "main_gpu": Option("whole", "accepted", "there is no GPU to choose"),
    "numa": Option("switch", "accepted", "the system places memory"),
    "use_mmap": Option("switch", "accepted", "weights are always mapped where they can be"),
    "use_mlock": Option("switch", "accepted", "memory is not locked"),
    "low_vram": Option("switch", "accepted", "there is no GPU memory"),
    "f16_kv": Option("switch", "accepted", "see --kv-type"),
    "vocab_only": Option("switch", "accepted", "the whole model is always loaded"),
    "logits_all": Option("switch", "accepted", "the engine computes the logits that are asked for"),
    "embedding_only": Option("switch", "accepted", "every model can embed"),
    "penalize_newline": Option("switch", "accepted", "deprecated in ollama"),
    "draft_num_predict": Option("whole", "accepted", "the engine adapts the length of its drafts"),
    "mirostat_tau": Option("number", "accepted", "only mirostat reads it"),
    "mirostat_eta": Option("number", "accepted", "only mirostat reads it"),
    "mirostat": Option("whole", "refused", "no mirostat sampling; 0, off, is accepted", off=(0,)),
    "tfs_z": Option("number", "refused", "no tail-free sampling; 1, off, is accepted", off=(1,)),
}
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_last_n",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
)
_WORDS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class OllamaOptions:
    """``sampling`` are fields of SamplingParams; the rest is None where it was not given."""

    sampling: dict[str, Any] = field(default_factory=dict)
    num_ctx: int | None = None
    num_keep: int | None = None
    num_batch: int | None = None
    num_thread: int | None = None


def parse_options(options: Mapping[str, Any]) -> OllamaOptions:
    """Read ollama's options, as JSON values. A value of None is as good as none.

    Raises RequestError naming the option: an unknown name, a wrong value, or one that can't be honoured.
    """
    given = {name: _checked(name, value) for name, value in options.items() if value is not None}
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    # What stands for no limit, or no seed, must be able to lift one that a model brings along.
    if "num_predict" in given:
        sampling["max_tokens"] = given["num_predict"] if given["num_predict"] > 0 else None
    if "seed" in given:
        sampling["seed"] = given["seed"] if given["seed"] != -1 else None
    if given.get("num_ctx", 1) < 1:
        raise RequestError(f"num_ctx must be a whole number of at least 1, found {given['num_ctx']}")
    return OllamaOptions(
        sampling, given.get("num_ctx"), given.get("num_keep"), given.get("num_batch"), given.get("num_thread") or None
    )


def parameter_from_text(name: str, text: str) -> Any:
    """The value that a Modelfile spells. Raises RequestError naming the parameter."""
    option = _option(name)
    if option.kind == "texts":
        return [text]
    if option.kind == "switch":
        value: Any = _WORDS.get(text.strip().lower(), text)
    else:
        try:
            value = int(text) if option.kind == "whole" else float(text)
        except ValueError:
            value = text
    return _checked(name, value)


def parameters_from_text(parameters: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A Modelfile's parameters as JSON values; ``stop`` is collected, of others the last one holds."""
    values: dict[str, Any] = {}
    for name, text in parameters:
        value = parameter_from_text(name, text)
        values[name] = values.get(name, []) + value if isinstance(value, list) else value
    return values


def _option(name: str) -> Option:
    option = OPTIONS.get(name)
    if option is None:
        near = difflib.get_close_matches(str(name).lower(), OPTIONS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(OPTIONS)}"
        raise RequestError(f"the option {name!r} is not known; {hint}")
    return option


def _checked(name: str, value: Any) -> Any:
    """The value as the option's kind. Raises RequestError."""
    option = _option(name)
    if option.kind == "texts":
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
            raise RequestError(f"{name} must be texts of at least one character, found {value!r}")
        return list(texts)
    if option.kind == "switch":
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false, found {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{name} must be a number, found {value!r}")
    if option.kind == "whole":
        if value != int(value):
            raise RequestError(f"{name} must be a whole number, found {value!r}")
        value = int(value)  # a client may write 40 as 40.0
    if option.status == "refused" and value not in option.off:
        raise RequestError(f"{name} = {value} is not supported: {option.note}; leave it out")
    return value
