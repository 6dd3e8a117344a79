"""From the fields of a request to sampling parameters and constraints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from puna.engine import Constraint, SamplingParams
from puna.errors import RequestError
from puna.llm import LLM
from puna.llm.bad_words import bad_words_ids
from puna.server.http_errors import FieldError
from puna.server.openai.fields import GenerationBody, JsonSchemaFormat, ResponseFormat, StructuredOutputs

# What the API documents, where neither the request nor the model's own defaults say anything.
API_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repeat_last_n": -1}
_SAME_NAME = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "allowed_token_ids",
)


def sampling_params(
    llm: LLM,
    body: GenerationBody,
    *,
    max_tokens: int | None,
    logprobs: bool,
    top_logprobs: int,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The parameters of one answer. Raises RequestError, FieldError."""
    given: dict[str, Any] = {name: getattr(body, name) for name in _SAME_NAME}
    given |= {
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "repeat_penalty": body.repetition_penalty,
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop,
        "max_tokens": max_tokens,
        "prompt_logprobs": prompt_logprobs,
        "bad_words_ids": None if body.bad_words is None else bad_words_ids(llm.tokenizer, body.bad_words),
        "logit_bias": None if body.logit_bias is None else _logit_bias(llm, body.logit_bias),
    }
    for name in ("stop_token_ids", "allowed_token_ids"):
        check_ids(llm, getattr(body, name) or (), name)
    if body.min_tokens is not None and max_tokens is not None and body.min_tokens > max_tokens:
        raise FieldError(
            f"min_tokens ({body.min_tokens}) must not exceed the {max_tokens} tokens allowed", "min_tokens"
        )
    return sampling_of(llm, {**given, "logprobs": logprobs, "top_logprobs": top_logprobs})


def sampling_of(llm: LLM, given: dict[str, Any]) -> SamplingParams:
    """Sampling parameters of which None was not given, with the model's own defaults, then the API's."""
    chosen: dict[str, Any] = {name: value for name, value in API_DEFAULTS.items() if name not in llm.defaults}
    return llm.sampling(**chosen | {name: value for name, value in given.items() if value is not None})


async def constraint_of(
    llm: LLM, response_format: ResponseFormat | None, structured: StructuredOutputs | None = None
) -> Constraint | None:
    """What the answer must look like, compiled in a worker thread. Raises FieldError."""
    formatted = None if response_format is None else _of_format(llm, response_format)
    chosen = None if structured is None else _of_structured(llm, structured)
    if formatted is not None and chosen is not None:
        raise FieldError("give either response_format or structured_outputs, not both", "structured_outputs")
    make = formatted or chosen
    if make is None:
        return None
    try:
        return await asyncio.to_thread(make)
    except RequestError as error:
        raise FieldError(str(error), "structured_outputs" if formatted is None else "response_format") from None


def _of_format(llm: LLM, wanted: ResponseFormat) -> Callable[[], Constraint] | None:
    if isinstance(wanted, JsonSchemaFormat) and wanted.json_schema.schema_ is not None:
        schema = wanted.json_schema.schema_
        return lambda: llm.constraints.json_schema(schema)
    return None if wanted.type == "text" else lambda: llm.constraints.json_object()


def _of_structured(llm: LLM, wanted: StructuredOutputs) -> Callable[[], Constraint]:
    made: list[Callable[[], Constraint]] = []
    schema, regex, choice, grammar = wanted.json_, wanted.regex, wanted.choice, wanted.grammar
    if schema is not None:
        made.append(lambda: llm.constraints.json_schema(schema))
    if regex is not None:
        made.append(lambda: llm.constraints.regex(regex))
    if choice is not None:
        made.append(lambda: llm.constraints.choice(choice))
    if grammar is not None:
        made.append(lambda: llm.constraints.grammar(grammar))
    if wanted.json_object:
        made.append(lambda: llm.constraints.json_object())
    if len(made) != 1:
        raise FieldError(
            f"structured_outputs needs exactly one of json, regex, choice, grammar and json_object, found {len(made)}",
            "structured_outputs",
        )
    return made[0]


def _logit_bias(llm: LLM, given: dict[str, float]) -> dict[int, float]:
    bias = {int(token): value for token, value in given.items()}
    check_ids(llm, list(bias), "logit_bias")
    return bias


def check_ids(llm: LLM, ids: Sequence[int], param: str) -> None:
    """Raises FieldError for a token id that the model doesn't have."""
    size = llm.config.vocab_size
    if max(ids, default=0) >= size:
        raise FieldError(f"{param}: token id {max(ids)} is outside the vocabulary of {size} tokens", param)
