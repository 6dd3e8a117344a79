"""From a conversation to token ids, so that a control token can only come from the template.

The template is rendered twice: as it is, and with private-use characters around what users wrote, in which numbers
stand for spelled control tokens. Where the second, with its marks taken out and the tokens put back, equals the first,
every character's origin is known. Control tokens are taken only from the template's own characters; the stretches
between them are encoded whole, as plain text, so that no border changes how words are cut.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, islice
from typing import Any

from puna.chat.messages import Message, parse_messages
from puna.chat.template import Template
from puna.errors import RequestError, TemplateError
from puna.tokenizer import Tokenizer

_PRIVATE_USE = range(0xF0000, 0x10FFFE)
_MARKED_FIELDS = ("content", "reasoning_content")
_TEMPLATE_TOKENS = ("bos_token", "eos_token")
_LAST = "\U0010ffff"


@dataclass(frozen=True)
class Piece:
    """One token of a prompt: its id, its text, and where it came from.

    ``origin`` is ``bos``, ``special`` (a control token the template wrote), ``template`` (plain text it wrote),
    ``messages[i].content``, or ``unknown`` where the template rewrote the messages beyond recognition. A token that
    crosses a border counts to where its middle lies.
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


Span = tuple[int, int, str]


@dataclass(frozen=True)
class _Marked:
    """A rendered text. ``spans`` (start, end, origin) is what users wrote, in order; None when unknown. ``quoted``
    (start, end, spelling) is where they spelled a control token."""

    text: str
    spans: list[Span] | None
    quoted: list[Span]


def render_prompt(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message | Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
) -> Prompt:
    """Render and encode a conversation. It begins with one BOS, if the template writes it or the model wants it.

    Raises RequestError for malformed messages, TemplateError when the template rejects or fails on them.
    """
    plain = [_as_text(message) for message in parse_messages(messages)]
    inputs = {"messages": plain, "tools": tools, "documents": documents, **variables}

    def render(given: Mapping[str, Any]) -> str:
        return template.render(
            add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message, **given
        )

    marked = _render_marked(render, inputs, tokenizer.special_tokens)
    segments = list(_segments(marked, tokenizer.special_tokens))
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
    render: Callable[[Mapping[str, Any]], str], inputs: Mapping[str, Any], control_tokens: Iterable[str]
) -> _Marked:
    """Render with marks; if the template's work depends on them, with fewer."""
    text = render(inputs)
    messages = inputs["messages"]
    strings = [text, *_strings(inputs)]
    free = _absent_characters(strings, len(messages) + 1)
    opens, close = free[:-1], free[-1]
    pattern = re.compile(_alternatives(control_tokens))
    stand_ins = _stand_ins({match[0] for string in strings[1:] for match in pattern.finditer(string)}, strings)

    def hidden(value: Any) -> Any:
        return _map_strings(value, lambda string: pattern.sub(lambda match: stand_ins[match[0]], string))

    def marked(string: str, opening: str) -> str:
        # Inside the outer whitespace, which templates like to trim.
        core = string.strip()
        return string.replace(core, f"{opening}{hidden(core)}{close}", 1) if core else string

    without_tokens = {key: value if key in _TEMPLATE_TOKENS else hidden(value) for key, value in inputs.items()}
    with_marks = [
        {
            key: marked(value, opening) if key in _MARKED_FIELDS and isinstance(value, str) else hidden(value)
            for key, value in message.items()
        }
        for opening, message in zip(opens, messages, strict=True)
    ]
    origins = {opening: f"messages[{i}].content" for i, opening in enumerate(opens)}
    found = _try(render, {**without_tokens, "messages": with_marks}, stand_ins, close, origins)
    if found is not None and found.text == text:
        return found
    # Only the control tokens are hidden now. Should the text still differ, it is a true rendering none the less.
    found = _try(render, without_tokens, stand_ins, close, {})
    if found is None:
        raise TemplateError("the chat template fails on a message that spells a control token")
    return found


def _absent_characters(strings: Iterable[str], needed: int) -> list[str]:
    """Private-use characters that no string holds."""
    used = set().union(*strings)
    free = list(islice((chr(code) for code in _PRIVATE_USE if chr(code) not in used), needed))
    if len(free) < needed:
        raise RequestError(f"a conversation of {needed - 1} messages is too long to be prepared")
    return free


def _stand_ins(tokens: Iterable[str], strings: Sequence[str]) -> dict[str, str]:
    """For each token a number that no string holds, of about its length: digits pass unchanged through whatever
    templates do to text (trimming, case, JSON), and spell no control token."""
    numbers = (f"{number:012d}" for number in count(710_203_040_506))
    absent = (number for number in numbers if not any(number in string for string in strings))
    return {token: next(absent).ljust(len(token), "7") for token in sorted(tokens)}


def _try(
    render: Callable[[Mapping[str, Any]], str],
    inputs: Mapping[str, Any],
    stand_ins: Mapping[str, str],
    close: str,
    origins: Mapping[str, str],
) -> _Marked | None:
    """Render, take the marks out and put the tokens back; None when the template stumbles or tears a pair of marks."""
    try:
        rendered = render(inputs)
    except TemplateError:
        return None
    tokens = {number: token for token, number in stand_ins.items()}
    parts: list[str] = []
    spans: list[Span] = []
    quoted: list[Span] = []
    at, opened = 0, None
    for part in re.split(f"([{close}{''.join(origins)}]{''.join(f'|{number}' for number in tokens)})", rendered):
        if part in origins:
            if opened is not None:
                return None
            opened = (at, origins[part])
        elif part == close:
            if opened is None:
                return None
            spans.append((opened[0], at, opened[1]))
            opened = None
        else:
            if part in tokens:
                part = tokens[part]
                quoted.append((at, at + len(part), part))
            parts.append(part)
            at += len(part)
    if opened is not None:
        return None
    return _Marked("".join(parts), spans if origins else None, quoted)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value


def _segments(marked: _Marked, ids: Mapping[str, int]) -> Iterator[tuple[int, str | int]]:
    """The text cut at the template's own control tokens: (start, plain text or token id)."""
    pattern, text = re.compile(_alternatives(ids)), marked.text
    done = search = 0
    while (match := pattern.search(text, search)) is not None:
        start, end = match.span()
        if _overlaps(marked.quoted, start, end) or _overlaps(marked.spans or [], start, end):
            search = start + 1
            continue
        if start > done:
            yield done, text[done:start]
        yield start, ids[match[0]]
        done = search = end
    if done < len(text):
        yield done, text[done:]


def _overlaps(spans: Sequence[Span], start: int, end: int) -> bool:
    before = bisect_right(spans, end - 1, key=lambda span: span[0]) - 1
    return before >= 0 and spans[before][1] > start


def _pieces(
    marked: _Marked,
    segments: Sequence[tuple[int, str | int]],
    encoded: Sequence[Sequence[int]],
    ids: Sequence[int],
    tokenizer: Tokenizer,
) -> Iterator[Piece]:
    def shown(token: int) -> str:
        return tokenizer.token_bytes(token).decode("utf-8", "replace")

    bos = tokenizer.bos_id
    if len(ids) > sum(map(len, encoded)):
        yield Piece(ids[0], shown(ids[0]), "bos")
    for number, ((start, segment), tokens) in enumerate(zip(segments, encoded, strict=True)):
        if isinstance(segment, int):
            yield Piece(segment, shown(segment), "bos" if number == 0 and segment == bos else "special")
            continue
        borders = _borders(marked, start, segment)
        # A SentencePiece vocabulary may have put a space before the text.
        at = len(segment.encode("utf-8", "replace")) - sum(len(tokenizer.token_bytes(token)) for token in tokens)
        for token in tokens:
            size = len(tokenizer.token_bytes(token))
            origin = borders[bisect_right(borders, (max(at + size // 2, 0), _LAST)) - 1][1]
            yield Piece(token, shown(token), origin)
            at += size


def _borders(marked: _Marked, start: int, segment: str) -> list[tuple[int, str]]:
    """Where, in bytes from the segment's start, which origin begins; the first is at 0."""
    if marked.spans is None:
        return [(0, "unknown")]
    borders = [(0, "template")]
    for first, last, origin in marked.spans:
        if first < start + len(segment) and last > start:
            for place, name in ((first, origin), (last, "template")):
                offset = len(segment[: max(place - start, 0)].encode("utf-8", "replace"))
                borders.append((offset, name))
    # Of several that begin at one place, the last holds.
    return sorted(dict(borders).items())
