"""Running a parsed Go template within bounds: steps, text made, nesting. Nothing else can be reached from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from puna.chat.gotemplate.functions import FUNCTIONS, SHORT_CIRCUIT, made
from puna.chat.gotemplate.nodes import (
    Action,
    Body,
    Branch,
    Call,
    Chain,
    Dot,
    Field,
    Function,
    Jump,
    Literal,
    Operand,
    Pipe,
    Program,
    Range,
    Text,
    Variable,
)
from puna.chat.gotemplate.values import Struct, kind_of, plain, show, truth
from puna.chat.sandbox import METER, STEP, Meter, Refused, size_of
from puna.errors import TemplateError

MAX_DEPTH = 60


class _Jump(Exception):
    """``break`` or ``continue`` on its way to its range."""


class _Break(_Jump):
    pass


class _Continue(_Jump):
    pass


@contextmanager
def bounds(inputs: Any) -> Iterator[None]:
    """What all that is executed within it may spend together; it grows with the size of what the caller gave."""
    meter = METER.set(Meter(size_of(inputs, 1 << 30)))
    try:
        yield
    finally:
        METER.reset(meter)


def execute(program: Program, data: Mapping[str, Any]) -> str:
    """The text a template makes of ``data``, within ``bounds``. Raises TemplateError naming the line."""
    run = _Run(program, data)
    try:
        run.body(program.body, data)
    except Refused as error:
        raise TemplateError(f"the chat template is not run to its end: line {run.line}: {error}") from None
    except TypeError:
        raise TemplateError(
            f"the chat template fails: line {run.line}: {run.calling} is called with the wrong number of arguments"
        ) from None
    except RecursionError:
        raise TemplateError(f"the chat template fails: line {run.line}: it is nested too deep") from None
    return "".join(run.out)


class _Run:
    def __init__(self, program: Program, data: Any) -> None:
        self.program = program
        self.out: list[str] = []
        self.variables: list[tuple[str, Any]] = [("$", data)]
        self.line = 1
        self.calling = ""
        self.depth = 0

    def body(self, nodes: Body, dot: Any) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused(f"it is nested more than {MAX_DEPTH} deep")
        known = len(self.variables)
        for node in nodes:
            METER.get().spend(STEP)
            if isinstance(node, Text):
                METER.get().spend(len(node.text))
                self.out.append(node.text)
            elif isinstance(node, Action):
                value = self.pipe(node.pipe, dot)
                if not node.pipe.variables:
                    self.out.append(made(value, show))
            elif isinstance(node, Branch):
                self.branch(node, dot)
            elif isinstance(node, Range):
                self.range(node, dot)
            elif isinstance(node, Jump):
                raise _Break if node.kind == "break" else _Continue
            else:
                self.call(node, dot)
        del self.variables[known:]
        self.depth -= 1

    def branch(self, node: Branch, dot: Any) -> None:
        known = len(self.variables)
        for pipe, body in node.arms:
            value = self.pipe(pipe, dot)
            if truth(value):
                self.body(body, value if node.kind == "with" else dot)
                break
        else:
            self.body(node.otherwise, dot)
        del self.variables[known:]

    def range(self, node: Range, dot: Any) -> None:
        known, depth = len(self.variables), self.depth
        values = self.pipe(node.pipe, dot, store=False)
        empty = True
        for key, value in _elements(values):
            empty = False
            METER.get().spend(STEP)
            names = node.pipe.variables
            for name, given in zip(names, (value,) if len(names) == 1 else (key, value), strict=False):
                self.store(name, given, node.pipe.declares)
            try:
                self.body(node.body, value)
            except _Break:
                break
            except _Continue:
                pass
            finally:
                self.depth = depth
                del self.variables[known:]
        if empty:
            self.body(node.otherwise, dot)
        del self.variables[known:]

    def call(self, node: Call, dot: Any) -> None:
        self.line = node.line
        body = self.program.defined.get(node.name)
        if body is None:
            raise Refused(f"the template {node.name!r} is not defined")
        given = None if node.pipe is None else self.pipe(node.pipe, dot)
        outer, self.variables = self.variables, [("$", given)]
        self.body(body, given)
        self.variables = outer

    def pipe(self, pipe: Pipe, dot: Any, store: bool = True) -> Any:
        self.line = pipe.line
        value: Any = None
        for i, command in enumerate(pipe.commands):
            METER.get().spend(STEP)
            value = self.command(command, dot, (value,) if i else ())
        if store:
            for name in pipe.variables:
                self.store(name, value, pipe.declares)
        return value

    def store(self, name: str, value: Any, declares: bool) -> None:
        if declares:
            self.variables.append((name, value))
            return
        for i in range(len(self.variables) - 1, -1, -1):
            if self.variables[i][0] == name:
                self.variables[i] = (name, value)
                return

    def command(self, command: tuple[Operand, ...], dot: Any, piped: tuple[Any, ...]) -> Any:
        first, rest = command[0], command[1:]
        if not isinstance(first, Function):
            if rest or piped:
                raise Refused("it gives arguments to something that is not a function")
            return self.operand(first, dot)
        if first.name in SHORT_CIRCUIT:
            return self.short_circuit(first.name, rest, dot, piped)
        arguments = [self.operand(operand, dot) for operand in rest]
        self.calling = first.name
        return FUNCTIONS[first.name](*arguments, *piped)

    def short_circuit(self, name: str, rest: tuple[Operand, ...], dot: Any, piped: tuple[Any, ...]) -> Any:
        value: Any = None
        for operand in rest:
            value = self.operand(operand, dot)
            if truth(value) == (name == "or"):
                return value
        if piped:
            return piped[0]
        if not rest:
            raise Refused(f"{name} has no arguments")
        return value

    def operand(self, operand: Operand, dot: Any) -> Any:
        if isinstance(operand, Literal):
            return operand.value
        if isinstance(operand, Dot):
            return dot
        if isinstance(operand, Field):
            return _field(dot, operand.names)
        if isinstance(operand, Variable):
            for name, value in reversed(self.variables):
                if name == operand.name:
                    return _field(value, operand.names)
            raise Refused(f"the variable {operand.name} is not defined")
        if isinstance(operand, Chain):
            return _field(self.pipe(operand.pipe, dot), operand.names)
        if isinstance(operand, Pipe):
            return self.pipe(operand, dot)
        raise Refused(f"the function {operand.name} is not first in its command")


def _field(value: Any, names: tuple[str, ...]) -> Any:
    """A map's missing key is nil; a struct's missing field, or a field of anything else, is an error."""
    for name in names:
        value = plain(value)
        if isinstance(value, Struct):
            if name not in value.fields:
                raise Refused(f"a {value.kind} has no field {name}; it has {', '.join(value.fields)}")
            value = value.fields[name]
        elif isinstance(value, Mapping):
            value = value.get(name)
        else:
            raise Refused(f"it asks for the field {name} of a {kind_of(value)}")
    return value


def _elements(values: Any) -> Iterator[tuple[Any, Any]]:
    values = plain(values)
    if values is None:
        return
    if isinstance(values, Mapping):
        for key in sorted(values):
            yield key, values[key]
    elif isinstance(values, (list, tuple)):
        yield from enumerate(values)
    elif isinstance(values, int) and not isinstance(values, bool):
        for number in range(values):
            yield number, number
    else:
        raise Refused(f"it cannot range over a {kind_of(values)}")
