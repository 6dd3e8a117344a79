"""Grammars for answers whose calls must fit the tools' schemas, in llguidance's variant of Lark's syntax."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from puna.chat.tools.formats import CLOSE_TAG, OPEN_TAG, PYTHON_TAG, ToolFormat
from puna.chat.tools.tool import Tool, ToolChoice

# A small model may go on with calls, or with blanks, until the context is full.
MAX_CALLS = 16
_BLANKS = r"[ \n]{0,12}"

# The keys with which ToolCallStream lets a call begin, and a backslash, which may spell them.
_CALL_OBJECT = r"""\{[ \t\r\n]*"((name|type|id|function|parameters|arguments)"|[^"]*\\)"""


def tool_grammar(
    tool_format: ToolFormat, tools: Sequence[Tool], choice: ToolChoice, parallel: bool = True
) -> str | None:
    """The grammar of the answers that are allowed; None where every answer is.

    ``required``: one call or, with ``parallel``, several, in the format's JSON form, whose arguments fit the schemas.
    ``auto``, where a tool is strict: any text, then perhaps such calls, which end the answer. Whatever the stream of
    this format would read as a call is ruled out of the text. Tools that are not strict are then held to an object.
    """
    parts = _tags if tool_format.style == "tags" else _llama
    if choice.mode == "required":
        chosen = [tool for tool in tools if choice.name in (None, tool.name)]
        answer = parts(tool_format, chosen, MAX_CALLS if parallel else 1)
        return _grammar([f"start: {answer.calls}", *_call_rules(chosen, answer.key, enforced=True)])
    if choice.mode == "auto" and any(tool.strict for tool in tools):
        answer = parts(tool_format, tools, MAX_CALLS if parallel else 1)
        text = rf"TEXT: /(.|\n)*/ & ~/(.|\n)*({answer.not_text})(.|\n)*/"
        rules = [f"start: TEXT | {answer.text_then_calls}", answer.begin, text]
        return _grammar([*filter(None, rules), *_call_rules(tools, answer.key, enforced=False)])
    return None


@dataclass(frozen=True)
class _Answer:
    """The parts of a format's grammar. ``call`` stands for what follows ``{"name"`` in a call, and is defined later.

    ``begin`` is the rule, if any, for text up to the point from which a call follows.
    """

    key: str
    calls: str
    text_then_calls: str
    not_text: str
    begin: str | None


def _llama(tool_format: ToolFormat, tools: Sequence[Tool], most: int) -> _Answer:
    """JSON, for the Pythonic releases too: a schema has no grammar of Python values, and they read both."""
    opened = _text('{"name"')
    more = _up_to(most - 1, f"{_text('; ')} {opened} call")
    names = "|".join(re.escape(tool.name) for tool in tools)
    not_text = rf"{_CALL_OBJECT}|\[[ \t\r\n]*({names})(\.call)?\(|{re.escape(PYTHON_TAG)}"
    calls, text_then_calls = f"{opened} call {more}", f"begin call {more}"
    tag = tool_format.visible_special_tokens.get(PYTHON_TAG)
    if tag is not None:
        text_then_calls += f" | TEXT <[{tag}]> {calls}"
        calls = f"<[{tag}]>? {calls}"
    return _Answer("parameters", calls, text_then_calls, not_text, f"begin[lazy]: TEXT {opened}")


def _tags(tool_format: ToolFormat, _tools: Sequence[Tool], most: int) -> _Answer:
    """Where our own text describes the tools, it asks for a list; templates that have tags ask for a call in each."""
    opening, closing = _marker(tool_format, OPEN_TAG), _marker(tool_format, CLOSE_TAG)
    call = _text('{"name"') + " call"
    if tool_format.template_shows_tools:
        line = r"/\n?/"
        one = f"{line} {call} {line} {closing}"
        more = _up_to(most - 1, f"{line} {opening} {one}")
        rest = f"{one} {more}"
    else:
        more = _up_to(most - 1, f"{_text(', ')} {call}")
        rest = f"{_text('[')} {call} {more} {_text(']')} {closing}"
    if OPEN_TAG in tool_format.visible_special_tokens:
        return _Answer("arguments", f"{opening} {rest}", f"TEXT {opening} {rest}", re.escape(OPEN_TAG), None)
    begin = f"begin[lazy]: TEXT {opening}"
    return _Answer("arguments", f"{opening} {rest}", f"begin {rest}", re.escape(OPEN_TAG), begin)


def _call_rules(tools: Sequence[Tool], key: str, enforced: bool) -> list[str]:
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        schema = tool.parameters if enforced or tool.strict else {"type": "object"}
        bounded = json.dumps({**schema, "x-guidance": {"whitespace_pattern": _BLANKS}})
        rules.append(
            f"call_{i}: {_text(f': {json.dumps(tool.name)}, {json.dumps(key)}: ')} %json {bounded} {_text('}')}"
        )
    return rules


def _grammar(rules: Sequence[str]) -> str:
    return "\n".join(["%llguidance {}", *rules])


def _up_to(most: int, rule: str) -> str:
    return f"({rule}){{0,{most}}}" if most else ""


def _marker(tool_format: ToolFormat, marker: str) -> str:
    token = tool_format.visible_special_tokens.get(marker)
    return _text(marker) if token is None else f"<[{token}]>"


def _text(text: str) -> str:
    return json.dumps(text)
