"""What goes wrong around a server: clients that leave, sit idle or never read, kills, a full disk. Nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from guarded_server import GuardedServer
from mirror import Mirror
from serve_process import ServeProcess

from bench.soak import resident_bytes, soak
from puna.errors import StoreError
from puna.server.keys import KeyFile
from puna.store import Store, import_file


@pytest.fixture
def tiny(shared_data: Path) -> Path:
    return shared_data / "weights" / "stories260K" / "stories260K.gguf"


@pytest.fixture
def server(model_store: Store) -> Iterator[GuardedServer]:
    with GuardedServer(model_store, parallel=8) as running:
        yield running


def address(server: GuardedServer) -> tuple[str, int]:
    host, port = server.server.servers[0].sockets[0].getsockname()[:2]
    return host, port


def wait_until_idle(server: GuardedServer) -> None:
    """Returns once nothing is left of any request, and raises when something stays."""
    service = server.service
    loop = service.engine_thread._loop

    async def settled() -> bool:
        await service.engine_thread.call(lambda: None)
        busy = service.accounting.limits.in_server or service.engine_thread.num_running
        return not busy and not any(model.leases for model in service.manager.loaded())

    for _ in range(10_000):
        if asyncio.run_coroutine_threadsafe(settled(), loop).result(60):
            break
    else:
        pytest.fail("requests are left though every client is gone")
    for model in service.manager.loaded():
        asyncio.run_coroutine_threadsafe(service.engine_thread.call(model.llm.engine.check_idle), loop).result(60)


def request_bytes(max_tokens: int | None) -> bytes:
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": max_tokens}).encode()
    head = f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


def test_clients_that_leave_at_any_moment_leave_nothing_behind(server: GuardedServer) -> None:
    """While the request is sent, while it waits or runs, after some of the answer; half of them with a reset."""

    def leave(seed: int) -> None:
        chance = random.Random(seed)
        text = request_bytes(chance.choice([1, 20, None]))
        cut = chance.choice([len(text), len(text), chance.randrange(len(text))])
        with socket.create_connection(address(server)) as client:
            client.sendall(text[:cut])
            if cut == len(text):
                for _ in range(chance.randrange(3)):
                    client.recv(chance.randrange(1, 400))
            if chance.random() < 0.5:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    threads = [threading.Thread(target=lambda first=i: [leave(first * 10 + j) for j in range(10)]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until_idle(server)
    assert httpx.post(f"{server.url}/api/generate", json={}, timeout=60).status_code == 200


def test_a_client_that_never_reads_keeps_no_cache(server: GuardedServer) -> None:
    """Its answers stay in the server until it leaves; the engine has long gone on."""
    with socket.create_connection(address(server)) as silent:
        silent.sendall(request_bytes(100))
        for _ in range(10):
            assert httpx.post(f"{server.url}/api/generate", json={}, timeout=60).status_code == 200
    wait_until_idle(server)


def test_a_thousand_idle_connections(server: GuardedServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"at most {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    idle = []
    try:
        for i in range(1000):
            idle.append(socket.create_connection(address(server)))
            if i % 2:
                idle[-1].sendall(b"POST /api/generate HTTP/1.1\r\nHost: local")
        for _ in range(3):
            assert httpx.post(f"{server.url}/api/generate", json={}, timeout=60).status_code == 200
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_until_idle(server)


def test_a_kill_during_a_pull_costs_nothing_but_time(tmp_path: Path, tiny: Path) -> None:
    store = Store(tmp_path, notify=lambda _: None)
    import_file(tiny, "stories", store=store)
    with Mirror(tiny.read_bytes() + b"\0" * 6_000_000) as mirror:
        body = {"model": mirror.url, "insecure": True}
        with (
            ServeProcess(tmp_path, NO_PROXY="127.0.0.1") as serving,
            httpx.stream("POST", f"{serving.url}/api/pull", json=body, timeout=60) as stream,
        ):
            next(line for line in stream.iter_lines() if "completed" in json.loads(line))
            assert mirror.halfway.wait(60)
            while not any(path.stat().st_size > 1 << 20 for path in (tmp_path / "partial").iterdir()):
                assert serving.process.poll() is None
            serving.process.kill()
            serving.process.wait()
        mirror.gate.set()
        assert [str(manifest.model_name) for manifest in store.models()] == ["stories:latest"]
        assert store.verify() == []
        with ServeProcess(tmp_path, NO_PROXY="127.0.0.1") as serving:
            again = httpx.post(f"{serving.url}/api/pull", json={**body, "stream": False}, timeout=60)
            assert again.json() == {"status": "success"}, again.text
            generated = {"model": "tales", "prompt": "Once", "stream": False, "options": {"num_predict": 2}}
            assert httpx.post(f"{serving.url}/api/generate", json=generated, timeout=60).status_code == 200
        assert mirror.ranges[0] is None
        assert mirror.ranges[1] is not None
    assert store.verify() == []
    assert store.collect_garbage() == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can't be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, tiny: Path) -> None:
    """What does not fit is refused in one sentence; what is there stays, and is served."""
    store = Store(small_disk, notify=lambda _: None)
    import_file(tiny, "stories", store=store)
    secret = KeyFile(store).add("alice", "admin")
    headers = {"x-api-key": secret}
    with ServeProcess(small_disk) as serving, httpx.Client(base_url=serving.url, headers=headers, timeout=60) as http:
        blob = os.urandom(1 << 21)
        refused = http.post("/api/blobs/sha256:" + "0" * 64, content=blob)
        assert refused.status_code == 507, refused.text
        assert "disk is full" in refused.json()["error"] or "free" in refused.json()["error"]
        with Mirror(tiny.read_bytes() + b"\0" * 2_000_000) as mirror:
            mirror.gate.set()
            body = {"model": mirror.url, "insecure": True, "stream": False}
            pulled = http.post("/api/pull", json=body)
            assert "error" in pulled.json(), pulled.text
        filler = small_disk / "filler"
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:  # noqa: PT012
            while True:
                file.write(b"\0" * 4096)
        with pytest.raises(StoreError, match="the disk is full"):
            KeyFile(store).add("bob")
        body = {"model": "stories", "prompt": "Once", "stream": False, "options": {"num_predict": 2}}
        assert http.post("/api/generate", json=body).status_code == 200
        filler.unlink()
        assert KeyFile(store).add("bob")
        assert http.get("/api/tags").json()["models"][0]["name"] == "stories:latest"
    assert [key.name for key in KeyFile(store).read()] == ["alice", "bob"]
    assert store.verify() == []


def test_memory_stays_as_it_is(tmp_path: Path, tiny: Path) -> None:
    """After a first hundred requests that fill caches, three hundred more need nothing (bench/soak.py does 10,000)."""
    import_file(tiny, "stories", store=Store(tmp_path, notify=lambda _: None))
    with ServeProcess(tmp_path) as serving:
        soak(serving.url, "stories", 100, seed=0)
        before = resident_bytes(serving.process.pid)
        soak(serving.url, "stories", 300, seed=1)
        assert resident_bytes(serving.process.pid) - before < 8e6
