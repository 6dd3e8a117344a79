"""From a Go template's pieces to its nodes."""

from __future__ import annotations

from collections.abc import Collection

from puna.chat.gotemplate.lexer import Piece, Token, pieces, syntax_error
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
    Node,
    Operand,
    Pipe,
    Program,
    Range,
    Text,
    Variable,
)

MAX_NESTING = 40
MAX_VARIABLES = 1000
_KEYWORDS = ("if", "with", "range", "define", "block", "template", "else", "end", "break", "continue")


def parse(source: str, functions: Collection[str]) -> Program:
    """Parse a template that may call ``functions``. Raises TemplateError naming the line."""
    parser = _Parser(list(pieces(source)), functions)
    try:
        body, end = parser.body(top=True)
    except RecursionError:
        raise syntax_error(1, "it is nested too deep") from None
    if end is not None:
        raise syntax_error(end.line, f"unexpected {{{{{end.value}}}}}")
    return Program(body, parser.defined)


class _Parser:
    def __init__(self, given: list[Piece], functions: Collection[str]) -> None:
        self.pieces = given
        self.functions = functions
        self.defined: dict[str, Body] = {}
        self.variables = ["$"]
        self.at = 0
        self.depth = 0
        self.loops = 0

    def body(self, top: bool = False) -> tuple[Body, Token | None]:
        """Nodes up to ``end`` or ``else``, whose piece stays the current one, or up to the end of the source."""
        nodes: list[Node] = []
        while self.at < len(self.pieces):
            piece = self.pieces[self.at]
            if piece.text is not None:
                nodes.append(Text(piece.text))
                self.at += 1
                continue
            if not piece.tokens:
                raise syntax_error(piece.line, "an action is empty")
            first = piece.tokens[0]
            if first.kind == "word" and first.value in ("end", "else"):
                return tuple(nodes), first
            node = self.statement(piece, first, top)
            if node is not None:
                nodes.append(node)
        return tuple(nodes), None

    def statement(self, piece: Piece, first: Token, top: bool) -> Node | None:
        word = first.value if first.kind == "word" else ""
        line, rest = piece.line, piece.tokens[1:]
        self.at += 1
        if word not in _KEYWORDS:
            return Action(self.pipe(piece.tokens, line))
        if word in ("break", "continue"):
            if rest or not self.loops:
                raise syntax_error(line, f"{word} stands alone, within a range")
            return Jump(word)
        if word == "template":
            name, arguments = self.name(rest, line)
            return Call(line, name, self.pipe(arguments, line) if arguments else None)
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise syntax_error(line, f"blocks are nested more than {MAX_NESTING} deep")
        known = len(self.variables)
        node: Node | None
        if word == "range":
            node = self.range(rest, line)
        elif word in ("if", "with"):
            node = self.branch(word, rest, line)
        else:
            if word == "define" and not top:
                raise syntax_error(line, "define must stand at the top, outside of other blocks")
            node = self.definition(word, rest, line)
        del self.variables[known:]
        self.depth -= 1
        return node

    def range(self, tokens: tuple[Token, ...], line: int) -> Range:
        pipe = self.pipe(tokens, line, most=2)
        self.loops += 1
        body, end = self.body()
        self.loops -= 1
        otherwise: Body = ()
        if self.is_else(end, line):
            if len(self.pieces[self.at].tokens) > 1:
                raise syntax_error(self.pieces[self.at].line, "the else of a range takes no condition")
            self.at += 1
            otherwise, end = self.body()
        self.close(end, "range", line)
        return Range(pipe, body, otherwise)

    def branch(self, kind: str, tokens: tuple[Token, ...], line: int) -> Branch:
        arms = []
        otherwise: Body = ()
        pipe = self.pipe(tokens, line)
        while True:
            body, end = self.body()
            arms.append((pipe, body))
            if not self.is_else(end, line):
                break
            more = self.pieces[self.at].tokens[1:]
            self.at += 1
            if not more:
                otherwise, end = self.body()
                break
            pipe = self.pipe(more[1:], more[0].line)
            if more[0].value != kind:
                # {{else with}} of an if, or the other way round, is a block of its own that shares the end.
                inner = self.branch(more[0].value, more[1:], more[0].line)
                return Branch(kind, tuple(arms), (inner,))
        self.close(end, kind, line)
        return Branch(kind, tuple(arms), otherwise)

    def is_else(self, end: Token | None, line: int) -> bool:
        if end is None or end.value != "else":
            return False
        more = self.pieces[self.at].tokens[1:]
        if more and more[0].value not in ("if", "with"):
            raise syntax_error(end.line, f"unexpected {more[0].value!r} after else")
        return True

    def close(self, end: Token | None, kind: str, line: int) -> None:
        if end is None:
            raise syntax_error(line, f"{{{{{kind}}}}} has no {{{{end}}}}")
        if end.value != "end" or len(self.pieces[self.at].tokens) > 1:
            raise syntax_error(end.line, f"expected {{{{end}}}} of the {kind} of line {line}")
        self.at += 1

    def definition(self, kind: str, tokens: tuple[Token, ...], line: int) -> Node | None:
        name, arguments = self.name(tokens, line)
        pipe = self.pipe(arguments, line) if arguments else None
        if (kind == "block") != (pipe is not None):
            raise syntax_error(line, 'expected {{define "name"}} or {{block "name" pipeline}}')
        outer, self.variables = self.variables, ["$"]
        loops, self.loops = self.loops, 0
        body, end = self.body()
        self.variables, self.loops = outer, loops
        self.close(end, kind, line)
        self.defined[name] = body
        return Call(line, name, pipe) if pipe is not None else None

    def name(self, tokens: tuple[Token, ...], line: int) -> tuple[str, tuple[Token, ...]]:
        if not tokens or not isinstance(tokens[0].value, str) or tokens[0].kind != "literal":
            raise syntax_error(line, "a template's name must be a quoted text")
        return tokens[0].value, tokens[1:]

    def pipe(self, tokens: tuple[Token, ...], line: int, most: int = 1) -> Pipe:
        """One whole pipeline that may set up to ``most`` variables."""
        names, declares, tokens = self.targets(tokens, line, most)
        commands, rest = self.commands(tokens, line)
        if rest:
            raise syntax_error(rest[0].line, f"unexpected {rest[0].value!r}")
        if declares:
            self.variables += names
            if len(self.variables) > MAX_VARIABLES:
                raise syntax_error(line, f"more than {MAX_VARIABLES} variables are defined here")
        return Pipe(line, commands, names, declares)

    def targets(
        self, tokens: tuple[Token, ...], line: int, most: int
    ) -> tuple[tuple[str, ...], bool, tuple[Token, ...]]:
        for count in range(1, most + 1):
            head, sign = tokens[: 2 * count - 1], tokens[2 * count - 1 : 2 * count]
            if not sign or sign[0].value not in (":=", "=") or sign[0].kind != "mark":
                continue
            names = tuple(token.value for token in head[::2])
            good = all(token.kind == "variable" for token in head[::2])
            if not good or any(token.value != "," for token in head[1::2]):
                break
            declares = sign[0].value == ":="
            if not declares:
                for name in names:
                    self.check_variable(name, line)
            return names, declares, tokens[2 * count :]
        return (), False, tokens

    def commands(
        self, tokens: tuple[Token, ...], line: int
    ) -> tuple[tuple[tuple[Operand, ...], ...], tuple[Token, ...]]:
        """Commands up to the end or a closing parenthesis, and what is left from there."""
        done: list[tuple[Operand, ...]] = []
        command: list[Operand] = []
        while True:
            mark = tokens[0].value if tokens and tokens[0].kind == "mark" else None
            if not tokens or mark in ("|", ")"):
                if not command:
                    raise syntax_error(line, "a value is missing in an action")
                done.append(tuple(command))
                command = []
                if mark != "|":
                    return tuple(done), tokens
                tokens = tokens[1:]
                if tokens and (tokens[0].kind in ("literal", "dot") or tokens[0].value == ")"):
                    raise syntax_error(line, "only a function can take the value of a pipeline")
                continue
            operand, tokens = self.operand(tokens, line, first=not command)
            command.append(operand)

    def operand(self, tokens: tuple[Token, ...], line: int, first: bool) -> tuple[Operand, tuple[Token, ...]]:
        token, rest = tokens[0], tokens[1:]
        names: list[str] = []

        def chained() -> tuple[str, ...]:
            nonlocal rest
            while rest and rest[0].kind == "field" and rest[0].glued:
                names.append(rest[0].value)
                rest = rest[1:]
            return tuple(names)

        if token.kind == "literal":
            return Literal(token.value), rest
        if token.kind == "dot":
            return Dot(), rest
        if token.kind == "field":
            names.append(token.value)
            return Field(chained()), rest
        if token.kind == "variable":
            self.check_variable(token.value, token.line)
            return Variable(token.value, chained()), rest
        if token.kind == "word":
            if token.value not in self.functions:
                raise syntax_error(
                    token.line, f"the function {token.value!r} is not known; known: {', '.join(sorted(self.functions))}"
                )
            # Not first in its command, a function is a value: called without arguments, as Go does.
            function = Function(token.value)
            return (function if first else Pipe(line, ((function,),))), rest
        if token.value != "(":
            raise syntax_error(token.line, f"unexpected {token.value!r}")
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise syntax_error(token.line, f"parentheses are nested more than {MAX_NESTING} deep")
        commands, rest = self.commands(rest, line)
        self.depth -= 1
        if not rest:
            raise syntax_error(token.line, "a parenthesis is not closed")
        rest = rest[1:]
        pipe = Pipe(token.line, commands)
        return (Chain(pipe, tuple(names)) if chained() else pipe), rest

    def check_variable(self, name: str, line: int) -> None:
        if name not in self.variables:
            raise syntax_error(line, f"the variable {name} is not defined here")
