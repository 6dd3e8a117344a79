"""Requests with LoRA adapters: who may name what, what they share, and that nobody notices the others."""

from pathlib import Path

import pytest
from tiny_models import random_adapter, random_weights, tiny_config

from puna.engine import Engine, Event, PrefixCache, Request, SamplingParams, Speculation
from puna.errors import RequestError
from puna.model.model import Model
from puna.ops.reference import ReferenceOps
from puna.ops.registry import make_ops

CONFIG = tiny_config()
PROMPT = [5, 9, 200, 31, 7, 7, 8, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110]
ADAPTERS = {
    "one": random_adapter(CONFIG, 4, 1),
    "two": random_adapter(CONFIG, 9, 2),
    "three": random_adapter(CONFIG, 1),
}


def make_engine(ops: str = "native", **options: object) -> Engine:
    if ops == "native":
        pytest.importorskip("puna._native", reason="the native extension is not built")
    model = Model.bind(make_ops(ops, 2), CONFIG, random_weights(CONFIG, seed=3))
    engine = Engine(model, **{"num_blocks": 64, "block_size": 8} | options)  # type: ignore[arg-type]
    for name, adapter in ADAPTERS.items():
        engine.load_adapter(name, adapter)
    return engine


def request(adapter: str | None = None, prompt: list[int] = PROMPT, salt: str = "", seed: int = 1) -> Request:
    params = SamplingParams(temperature=0.7, seed=seed, max_tokens=12, top_logprobs=3)
    return Request(prompt, params, adapter=adapter, cache_salt=salt)


def told(events: list[Event]) -> list[object]:
    return [event._replace(request_id=0) for event in events]


def alone(one: Request, **options: object) -> list[object]:
    return told(list(make_engine(**options).submit(one)))


def test_a_mixed_batch_answers_as_each_would_alone() -> None:
    """Bit for bit, log probabilities included, while prompts are cut into pieces and sequences are preempted."""
    requests = [
        request(adapter, PROMPT[:length], seed=length)
        for length, adapter in ((18, None), (3, "one"), (18, "two"), (9, "one"), (1, "three"), (17, None))
    ]
    expected = [alone(one) for one in requests]
    assert len({str(answer) for answer in expected}) == len(requests)
    for options in ({}, {"max_batch_tokens": 8, "max_sequences": 6}, {"num_blocks": 5}):
        engine = make_engine(**options)  # type: ignore[arg-type]
        streams = [engine.submit(one) for one in requests]
        found: list[list[Event]] = [[] for _ in streams]
        while engine.has_work:
            for event in engine.step():
                found[event.request_id].append(event)
        assert [told(events) for events in found] == expected


def test_adapters_are_loaded_and_unloaded_while_others_run() -> None:
    expected = {name: alone(request(name)) for name in (None, "two", "three")}
    engine = make_engine()
    engine.unload_adapter("one")
    streams = {name: engine.submit(request(name)) for name in (None, "two")}
    engine.step()
    engine.unload_adapter("three")
    engine.step()
    engine.load_adapter("three", ADAPTERS["three"])  # where "one" was
    assert engine.adapters["three"].number == 0
    streams["three"] = engine.submit(request("three"))
    assert {name: told(list(stream)) for name, stream in streams.items()} == expected


def test_both_ops_answer_alike() -> None:
    expected = [event.token for event in make_engine("reference").submit(request("two"))]
    assert [event.token for event in make_engine("native", kv_type="f32").submit(request("two"))] == expected


def test_drafts_change_nothing() -> None:
    repeating = PROMPT[3:9] * 5
    expected = alone(request("two", repeating))
    assert alone(request("two", repeating), speculation=Speculation(token_cost=0.0)) == expected
    draft = Model.bind(ReferenceOps(), CONFIG, random_weights(CONFIG, seed=3))
    speculation = Speculation("model", draft_model=draft, token_cost=0.0)
    assert alone(request("two", repeating), speculation=speculation) == expected


def test_names() -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match="no adapter 'four' is loaded; loaded: one, two, three"):
        engine.submit(request("four"))
    with pytest.raises(RequestError, match="no adapter 'four'"):
        engine.unload_adapter("four")
    with pytest.raises(RequestError, match="'one' is loaded already"):
        engine.load_adapter("one", ADAPTERS["two"])
    with pytest.raises(RequestError, match="needs a name"):
        engine.load_adapter("", ADAPTERS["two"])
    assert not engine.has_work
    assert {name: (loaded.rank, loaded.nbytes) for name, loaded in engine.adapters.items()} == {
        name: (adapter.rank, adapter.nbytes) for name, adapter in ADAPTERS.items()
    }
    for name in ADAPTERS:
        engine.unload_adapter(name)
    assert not engine.adapters
    with pytest.raises(RequestError, match="none is"):
        engine.submit(request("one"))
    assert told(list(engine.submit(request()))) == alone(request())


@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_an_adapter_in_use_stays(end: str) -> None:
    engine = make_engine()
    stream = engine.submit(request("one"))
    waiting = engine.submit(request("one"))
    engine.step()
    with pytest.raises(RequestError, match="'one' is in use by 2 requests"):
        engine.unload_adapter("one")
    if end == "finish":
        list(stream), list(waiting)
    else:
        engine.cancel(stream.id), engine.cancel(waiting.id)
    engine.unload_adapter("one")
    assert list(engine.adapters) == ["two", "three"]


def test_prefixes_are_shared_under_one_adapter_only(tmp_path: Path) -> None:
    """In memory and on disk, and whatever others put into their salts."""
    cache = PrefixCache(tmp_path / "cache", "tiny", 10**7)
    digest = ADAPTERS["one"].digest
    for prefix_cache in (None, cache, cache):
        engine = make_engine(prefix_cache=prefix_cache)
        cached = []
        for adapter, salt in (
            (None, ""), ("one", ""), ("two", ""), (None, digest), (None, f"{digest}:"), ("one", ""), (None, ""),
        ):  # fmt: skip
            stream = engine.submit(request(adapter, salt=salt))
            assert told(list(stream)) == alone(request(adapter, salt=salt))
            cached.append(stream.timings.cached_tokens)
        if prefix_cache is None or cached[0] == 0:
            assert cached == [0, 0, 0, 0, 0, 16, 16]
    assert cached == [16] * 7


def test_an_adapter_of_other_content_under_the_same_name_finds_nothing() -> None:
    engine = make_engine()
    list(engine.submit(request("one")))
    engine.unload_adapter("one")
    engine.load_adapter("one", random_adapter(CONFIG, 4, 5))
    stream = engine.submit(request("one"))
    list(stream)
    assert stream.timings.cached_tokens == 0
    engine.unload_adapter("one")
    engine.load_adapter("again", ADAPTERS["one"])
    stream = engine.submit(request("again"))
    assert told(list(stream)) == alone(request("one"))
    assert stream.timings.cached_tokens == 16


def test_embeddings_and_prompt_scores_are_the_adapters() -> None:
    def embedding(engine: Engine, adapter: str | None) -> list[float]:
        request = Request(PROMPT, SamplingParams(), adapter=adapter, pooling="mean")
        vector = list(engine.submit(request))[-1].embedding
        assert vector is not None
        return vector.tolist()

    def scores(engine: Engine, adapter: str | None) -> object:
        request = Request(PROMPT, SamplingParams(prompt_logprobs=2, max_tokens=0), adapter=adapter)
        first, *_ = engine.submit(request)
        return first.prompt_logprobs

    for ask in (embedding, scores):
        together = make_engine()
        found = [ask(together, adapter) for adapter in (None, "one", "two")]
        assert found == [ask(make_engine(), adapter) for adapter in (None, "one", "two")]
        assert found[0] != found[1] != found[2]
