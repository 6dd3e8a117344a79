"""What a Go template is made of (the package text/template/parse has the same nodes)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Dot:
    """``.``"""


@dataclass(frozen=True)
class Literal:
    """A text, number, boolean or ``nil``."""

    value: Any


@dataclass(frozen=True)
class Field:
    """``.A.B``"""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Variable:
    """``$x.A.B``; ``$`` is the data the template was given."""

    name: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chain:
    """``(pipeline).A.B``"""

    pipe: Pipe
    names: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    """The name of a function, first in its command."""

    name: str


@dataclass(frozen=True)
class Pipe:
    """Commands, each given the last one's value. The result goes to the variables ``declares`` or ``assigns`` names."""

    line: int
    commands: tuple[tuple[Operand, ...], ...]
    variables: tuple[str, ...] = ()
    declares: bool = False


Operand: TypeAlias = Dot | Literal | Field | Variable | Chain | Function | Pipe


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Action:
    pipe: Pipe


@dataclass(frozen=True)
class Branch:
    """``if`` or ``with`` (which moves the dot): the first body whose pipeline is true, or ``otherwise``."""

    kind: str
    arms: tuple[tuple[Pipe, Body], ...]
    otherwise: Body


@dataclass(frozen=True)
class Range:
    pipe: Pipe
    body: Body
    otherwise: Body


@dataclass(frozen=True)
class Jump:
    """``break`` or ``continue``."""

    kind: str


@dataclass(frozen=True)
class Call:
    """``template``, or a ``block`` where it stands."""

    line: int
    name: str
    pipe: Pipe | None


Node: TypeAlias = Text | Action | Branch | Range | Jump | Call
Body: TypeAlias = tuple[Node, ...]


@dataclass(frozen=True)
class Program:
    """A parsed template, and the ones it defines by name."""

    body: Body
    defined: dict[str, Body] = field(default_factory=dict)
