"""Constraints by llguidance: answers that follow a JSON schema, a regular expression or a grammar.

Importing this costs a tenth of a second, so whoever needs no constraint does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from puna.engine.gbnf import is_gbnf, lark_from_gbnf
from puna.engine.json_schema import enforceable
from puna.engine.request import Constraint, ConstraintState
from puna.engine.spelling import spelling
from puna.errors import RequestError

# Between JSON's tokens: perhaps a space, perhaps a line end and indentation. Without a bound a small model,
# or any by chance, may spend all its tokens on blanks.
WHITESPACE = r" ?(\r?\n[ \t]{0,24})?"


class Vocabulary(Protocol):
    """The part of a tokenizer that constraints need; puna.tokenizer.Tokenizer has it."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...

    def is_special(self, token: int) -> bool: ...


class ConstraintCompiler:
    """Makes constraints for one model. Goes over the whole vocabulary once, so keep it with the model.

    ``vocab_size`` is the model's; where it is padded beyond the tokenizer's, those ids are never allowed.
    """

    def __init__(self, tokenizer: Vocabulary, vocab_size: int, eos_ids: Collection[int]) -> None:
        adapter = _TokenizerAdapter(tokenizer, vocab_size, eos_ids)
        self._tokenizer = LLTokenizer(TokenizerWrapper(adapter), eos_token=adapter.eos_ids)
        self._vocab_size = vocab_size

    def json_schema(self, schema: Mapping[str, Any] | bool | str) -> Constraint:
        """Any JSON text that is valid under the schema. Raises RequestError with what is wrong or unsupported in it."""
        text = enforceable(schema)
        grammar = partial(LLMatcher.grammar_from_json_schema, text, overrides={"whitespace_pattern": WHITESPACE})
        return self._compile("JSON schema", grammar)

    def json_object(self) -> Constraint:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Constraint:
        """Text that matches the pattern (Rust's syntax) from first to last character. Raises RequestError."""
        return self._compile("regular expression", partial(LLMatcher.grammar_from_regex, pattern))

    def lark(self, grammar: str) -> Constraint:
        """Text of a context-free grammar, in llguidance's variant of Lark's syntax. Raises RequestError."""
        return self._compile("grammar", partial(LLMatcher.grammar_from_lark, grammar))

    def grammar(self, text: str) -> Constraint:
        """Text of a context-free grammar, in llguidance's Lark or in GBNF, llama.cpp's format. Raises RequestError."""
        if not isinstance(text, str):
            raise RequestError(f"the grammar must be a text, found {type(text).__name__}")
        return self.lark(lark_from_gbnf(text) if is_gbnf(text) else text)

    def choice(self, choices: Sequence[str]) -> Constraint:
        """One of some texts. Raises RequestError."""
        if isinstance(choices, str) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise RequestError(f"choice must be a list of texts of at least one character, found {str(choices)[:100]}")
        return self._compile("choice", partial(LLMatcher.grammar_from_regex, "|".join(map(re.escape, choices))))

    def _compile(self, kind: str, grammar: Callable[[], str]) -> Constraint:
        try:
            matcher = LLMatcher(self._tokenizer, grammar(), log_level=0)
        except (TypeError, ValueError) as error:
            raise RequestError(f"the {kind} cannot be read: {error}") from None
        if matcher.is_error():
            raise RequestError(f"the {kind} is not valid or not supported: {_reason(matcher)}")
        return _GrammarConstraint(matcher, self._vocab_size)


class _GrammarConstraint:
    """A compiled grammar; each answer gets its own copy of the matcher, which is cheap."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def start(self) -> ConstraintState:
        return _GrammarState(self._matcher.deep_copy(), _mask_words(self._vocab_size))


class _GrammarState:
    def __init__(self, matcher: LLMatcher, words: int) -> None:
        self._matcher = matcher
        self._words = words

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.uint32]:
        known = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        self._check()
        mask = np.zeros(self._words, np.uint32)
        mask[: len(known)] = known
        return mask

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def fork(self) -> ConstraintState:
        return _GrammarState(self._matcher.deep_copy(), self._words)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the constraint cannot be followed any further: {_reason(self._matcher)}")


class _TokenizerAdapter:
    """A vocabulary in the shape that llguidance's TokenizerWrapper reads; the attributes' names are its own."""

    bos_token_id = None

    def __init__(self, tokenizer: Vocabulary, vocab_size: int, eos_ids: Collection[int]) -> None:
        size = min(tokenizer.vocab_size, vocab_size)
        special = {i for i in range(size) if tokenizer.is_special(i)}
        self._encode = tokenizer.encode
        texts = [b"" if i in special else tokenizer.token_bytes(i) for i in range(size)]
        # A grammar may name a control token by its id, ``<[128010]>``; llguidance tells them apart by their spelling.
        self.tokens = [f"<[{i}]>".encode() if i in special else text for i, text in enumerate(texts)]
        self.eos_ids = [i for i in eos_ids if i < size]
        if not self.eos_ids:
            # llguidance needs an end token: the first that is past the mask's last word, which cuts it off.
            beyond = _mask_words(vocab_size) * 32
            self.tokens += [b""] * (beyond + 1 - size)
            self.eos_ids = [beyond]
        self.eos_token_id = self.eos_ids[0]
        self.special_token_ids = sorted(special | set(self.eos_ids))
        self._ids = {text: i for i, text in reversed(list(enumerate(texts))) if text}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that the grammar forces: as the tokenizer writes it within a longer text, where it can."""
        found = spelling(self._encode, self.tokens.__getitem__, text)
        return self._longest_match(text.encode()) if found is None else found

    def _longest_match(self, text: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(text):
            for end in range(min(len(text), start + self._longest), start, -1):
                if text[start:end] in self._ids:
                    ids.append(self._ids[text[start:end]])
                    start = end
                    break
            else:
                return ids
        return ids


def _mask_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def _reason(matcher: LLMatcher) -> str:
    """What llguidance says, in one line and without the dump of its state or stack that follows."""
    message = re.split("<state>|<backtrace>", str(matcher.get_error()))[0]
    if "NoExtension" in message:
        message = "no text satisfies it, such as where a $ref leads to itself"
    if "coerce_one_of" in message:
        message = "oneOf whose alternatives may overlap; write anyOf, or make a property or type tell them apart"
    return " ".join(message.split())[:400]
