"""From a conversation to token ids, so that a control token can only come from the template.

The template is rendered twice: as it is, and with private-use characters around what users wrote. Where the second, without
its marks, equals the first, every character's origin is known. Control tokens are taken only from the template's own
characters; the stretches between them are encoded whole, as plain text, so that no border changes how words are cut.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from puna.chat.messages import Message, parse_messages
from puna.chat.template import ChatTemplate
from puna.errors import RequestError
from puna.tokenizer import Tokenizer

_PRIVATE_USE = range(0xF0000, 0x10FFFE)
_MARKED_FIELDS = ("content", "reasoning_content")


@dataclass(frozen=True)
class Piece:
    """One token of a prompt: its id, its text, and where it came from.

    ``origin`` is ``bos``, ``special`` (a control token the template wrote), ``template`` (plain text the template wrote),
    ``messages[i].content``, or ``unknown`` where the template rewrote the messages beyond recognition. A token that
    crosses a border counts to where it begins.
    """

    id: int
    text: str
    origin: str


@dataclass(frozen=True)
class Prompt:
    """``text`` as the template wrote it, and the ``ids`` that the model reads."""

    text: str
    ids: list[int]
    _explain: Callable[[], list[Piece]] = field(repr=False, compare=False)

    @cached_property
    def pieces(self) -> list[Piece]:
        """Every token with its origin, for people to read."""
        return self._explain()


@dataclass(frozen=True)
class _Marked:
    """A rendered text. ``spans`` are (start, end, origin) of what users wrote, None when unknown; ``quoted`` is where in
    the text users wrote the spelling of a control token."""

    text: str
    spans: list[tuple[int, int, str]] | None
    quoted: frozenset[int]


def render_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message | Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
) -> Prompt:
    """Render and encode a conversation. It begins with BOS exactly once if the template writes BOS or the model wants it.

    Raises RequestError for malformed messages, TemplateError when the template rejects or fails on them.
    """
    plain = [_as_text(message) for message in parse_messages(messages)]
    inputs = {"messages": plain, "tools": tools, "documents": documents, **variables}

    def render(given: Mapping[str, Any]) -> str:
        return template.render(
            add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message, **given
        )

    control = _alternatives(tokenizer.special_tokens)
    marked = _render_marked(render, inputs, control)
    segments = list(_segments(marked, control, tokenizer.special_tokens))
    bos = tokenizer.bos_id
    while bos is not None and [token for _start, token in segments[:2]] == [bos, bos]:
        del segments[0]
    encoded = tokenizer.encode_segments([segment for _start, segment in segments])
    ids = [token for part in encoded for token in part]
    if bos is not None and tokenizer.add_bos and ids[:1] != [bos]:
        ids.insert(0, bos)
    return Prompt(marked.text, ids, lambda: list(_pieces(marked, segments, encoded, ids, tokenizer)))


def _as_text(message: Message) -> dict[str, Any]:
    """As a dictionary whose content is one text: not every template can read parts."""
    raw = message.to_dict()
    return {**raw, "content": message.text} if isinstance(message.content, list) else raw


def _alternatives(tokens: Iterable[str]) -> str:
    """A pattern of any of the tokens, longest first, so that the longest spelling at a place wins."""
    spelled = sorted((token for token in tokens if token), key=len, reverse=True)
    return "|".join(map(re.escape, spelled)) or "(?!)"


def _render_marked(
    render: Callable[[Mapping[str, Any]], str], inputs: Mapping[str, Any], control: str
) -> _Marked:
    """Render with marks; if the template's work depends on them, with fewer."""
    text = render(inputs)
    messages = inputs["messages"]
    used = set().union(text, *_strings(inputs))
    free = [chr(code) for code in _PRIVATE_USE if chr(code) not in used][: len(messages) + 2]
    if len(free) < len(messages) + 2:
        raise RequestError(f"a conversation of {len(messages)} messages is too long to be prepared")
    quote, close, *opens = free
    anywhere = re.compile(f"(?=(?:{control}))")

    def quoted(value: Any) -> Any:
        return _map_strings(value, lambda string: anywhere.sub(quote, string))

    def wrapped(string: str, opening: str) -> str:
        # Inside the outer whitespace, which templates like to trim.
        core = string.strip()
        return string.replace(core, f"{opening}{quoted(core)}{close}", 1) if core else string

    around = {
        **quoted({key: value for key, value in inputs.items() if key not in ("bos_token", "eos_token")}),
        "messages": [
            {
                key: wrapped(value, opens[i]) if key in _MARKED_FIELDS and isinstance(value, str) else quoted(value)
                for key, value in message.items()
            }
            for i, message in enumerate(messages)
        ],
    }
    origins = {opening: f"messages[{i}].content" for i, opening in enumerate(opens)}
    for given, known in ((around, origins), (quoted(inputs), {})):
        try:
            marked = _read_marks(render(given), quote, close, known)
        except TemplateError:
            continue  # it may compare or parse what is marked here
        if marked is not None and marked.text == text:
            return marked
    ...
