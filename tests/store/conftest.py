"""A store in a temporary folder, servers on this machine, and no way to the user's own settings."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from local_server import LocalServer

from puna.store import Store
from puna.store.http_download import Http


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT", "XDG_CACHE_HOME", "PUNA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home", notify=lambda message: None)


@pytest.fixture
def start_server() -> Iterator[Callable[[], LocalServer]]:
    servers: list[LocalServer] = []

    def start() -> LocalServer:
        servers.append(LocalServer())
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(start_server: Callable[[], LocalServer]) -> LocalServer:
    return start_server()


@pytest.fixture(scope="session")
def shared_http() -> Iterator[tuple[Http, list[float]]]:
    """One client for all tests, since making one reads the machine's certificates; and the pauses it asked for."""
    waits: list[float] = []
    with Http(retries=3, timeout=20, sleep=waits.append) as client:
        yield client, waits


@pytest.fixture
def waits(shared_http: tuple[Http, list[float]]) -> list[float]:
    """The pauses that the client under test asked for instead of sleeping."""
    shared_http[1].clear()
    return shared_http[1]


@pytest.fixture
def http(shared_http: tuple[Http, list[float]]) -> Http:
    return shared_http[0]


@pytest.fixture
def model() -> bytes:
    """300 kB that look like a GGUF from afar."""
    return b"GGUF" + random.Random(1).randbytes(300_000)
