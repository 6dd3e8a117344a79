"""The Jinja environment that chat templates run in. Templates come from model files, so they may be hostile.

Jinja's sandbox keeps a template from reaching Python's internals. It does not keep it from running forever or from
filling the memory. Here everything a template makes is paid from one ``Meter``: a step for each turn of a loop, filter
and call, a character for each character made. What could grow faster than it is paid for (repeating, replacing,
joining, nesting) is measured before it is made; filters and methods that chat templates do not need are left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import Environment, nodes, pass_context
from jinja2.exceptions import TemplateRuntimeError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

STEP = 8
BASE_BUDGET = 4_000_000
BUDGET_PER_CHARACTER = 256  # some templates build the whole conversation anew for every message
LARGEST_PER_CHARACTER = 8
SECONDS = 10.0


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COLLECTION_FILTERS = _words(
    "attr count d default dictsort first groupby items join last length list map max min reject rejectattr "
    "reverse select selectattr sort tojson unique"
)
_TEXT_FILTERS = _words(
    "abs capitalize e escape float indent int lower replace safe string striptags title trim truncate upper wordcount"
)
_GROWING_METHODS = _words("center encode expandtabs fromkeys ljust maketrans rjust translate zfill")


class Refused(TemplateRuntimeError):
    """The template does what no chat template needs to."""


class Meter:
    """What one rendering may still make, and the largest size of any single value."""

    def __init__(self, input_size: int) -> None:
        self.largest = BASE_BUDGET + LARGEST_PER_CHARACTER * input_size
        self._left = BASE_BUDGET + BUDGET_PER_CHARACTER * input_size
        self._deadline = time.monotonic() + SECONDS

    def spend(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise Refused("it makes too much text, or loops too often")
        if time.monotonic() > self._deadline:
            raise Refused(f"it takes more than {SECONDS:g} seconds")

    def fits(self, size: int) -> None:
        if size > min(self._left, self.largest):
            raise Refused("it makes too much text")


METER: ContextVar[Meter] = ContextVar("meter")


class _List(list[Any]):
    size: int


class _Tuple(tuple[Any, ...]):
    size: int


class _Dict(dict[Any, Any]):
    size: int


def size_of(value: Any, limit: int) -> int:
    """How much a value prints, nesting included, counted up to ``limit``. What the template built knows it already."""
    total, waiting = 0, [value]
    while waiting and total <= limit:
        item = waiting.pop()
        total += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, (_List, _Tuple, _Dict)):
            total += item.size
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            waiting += item
    return total


def _built(value: Any) -> Any:
    """A container made by the template: measured once, so that nesting it in itself cannot grow unseen."""
    meter = METER.get()
    size = size_of(value, meter.largest)
    meter.fits(size)
    kind = _Dict if isinstance(value, dict) else _Tuple if isinstance(value, tuple) else _List
    made = kind(value)
    made.size = size
    return made


def _printable(value: Any) -> Any:
    """Let pass only what has a bounded text. Raises Refused."""
    if value is None or isinstance(value, (str, int, float, Undefined)):
        return value
    if isinstance(value, (list, tuple, Mapping)):
        meter = METER.get()
        meter.fits(size_of(value, meter.largest))
        return value
    raise Refused(f"it prints a {type(value).__name__}, which is not text")


@pass_context
def _finalize(_context: Context, value: Any) -> Any:
    return _printable(value)


def _concat(pieces: Iterable[str]) -> str:
    meter, kept = METER.get(), []
    for piece in pieces:
        meter.spend(len(piece))
        kept.append(piece)
    return "".join(kept)


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    meter = METER.get()
    for value in values:
        meter.spend(STEP)
        yield value


def _loop_over(values: Any) -> Any:
    """The iterable of a ``for``: counted, but with a length where it has one, for ``loop.last`` and ``loop.length``."""
    if isinstance(values, Undefined) or not hasattr(values, "__len__"):
        return _counted(values)
    return _CountedSequence(values)


class _CountedSequence:
    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return _counted(self._values)


@pass_context
def _join(context: Context, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    meter, texts = METER.get(), []
    getter = make_attrgetter(context.environment, attribute) if attribute is not None else None
    separator = str(_printable(separator))
    for value in values:
        text = str(_printable(getter(value) if getter else value))
        meter.spend(STEP + len(text) + len(separator))
        texts.append(text)
    return separator.join(texts)


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    text, old, new = (str(_printable(value)) for value in (text, old, new))
    METER.get().fits(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(_printable(text))
    margin = len(width) if isinstance(width, str) else width
    METER.get().fits(len(text) + (text.count("\n") + 1) * margin)
    return do_indent(text, width, first, blank)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: no HTML escapes, keys in their order."""
    if isinstance(indent, int) and not 0 <= indent <= 64:
        raise Refused(f"its tojson indents by {indent}")
    if isinstance(value, Undefined):
        raise TypeError(f"{value._undefined_name} is undefined and cannot be written as JSON")
    return json.dumps(
        _printable(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that pays for the text it reads and makes."""

    @wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        meter, values = METER.get(), [*args, *kwargs.values()]
        meter.spend(STEP + sum(len(value) for value in values if isinstance(value, str)))
        if name in _TEXT_FILTERS:
            for value in values:
                if not isinstance(value, (Context, EvalContext, Environment)):
                    _printable(value)
        result = function(*args, **kwargs)
        if isinstance(result, str):
            meter.spend(len(result))
        return result

    return metered


def _raise_exception(message: str) -> None:
    raise TemplateRuntimeError(str(_printable(message)))


def _no_format(*_args: Any, **_kwargs: Any) -> None:
    raise Refused("it formats text with format(), which is not supported; use ~ instead")


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    held = dict(*args, **kwargs)
    hidden = next((key for key in held if str(key).startswith("_")), None)
    if hidden is not None:
        raise Refused(f"a namespace cannot hold {hidden!r}")
    return Namespace(held)


class _GenerationTag(Extension):
    """``{% generation %}`` marks what an assistant wrote, for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Configured as transformers configures it, less what could grow without bound."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])
    concat = staticmethod(_concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # or constant expressions would run while compiling, unmetered
            finalize=_finalize,
            extensions=[loopcontrols, _GenerationTag],
        )
        own = {"tojson": _tojson, "join": _join, "replace": _replace, "indent": _indent}
        kept = {n: f for n, f in self.filters.items() if n in _COLLECTION_FILTERS | _TEXT_FILTERS} | own
        self.filters = {n: _metered(n, f) for n, f in kept.items()} | {"puna_loop": _loop_over, "puna_built": _built}
        self.globals = {
            "range": self.globals["range"],  # jinja2's own, which refuses more than 100,000 numbers
            "namespace": _namespace,
            "dict": lambda *args, **kwargs: _built(dict(*args, **kwargs)),
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Rewriter().visit(tree)
        tree.set_environment(self)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in _GROWING_METHODS or isinstance(obj, (int, float, bytes)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """``str.format`` can pad without bound, and is not offered."""
        if super().wrap_str_format(value) is None:
            return None
        return _no_format

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = METER.get()
        meter.spend(STEP)
        if operator == "%" and isinstance(left, str):
            raise Refused("it formats text with %, which is not supported; use ~ instead")
        if operator == "**" and not (_is_small(left) and _is_small(right)):
            raise Refused("it raises a number to a large power")
        if operator == "*":
            for factor, repeated in ((left, right), (right, left)):
                if isinstance(factor, int) and not isinstance(repeated, (int, float)):
                    meter.fits(max(factor, 0) * size_of(repeated, meter.largest))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str):
            meter.spend(len(result))
        elif isinstance(result, (list, tuple)):
            result = _built(result)
        elif isinstance(result, int) and result.bit_length() > 4096:
            raise Refused("it computes a number of more than 4096 bits")
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The names are jinja2's: a macro may have any argument name but these.
        meter, values = METER.get(), [*args, *kwargs.values()]
        meter.spend(STEP + sum(len(value) for value in values if isinstance(value, str)))
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            meter.spend(len(owner))
            if __obj.__name__ == "replace":
                return _replace(owner, *args, **kwargs)
            if __obj.__name__ == "join":
                return _join(__context, args[0], owner)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            meter.spend(len(result))
        return result


def _is_small(number: Any) -> bool:
    return isinstance(number, (int, float)) and abs(number) <= 64


class _Rewriter(NodeTransformer):
    """Puts the meter where Jinja has no hook: loops, ``~``, and containers that hold computed values."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateSyntaxError("recursive loops are not supported", node.lineno)
        self.generic_visit(node)
        node.iter = _filter(node.iter, "puna_loop")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "join")

    def visit_List(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        return node if stored or constant else _filter(node, "puna_built")

    visit_Dict = visit_Tuple = visit_List

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:
        if node.attr.startswith("_"):
            raise TemplateSyntaxError(f"a namespace cannot hold {node.attr!r}", node.lineno)
        return node


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
