"""/v1/moderations: the mapping by itself, and the route over a model that stands for Llama Guard.

What the real guards find is theirs; proven here is that their prompt is theirs, that their answers are read, and that
scores are probabilities.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai_schemas import check
from running_server import RunningServer

from puna.errors import PunaError
from puna.llm import TokenLogprob
from puna.server.asking import Ask, texts_pieces
from puna.server.manager import ServedModel
from puna.server.openai import moderations
from puna.server.openai.guard import (
    DEFAULT_CATEGORIES,
    OPENAI_CATEGORIES,
    Verdict,
    answer_pattern,
    listed_categories,
    moderation,
    read_verdict,
)
from puna.server.openai.moderations import is_guard
from puna.server.pieces import Pieces
from puna.store import Store, import_file

# In the form of Llama Guard's templates; the second reads messages in parts, as that of Llama Guard 3 1B does.
TEMPLATE = """{{- '<|im_start|>user\\nTask: say which of these categories a message violates.\\n\\n' -}}
{{- 'S1: Violent Crimes.\\nS2: Hate.\\nS3: Elections.\\n\\nUser: ' ~ messages[0]['content'] ~ '\\n\\n' -}}
{{- 'Answer safe or unsafe and a line of codes.<|im_end|>\\n<|im_start|>assistant\\n' -}}"""
IN_PARTS = TEMPLATE.replace("messages[0]['content']", "messages[0]['content'][0]['text']")


@pytest.fixture(scope="module", params=[TEMPLATE, IN_PARTS], ids=["text", "parts"])
def guard_server(
    request: pytest.FixtureRequest, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    store = Store(tmp_path_factory.mktemp("guard"), notify=lambda _: None)
    import_file(smollm2_path, "llama-guard-test", store=store)
    import_file(smollm2_path, "smollm2", store=store)
    store.commit(replace(store.find("llama-guard-test"), template=request.param))
    with RunningServer(store) as running:
        yield running


def test_the_route(guard_server: RunningServer, shared_data: Path) -> None:
    with openai.OpenAI(base_url=f"{guard_server.url}/v1", api_key="none", max_retries=0) as client:
        one = client.moderations.create(input="I love you.", model="omni-moderation-latest")
        many = client.moderations.create(input=["I love you.", "I hate you."], model="llama-guard-test")
        parts: Any = [{"type": "text", "text": "I love you."}]
        part = client.moderations.create(input=parts)
    for reply in (one, many, part):
        check(shared_data, "CreateModerationResponse", reply.to_dict())
        assert reply.model == "llama-guard-test:latest"
    assert len(many.results) == 2
    assert one.results[0] == many.results[0] == part.results[0]
    for result in many.results:
        codes = result.to_dict()["guard_categories"]
        assert result.flagged == bool(codes)
        assert codes.keys() <= {"S1", "S2", "S3"}  # type: ignore[attr-defined]
        scores = result.category_scores.to_dict().values()
        assert all(0 <= score <= 1 for score in scores)  # type: ignore[operator]


def test_the_guard_is_shown_the_text(guard_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its template reads; else every text would be safe."""
    shown = []

    def watch(model: ServedModel, prompts: list[list[int]], ask: Ask) -> Pieces:
        shown.extend(model.llm.tokenizer.decode(prompt).decode() for prompt in prompts)
        return texts_pieces(model, prompts, ask)

    monkeypatch.setattr(moderations, "texts_pieces", watch)
    reply = httpx.post(f"{guard_server.url}/v1/moderations", json={"input": ["x", "They <|im_end|> hide"]})
    assert reply.status_code == 200
    assert "User: x\n" in shown[0]
    assert "User: They <|im_end|> hide\n" in shown[1]


def test_what_is_refused(guard_server: RunningServer, http: httpx.Client) -> None:
    with httpx.Client(base_url=guard_server.url) as guarded:
        image = [{"type": "image_url", "image_url": {"url": "http://x"}}]
        for body, words in (
            ({"input": image}, "text only"),
            ({"input": "x", "model": "smollm2"}, "no guard model"),
            ({"input": []}, "input"),
            ({"input": "x", "colour": "red"}, "colour"),
        ):
            reply = guarded.post("/v1/moderations", json=body)
            assert reply.status_code == 400
            assert words in reply.json()["error"]["message"]
    reply = http.post("/v1/moderations", json={"input": "x"})
    assert reply.status_code == 404
    assert "puna pull llama-guard" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-guard-3-1b:latest", True),
        ("meta-llama/Llama-Guard-4-12B", True),
        ("llamaguard-7b", True),
        ("smollm2", False),
        ("guard", False),
        ("llama-3-guardian", False),
    ],
)
def test_which_models_are_guards(name: str, expected: bool) -> None:
    assert is_guard(name) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("S1", {"violence", "illicit/violent"}),
        ("S2", {"illicit"}),
        ("S3", {"sexual", "illicit"}),
        ("S4", {"sexual", "sexual/minors"}),
        ("S5", set()),
        ("S6", set()),
        ("S7", set()),
        ("S8", set()),
        ("S9", {"illicit", "illicit/violent"}),
        ("S10", {"hate"}),
        ("S11", {"self-harm"}),
        ("S12", {"sexual"}),
        ("S13", set()),
        ("S14", set()),
    ],
)
def test_the_mapping_of_llama_guard_3(code: str, expected: set[str]) -> None:
    result = moderation(Verdict((code,), 0.9), DEFAULT_CATEGORIES)
    assert result["flagged"]
    assert {name for name, found in result["categories"].items() if found} == expected
    assert {name for name, score in result["category_scores"].items() if score} == expected
    assert result["guard_categories"] == {code: DEFAULT_CATEGORIES[code]}


def test_codes_mean_what_the_prompt_says_they_do() -> None:
    """Llama Guard 2 counts differently from 3, and Llama Guard 1 has other categories."""
    prompt = "Task\n\n<BEGIN CATEGORIES>\nO1: Violence and Hate.\nShould not\nO6: Self-Harm.\n<END>\nUser: S1: no"
    assert listed_categories(prompt) == {"O1": "Violence and Hate", "O6": "Self-Harm"}
    result = moderation(Verdict(("O1",), 1.0), listed_categories(prompt))
    assert {name for name, found in result["categories"].items() if found} == {"violence", "hate"}
    assert listed_categories("nothing") == DEFAULT_CATEGORIES


def test_a_safe_text_bounds_every_score() -> None:
    result = moderation(Verdict((), 0.2), {"S1": "Violent Crimes", "S2": "Elections"})
    assert not result["flagged"]
    assert not any(result["categories"].values())
    assert {n for n, score in result["category_scores"].items() if score == 0.2} == {"violence", "illicit/violent"}
    assert set(result["category_scores"]) == set(OPENAI_CATEGORIES)


@dataclass
class Words:
    """A vocabulary of whole words."""

    words: list[str]

    def token_bytes(self, token: int) -> bytes:
        return self.words[token].encode()


WORDS = Words(["\n\n", "safe", "unsafe", "un", " safe", "x", "\n", "S1"])


@pytest.mark.parametrize(
    ("answer", "codes"),
    [
        ("safe", ()),
        ("\n\nsafe", ()),
        ("\n\nunsafe\nS1", ("S1",)),
        ("unsafe\nS1,S10", ("S1", "S10")),
        ("unsafe\nO3, O1,O3\n", ("O3", "O1")),
    ],
)
def test_answers_are_read(answer: str, codes: tuple[str, ...]) -> None:
    assert read_verdict(answer, [], WORDS).codes == codes  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", ["", "unsafe", "Sorry", "safe\nS1", "unsafe\nX1", "unsafe S1 because"])
def test_other_answers_are_errors(answer: str) -> None:
    with pytest.raises(PunaError, match="neither safe nor unsafe"):
        read_verdict(answer, [], WORDS)  # type: ignore[arg-type]


def test_the_score_is_the_probability_of_unsafe_where_the_verdict_begins() -> None:
    top = [(1, math.log(0.5)), (2, math.log(0.2)), (3, math.log(0.1)), (4, math.log(0.1)), (5, math.log(0.1))]
    blank = TokenLogprob(0, math.log(0.9), [(0, math.log(0.9)), (2, math.log(0.05))])
    verdict = read_verdict("\n\nsafe", [blank, TokenLogprob(1, math.log(0.5), top)], WORDS)  # type: ignore[arg-type]
    assert verdict.score == pytest.approx((0.2 + 0.1) / (0.5 + 0.2 + 0.1 + 0.1))


def test_the_pattern_of_answers() -> None:
    pattern = answer_pattern(["S1", "S10"])
    for good in ("safe", "\n\nsafe", "unsafe\nS1", "unsafe\nS10,S1"):
        assert re.fullmatch(pattern, good)
    for bad in ("unsafe", "unsafe\nS2", "unsafe\nS1,S1,S1", "maybe"):
        assert not re.fullmatch(pattern, bad)
