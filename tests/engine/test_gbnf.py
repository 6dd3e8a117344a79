"""GBNF, against Python's own readers of the same languages."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

import pytest
from byte_vocabulary import accepts, compiler
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine.gbnf import is_gbnf, lark_from_gbnf
from puna.errors import RequestError

COMPILER = compiler()
JSON = r"""
# Any JSON value (RFC 8259).
root ::= ws value
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (
    string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" (
    [^"\\\x00-\x1F] |   # plain
    "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})
  )* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws ::= | [ \t\n\r]+
"""
JSON_CONSTRAINT = COMPILER.grammar(JSON)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    value=VALUES,
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    cut=st.tuples(st.integers(0, 40), st.integers(0, 3)),
)
def test_json(value: Any, ascii_only: bool, indent: int | None, cut: tuple[int, int]) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    text = text.encode(errors="surrogatepass").decode(errors="replace")
    text = text[: cut[0]] + text[sum(cut) :]
    try:
        json.loads(text)
    except ValueError:
        valid = False
    else:
        valid = True
    assert accepts(JSON_CONSTRAINT, text) == valid


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('root ::= ("a" | "ab") "bc"', "(a|ab)bc"),
        ('root ::= x y\nx ::= "a"+ | b-1?\nb-1::="b"{2}\ny ::= "c"{1,} "d"{0,2}', "(a+|(bb)?)c+d{0,2}"),
        ('root ::= [^a-c\\]]* | . . "\\x41"', "[^a-c\\]]*|(?s:..)A"),
        ('root ::= [-b] [c-] "\\u00e9"? # a comment\n', "[-b][c-]é?"),
        ('root ::=\n  "ab" |\n  ("c"\n   "a")\n', "ab|ca"),
        ('root ::= ""', ""),
        ('root ::= ("a" "b"?)*', "(ab?)*"),
    ],
)
@settings(max_examples=60, deadline=None)
@given(text=st.text("abcdA-]é\n", max_size=6))
def test_regular_grammars(grammar: str, pattern: str, text: str) -> None:
    assert is_gbnf(grammar)
    assert accepts(COMPILER.grammar(grammar), text) == bool(re.fullmatch(pattern, text))


def test_lark_is_not_mistaken_for_it() -> None:
    lark = 'start: "root ::= " ("a" | "b")'
    assert not is_gbnf(lark)
    assert accepts(COMPILER.grammar(lark), "root ::= a")


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ('root ::= "a"\nroot ::= x', "rule root once in line 2"),
        ("root ::= x", "rule root uses x, which is not defined"),
        ('top ::= "a"', "no rule named root"),
        ('\nroot ::= "a', "closing quote or bracket in line 2, found 'the end of the line'"),
        ("root ::= [a\nb]", "closing quote or bracket in line 1"),
        ("root ::= []", "at least one character"),
        ("root ::= [b-a]", "a range that goes up"),
        (r'root ::= "\q"', "an escape such as"),
        (r'root ::= "\ud800"', "an escape such as"),
        ('root ::= "a" )', r"the end of the rule in line 1, found '\)'"),
        ('root ::= ("a"', r"should have \) in line 1"),
        ("root ::= <[1]>", "a literal, a class, a rule or a group"),
        ("root ::= " + "(" * 10**5, "at most 100 groups"),
        ('root "a"\nx ::= "b"', "should have ::= in line 1"),
    ],
)
def test_mistakes(grammar: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        lark_from_gbnf(grammar)


@settings(max_examples=200, deadline=None)
@given(text=st.text('ab"[]()|*+?{}1,.\\-^#\n :=', max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(RequestError):
        COMPILER.grammar("root ::= " + text)
