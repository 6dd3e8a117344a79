"""Constraints on vocabularies from single bytes to real ones; independent validators judge what comes out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import numpy as np
import pytest
from byte_vocabulary import EOS, ByteVocabulary, accepts, allowed_ids, compiler
from fake_model import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_weights, tiny_config

from puna.engine import Constraint, Engine, Request, SamplingParams
from puna.engine.constraint import ConstraintCompiler, _TokenizerAdapter
from puna.errors import RequestError
from puna.model.model import Model
from puna.ops.reference import ReferenceOps
from puna.tokenizer import Tokenizer, load_tokenizer


class TestMasks:
    def test_only_what_may_follow_is_allowed(self) -> None:
        state = compiler(longer=[b"ab", b"abc", b"abd"], vocab_size=260).regex("ab*c?").start()
        assert allowed_ids(state) == {ord("a"), 257, 258}
        state.accept(257)
        assert not state.complete
        assert allowed_ids(state) == {ord("b"), ord("c"), EOS}
        state.accept(ord("c"))
        assert state.complete

    def test_asking_again_gives_the_same(self) -> None:
        state = compiler().json_object().start()
        assert allowed_ids(state) == allowed_ids(state) == {ord("{")}

    def test_starts_are_independent(self) -> None:
        constraint = compiler().regex("ab")
        first = constraint.start()
        first.accept(ord("a"))
        assert allowed_ids(constraint.start()) == {ord("a")}
        assert allowed_ids(first) == {ord("b")}

    def test_special_tokens_are_never_text(self) -> None:
        """The end token is spelled like the end of a JSON text; it must not stand for it."""
        state = compiler().json_object().start()
        for byte in b'{"a":"b':
            state.accept(byte)
        assert EOS not in allowed_ids(state)

    @pytest.mark.parametrize("vocab_size", [257, 258, 288, 289, 1000])
    def test_a_padded_model_vocabulary(self, vocab_size: int) -> None:
        state = compiler(vocab_size).regex("(?s:.*)").start()
        assert state.allowed().dtype == np.uint32
        assert len(state.allowed()) == -(-vocab_size // 32)
        assert max(allowed_ids(state)) == EOS

    @pytest.mark.parametrize("vocab_size", [128, 130, 256])
    def test_a_model_vocabulary_smaller_than_the_tokenizers(self, vocab_size: int) -> None:
        state = compiler(vocab_size).regex("(?s:.*)").start()
        assert len(state.allowed()) == -(-vocab_size // 32)
        assert max(allowed_ids(state)) < vocab_size

    def test_without_an_end_token_only_completion_ends(self) -> None:
        state = compiler(eos_ids=()).regex("ab?").start()
        state.accept(ord("a"))
        assert allowed_ids(state) == {ord("b")}
        state.accept(ord("b"))
        assert state.complete

    def test_a_token_that_was_not_allowed_is_an_error(self) -> None:
        state = compiler().regex("ab").start()
        with pytest.raises(RequestError, match="cannot be followed"):
            state.accept(ord("x"))


@pytest.mark.parametrize("choices", [["yes", "no"], ["a", "ab"], ["a b", "c\nd", "x-y#&~<>", "é", '"q"/', ".*", "\\"]])
def test_choice(choices: list[str]) -> None:
    constraint = compiler().choice(choices)
    assert all(accepts(constraint, choice) for choice in choices)
    assert not any(accepts(constraint, text) for text in ("", "c", "ax", choices[0] + choices[1]))


class TestWhiteSpace:
    """Between JSON's tokens: as json.dumps writes it in any of its styles, but no run in which an answer could end."""

    VALUE: ClassVar = {"a": [1, {"b": []}, "x"], "c": {"d": None, "e": {"f": {"g": 1.5}}}}
    PLACES = ("{", '{"a"', '{"a":', '{"a":[', '{"a":[1', '{"a":[1,', '{"a":[1]', '{"a":[1],')

    @pytest.fixture(params=["object", "schema", "own-override"])
    def constraint(self, request: pytest.FixtureRequest) -> Constraint:
        if request.param == "object":
            return compiler().json_object()
        schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "array"}, "c": {"type": "object"}}}
        if request.param == "own-override":  # llguidance's own keyword
            schema["x-guidance"] = {"whitespace_flexible": True}
        return compiler().json_schema(schema)

    @pytest.mark.parametrize("indent", [None, 0, 2, 4, "\t"])
    @pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (",", ": ")])
    def test_common_styles_are_accepted(self, constraint: Constraint, indent: Any, separators: Any) -> None:
        text = json.dumps(self.VALUE, indent=indent, separators=separators)
        assert accepts(constraint, text)
        assert accepts(constraint, text.replace("\n", "\r\n"))

    @pytest.mark.parametrize("blanks", ["  ", "\t", "\n\n", " \n\n", "\r ", "\n" + 25 * " ", "\n  \n"], ids=repr)
    def test_longer_runs_are_refused_everywhere(self, constraint: Constraint, blanks: str) -> None:
        for begun in self.PLACES:
            state = constraint.start()
            for byte in (begun + blanks[:-1]).encode():
                if byte not in allowed_ids(state):
                    break
                state.accept(byte)
            else:
                assert ord(blanks[-1]) not in allowed_ids(state), begun

    def test_no_choice_of_blanks_goes_on(self, constraint: Constraint) -> None:
        for begun in self.PLACES:
            for blank in b" \t\n\r":
                state = constraint.start()
                for byte in begun.encode():
                    state.accept(byte)
                run = 0
                while blanks := allowed_ids(state) & set(b" \t\n\r"):
                    state.accept(blank if blank in blanks else min(blanks))
                    run += 1
                    assert run <= 27

    def test_none_before_or_after_the_value(self, constraint: Constraint) -> None:
        assert not accepts(constraint, ' {"a": [1]}')
        assert not accepts(constraint, '{"a": [1]}\n')


class TestMistakes:
    @pytest.mark.parametrize(
        ("kind", "source", "reason"),
        [
            ("regex", "a(", "unclosed group"),
            ("regex", "(" * 5000, "regular expression is not valid"),
            ("regex", None, "cannot be read"),
            ("lark", "start: <|nosuchtoken|>", "^((?!backtrace).)*$"),
            ("lark", "start: nowhere", "nowhere"),
            ("lark", "", "grammar"),
            ("json_schema", {"type": "nope"}, "nope"),
            ("json_schema", {"not": {}}, "uses 'not' at #, which cannot be enforced"),
            ("json_schema", {"minItems": 2, "maxItems": 1, "type": "array"}, "Unsatisfiable"),
            ("json_schema", {"$ref": "http://example.com/x"}, "example.com"),
            ("json_schema", "{broken", "is not JSON"),
            ("json_schema", "[1]", "JSON schema"),
            ("json_schema", {"type": object}, "is not JSON"),
            ("json_schema", {"oneOf": [{}, {}]}, "write anyOf"),
            ("grammar", None, "must be a text, found NoneType"),
            ("grammar", 'root ::= "a', "closing quote"),
            ("grammar", "start: nowhere", "nowhere"),
            ("choice", [], "list of texts"),
            ("choice", "yes", "list of texts"),
            ("choice", ["yes", ""], "at least one character"),
            ("choice", [1], "list of texts"),
        ],
    )
    def test_the_reason_is_given_in_one_line(self, kind: str, source: Any, reason: str) -> None:
        with pytest.raises(RequestError, match=reason) as error:
            getattr(compiler(), kind)(source)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500

    def test_a_vocabulary_that_cannot_spell_it_fails_that_request_only(self) -> None:
        class NoBraces(ByteVocabulary):
            def token_bytes(self, token: int) -> bytes:
                return b"" if token in b"{}" else super().token_bytes(token)

            def encode(self, text: str) -> list[int]:
                return [EOS for _ in text]

        engine = Engine(FakeModel(vocab_size=257))
        bad = ConstraintCompiler(NoBraces(), 257, [EOS]).json_object()
        streams = [engine.submit(Request([1], SamplingParams(max_tokens=9), constraint=c)) for c in (bad, None)]
        assert list(streams[0])[-1].finish_reason in ("error", "stop")
        assert list(streams[1])[-1].finish_reason == "length"


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["glad", "sad", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"lat": {"type": "number", "minimum": -90, "maximum": 90}},
            "required": ["lat"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "mood", "tags", "home"],
    "additionalProperties": False,
}
GRAMMAR = 'start: sum\nsum: product (("+" | "-") product)*\nproduct: NUMBER ("*" NUMBER)*\nNUMBER: /[0-9]{1,3}/'


@pytest.fixture(scope="module", params=["sentencepiece", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, shared_data: Path) -> Tokenizer:
    path = {"sentencepiece": "weights/stories260K/tok512.model", "tiktoken": "tokenizers/tiktoken_small.model"}
    return load_tokenizer(shared_data / path[request.param])


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Model:
    """Random weights: it writes any text that it is allowed to. Its vocabulary is padded."""
    config = tiny_config(vocab_size=tokenizer.vocab_size + 19, max_position_embeddings=1024, num_hidden_layers=1)
    return Model.bind(ReferenceOps(), config, random_weights(config, scale=0.3))


@pytest.fixture(scope="module")
def compile_for(tokenizer: Tokenizer, model: Model) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer, model.config.vocab_size, tokenizer.eos_ids)


def answers(model: Model, tokenizer: Tokenizer, constraint: Constraint, count: int = 6) -> list[str]:
    """Texts written under a constraint, all in one batch with requests that have none."""
    engine = Engine(model, num_blocks=200, max_batch_tokens=64, max_sequences=16)
    prompt = tokenizer.encode("Write something.")
    streams = []
    for seed in range(count):
        params = SamplingParams(seed=seed, temperature=1.5, top_k=0, top_p=1.0)
        streams.append(engine.submit(Request(prompt, params, tokenizer.eos_ids, constraint)))
        engine.submit(Request(prompt, SamplingParams(max_tokens=20)))
    texts = []
    for stream in streams:
        events = list(stream)
        assert events[-1].finish_reason == "stop", events[-1]
        texts.append(b"".join(tokenizer.token_bytes(e.token) for e in events if e.token is not None).decode())
    return texts


class TestGeneration:
    def test_json_schema(self, model: Model, tokenizer: Tokenizer, compile_for: ConstraintCompiler) -> None:
        texts = answers(model, tokenizer, compile_for.json_schema(SCHEMA))
        assert len(set(texts)) > 1
        for text in texts:
            jsonschema.validate(json.loads(text), SCHEMA)

    def test_regex(self, model: Model, tokenizer: Tokenizer, compile_for: ConstraintCompiler) -> None:
        pattern = r"(Yes|No), [a-z]{3,9}( [a-z]{2,5}){0,3}[.!]"
        for text in answers(model, tokenizer, compile_for.regex(pattern)):
            assert re.fullmatch(pattern, text)

    def test_lark(self, model: Model, tokenizer: Tokenizer, compile_for: ConstraintCompiler) -> None:
        for text in answers(model, tokenizer, compile_for.lark(GRAMMAR)):
            assert re.fullmatch(r"\d{1,3}([-+*]\d{1,3})*", text)

    def test_json_object(self, model: Model, tokenizer: Tokenizer, compile_for: ConstraintCompiler) -> None:
        """An open-ended one: greedy with a strong wish for closing, as a random model would ramble on."""
        closing = {i: 12.0 for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in (b'"', b"}", b"]", b"1")}
        engine = Engine(model, num_blocks=40)
        params = SamplingParams(temperature=0, logit_bias=closing)
        stream = engine.submit(Request([1], params, tokenizer.eos_ids, compile_for.json_object()))
        text = b"".join(tokenizer.token_bytes(e.token) for e in stream if e.token is not None)
        assert isinstance(json.loads(text), dict)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from(' \n\t{}[]":,abcäß€😀01') | st.characters(codec="utf-8"), max_size=12))
def test_forced_text_is_tokenized_exactly(text: str, shared_data: Path) -> None:
    """Whatever a tokenizer does at the start of a text, the tokens that stand for a forced text spell that text."""
    for name in ("weights/stories260K/tok512.model", "tokenizers/tiktoken_small.model"):
        tokenizer = load_tokenizer(shared_data / name)
        ids = _TokenizerAdapter(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_forced_text_has_the_tokens_that_the_model_knows(shared_data: Path) -> None:
    """Not "{", '"', "n", …: a forced key is written as it would be in the middle of any text."""
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "tiktoken_small.model")
    constraint = ConstraintCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids).regex(
        "the nation and its people"
    )
    state, written = constraint.start(), []
    while not state.complete:
        (token,) = allowed_ids(state)
        written.append(token)
        state.accept(token)
    assert written == tokenizer.encode("the nation and its people")
