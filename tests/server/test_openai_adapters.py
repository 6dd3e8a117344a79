"""Adapters: loaded and unloaded while the server runs, and asked for by base:adapter."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from lora_files import write_peft
from openai_schemas import check
from running_server import RunningServer
from tiny_models import random_adapter

from puna.checkpoint.lora import read_adapter
from puna.errors import CapacityError
from puna.llm import LLM
from puna.llm.create import create
from puna.server.engine_thread import EngineThread
from puna.server.manager import Manager
from puna.server.policy import policy_of
from puna.server.settings import ServerSettings
from puna.store import Store

BODY = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    with LLM.load(shared_data / "weights" / "stories260K" / "stories260K.gguf") as llm:
        for seed, name in enumerate(("one", "two"), 1):
            write_peft(folder / name, random_adapter(llm.config, 4, seed=seed, size=0.02))
    (folder / "broken").mkdir()
    return folder


@pytest.fixture(scope="module")
def expected(shared_data: Path, folder: Path) -> dict[str, str]:
    """What the library says: with each adapter, and without."""
    with LLM.load(shared_data / "weights" / "stories260K" / "stories260K.gguf") as llm:
        options: Any = {"temperature": 0, "max_tokens": 40}
        texts = {"stories": llm.generate("Once upon a time", **options).text}
        for name in ("one", "two"):
            llm.load_adapter(name, folder / name)
            texts[f"stories:{name}"] = llm.generate("Once upon a time", adapter=name, **options).text
    assert len(set(texts.values())) == 3
    return texts


@pytest.fixture
def http(model_store: Store, folder: Path) -> Iterator[httpx.Client]:
    with (
        RunningServer(model_store, adapter_dir=folder, keep_alive=3600) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def load(http: httpx.Client, name: str, path: str, **fields: Any) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


def tell(http: httpx.Client, model: str) -> str:
    response = http.post("/v1/completions", json={**BODY, "model": model})
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_several_adapters_beside_their_base(
    http: httpx.Client, shared_data: Path, folder: Path, expected: dict[str, str]
) -> None:
    assert load(http, "stories:one", "one").status_code == 200
    assert load(http, "two", str(folder / "two"), base_model="stories").status_code == 200
    models = list(expected) * 4
    with ThreadPoolExecutor(len(models)) as pool:
        texts = list(pool.map(lambda model: tell(http, model), models))
    assert texts == [expected[model] for model in models]
    listed = http.get("/v1/models").json()
    check(shared_data, "ListModelsResponse", listed)
    assert {"stories:one", "stories:two"} <= {model["id"] for model in listed["data"]}
    assert http.get("/v1/models/stories:one").json()["parent"] == "stories:latest"


def test_an_unloaded_adapter_is_no_model(http: httpx.Client, expected: dict[str, str]) -> None:
    assert load(http, "stories:one", "one").status_code == 200
    assert load(http, "stories:one", "one").status_code == 400
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "one"}).status_code == 200
    assert http.post("/v1/completions", json={**BODY, "model": "stories:one"}).status_code == 404
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "one"}).status_code == 400
    assert load(http, "one", "two").status_code == 200  # the only model that is loaded
    assert tell(http, "stories:one") == expected["stories:two"]


def test_an_adapter_comes_back_with_its_model(http: httpx.Client, expected: dict[str, str]) -> None:
    assert load(http, "stories:one", "one").status_code == 200
    http.post("/api/generate", json={"model": "stories", "keep_alive": 0})
    while http.get("/api/ps").json()["models"]:
        pass
    assert tell(http, "stories:one") == expected["stories:one"]


def test_their_memory_counts_as_their_model_s(http: httpx.Client, shared_data: Path, folder: Path) -> None:
    assert http.post("/v1/completions", json={**BODY, "model": "stories"}).status_code == 200
    (alone,) = http.get("/api/ps").json()["models"]
    assert alone["adapters"] == []
    assert load(http, "stories:one", "one").status_code == 200
    (loaded,) = http.get("/api/ps").json()["models"]
    with LLM.load(shared_data / "weights" / "stories260K" / "stories260K.gguf") as llm:
        nbytes = read_adapter(folder / "one", llm.config).nbytes
    assert nbytes > 0
    assert loaded["size"] - alone["size"] == nbytes
    assert loaded["adapters"] == ["one"]


def test_one_without_room_beside_models_in_use_is_refused(model_store: Store, folder: Path) -> None:
    model_store.copy("stories", "other")

    async def use() -> None:
        settings = ServerSettings(adapter_dir=folder, memory_budget=1 << 40)
        thread = EngineThread()
        manager = Manager(model_store, settings, thread)
        adapter = manager.adapters.make("stories", "one", "one")
        async with manager.use("other") as other:
            async with manager.use("stories") as model:
                manager.budget = other.num_bytes + model.num_bytes
            with pytest.raises(CapacityError, match="no room for the adapter stories:one"):
                await manager.add_adapter(adapter)
            assert manager.adapters.added() == []
        await manager.add_adapter(adapter)  # in place of the other model
        assert [model.name for model in manager.loaded()] == ["stories:latest"]
        await manager.close()
        await thread.close()

    try:
        asyncio.run(use())
    finally:
        model_store.remove("other")


def test_ollama_s_api_shows_them(http: httpx.Client) -> None:
    assert load(http, "stories:one", "one").status_code == 200
    base, adapted = (http.post("/api/show", json={"model": name}).json() for name in ("stories", "stories:one"))
    assert adapted["details"].pop("parent_model") == "stories:latest"
    assert base["details"].pop("parent_model") == ""
    assert adapted == base


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("stories:x", "../secret", "within the server's --adapter-dir"),
        ("stories:x", "/etc/passwd", "within the server's --adapter-dir"),
        ("stories:x", "link", "within the server's --adapter-dir"),
        ("stories:x", "a\0b", "within the server's --adapter-dir"),
        ("stories:x", "nowhere", "does not exist"),
        ("stories:x", "broken", "adapter_config.json"),
        ("stories:", "one", "must be letters"),
        ("stories:a/b", "one", "must be letters"),
        ("stories:latest", "one", "already"),
        ("x", "one", "0 models are loaded"),
    ],
)
def test_what_is_no_adapter_is_refused(http: httpx.Client, folder: Path, name: str, path: str, message: str) -> None:
    if path == "link" and not (folder / "link").exists():
        os.symlink("/etc", folder / "link")
    response = load(http, name, path)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert "stories:x" not in [model["id"] for model in http.get("/v1/models").json()["data"]]


def test_only_an_admin_may_load_and_unload() -> None:
    for name in ("load", "unload"):
        assert policy_of("POST", f"/v1/{name}_lora_adapter") == "admin"


def test_a_server_without_a_folder_takes_no_paths(server: RunningServer, folder: Path) -> None:
    with httpx.Client(base_url=server.url) as client:
        response = load(client, "stories:one", str(folder / "one"))
    assert response.status_code == 400
    assert "--adapter-dir" in response.json()["error"]["message"]


def test_a_stored_model_has_its_adapter(
    http: httpx.Client, model_store: Store, folder: Path, expected: dict[str, str]
) -> None:
    one = create(model_store, "tales", from_="stories", adapters=[folder / "one"])
    create(model_store, "both", from_="stories", adapters=[folder / "one", folder / "two"])
    try:
        assert tell(http, "tales") == tell(http, f"tales:{one.adapters[0].name}") == expected["stories:one"]
        assert tell(http, "both:two") == expected["stories:two"]
        response = http.post("/v1/completions", json={**BODY, "model": "both"})
        assert response.status_code == 400
        assert "ask for one of both:one, both:two" in response.json()["error"]["message"]
        assert load(http, "tales:one", "two").status_code == 400
    finally:
        for name in ("tales", "both"):
            model_store.remove(name)
