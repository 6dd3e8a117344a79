"""The Python API on the real SmolLM2."""

import doctest
from pathlib import Path

import numpy as np
import pytest

import puna.llm.llm
from puna.errors import CheckpointError, RequestError, StoreError
from puna.llm import LLM, Chunk


@pytest.fixture(scope="module")
def llm(smollm2_path: Path):
    with LLM.load(smollm2_path) as loaded:
        yield loaded


SUM = [{"role": "user", "content": "What is 2+2?"}]
ANSWER = "The answer to this classic math problem is 4."  # also transformers' in float32, by a clear margin


def test_a_list_gives_the_same_as_each_alone(llm: LLM) -> None:
    prompts = ["The capital of France is", "1, 2, 3,", "def main():"]
    together = llm.generate(prompts, temperature=0, max_tokens=12)
    alone = [llm.generate(prompt, temperature=0, max_tokens=12) for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert together[0].text.startswith(" Paris")
    assert all(c.finish_reason == "length" and len(c.token_ids) == 12 for c in together)


def test_streaming_gives_the_same_text(llm: LLM) -> None:
    chunks = list(llm.chat(SUM, temperature=0, stream=True))
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    assert "".join(c.text for c in chunks) == llm.chat(SUM, temperature=0).text == ANSWER
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].timings.generated_tokens == len(llm.tokenizer.encode(ANSWER)) + 1


def test_two_streams_interleave(llm: LLM) -> None:
    first, second = (llm.generate(p, temperature=0, max_tokens=10, stream=True) for p in ("1, 2, 3,", "a, b, c,"))
    texts = ["", ""]
    for one, two in zip(first, second, strict=True):
        texts[0] += one.text
        texts[1] += two.text
    assert texts[0] == llm.generate("1, 2, 3,", temperature=0, max_tokens=10).text
    assert texts[1] == llm.generate("a, b, c,", temperature=0, max_tokens=10).text


def test_leaving_a_stream_cancels_it(llm: LLM) -> None:
    stream = llm.generate("Once upon a time", temperature=0, stream=True)
    next(stream)
    stream.close()
    assert not llm.engine.has_work


def test_stop_strings_end_and_are_not_shown(llm: LLM) -> None:
    answer = llm.chat(SUM, temperature=0, stop=["classic"])
    assert answer.text == "The answer to this "
    assert answer.finish_reason == "stop"


def test_the_second_turn_reuses_the_first(llm: LLM) -> None:
    first = llm.chat(SUM, temperature=0)
    turn = [*SUM, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And 3+3?"}]
    assert llm.chat(turn, temperature=0, max_tokens=4).timings.cached_tokens >= 32


def test_logprobs_agree_with_logits(llm: LLM) -> None:
    answer = llm.generate("The capital of France is", temperature=0, max_tokens=3, logprobs=True, top_logprobs=2)
    rows = llm.logits([*answer.prompt_ids, *answer.token_ids]).astype(np.float64)
    for place, entry in enumerate(answer.logprobs):
        row = rows[len(answer.prompt_ids) - 1 + place]
        assert entry.token_id == answer.token_ids[place] == entry.top[0][0]
        assert entry.logprob == pytest.approx(row[entry.token_id] - np.log(np.exp(row).sum()), abs=1e-3)


def test_scores_add_up_and_prefer_the_truth(llm: LLM) -> None:
    paris = llm.score("The capital of France is", " Paris")
    assert paris.is_greedy
    assert paris.logprob > llm.score("The capital of France is", " Madrid").logprob
    spaced = llm.score("The capital of France is ", "Paris")
    assert spaced.token_ids == paris.token_ids
    long = llm.score("One", " two three four five six." * 120)  # several chunks
    assert long.logprob == pytest.approx(sum(long.token_logprobs))
    rows = llm.logits([*llm.tokenizer.encode("One"), *long.token_ids]).astype(np.float64)
    expected = [row[i] - np.log(np.exp(row).sum()) for row, i in zip(rows, long.token_ids, strict=False)]
    np.testing.assert_allclose(long.token_logprobs, expected, atol=1e-3)


def test_embeddings_put_like_to_like(llm: LLM) -> None:
    cat, kitten, tax = llm.embed(["A cat sleeps.", "A kitten sleeps.", "Tax law changed in 2019."])
    assert np.linalg.norm(cat) == pytest.approx(1, abs=1e-5)
    assert cat @ kitten > cat @ tax


def test_system_prompt_of_the_model_applies_unless_given(llm: LLM) -> None:
    llm.system = "You are a pirate."
    try:
        assert "You are a pirate." in llm.prompt(SUM).text
        assert "pirate" not in llm.prompt([{"role": "system", "content": "Be plain."}, *SUM]).text
    finally:
        llm.system = None


def test_mistakes(llm: LLM, smollm2_path: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="unknown sampling parameter"):
        llm.generate("x", warmth=1)
    with pytest.raises(RequestError, match="temperature"):
        llm.generate("x", temperature=-1)
    with pytest.raises(RequestError, match="either params or"):
        llm.generate("x", puna.SamplingParams(), temperature=1)
    with pytest.raises(RequestError, match="empty"):
        llm.generate("")
    for prompts in (5, None, [1, 2], [[1, 2]], b"bytes"):
        with pytest.raises(RequestError, match="a text or a list of texts"):
            llm.generate(prompts)
        with pytest.raises(RequestError, match="a text or a list of texts"):
            llm.embed(prompts)
    with pytest.raises(RequestError, match="SamplingParams, found dict"):
        llm.generate("x", {"temperature": 0})
    with pytest.raises(RequestError, match=r"llm\.constraints, found str"):
        llm.generate("x", constraint="[0-9]+")
    with pytest.raises(RequestError, match="list of at least one token id"):
        llm.logits([[1], [2, 3]])
    with pytest.raises(RequestError, match="0 to 49151"):
        llm.logits([49152])
    with pytest.raises(RequestError):
        llm.score("", "x")
    with pytest.raises(StoreError):
        LLM.load("no-such-model")
    with pytest.raises(CheckpointError):
        LLM.load(tmp_path)
    with pytest.raises(RequestError, match="smaller context_length"):
        LLM(llm.model, llm.tokenizer, context_length=2**40)
    with pytest.raises(RequestError, match="unknown ops"):
        LLM.load(smollm2_path, ops="gpu")
    for threads in (0, -1, 10**6):
        with pytest.raises(RequestError, match=f"threads must be from 1 to 1024, found {threads}"):
            LLM.load(smollm2_path, threads=threads)
    with pytest.raises(RequestError, match="context_length must be at least 1, found 0"):
        LLM(llm.model, llm.tokenizer, context_length=0)


def test_a_prompt_that_spells_bos_has_it_once(shared_data: Path) -> None:
    with LLM.load(shared_data / "weights" / "stories260K" / "stories260K.gguf") as stories:
        plain = stories.generate("Once upon", temperature=0, max_tokens=1)
        spelled = stories.generate("<s>Once upon", temperature=0, max_tokens=1, parse_special=True)
        quoted = stories.generate("<s>Once upon", temperature=0, max_tokens=1)
        assert plain.prompt_ids[:1] == spelled.prompt_ids[:1] == quoted.prompt_ids[:1] == [1]
        assert spelled.prompt_ids.count(1) == quoted.prompt_ids.count(1) == 1
        assert spelled.prompt_ids == plain.prompt_ids != quoted.prompt_ids


def test_nothing_asked_nothing_answered(llm: LLM) -> None:
    assert llm.generate([]) == list(llm.generate([], stream=True)) == []
    assert llm.embed([]).shape == (0, 576)


def test_documentation_examples(llm: LLM, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The docstrings' examples, with "smollm2" standing for the file."""
    monkeypatch.setattr(
        puna.llm.llm,
        "resolve",
        lambda name: puna.store.ResolvedModel(smollm2_path, None, smollm2_path.with_suffix(".packed")),
    )
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner()
    for test in finder.find(LLM, "LLM", globs={"llm": llm, "LLM": LLM}):
        runner.run(test)
    assert runner.tries > 5
    assert runner.failures == 0
