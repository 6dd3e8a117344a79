"""A schema is enforced or refused, judged by the official test suite and by an independent validator."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from byte_vocabulary import EOS, accepts, allowed_ids, compiler
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from puna.engine import Constraint
from puna.engine.json_schema import enforceable
from puna.errors import RequestError

COMPILER = compiler()

# Valid instances that are not written: one order of properties and one spelling of a number are enough for that.
NARROWER = {
    ("allOf.json", "allOf"),
    ("allOf.json", "valid"),
    ("const.json", "same object with different property order is valid"),
    ("const.json", "float zero is valid"),
    ("const.json", "float one is valid"),
    ("const.json", "float -2.0 is valid"),
    ("const.json", "float is valid"),
    ("enum.json", "float zero is valid"),
    ("enum.json", "[0.0] is valid"),
    ("enum.json", "float one is valid"),
    ("enum.json", "[1.0] is valid"),
    ("type.json", "a float with zero fractional part is an integer"),
    ("ref.json", "ref valid, maxItems ignored"),  # newer drafts let $ref have siblings; so does llguidance
    ("ecmascript-regex.json", "zero-width whitespace matches"),  # patterns are Rust's: U+FEFF is no white space
    ("float-overflow.json", "valid if optional overflow handling is implemented"),
    ("ipv6.json", "mixed format with the ipv4 section as decimal octets"),
    ("ipv6.json", "mixed format with double colons between the sections"),
    ("ipv6.json", "mixed format with leading double colons (ipv4-mapped ipv6 address)"),
    ("ipv6.json", "a long valid ipv6"),
}
# Formats are enforced as far as a regular expression can: no leap years and seconds, no rules of Punycode.
LOOSE_FORMATS = {"date.json", "date-time.json", "time.json", "hostname.json"}
WIDER = {("ecmascript-regex.json", "zero-width whitespace does not match")}


def test_json_schema_test_suite(shared_data: Path) -> None:
    """Of the official tests of draft 7, each schema is refused or decides every instance rightly, save those above."""
    folder = shared_data / "grammar" / "json-schema-draft7"
    narrower, wider = set(), set()
    compiled = 0
    for path in sorted(folder.rglob("*.json")):
        for group in json.loads(path.read_text()):
            try:
                constraint = COMPILER.json_schema(group["schema"])
            except RequestError:
                continue
            compiled += 1
            for case in group["tests"]:
                if accepts(constraint, json.dumps(case["data"], ensure_ascii=False)) != case["valid"]:
                    (narrower if case["valid"] else wider).add((path.name, case["description"]))
    assert {case for case in wider if case[0] not in LOOSE_FORMATS} <= WIDER
    assert narrower <= NARROWER
    assert compiled >= 200


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"properties": {"a/b": {"items": [True, {"not": {}}]}}}, "uses 'not' at #/properties/a~1b/items/1, which"),
        ({"anyOf": [{}, {"contentEncoding": "base64"}]}, "'contentEncoding' at #/anyOf/1"),
        ({"$ref": "#/x/y~1z", "x": {"y/z": {"uniqueItems": True}}}, "'uniqueItems' at #/x/y~1z"),
        ({"if": {}, "then": False}, "'if' at #"),
        ({"$defs": {"a": {"dependencies": {}}}}, r"'dependencies' at #/\$defs/a"),
        ({"allOf": [{"$id": "x", "$ref": "#"}]}, r"'\$id' beside '\$ref' at #/allOf/0"),
        (False, "allows no text"),
        ([], "object or true, found list"),
        ("[" * 10**5, "is not JSON"),
    ],
)
def test_what_cannot_be_enforced_is_named_with_its_place(schema: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        enforceable(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"not": {"type": "string"}, "if": {}}},
        {"const": {"not": 1}, "default": {"contains": 1}},
        {"$ref": "#", "definitions": {"a": {"$ref": "#/definitions/a"}}},
        {"$ref": "#/nowhere/0"},
        {"properties": 1, "items": 1, "$ref": 1},
    ],
)
def test_what_only_looks_like_a_keyword_stays(schema: Any) -> None:
    assert json.loads(enforceable(schema)) == schema


@pytest.mark.parametrize(
    ("schema", "plain"),
    [
        (True, {}),
        ("true", {}),
        ({"uniqueItems": False, "if": {}, "items": {"then": {}, "else": {}}}, {"items": {}}),
        ({"maxLength": 2.0, "anyOf": [{"minItems": 1.0}]}, {"maxLength": 2, "anyOf": [{"minItems": 1}]}),
    ],
)
def test_other_spellings(schema: Any, plain: Any) -> None:
    assert json.loads(enforceable(schema)) == plain


SMALL = st.integers(0, 3)
NAMES = st.sampled_from("abc")
VALUES = st.sampled_from([0, 1, -1, 1.5, "a", "ab", "", None, True, [], [1], {}, {"a": 1}])


def extend(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": st.sampled_from(["object", "array", "string", "integer", "number", "boolean", ["null", "string"]]),
        "minLength": SMALL,
        "maxLength": SMALL,
        "pattern": st.sampled_from(["^a", "b$", "^[a-c]{1,3}$"]),
        "minimum": st.sampled_from([0, -2, 1.5, 10]),
        "exclusiveMaximum": st.sampled_from([1, 3, 2.5, 20]),
        "multipleOf": st.sampled_from([1, 2, 0.5]),
        "items": schemas | st.lists(schemas, min_size=1, max_size=2),
        "additionalItems": schemas,
        "minItems": SMALL,
        "maxItems": SMALL,
        "properties": st.dictionaries(NAMES, schemas, max_size=2),
        "required": st.lists(NAMES, max_size=2, unique=True),
        "additionalProperties": schemas,
        "patternProperties": st.dictionaries(st.sampled_from(["^a", "^x"]), schemas, max_size=1),
        "minProperties": SMALL,
        "maxProperties": SMALL,
        "enum": st.lists(VALUES, min_size=1, max_size=3),
        "const": VALUES,
        "anyOf": st.lists(schemas, min_size=1, max_size=2),
        "allOf": st.lists(schemas, min_size=1, max_size=2),
        "oneOf": st.lists(schemas, min_size=1, max_size=2),
        "not": schemas,
        "if": schemas,
        "then": schemas,
        "contains": schemas,
        "propertyNames": schemas,
        "uniqueItems": st.booleans(),
        "dependencies": st.just({"a": ["b"]}),
    }
    chosen = st.lists(st.sampled_from(sorted(keywords)), max_size=3, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: keywords[name] for name in names}))


def write(constraint: Constraint, chance: random.Random) -> str | None:
    """A text that the constraint allows, with a preference for short ones; None when it does not come to an end."""
    state, text = constraint.start(), bytearray()
    while len(text) < 200:
        allowed = allowed_ids(state)
        if state.complete or (EOS in allowed and (len(allowed) == 1 or chance.random() < 0.5)):
            return text.decode(errors="replace")
        closing = [byte for byte in b'"}]01,:' if byte in allowed]
        plain = [byte for byte in allowed if 32 <= byte < 127]
        token = chance.choice(closing if closing and chance.random() < 0.7 else plain or sorted(allowed - {EOS}))
        state.accept(token)
        text.append(token)
    return None


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A grammar cannot remember names that the schema does not list, so it may repeat one (docs/engine.md)."""
    assume(len(dict(pairs)) == len(pairs))
    return dict(pairs)


@settings(max_examples=150, deadline=None)
@given(
    schema=st.recursive(st.just({"type": "integer"}) | st.booleans(), extend, max_leaves=5),
    chance=st.randoms(use_true_random=False),
)
def test_all_that_is_written_is_valid(schema: Any, chance: random.Random) -> None:
    try:
        constraint = COMPILER.json_schema(schema)
    except RequestError:
        assume(False)
    text = write(constraint, chance)
    if text is not None:
        jsonschema.Draft7Validator(schema).validate(json.loads(text, object_pairs_hook=without_repeats))
