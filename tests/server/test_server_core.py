"""The engine's thread, the models' life and the pieces of answers, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from puna.engine import SamplingParams
from puna.errors import CapacityError, RequestError, StoreError
from puna.llm import LLM
from puna.llm.create import create
from puna.server.asking import Ask, ChatAsk, chat_pieces, text_pieces
from puna.server.engine_thread import EngineThread
from puna.server.manager import Manager, ServedModel
from puna.server.service import Service
from puna.server.settings import ServerSettings
from puna.store import Store, import_file

Result = TypeVar("Result")
GREEDY = SamplingParams(temperature=0, max_tokens=24)


def with_service(store: Store, use: Callable[[Service], Awaitable[Result]], **settings: object) -> Result:
    async def run() -> Result:
        chosen = ServerSettings(**settings)  # type: ignore[arg-type]
        thread = EngineThread()
        service = Service(chosen, store, thread, Manager(store, chosen, thread))
        try:
            return await use(service)
        finally:
            await service.close()

    return asyncio.run(run())


async def text_of(model: ServedModel, prompt: str, ask: Ask) -> list[str]:
    ids = model.llm.tokenizer.encode(prompt, add_bos=model.llm.tokenizer.add_bos)
    texts = [""] * ask.n
    async with text_pieces(model, ids, ask) as pieces:
        async for piece in pieces:
            texts[piece.index] += piece.text
    return texts


def test_many_at_once_give_the_same_as_the_library_alone(model_store: Store, shared_data: Path) -> None:
    prompts = [f"Once upon a time, {i}" for i in range(8)]
    with LLM.load(shared_data / "weights" / "stories260K" / "stories260K.gguf") as llm:
        expected = [c.text for c in llm.generate(prompts, GREEDY)]

    async def use(service: Service) -> list[list[str]]:
        async with service.manager.use("stories") as model:
            return await asyncio.gather(*(text_of(model, prompt, Ask(GREEDY)) for prompt in prompts))

    assert [texts[0] for texts in with_service(model_store, use)] == expected


def test_n_answers_have_seeds_that_follow_each_other(model_store: Store) -> None:
    params = SamplingParams(temperature=2, top_k=0, top_p=1, max_tokens=12, seed=7)

    async def use(service: Service) -> tuple[list[str], list[str]]:
        async with service.manager.use("stories") as model:
            both = await text_of(model, "Once", Ask(params, n=2))
            second = await text_of(model, "Once", Ask(replace(params, seed=8)))
            return both, second

    both, second = with_service(model_store, use)
    assert both[0] != both[1] == second[0]


def test_usage_and_the_end_at_a_stop_string(model_store: Store) -> None:
    async def use(service: Service) -> None:
        ask = ChatAsk(SamplingParams(temperature=0, stop=["4"]), messages=[{"role": "user", "content": "What is 2+2?"}])
        async with service.manager.use("smollm2") as model:
            prompt, pieces = chat_pieces(model, ask)
            async with pieces:
                found = [piece async for piece in pieces]
        assert "".join(piece.text for piece in found) == "The answer to this classic math problem is "
        assert (found[-1].finish_reason, found[-1].stop) == ("stop", "4")
        usage = found[-1].usage
        assert usage is not None
        assert usage.prompt_tokens == len(prompt.ids)
        assert service.engine_thread.num_running == 0 or await idle(service)

    with_service(model_store, use)


async def idle(service: Service) -> bool:
    """Whether nothing runs once the engine's thread has done what it was told."""
    await service.engine_thread.call(lambda: None)
    return service.engine_thread.num_running == 0


def test_leaving_early_cancels(model_store: Store) -> None:
    async def use(service: Service) -> None:
        ask = Ask(SamplingParams(temperature=0, max_tokens=400, ignore_eos=True), n=3)
        async with service.manager.use("stories") as model:
            async with text_pieces(model, [1], ask) as pieces:
                async for _ in pieces:
                    break
            assert await idle(service)
            pool = model.llm.engine.scheduler.pool
            assert pool.available == pool.num_blocks

    with_service(model_store, use)


def test_a_bad_request_raises_before_anything_runs(model_store: Store) -> None:
    async def use(service: Service) -> None:
        async with service.manager.use("stories") as model:
            with pytest.raises(RequestError, match="context of"):
                text_pieces(model, [1] * 5000, Ask(GREEDY))
            pieces = text_pieces(model, [10**6], Ask(GREEDY, n=2))
            with pytest.raises(RequestError, match="token id 1000000"):
                await pieces.__aenter__()
            assert await idle(service)

    with_service(model_store, use)


def test_truncation_keeps_the_end(model_store: Store) -> None:
    async def use(service: Service) -> None:
        async with service.manager.use("stories") as model:
            limit = 32
            ids = [1, *range(300, 360)]
            cut = text_pieces(model, ids, Ask(GREEDY, context_length=limit, truncate=True))
            assert list(cut.requests[0].prompt_ids) == ids[-limit + 1 :]

    with_service(model_store, use)


def test_a_failing_model_ends_its_requests_and_the_thread_goes_on(
    model_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(service: Service) -> None:
        async with service.manager.use("stories") as model:
            with monkeypatch.context() as patch:
                patch.setattr(model.llm.engine, "step", lambda: 1 / 0)
                with pytest.raises(RequestError, match="ZeroDivisionError"):
                    await text_of(model, "Once", Ask(GREEDY))
            assert (await text_of(model, "Once", Ask(GREEDY)))[0]

    with_service(model_store, use)


def test_models_are_loaded_once_and_evicted_least_recently_used(model_store: Store, shared_data: Path) -> None:
    tiny = shared_data / "weights" / "stories260K" / "stories260K.gguf"
    for name in ("one", "two", "three"):
        import_file(tiny, name, store=model_store)

    async def use(service: Service) -> None:
        manager = service.manager

        async def touch(name: str) -> int:
            async with manager.use(name) as model:
                return id(model)

        assert len(set(await asyncio.gather(*(touch("one") for _ in range(5))))) == 1
        await touch("two")
        await touch("one")
        await touch("three")
        assert [model.name for model in manager.loaded()] == ["three:latest", "one:latest"]
        async with manager.use("one"), manager.use("three"):
            waiting = asyncio.create_task(touch("two"))
            for _ in range(20):
                await service.engine_thread.call(lambda: None)
            assert not waiting.done()
            way = asyncio.create_task(manager.make_way())
            await asyncio.sleep(0)
            assert not way.done()
        await waiting
        await way
        assert "two:latest" in [model.name for model in manager.loaded()]

    with_service(model_store, use, max_loaded=2)


def test_keep_alive_of_zero_unloads(model_store: Store) -> None:
    async def use(service: Service) -> None:
        async with service.manager.use("stories", keep_alive=0):
            assert len(service.manager.loaded()) == 1
        await service.manager.stop("stories")
        assert service.manager.loaded() == []
        assert not await service.manager.stop("stories")
        async with service.manager.use("stories") as model:
            assert await service.manager.stop("stories")
            assert service.manager.loaded() == [model]
        await service.manager.close()
        assert service.manager.loaded() == []

    with_service(model_store, use)


def test_what_cannot_fit_is_refused_before_loading(model_store: Store) -> None:
    async def use(service: Service) -> None:
        with pytest.raises(CapacityError, match=r"smollm2:latest needs 0\.\d GB"):
            async with service.manager.use("smollm2"):
                pass
        with pytest.raises(StoreError, match="no model nothing"):
            async with service.manager.use("nothing"):
                pass

    with_service(model_store, use, memory_budget=100_000_000)


def test_a_path_is_not_a_model_of_the_server(model_store: Store, smollm2_path: Path) -> None:
    async def use(service: Service) -> None:
        with pytest.raises(StoreError, match="is not a model name"):
            async with service.manager.use(str(smollm2_path)):
                pass

    with_service(model_store, use)


def test_a_model_has_the_context_it_was_made_with(model_store: Store) -> None:
    create(model_store, "short", from_="stories", parameters={"num_ctx": 64})

    async def use(service: Service) -> tuple[int, int]:
        async with service.manager.use("short") as model:
            own = model.llm.context_length
        async with service.manager.use("short", context_length=96) as model:
            return own, model.llm.context_length

    try:
        assert with_service(model_store, use, context_length=128) == (64, 96)
    finally:
        model_store.remove("short")
