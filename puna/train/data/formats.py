"""The formats of training data: which fields a row of each has, and what they mean.

Sources: LLaMA-Factory's data README (alpaca, ShareGPT, preference and KTO forms), OpenAI's fine-tuning guide
(``messages``), TRL's dataset formats (``prompt``/``completion``, ``chosen``/``rejected``, ``label``), Anthropic's
hh-rlhf.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puna.chat.messages import Message
from puna.errors import DataError
from puna.train.data.conversations import Turn, conversation, parse_tools, parse_turns, text_of
from puna.train.data.examples import Continuation, Conversation, Example, Labelled, Preference, Sample
from puna.train.data.rows import Row

_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Format:
    """``fields`` are those by which a row is known, ``kind`` what it is for; ``parse`` raises DataError."""

    name: str
    fields: tuple[str, ...]
    kind: str
    parse: Callable[[Row], Example]


def parse_example(form: Format, row: Row) -> Example:
    """What a row means. Raises DataError naming the field."""
    for field in _MEDIA:
        if row.get(field):
            raise DataError(f"{field}: this version trains on text only; take the field out, or the row")
    return form.parse(row)


def detect(rows: Sequence[Row]) -> Format:
    """The format of a file, from its first rows. Raises DataError naming the fields that were found."""
    if not rows:
        raise DataError("the file holds no rows")
    # Some fields are in some rows only: history, system, tools.
    present = {field for row in rows for field, value in row.items() if value is not None}
    if "kto_tag" in present:
        present.add("label")
    for form in FORMATS.values():
        if present.issuperset(form.fields) and (form.name != "hh-rlhf" or _looks_like_hh(rows)):
            return form
    raise DataError(
        f"the rows have the fields {', '.join(sorted(present)) or '(none)'}, which no format has; rename them to those "
        "of one (--column output=response reads the field response as output): "
        + "; ".join(
            f"{form.name} ({', '.join(form.fields)})" for form in FORMATS.values() if form.kind in ("sft", "text")
        )
        + "; with chosen and rejected for a preference, with label for KTO"
    )


def format_named(name: str) -> Format:
    """Raises DataError with the nearest name."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"{name!r} is no format; known: {', '.join(FORMATS)}{hint}")
    return FORMATS[name]


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """``columns``: the format's field → the file's. Raises DataError when the file's is absent."""
    if not columns:
        return row
    for field, source in columns.items():
        if source not in row:
            raise DataError(f"the row has no field {source}, which is to be read as {field}")
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken}
    return {**kept, **{field: row[source] for field, source in columns.items()}}


def _text(row: Row) -> Continuation:
    text = text_of(row, "text")
    if not text.strip():
        raise DataError("text is empty")
    return Continuation(text)


def _completion(row: Row) -> Sample:
    return _answer(row, "completion")


def _answer(row: Row, field: str) -> Sample:
    """``prompt`` and an answer to it: both text, or both messages."""
    if isinstance(row.get("prompt"), str) and isinstance(row.get(field), str):
        if not row[field]:
            raise DataError(f"{field} is empty")
        return Continuation(row[field], row["prompt"])
    if isinstance(row.get("prompt"), str) or isinstance(row.get(field), str):
        raise DataError(f"prompt and {field} must both be text, or both be lists of messages")
    return _answered(parse_turns(row.get("prompt"), "prompt"), parse_turns(row.get(field), field), _tools(row))


def _alpaca(row: Row) -> Conversation:
    return _alpaca_answer(row, "output")


def _alpaca_answer(row: Row, field: str) -> Conversation:
    """``instruction`` and ``input`` are the question; ``history`` is a list of earlier [question, answer]."""
    turns: list[Turn] = []
    system = text_of(row, "system", optional=True)
    if system:
        turns.append(Turn(Message("system", system), False))
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history must be a list of [question, answer], found {type(history).__name__}")
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"history[{i}] must be [question, answer], both text, found {pair!r:.80}")
        turns += [Turn(Message("user", pair[0]), False), Turn(Message("assistant", pair[1]), True)]
    question = "\n".join(filter(None, [text_of(row, "instruction"), text_of(row, "input", optional=True)]))
    if not question.strip():
        raise DataError("instruction and input are both empty")
    answer = text_of(row, field)
    if not answer.strip():
        raise DataError(f"{field} is empty")
    return conversation([*turns, Turn(Message("user", question), False), Turn(Message("assistant", answer), True)])


def _sharegpt(row: Row) -> Conversation:
    return conversation(_with_system(row, parse_turns(row.get("conversations"), "conversations")), _tools(row))


def _messages(row: Row) -> Conversation:
    return conversation(parse_turns(row.get("messages"), "messages"), _tools(row))


def _with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    system = text_of(row, "system", optional=True)
    return [Turn(Message("system", system), False), *turns] if system else turns


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    return parse_tools(row.get("tools"))


def _answered(prompt: Sequence[Turn], answer: Sequence[Turn], tools: tuple[dict[str, Any], ...]) -> Conversation:
    """Of a prompt and its answer, only the answer is learnt."""
    return conversation([*(Turn(turn.message, False) for turn in prompt), *answer], tools)


def _preference(chosen: Sample, rejected: Sample) -> Preference:
    if chosen == rejected:
        raise DataError("chosen and rejected are the same, so there is nothing to prefer")
    return Preference(chosen, rejected)


def _alpaca_preference(row: Row) -> Preference:
    # Earlier answers are not what is compared.
    chosen, rejected = (_last_only(_alpaca_answer(row, field)) for field in ("chosen", "rejected"))
    return _preference(chosen, rejected)


def _sharegpt_preference(row: Row) -> Preference:
    return _turns_preference(row, "conversations")


def _messages_preference(row: Row) -> Preference:
    return _turns_preference(row, "messages")


def _turns_preference(row: Row, field: str) -> Preference:
    prompt, tools = _with_system(row, parse_turns(row.get(field), field)), _tools(row)
    chosen, rejected = (_answered(prompt, parse_turns(row.get(side), side), tools) for side in ("chosen", "rejected"))
    return _preference(chosen, rejected)


def _prompt_preference(row: Row) -> Preference:
    """The answers are text, messages, or whole conversations that begin with the prompt."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and _begins_with_user(chosen):
        return _pair_preference(row)
    return _preference(_answer(row, "chosen"), _answer(row, "rejected"))


def _begins_with_user(raw: list[Any]) -> bool:
    return parse_turns(raw, "chosen")[0].message.role != "assistant"


def _pair_preference(row: Row) -> Preference:
    """Two whole conversations; what they have in common at the beginning is the prompt."""
    return _from_common_prompt(
        parse_turns(row.get("chosen"), "chosen"), parse_turns(row.get("rejected"), "rejected"), _tools(row)
    )


def _from_common_prompt(
    chosen: Sequence[Turn], rejected: Sequence[Turn], tools: tuple[dict[str, Any], ...]
) -> Preference:
    shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one.message != other.message:
            break
        shared += 1
    if shared == 0:
        raise DataError("chosen and rejected begin with different messages; they must answer the same prompt")
    if shared in (len(chosen), len(rejected)):
        raise DataError("chosen and rejected do not both go on after what they have in common")
    sides = (_answered(side[:shared], side[shared:], tools) for side in (chosen, rejected))
    return _preference(*sides)


def _hh_rlhf(row: Row) -> Preference:
    """Anthropic's transcripts, in which each turn begins with ``\\n\\nHuman:`` or ``\\n\\nAssistant:``."""
    sides = []
    for side in ("chosen", "rejected"):
        before, *parts = _HH_TURN.split(text_of(row, side))
        if before.strip() or not parts:
            raise DataError(rf"{side} must begin with '\n\nHuman:' or '\n\nAssistant:'")
        roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
        sides.append(
            [
                Turn(Message(role, text.strip()), role == "assistant")
                for role, text in zip(roles, parts[1::2], strict=True)
            ]
        )
    return _from_common_prompt(sides[0], sides[1], ())


def _looks_like_hh(rows: Sequence[Row]) -> bool:
    return all(isinstance(row.get("chosen"), str) and _HH_TURN.match(row["chosen"]) for row in rows)


def _last_only(sample: Sample) -> Sample:
    if isinstance(sample, Continuation):
        return sample
    return Conversation(sample.messages, sample.trained[-1:], sample.tools)


def _labelled(parse: Callable[[Row], Sample]) -> Callable[[Row], Labelled]:
    def parse_labelled(row: Row) -> Labelled:
        field = "kto_tag" if row.get("label") is None and row.get("kto_tag") is not None else "label"
        label = row.get(field)
        # CSV has no booleans.
        words: dict[Any, bool] = {"true": True, "false": False}
        if isinstance(label, str) and label.strip().lower() in words:
            label = words[label.strip().lower()]
        if not isinstance(label, bool):
            raise DataError(
                f"{field} must be true (a good answer) or false, found {label!r:.80}; name the format to read the rows "
                "without labels"
            )
        return Labelled(_last_only(parse(row)), label)

    return parse_labelled


def _formats() -> dict[str, Format]:
    """In the order in which they are tried: those with more fields go first."""
    plain: list[tuple[str, tuple[str, ...], Callable[[Row], Sample]]] = [
        ("sharegpt", ("conversations",), _sharegpt),
        ("messages", ("messages",), _messages),
        ("alpaca", ("instruction", "output"), _alpaca),
        ("completion", ("prompt", "completion"), _completion),
    ]
    preferences: list[tuple[str, tuple[str, ...], Callable[[Row], Preference]]] = [
        ("sharegpt-preference", ("conversations",), _sharegpt_preference),
        ("messages-preference", ("messages",), _messages_preference),
        ("alpaca-preference", ("instruction",), _alpaca_preference),
        ("prompt-preference", ("prompt",), _prompt_preference),
        ("hh-rlhf", (), _hh_rlhf),
        ("preference", (), _pair_preference),
    ]
    found = [Format(name, (*fields, "chosen", "rejected"), "preference", parse) for name, fields, parse in preferences]
    found += [Format(f"{name}-kto", (*fields, "label"), "kto", _labelled(parse)) for name, fields, parse in plain]
    found += [Format(name, fields, "sft", parse) for name, fields, parse in plain]
    found.append(Format("text", ("text",), "text", _text))
    return {form.name: form for form in found}


FORMATS: dict[str, Format] = _formats()
