"""Models come in by ollama's routes, as blobs and from other servers; what breaks off leaves nothing half done."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from mirror import Mirror
from running_server import RunningServer

from puna.server.ollama import jobs
from puna.server.ollama.streaming import Line


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def test_blobs(own: RunningServer) -> None:
    content = b"GGUF" + bytes(3_000_000)
    url = f"{own.url}/api/blobs/{digest_of(content)}"
    partial = own.service.store.blobs.partial
    assert httpx.head(url).status_code == 404
    wrong = httpx.post(url, content=content[:-1])
    assert wrong.status_code == 400
    assert "nothing was stored" in wrong.json()["error"]
    assert list(partial.glob("upload-*")) == []
    assert httpx.post(url, content=iter([content[:5], content[5:]])).status_code == 201  # chunked, of unknown length
    assert httpx.head(url).status_code == 200
    assert httpx.post(url, content=content).status_code == 200
    assert [path.read_bytes() for path in partial.glob("sha256-*")] == [content]
    for bad in ("sha256:xyz", "md5:" + "0" * 32, "..%2f..%2fetc"):
        assert httpx.post(f"{own.url}/api/blobs/{bad}", content=b"x").status_code in (400, 404)


def test_an_upload_that_breaks_off_leaves_nothing(own: RunningServer) -> None:
    address = httpx.URL(own.url)
    partial = own.service.store.blobs.partial
    with socket.create_connection((address.host, address.port)) as client:
        head = f"POST /api/blobs/{digest_of(b'x')} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n"
        client.sendall(head.encode() + bytes(2_000_000))
        own.until(lambda _: bool(list(partial.glob("upload-*"))))
    own.until(lambda _: not list(partial.glob("upload-*")))


@pytest.fixture
def mirror(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Mirror((shared_data / "weights" / "stories260K" / "stories260K.gguf").read_bytes()) as made:
        yield made


def test_pull(own: RunningServer, mirror: Mirror) -> None:
    mirror.gate.set()
    refused = httpx.post(own.url + "/api/pull", json={"model": mirror.url})
    assert (refused.status_code, "insecure" in refused.json()["error"]) == (400, True)
    body = {"model": mirror.url, "insecure": True}
    answer = httpx.post(own.url + "/api/pull", json=body, timeout=60)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["status"] for line in lines][-3:] == [
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]
    assert lines[0] == {"status": "pulling manifest"}
    size = (own.service.store.find("tales")).size
    progress = [line for line in lines if "completed" in line]
    assert progress[-1] == {"status": "pulling tales.gguf", "total": size, "completed": size}
    again = httpx.post(own.url + "/api/pull", json={**body, "stream": False}, timeout=60)
    assert again.json() == {"status": "success"}
    body = {"model": "tales", "prompt": "Once upon a time", "stream": False, "options": {"num_predict": 1}}
    assert httpx.post(own.url + "/api/generate", json=body, timeout=60).status_code == 200


def test_a_pull_that_is_left_goes_on_where_it_was(
    own: RunningServer, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    tellers: list[jobs._Teller] = []

    class Teller(jobs._Teller):
        def __init__(self, describe: Callable[[str], Line]) -> None:
            super().__init__(describe)
            tellers.append(self)

    monkeypatch.setattr(jobs, "_Teller", Teller)
    body = {"model": mirror.url, "insecure": True}
    with httpx.stream("POST", own.url + "/api/pull", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if "completed" in json.loads(line):
                break
    own.until(lambda service: tellers[0].given_up)
    mirror.gate.set()
    # The abandoned work ends at its next sign of progress, and only then lets go of the file.
    answer = httpx.post(own.url + "/api/pull", json={**body, "stream": False}, timeout=60)
    assert answer.json() == {"status": "success"}, answer.text
    assert mirror.ranges[0] is None
    assert mirror.ranges[1] is not None
    assert own.service.store.verify() == []


def test_two_pulls_of_one_model_share_the_work(own: RunningServer, mirror: Mirror) -> None:
    body = {"model": mirror.url, "insecure": True, "stream": False}
    answers: list[httpx.Response] = []

    def pull() -> None:
        answers.append(httpx.post(own.url + "/api/pull", json=body, timeout=60))

    threads = [threading.Thread(target=pull) for _ in range(2)]
    for thread in threads:
        thread.start()
    mirror.gate.set()
    for thread in threads:
        thread.join()
    assert [answer.json() for answer in answers] == [{"status": "success"}] * 2


def test_a_path_of_the_server_cannot_be_pulled(own: RunningServer, shared_data: Path) -> None:
    path = shared_data / "weights" / "stories260K" / "stories260K.gguf"
    for model in (str(path), f"file://{path}", "./stories260K.gguf", "tests/server"):
        answer = httpx.post(own.url + "/api/pull", json={"model": model, "stream": False}, timeout=60)
        assert answer.status_code in (400, 404, 502), (model, answer.text)
    assert [str(manifest.model_name) for manifest in own.service.store.models()] == ["stories:latest"]
