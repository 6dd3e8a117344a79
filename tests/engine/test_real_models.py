"""The engine on real arithmetic: a random model in any mixture, and a trained one against its published text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import random_weights, tiny_config

from puna.checkpoint import open_checkpoint
from puna.engine import Engine, Request, SamplingParams, Speculation, Timings
from puna.llm import scoring
from puna.model.model import Model
from puna.ops.registry import OPS, make_ops
from puna.tensor import Weight


@pytest.fixture(scope="module", params=sorted(OPS))
def ops_name(request: pytest.FixtureRequest) -> str:
    try:
        make_ops(request.param)
    except ImportError as error:
        pytest.skip(f"{request.param} ops are not built here: {error}")
    return str(request.param)


@pytest.fixture(scope="module")
def tiny(ops_name: str) -> Model:
    config = tiny_config()
    return Model.bind(make_ops(ops_name), config, random_weights(config, seed=3))


PREEMPTING = 14  # blocks of 8, for three sequences of which the two longest need 18
PROMPTS = [np.random.default_rng(i).integers(3, 256, 5 + 17 * i).tolist() for i in range(5)]


def answers(model: Model, params: SamplingParams, **options: int) -> list[list[int]]:
    engine = Engine(model, **options)
    streams = [engine.submit(Request(prompt, params)) for prompt in PROMPTS]
    got = [[e.token for e in stream if e.token is not None] for stream in streams]
    assert engine.scheduler.pool.available == engine.scheduler.pool.num_blocks
    assert (engine.scheduler.num_preemptions > 0) == (options.get("num_blocks") == PREEMPTING)
    return got


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0, max_tokens=24), SamplingParams(seed=5, max_tokens=24)]
)
@pytest.mark.parametrize(
    "options",
    [
        {"max_sequences": 1, "max_batch_tokens": 7, "num_blocks": 4},
        {"max_sequences": 5, "max_batch_tokens": 16, "num_blocks": 256, "block_size": 4},
        {"max_sequences": 3, "max_batch_tokens": 64, "num_blocks": PREEMPTING, "block_size": 8},
    ],
)
def test_same_tokens_in_any_batch(tiny: Model, params: SamplingParams, options: dict[str, int]) -> None:
    # The block size may decide the order in which attention adds up, so it is the same.
    alone = answers(tiny, params, max_sequences=1, num_blocks=100, block_size=options.get("block_size", 32))
    assert answers(tiny, params, **options) == alone


@pytest.mark.parametrize("budget", [5, 64])
def test_scores_and_embeddings_of_prompts(tiny: Model, budget: int) -> None:
    """In chunks, beside a text that is generated: as computed from all logits and hidden states at once."""
    engine = Engine(tiny, num_blocks=100, max_batch_tokens=budget, max_sequences=5)
    prompt = PROMPTS[3]
    params = SamplingParams(temperature=0, max_tokens=30)
    plain = list(Engine(tiny, num_blocks=100).submit(Request(prompt, params)))
    generated = engine.submit(Request(prompt, params))
    mean = engine.submit(Request(prompt, pooling="mean"))
    scored = engine.submit(Request(prompt, SamplingParams(prompt_logprobs=2, max_tokens=0)))
    assert [event.token for event in generated] == [event.token for event in plain]

    (event,) = mean
    vector = event.embedding
    assert vector is not None
    np.testing.assert_allclose(vector / np.linalg.norm(vector), scoring.embedding(tiny, prompt), atol=1e-5)

    (event,) = scored
    assert event.prompt_logprobs is not None
    expected = scoring.score(tiny, prompt[:1], prompt[1:])
    logprobs = [entry.logprob for entry in event.prompt_logprobs[1:]]
    np.testing.assert_allclose(logprobs, expected.token_logprobs, atol=1e-4)
    assert all(len(entry.top) == 2 for entry in event.prompt_logprobs[1:])
    engine.check_idle()


def test_the_published_story(ops_name: str, shared_data: Path) -> None:
    """Greedy text of stories260K as llama2.c documents it, with other stories in the batch."""
    folder = shared_data / "weights" / "stories260K"
    checkpoint = open_checkpoint(folder / "stories260K.gguf")
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    model = Model.bind(make_ops(ops_name), checkpoint.config, checkpoint.tensors)
    engine = Engine(model, num_blocks=64, max_batch_tokens=64, max_sequences=4)
    others = [engine.submit(Request([1, 300 + i], SamplingParams(max_tokens=50))) for i in range(3)]
    expected = (folder / "expected_greedy.txt").read_text().rstrip("\n")
    stream = engine.submit(Request([1], SamplingParams(temperature=0, max_tokens=256)))
    text = tokenizer.decode([e.token for e in stream if e.token is not None]).decode()
    assert text == expected
    assert all(list(other)[-1].finish_reason in ("length", "stop") for other in others)


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0, max_tokens=48), SamplingParams(seed=5, temperature=0.1, max_tokens=48)]
)
@pytest.mark.parametrize("drafter", ["ngram", "equal model", "other model"])
@pytest.mark.parametrize(
    "options", [{"num_blocks": 100}, {"num_blocks": 24, "block_size": 8, "max_sequences": 3, "max_batch_tokens": 40}]
)
def test_same_tokens_with_drafts(tiny: Model, params: SamplingParams, drafter: str, options: dict[str, int]) -> None:
    draft_model = None
    if drafter != "ngram":
        weights = random_weights(tiny.config, seed=3)
        if drafter == "other model":
            head = weights["lm_head.weight"].dequantize()
            noise = np.random.default_rng(0).standard_normal(head.shape, dtype=np.float32)
            weights["lm_head.weight"] = Weight.from_array("lm_head.weight", head + np.float32(0.02) * noise, "F32")
        draft_model = Model.bind(tiny.ops, tiny.config, weights)
    speculation = Speculation("model" if draft_model else "ngram", 6, 0.0, draft_model)

    def answers(speculation: Speculation | None, **options: int) -> tuple[list[list[int]], list[Timings]]:
        engine = Engine(tiny, speculation=speculation, **options)
        streams = [engine.submit(Request(prompt, params)) for prompt in PROMPTS]
        return [[e.token for e in s if e.token is not None] for s in streams], [s.timings for s in streams]

    plain, _ = answers(None, max_sequences=1, num_blocks=100, block_size=options.get("block_size", 32))
    got, timings = answers(speculation, **options)
    assert got == plain
    accepted, drafted = (sum(getattr(t, name) for t in timings) for name in ("accepted_tokens", "drafted_tokens"))
    if drafter == "equal model":
        assert accepted == drafted > 100
    elif drafter == "other model":
        assert 20 < accepted < drafted
    else:
        assert 0 < accepted < drafted
