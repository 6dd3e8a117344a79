"""A store with two real models, and a server over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ollama_schema import OllamaSchema
from running_server import RunningServer

import puna.server.asking
from puna.chat.tools import TextDelta, ThinkingDelta, ToolCallArguments, ToolCallStart
from puna.server.pieces import Delta
from puna.store import Store, import_file


@pytest.fixture(scope="session")
def model_store(smollm2_path: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """``smollm2`` (SmolLM2-135M-Instruct) and ``stories`` (a base model of 260 thousand parameters)."""
    store = Store(tmp_path_factory.mktemp("store"), notify=lambda _: None)
    import_file(smollm2_path, "smollm2", store=store)
    import_file(shared_data / "weights" / "stories260K" / "stories260K.gguf", "stories", store=store)
    return store


@pytest.fixture(scope="session")
def server(model_store: Store) -> Iterator[RunningServer]:
    with RunningServer(model_store) as running:
        yield running


@pytest.fixture
def own(shared_data: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server of the test's own, over a store of its own that holds ``stories``."""
    store = Store(tmp_path / "home", notify=lambda _: None)
    import_file(shared_data / "weights" / "stories260K" / "stories260K.gguf", "stories", store=store)
    with RunningServer(store) as running:
        yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def ollama_schema(shared_data: Path) -> OllamaSchema:
    return OllamaSchema(shared_data)


class StructuredReader:
    """Stands for a model that thinks, speaks, and calls two tools, whatever it writes."""

    def push(self, text: str) -> list[Delta]:
        return []

    def finish(self) -> list[Delta]:
        return [
            ThinkingDelta("Let me "),
            ThinkingDelta("look."),
            TextDelta("One moment."),
            ToolCallStart(0, "call_a", "get_weather"),
            ToolCallArguments(0, '{"city":'),
            ToolCallArguments(0, ' "Paris"}'),
            ToolCallStart(1, "call_b", "get_time"),
            ToolCallArguments(1, "{}"),
        ]


@pytest.fixture
def structured(monkeypatch: pytest.MonkeyPatch) -> type[StructuredReader]:
    monkeypatch.setattr(puna.server.asking, "reader_of", lambda *_: (StructuredReader, frozenset()))
    return StructuredReader
