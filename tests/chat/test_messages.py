"""Messages from plain dictionaries: what is accepted, and the sentence for what is not."""

import pytest

from puna.chat.messages import Message, parse_messages
from puna.errors import RequestError


def test_plain_messages_keep_their_fields() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    raw = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "21", "tool_call_id": "c1", "name": "f"},
    ]
    messages = parse_messages(raw)
    assert [m.to_dict() for m in messages] == raw
    assert [m.text for m in messages] == ["s", "ab", "", "21"]
    assert parse_messages(messages) == messages


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ('{"x": 1}', {"x": 1}),
        ({"x": 1}, {"x": 1}),
        ("not json", "not json"),
        ("[1]", "[1]"),
        ("[" * 100000, "[" * 100000),
    ],
    ids=["json", "object", "text", "array", "deep"],
)
def test_arguments_as_json_text_become_an_object(arguments, kept) -> None:
    message = Message.from_dict(
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    )
    assert message.tool_calls[0]["function"] == {"name": "f", "arguments": kept}


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages is empty"),
        ("hello", "must be a list"),
        ({"role": "user"}, "must be a list"),
        ([{"role": "user", "content": "a"}, "b"], r"messages\[1\] must be an object"),
        ([{"content": "a"}], r"messages\[0\]\.role must be one of .* found None"),
        ([{"role": "<|eot_id|>", "content": "a"}], r"messages\[0\]\.role"),
        ([{"role": ["user"], "content": "a"}], r"messages\[0\]\.role"),
        ([Message("<|eot_id|>", "a")], r"messages\[0\]\.role"),
        ([Message("user", 3)], r"messages\[0\]\.content must be text"),
        ([{"role": "user"}], r"messages\[0\]\.content is missing"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be text"),
        ([{"role": "user", "content": [{"text": "a"}]}], r"content\[0\] must be an object with a type"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "this version takes text only"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"content\[0\]\.text must be text"),
        ([{"role": "user", "content": "a", "contents": "b"}], "unknown field 'contents'"),
        ([{"role": "tool", "content": "a", "tool_call_id": 7}], r"tool_call_id must be text"),
        ([{"role": "assistant", "tool_calls": "f"}], r"tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], r"tool_calls\[0\] must be"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}], "arguments must be"),
    ],
)
def test_malformed_messages_are_named(messages, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        parse_messages(messages)
