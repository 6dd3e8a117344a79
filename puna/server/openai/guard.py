"""Llama Guard's categories and verdicts, and what they are in OpenAI's terms.

Sources: the model cards of Llama Guard 1 to 4, whose prompts list the categories as ``S1: Violent Crimes.`` and whose
answers are ``safe``, or ``unsafe`` and a line of codes; the descriptions of OpenAI's moderation categories.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puna.errors import PunaError
from puna.llm import TokenLogprob
from puna.tokenizer import Tokenizer

OPENAI_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
# By words of the category's name, since the codes of the versions differ. The first that fits counts; those of which
# OpenAI has nothing (defamation, advice, privacy, intellectual property, elections, code interpreters) are absent.
_MEANINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("non-violent crimes", ("illicit",)),
    ("violent crimes", ("violence", "illicit/violent")),
    ("child", ("sexual/minors", "sexual")),
    ("sex-related crimes", ("sexual", "illicit")),
    ("sex crimes", ("sexual", "illicit")),
    ("sexual", ("sexual",)),
    ("weapons", ("illicit", "illicit/violent")),
    ("violence and hate", ("violence", "hate")),
    ("hate", ("hate",)),
    ("self-harm", ("self-harm",)),
    ("criminal planning", ("illicit",)),
    ("controlled substances", ("illicit",)),
)
_LISTED = re.compile(r"^([SO]\d{1,2}): *(.+?)\.? *$", re.MULTILINE)
_ANSWER = re.compile(r"\s*(?:(safe)|unsafe\s+([SO]\d{1,2}(?: *, *[SO]\d{1,2})*))\s*")
# Of Llama Guard 3, for a prompt that lists none.
DEFAULT_CATEGORIES = {
    "S1": "Violent Crimes",
    "S2": "Non-Violent Crimes",
    "S3": "Sex-Related Crimes",
    "S4": "Child Sexual Exploitation",
    "S5": "Defamation",
    "S6": "Specialized Advice",
    "S7": "Privacy",
    "S8": "Intellectual Property",
    "S9": "Indiscriminate Weapons",
    "S10": "Hate",
    "S11": "Suicide & Self-Harm",
    "S12": "Sexual Content",
    "S13": "Elections",
    "S14": "Code Interpreter Abuse",
}


@dataclass(frozen=True)
class Verdict:
    """``codes`` are the categories that a text violates, empty for a safe one; ``score`` is P(unsafe)."""

    codes: tuple[str, ...]
    score: float


def listed_categories(prompt: str) -> dict[str, str]:
    """The categories by their codes, as the guard's own prompt names them."""
    return dict(_LISTED.findall(prompt)) or DEFAULT_CATEGORIES


def answer_pattern(codes: Sequence[str]) -> str:
    """The regular expression of a guard's answer."""
    code = "(" + "|".join(map(re.escape, codes)) + ")"
    return rf"[ \n]{{0,2}}(safe|unsafe\n{code}(,{code}){{0,{len(codes) - 1}}})"


def read_verdict(answer: str, tokens: Sequence[TokenLogprob], tokenizer: Tokenizer) -> Verdict:
    """From a guard's answer and the log probabilities of its tokens. Raises PunaError for an answer of another kind."""
    found = _ANSWER.fullmatch(answer)
    if found is None:
        raise PunaError(f"the guard model answered {answer[:80]!r}, neither safe nor unsafe with codes; use another")
    codes = () if found[1] else tuple(dict.fromkeys(code.strip() for code in found[2].split(",")))
    return Verdict(codes, _unsafe_probability(tokens, tokenizer))


def moderation(verdict: Verdict, categories: Mapping[str, str]) -> dict[str, Any]:
    """One of the ``results``: ``guard_categories``, which OpenAI doesn't have, names what the guard found.

    A category that the guard names has the score P(unsafe), another 0. Of a safe text, every one that the guard could
    have named has it: no violation of it is more probable.
    """
    named = {meaning for code in verdict.codes for meaning in _meanings(categories.get(code, ""))}
    scored = named if verdict.codes else {meaning for name in categories.values() for meaning in _meanings(name)}
    return {
        "flagged": bool(verdict.codes),
        "categories": {name: name in named for name in OPENAI_CATEGORIES},
        "category_scores": {name: verdict.score if name in scored else 0.0 for name in OPENAI_CATEGORIES},
        "category_applied_input_types": {name: ["text"] for name in OPENAI_CATEGORIES},
        "guard_categories": {code: categories.get(code, "") for code in verdict.codes},
    }


def _meanings(name: str) -> tuple[str, ...]:
    lowered = name.lower()
    return next((meanings for words, meanings in _MEANINGS if words in lowered), ())


def _unsafe_probability(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer) -> float:
    """P(unsafe) against P(safe) where the verdict begins; vocabularies differ in how they cut the words."""
    for token in tokens:
        if _text(tokenizer, token.token_id):
            break
    else:
        return 0.0
    mass = {"safe": 0.0, "unsafe": 0.0}
    for candidate, logprob in {**dict(token.top), token.token_id: token.logprob}.items():
        text = _text(tokenizer, candidate)
        for word in mass:
            if text and word.startswith(text):
                mass[word] += math.exp(logprob)
    total = sum(mass.values())
    return mass["unsafe"] / total if total else 0.0


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode("utf-8", "replace").strip()
