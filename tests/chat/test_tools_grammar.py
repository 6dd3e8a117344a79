"""Constrained calls: random walks through a grammar, judged by jsonschema; and texts that it must refuse."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from puna.chat.builtin import CHATML
from puna.chat.template import ChatTemplate
from puna.chat.tools import (
    Tool,
    ToolCallStream,
    ToolChoice,
    ToolFormat,
    check_tools,
    collect,
    tool_format,
    tool_grammar,
)
from puna.engine.constraint import ConstraintCompiler
from puna.errors import RequestError
from puna.tokenizer import Tokenizer, load_tokenizer

TOOLS = [
    Tool(
        "get_weather",
        parameters={
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 3, "maximum": 70}},
        },
        strict=True,
    ),
    Tool(
        "math.add-up",
        parameters={
            "type": "object",
            "properties": {
                "unit": {"enum": ["a", "b"]},
                "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
            },
            "required": ["unit"],
            "additionalProperties": False,
        },
    ),
]
NAMES = [tool.name for tool in TOOLS]
LLAMA = ToolFormat("llama_json", {"<|python_tag|>": 128010}, True, True, False, True)
PYTHONIC = ToolFormat("pythonic", {}, True, True, True, False)
HERMES = ToolFormat("tags", {}, True, True, True, False)
HERMES_TOKENS = ToolFormat("tags", {"<tool_call>": 128011, "</tool_call>": 128012}, True, True, True, False)
LISTED = ToolFormat("tags", {}, False, False, False, False)
FORMATS = {
    "llama": LLAMA,
    "pythonic": PYTHONIC,
    "hermes": HERMES,
    "hermes with control tokens": HERMES_TOKENS,
    "listed": LISTED,
}


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "tokenizers" / "llama3.tokenizer.model")


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)


def seen(ids: list[int], tokenizer: Tokenizer, form: ToolFormat) -> str:
    """The text that the reader of calls gets: control tokens are skipped, save for those that the format asks for."""
    markers = {token: marker.encode() for marker, token in form.visible_special_tokens.items()}
    assert all(token in markers for token in ids if tokenizer.is_special(token))
    return b"".join(markers.get(token) or tokenizer.token_bytes(token) for token in ids).decode("utf-8", "replace")


def walk(state, tokenizer: Tokenizer, rng: random.Random, begin: list[int]) -> list[int] | None:
    """Random tokens until the answer may end; None when it is still open after many."""
    for token in begin:
        state.accept(token)
    ids = list(begin)
    while len(ids) < 400:
        if state.complete:
            return ids
        allowed = np.flatnonzero(np.unpackbits(state.allowed().view(np.uint8), bitorder="little"))
        going_on = allowed[~np.isin(allowed, list(tokenizer.eos_ids))]
        if len(going_on) < len(allowed) and (not len(going_on) or rng.random() < 0.5):
            return ids
        ids.append(int(rng.choice(going_on)))
        state.accept(ids[-1])
    return None


def check(ids: list[int], tokenizer: Tokenizer, form: ToolFormat):
    reader = ToolCallStream(form, NAMES)
    text = seen(ids, tokenizer, form)
    content, calls = collect(reader.push(text) + reader.finish())
    assert not reader.broken
    return content, calls


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("choice", [ToolChoice("required"), ToolChoice("required", "math.add-up")], ids=str)
def test_required_calls_fit_their_schemas(name, choice, tokenizer, compiler) -> None:
    form, rng = FORMATS[name], random.Random(5)
    schemas = {tool.name: dict(tool.parameters) for tool in TOOLS}
    for parallel in (True, False):
        constraint = compiler.lark(tool_grammar(form, TOOLS, choice, parallel) or "")
        walks = [walk(constraint.start(), tokenizer, rng, []) for _ in range(8)]
        whole = [ids for ids in walks if ids is not None]
        assert len(whole) > 3
        numbers = set()
        for ids in whole:
            content, calls = check(ids, tokenizer, form)
            assert content == ""
            numbers.add(len(calls))
            for call in calls:
                assert choice.name in (None, call.name)
                jsonschema.validate(json.loads(call.arguments), schemas[call.name])
        assert 0 not in numbers
        assert max(numbers) > 1 if parallel else numbers == {1}


BEGINNINGS = {"llama": 'Well {"name"', "pythonic": '{"name"'}


@pytest.mark.parametrize("name", FORMATS)
def test_free_answers_hold_strict_calls(name, tokenizer, compiler) -> None:
    form, rng = FORMATS[name], random.Random(6)
    constraint = compiler.lark(tool_grammar(form, TOOLS, ToolChoice("auto")) or "")
    begin = tokenizer.encode(BEGINNINGS.get(name, "Well <tool_call>"))
    if name == "hermes with control tokens":
        begin = [*tokenizer.encode("Well "), 128011]
    strict = 0
    for _ in range(10):
        ids = walk(constraint.start(), tokenizer, rng, begin)
        if ids is None:
            continue
        content, calls = check(ids, tokenizer, form)
        assert content == ("Well " if name != "pythonic" else "")
        assert calls
        for call in calls:
            if call.name == "get_weather":
                jsonschema.validate(json.loads(call.arguments), dict(TOOLS[0].parameters))
                strict += 1
    assert strict > 0


def accepts(constraint, ids: list[int], tokenizer: Tokenizer) -> bool:
    """Whether these tokens may be written, and the answer end there."""
    state = constraint.start()
    for token in ids:
        if state.complete or not state.allowed()[token // 32] >> np.uint32(token % 32) & 1:
            return False
        state.accept(token)
    return state.complete or any(
        state.allowed()[token // 32] >> np.uint32(token % 32) & 1 for token in tokenizer.eos_ids
    )


FREE = ["Hello", "", "{x} [1, 2] {\"city\": 1} get_weather(city='x')", "a < b <tool> [other(x=1)]\n\n"]
CALLS = {
    "llama": [
        '{"name": "get_weather", "parameters": {"city": 1}}',
        '{"type": "function", "name": "get_weather", "parameters": {"city": "x"}}',
        '{ "name": "get_weather", "parameters": {"city": 1}}',
        '{"parameters": {"city": 1}, "name": "get_weather"}',
        '{"n\\u0061me": "get_weather", "parameters": {"city": 1}}',
        "[ get_weather(city=1)]",
        "[get_weather.call(city=1)]",
        "<|python_tag|>get_weather(city=1)",
    ],
    "listed": ['<tool_call>[{"name": "get_weather", "arguments": {"city": 1}}]</tool_call>'],
}


@pytest.mark.parametrize("name", CALLS)
def test_free_answers_may_say_anything_but_misfitting_calls(name, tokenizer, compiler) -> None:
    form = FORMATS[name]
    constraint = compiler.lark(tool_grammar(form, TOOLS, ToolChoice("auto")) or "")
    for text in FREE:
        assert accepts(constraint, tokenizer.encode(text), tokenizer), text
    for text in CALLS[name]:
        for begin in ("", "Well, "):
            reader = ToolCallStream(form, NAMES)
            assert collect(reader.push(text) + reader.finish())[1], "the stream must take this for a call"
            assert not accepts(constraint, tokenizer.encode(begin + text), tokenizer), text


def test_a_call_after_the_control_token(tokenizer, compiler) -> None:
    constraint = compiler.lark(tool_grammar(LLAMA, TOOLS, ToolChoice("auto")) or "")
    fitting = tokenizer.encode('{"name": "get_weather", "parameters": {"city": "Oslo"}}')
    assert accepts(constraint, [128010, *fitting], tokenizer)
    assert not accepts(constraint, [128012, *fitting], tokenizer)
    assert not accepts(constraint, [128010, *tokenizer.encode("print(1)")], tokenizer)


def test_nothing_is_enforced_unless_asked_for() -> None:
    lax = [Tool("f")]
    assert tool_grammar(LLAMA, lax, ToolChoice("auto")) is None
    assert tool_grammar(LLAMA, TOOLS, ToolChoice("none")) is None


def test_a_schema_that_cannot_be_enforced_is_refused(compiler) -> None:
    raw = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "strung"}}}}
    [tool] = check_tools([{"type": "function", "function": raw}])
    form = tool_format(ChatTemplate(CHATML), type("Vocabulary", (), {"special_tokens": {}})())
    with pytest.raises(RequestError, match="grammar"):
        compiler.lark(tool_grammar(form, [tool], ToolChoice("required")) or "")
