"""Modelfiles: the text from which a model is made, in ollama's format, read and written.

Source: ollama's documentation of the Modelfile. One instruction a line; a value in quotes, or in three of them, goes on
over lines up to the one that ends with the same quotes. There are no escapes.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from puna.errors import StoreError
from puna.store.manifest import MESSAGE_ROLES

INSTRUCTIONS = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE")
_LINE = re.compile(r"[ \t]*(\S+)[ \t]*(.*)", re.DOTALL)
_TRIPLE = '"""'


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says. ``from_`` is a stored model's name or a path; parameters are (name, text) in order."""

    from_: str
    parameters: tuple[tuple[str, str], ...] = ()
    template: str | None = None
    system: str | None = None
    adapters: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()


def parse_modelfile(text: str, where: str = "Modelfile") -> Modelfile:
    """Read a Modelfile; of TEMPLATE and SYSTEM the last one holds. Raises StoreError naming the line and the remedy."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    froms: list[str] = []
    template = system = None
    parameters, adapters, licences, messages = [], [], [], []
    at = 0
    while at < len(lines):
        start, line = at + 1, lines[at].lstrip(" \t")
        at += 1
        if not line.strip(" \t") or line.startswith("#"):
            continue
        word, rest = _split(line)
        instruction = word.upper()
        first = ""
        if instruction in ("PARAMETER", "MESSAGE"):
            first, rest = _split(rest)
        elif instruction not in INSTRUCTIONS:
            raise _error(where, start, f"unknown instruction {word[:40]!r}; {_near(instruction)}")
        if not rest:
            raise _error(where, start, f"{instruction} needs a value; {_usage(instruction)}")
        # Only what begins with a quote goes on over lines.
        while (value := _unquoted(rest)) is None:
            if at == len(lines):
                raise _error(where, start, "the quotes that open here are never closed; end a line with the same ones")
            rest += "\n" + lines[at]
            at += 1
        if instruction == "FROM":
            froms.append(value)
            if len(froms) > 1:
                raise _error(where, start, "a second FROM; keep one, and name a split model by its folder")
        elif instruction == "PARAMETER":
            parameters.append((first.lower(), value))
        elif instruction == "TEMPLATE":
            template = value
        elif instruction == "SYSTEM":
            system = value
        elif instruction == "ADAPTER":
            adapters.append(value)
        elif instruction == "LICENSE":
            licences.append(value)
        else:
            if first.lower() not in MESSAGE_ROLES:
                raise _error(where, start, f"the role {first[:40]!r} is not one of {', '.join(MESSAGE_ROLES)}")
            messages.append((first.lower(), value))
    if not froms or not froms[0]:
        raise StoreError(f"{where} has no FROM; begin it with FROM and a model's name, a .gguf file or a folder")
    return Modelfile(froms[0], tuple(parameters), template, system, tuple(adapters), tuple(licences), tuple(messages))


def write_modelfile(modelfile: Modelfile) -> str:
    """The text that ``parse_modelfile`` reads as the same. Raises StoreError for a value that no quotes can hold."""
    lines = [f"FROM {_quoted(modelfile.from_)}"]
    if modelfile.template is not None:
        lines.append(f"TEMPLATE {_quoted(modelfile.template)}")
    if modelfile.system is not None:
        lines.append(f"SYSTEM {_quoted(modelfile.system)}")
    lines += [f"PARAMETER {name} {_quoted(value)}" for name, value in modelfile.parameters]
    lines += [f"ADAPTER {_quoted(path)}" for path in modelfile.adapters]
    lines += [f"MESSAGE {role} {_quoted(content)}" for role, content in modelfile.messages]
    lines += [f"LICENSE {_quoted(text)}" for text in modelfile.licences]
    return "\n".join(lines) + "\n"


def _split(line: str) -> tuple[str, str]:
    match = _LINE.fullmatch(line)
    return (match[1], match[2]) if match else ("", "")


def _unquoted(text: str) -> str | None:
    """The value that is spelled, or None while its quotes are open."""
    stripped = text.strip(" \t\n\r")
    for quotes in (_TRIPLE, '"'):
        if stripped.startswith(quotes):
            whole = len(stripped) >= 2 * len(quotes) and stripped.endswith(quotes)
            return stripped[len(quotes) : -len(quotes)] if whole else None
    return stripped


def _quoted(value: str) -> str:
    """The plainest spelling that is read back as the value. Raises StoreError when there is none."""
    for quotes in ("", '"', _TRIPLE):
        spelled = f"{quotes}{value}{quotes}"
        lines = spelled.split("\n")
        early = any(_unquoted("\n".join(lines[:count])) is not None for count in range(1, len(lines)))
        if spelled.strip(" \t") and not early and _unquoted(spelled) == value and "\r" not in value:
            return spelled
    raise StoreError(f"a Modelfile cannot hold the text {value[:40]!r}…: a line of it ends with three quotes")


def _near(instruction: str) -> str:
    near = difflib.get_close_matches(instruction, INSTRUCTIONS, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(INSTRUCTIONS)}"


def _usage(instruction: str) -> str:
    example = {
        "FROM": "FROM smollm2",
        "PARAMETER": "PARAMETER temperature 0.7",
        "MESSAGE": "MESSAGE user Hello",
        "ADAPTER": "ADAPTER ./adapter-folder",
    }.get(instruction, f'{instruction} """text"""')
    return f"as in `{example}`"


def _error(where: str, line: int, problem: str) -> StoreError:
    return StoreError(f"{where}, line {line}: {problem}")
