"""Calls read from answers cut anywhere; samples from the releases' published prompt formats."""

from __future__ import annotations

import json
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.chat.tools import (
    TextDelta,
    ThinkingStream,
    ToolCallArguments,
    ToolCallStart,
    ToolCallStream,
    ToolFormat,
    collect,
)

NAMES = ("get_weather", "trending_songs", "get_user_info", "brave_search", "f")
LLAMA = ToolFormat("llama_json", {"<|python_tag|>": 128010}, True, True, False, True)
TAGS = ToolFormat("tags", {}, False, False, False, False)

# (format, tools beside NAMES, answer, content, calls)
SAMPLES = [
    (LLAMA, (), "Hello { x } [1, 2] <|python", "Hello { x } [1, 2] <|python", []),
    (LLAMA, (), " \n ", " \n ", []),
    (
        LLAMA,
        (),
        '<|python_tag|>{\n    "type": "function",\n    "name": "trending_songs",\n    "parameters": {\n'
        '        "n": "10",\n        "genre": "all"\n    }\n}',
        "",
        [("trending_songs", {"n": "10", "genre": "all"})],
    ),
    (
        LLAMA,
        (),
        '<|python_tag|>brave_search.call(query="latest price of 1oz gold")',
        "",
        [("brave_search", {"query": "latest price of 1oz gold"})],
    ),
    (
        LLAMA,
        ("code_interpreter",),
        '<|python_tag|>def f(n):\n    return "7" if n <= 1 else [f(n=1)]\n',
        "",
        [("code_interpreter", {"code": 'def f(n):\n    return "7" if n <= 1 else [f(n=1)]\n'})],
    ),
    (LLAMA, (), "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (
        LLAMA,
        (),
        "[get_weather(city='San Francisco', metric='celsius'), get_weather(city='Seattle', metric='celsius')]",
        "",
        [
            ("get_weather", {"city": "San Francisco", "metric": "celsius"}),
            ("get_weather", {"city": "Seattle", "metric": "celsius"}),
        ],
    ),
    (
        LLAMA,
        (),
        "[get_user_info(user_id=7890, special='black')]",
        "",
        [("get_user_info", {"user_id": 7890, "special": "black"})],
    ),
    (
        LLAMA,
        (),
        "<|python_tag|>[f(a=True, c=(1, -2.5e3, .5, 0x1F, 1_000), d={'k': [\"it's\", 'q\"\\'\\x41\\101\\n']},)]",
        "",
        [("f", {"a": True, "c": [1, -2.5e3, 0.5, 31, 1000], "d": {"k": ["it's", "q\"'AA\n"]}})],
    ),
    (
        LLAMA,
        (),
        'Let me see.\n{"name": "f", "parameters": {"s": "a\\"}{\\u00e9\\ud83d\\ude00"}}; '
        '{"name": "f", "parameters": {}}\n',
        "Let me see.\n",
        [("f", {"s": 'a"}{é\U0001f600'}), ("f", {})],
    ),
    (
        LLAMA,
        (),
        '{"parameters": {"x": [{}]}, "name": "f"} done',
        " done",
        [("f", {"x": [{}]})],
    ),
    (
        LLAMA,
        (),
        '{"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}',
        "",
        [("f", {"x": 1})],
    ),
    (
        LLAMA,
        (),
        '{"name": "unknown", "parameters": {}} [unknown(x=1)] {"city": "Paris"}',
        '{"name": "unknown", "parameters": {}} [unknown(x=1)] {"city": "Paris"}',
        [],
    ),
    (TAGS, (), '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    (
        TAGS,
        (),
        '<tool_call>[{"name": "f", "arguments": {"x": 1}}, {"name": "get_weather", "arguments": {"city": "Oslo"}}]'
        "</tool_call>",
        "",
        [("f", {"x": 1}), ("get_weather", {"city": "Oslo"})],
    ),
    (
        TAGS,
        (),
        '\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>\n{"arguments": {"x": 2}, '
        '"name": "f"}\n</tool_call>\nDone.',
        "\nDone.",
        [("f", {"x": 1}), ("f", {"x": 2})],
    ),
    (TAGS, (), "<tool_call>[]</tool_call> <tool_", "<tool_call>[]</tool_call> <tool_", []),
    (TAGS, (), "a <tool_call>{'x'}</tool_call> b", "a <tool_call>{'x'}</tool_call> b", []),
]


def stream(tool_format: ToolFormat, more: tuple[str, ...] = ()) -> ToolCallStream:
    ids = count()
    return ToolCallStream(tool_format, (*NAMES, *more), lambda: f"call_{next(ids)}")


def read(reader: ToolCallStream, pieces: list[str]):
    deltas = [delta for piece in pieces for delta in reader.push(piece)] + reader.finish()
    return collect(deltas)


@pytest.mark.parametrize(("tool_format", "more", "answer", "content", "calls"), SAMPLES)
def test_samples_at_every_cut(tool_format, more, answer, content, calls) -> None:
    cuts = [[answer[:i], answer[i:]] for i in range(len(answer) + 1)]
    for pieces in [*cuts, list(answer)]:
        reader = stream(tool_format, more)
        text, found = read(reader, pieces)
        assert text == content, pieces
        assert [(call.name, json.loads(call.arguments)) for call in found] == calls, pieces
        assert [call.id for call in found] == [f"call_{i}" for i in range(len(calls))]
        assert not reader.broken


def test_arguments_come_while_they_are_written() -> None:
    reader = stream(LLAMA)
    assert reader.push('{"name": "f", "parameters": ') == []
    assert reader.push('{"x": "ab') == [ToolCallStart(0, "call_0", "f"), ToolCallArguments(0, '{"x": "ab')]
    assert reader.push("c") == [ToolCallArguments(0, "c")]
    assert reader.push('", "n": 1') == [ToolCallArguments(0, '", "n": ')]
    assert reader.push("2}") == [ToolCallArguments(0, "12}")]
    assert reader.push("} ok") == [TextDelta(" ok")]
    assert reader.finish() == []


@pytest.mark.parametrize(
    ("answer", "content", "arguments"),
    [
        ('{"name": "f", "parameters": {"a": 1, "b": oops}} end', " oops}} end", '{"a": 1, "b": '),
        ('{"name": "f", "parameters": {"path": "/home/x', "", '{"path": "/home/x'),
        ('{"name": "f", "parameters": {"n": 12e', "", '{"n": 12e'),
        ("[f(a='x', b=y)]", ", b=y)]", '{"a": "x"'),
        ("<|python_tag|>[f(a='x", "", '{"a": "x'),
    ],
)
def test_arguments_that_break_off_are_marked(answer, content, arguments) -> None:
    reader = stream(LLAMA)
    text, [call] = read(reader, list(answer))
    assert (text, call.arguments) == (content, arguments)
    assert reader.broken == {0}


def test_numbers_and_depth_that_no_client_could_read_are_content() -> None:
    for value in ("9" * 5000, "[" * 5000, '{"a":' * 5000):
        answer = f'{{"parameters": {{"x": {value}}}, "name": "f"}}'
        text, calls = read(stream(LLAMA), [answer])
        assert (text, calls) == (answer, [])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
arguments = st.dictionaries(st.text(), values, max_size=4)
python_arguments = st.dictionaries(st.from_regex(r"[a-z_]\w{0,9}", fullmatch=True), values, max_size=4)


def pieces_of(data: st.DataObject, text: str) -> list[str]:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(st.data(), st.lists(arguments, min_size=1, max_size=3), st.booleans())
def test_any_json_arguments(data, given_arguments, ascii_only) -> None:
    objects = [json.dumps({"name": "f", "arguments": each}, ensure_ascii=ascii_only) for each in given_arguments]
    listed = f"<tool_call>[{', '.join(objects)}]</tool_call>"
    for tool_format, answer in ((LLAMA, "; ".join(objects)), (TAGS, listed)):
        text, calls = read(stream(tool_format), pieces_of(data, answer))
        assert text == ""
        assert [json.loads(call.arguments) for call in calls] == given_arguments


@given(st.data(), st.lists(python_arguments, min_size=1, max_size=3))
def test_any_python_arguments(data, given_arguments) -> None:
    """repr is Python's own writer of literals."""
    calls_text = [f"f({', '.join(f'{key}={value!r}' for key, value in each.items())})" for each in given_arguments]
    text, calls = read(stream(LLAMA), pieces_of(data, f"[{', '.join(calls_text)}]"))
    assert text == ""
    assert [json.loads(call.arguments) for call in calls] == given_arguments


WORDS = [
    *(
        "<|python_tag|>",
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "parameters": ',
        '{"name": "f", "arguments": {',
        "f(",
    ),
    *(
        '"name"',
        '"f"',
        '"parameters": {',
        "[f(x=",
        "'a",
        '"',
        "'",
        "\\",
        "\\u12",
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        ":",
        ",",
    ),
    *("1e", "9" * 401, "true", "None", " ", "\n", ";", "é", "x=", "get_weather.call(", "code"),
]


@given(st.data(), st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=30), st.booleans())
def test_hostile_text(data, words, code) -> None:
    """Never an error; cut anywhere, the same; without a call, all of it is content; whole calls are JSON objects."""
    answer = "".join(words)
    for tool_format in (LLAMA, TAGS):
        more = ("code_interpreter",) if code else ()
        whole, cut = stream(tool_format, more), stream(tool_format, more)
        result = read(whole, [answer])
        assert read(cut, pieces_of(data, answer)) == result
        assert cut.broken == whole.broken
        text, calls = result
        if not calls:
            assert text == answer
        for i, call in enumerate(calls):
            if i not in whole.broken:
                assert isinstance(json.loads(call.arguments), dict)


THOUGHTS = [
    (False, "<think>\nHm, 1 < 2.\n</think>\n\nYes.", "Hm, 1 < 2.", "Yes."),
    (True, "\nHm, </thin\n\n</think>\n\nYes </think>.", "Hm, </thin", "Yes </think>."),
    (False, "No <think>x</think>", "", "No <think>x</think>"),
    (False, " <thin", "", " <thin"),
    (False, "<think>\n\n</think>\n\nYes", "", "Yes"),
    (True, "never ends </th", "never ends </th", ""),
]


@pytest.mark.parametrize(("opened", "answer", "thinking", "content"), THOUGHTS)
def test_thinking_at_every_cut(opened, answer, thinking, content) -> None:
    for pieces in [*([answer[:i], answer[i:]] for i in range(len(answer) + 1)), list(answer)]:
        reader = ThinkingStream(opened)
        deltas = [delta for piece in pieces for delta in reader.push(piece)] + reader.finish()
        texts = [delta.text for delta in deltas if isinstance(delta, TextDelta)]
        thoughts = [delta.text for delta in deltas if not isinstance(delta, TextDelta)]
        assert ("".join(thoughts), "".join(texts)) == (thinking, content), pieces
