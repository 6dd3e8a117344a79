"""/v1/batches by OpenAI's client; batches that are killed, cancelled, expired, and wanted by two servers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai_schemas import check
from running_server import RunningServer

from puna.server.batch_journal import Journal
from puna.server.openai import batch_runner
from puna.server.records import new_id
from puna.store import Store, import_file

ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def tiny_store(shared_data: Path, tmp_path: Path) -> Store:
    store = Store(tmp_path / "home", notify=lambda _: None)
    import_file(shared_data / "weights" / "stories260K" / "stories260K.gguf", "stories", store=store)
    return store


def completion(custom_id: str, prompt: str = "Once", max_tokens: int = 8, **more: Any) -> dict[str, Any]:
    body = {"model": "stories", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def start(client: openai.OpenAI, lines: list[Any], endpoint: Any = "/v1/completions") -> openai.types.Batch:
    data = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    file = client.files.create(file=("requests.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


def wait(client: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    while (batch := client.batches.retrieve(batch_id)).status not in ENDED:
        time.sleep(0.02)
    return batch


def results(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [] if file_id is None else [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_a_batch_from_validating_to_completed(client: openai.OpenAI, shared_data: Path) -> None:
    prompts = [f"Once upon a time, {i}" for i in range(20)]
    made = start(client, [completion(f"line-{i}", prompt) for i, prompt in enumerate(prompts)])
    check(shared_data, "Batch", made.to_dict())
    assert made.status == "validating"
    batch = wait(client, made.id)
    check(shared_data, "Batch", batch.to_dict())
    assert (batch.status, batch.error_file_id) == ("completed", None)
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (20, 20, 0)
    assert client.files.retrieve(batch.output_file_id or "").purpose == "batch_output"
    found = {line["custom_id"]: line for line in results(client, batch.output_file_id)}
    assert len(found) == 20
    for i in (0, 19):
        alone = client.completions.create(model="stories", prompt=prompts[i], max_tokens=8, temperature=0)
        line = found[f"line-{i}"]
        assert line["response"]["body"]["choices"][0]["text"] == alone.choices[0].text
        assert (line["response"]["status_code"], line["error"]) == (200, None)
    assert client.batches.list().data[0].id == batch.id


def test_other_endpoints(client: openai.OpenAI) -> None:
    chat = {"model": "smollm2", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
    embedding = {"model": "smollm2", "input": "a cat"}
    response = {"model": "smollm2", "input": "Hi", "max_output_tokens": 4}
    for endpoint, body in (
        ("/v1/chat/completions", chat),
        ("/v1/embeddings", embedding),
        ("/v1/responses", response),
    ):
        batch = wait(client, start(client, [{"custom_id": "a", "url": endpoint, "body": body}], endpoint).id)
        (line,) = results(client, batch.output_file_id)
        assert line["response"]["body"]["model"] == "smollm2"
    assert client.responses.retrieve(line["response"]["body"]["id"]).model == "smollm2"


def test_lines_that_fail_have_a_file_of_their_own(client: openai.OpenAI) -> None:
    lines = [completion("good"), completion("long", "word " * 3000), completion("lost") | {}]
    lines[2]["body"]["model"] = "nothing"
    batch = wait(client, start(client, lines).id)
    assert batch.status == "completed"
    assert [line["custom_id"] for line in results(client, batch.output_file_id)] == ["good"]
    errors = {line["custom_id"]: line["response"] for line in results(client, batch.error_file_id)}
    assert {name: response["status_code"] for name, response in errors.items()} == {"long": 400, "lost": 404}
    assert "no model nothing" in errors["lost"]["body"]["error"]["message"]
    counts = batch.request_counts
    assert counts is not None
    assert (counts.completed, counts.failed) == (1, 2)


def test_bad_lines_are_named(client: openai.OpenAI, shared_data: Path) -> None:
    lines = [
        completion("a"),
        b"{not json",
        b"",
        completion("a"),
        completion("b") | {"url": "/v1/embeddings"},
        completion("c", stream=True),
        completion("d", colour="red"),
        completion(""),
        b"[]",
        completion("e") | {"method": "GET"},
    ]
    batch = wait(client, start(client, lines).id)
    check(shared_data, "Batch", batch.to_dict())
    assert batch.status == "failed"
    assert batch.errors is not None
    found = {error.line: error.message or "" for error in batch.errors.data or []}
    words = {
        2: "not JSON",
        4: "used before",
        5: "url",
        6: "stream",
        7: "colour",
        8: "custom_id",
        9: "object",
        10: "POST",
    }
    assert found.keys() == words.keys()
    for line, word in words.items():
        assert word in found[line]


def test_what_is_refused(client: openai.OpenAI, http: httpx.Client) -> None:
    assert wait(client, start(client, [b""]).id).status == "failed"
    with pytest.raises(openai.NotFoundError, match="no file"):
        client.batches.create(input_file_id="file-x", endpoint="/v1/completions", completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="endpoint must be one of"):
        client.batches.create(input_file_id="file-x", endpoint="/v1/images/edits", completion_window="24h")
    with pytest.raises(openai.NotFoundError, match="no batch"):
        client.batches.retrieve("batch_x")
    done = wait(client, start(client, [completion("a")]).id)
    with pytest.raises(openai.BadRequestError, match="is completed"):
        client.batches.cancel(done.id)
    body = {"input_file_id": "x", "endpoint": "/v1/completions", "completion_window": "1h"}
    assert http.post("/v1/batches", json=body).status_code == 400


def test_a_cancelled_batch_keeps_what_is_done(tiny_store: Store) -> None:
    with RunningServer(tiny_store) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        made = start(client, [completion(f"{i}", f"{i}", 300, ignore_eos=True) for i in range(200)])
        while not (client.batches.retrieve(made.id).request_counts or made).completed:  # type: ignore[union-attr]
            pass
        assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
        batch = wait(client, made.id)
        assert batch.status == "cancelled"
        done = results(client, batch.output_file_id)
        counts = batch.request_counts
        assert counts is not None
        assert 0 < len(done) == counts.completed < 200
        assert not (tiny_store.home / "server" / "batches" / made.id).exists()


def test_batches_make_way_for_a_model_that_has_no_room(tiny_store: Store) -> None:
    tiny_store.copy("stories", "other")
    with (
        RunningServer(tiny_store, max_loaded=1) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-") as client,
    ):
        made = start(client, [completion(f"{i}", f"{i}", 100, ignore_eos=True) for i in range(300)])
        while not (client.batches.retrieve(made.id).request_counts or made).completed:  # type: ignore[union-attr]
            pass
        client.completions.create(model="other", prompt="Once", max_tokens=2)
        assert client.batches.retrieve(made.id).status == "in_progress"
        client.batches.cancel(made.id)
        assert wait(client, made.id).status == "cancelled"


def test_what_is_late_expires(tiny_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.server.openai import batches

    monkeypatch.setattr(batches, "WINDOW", 0)
    with RunningServer(tiny_store) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        batch = wait(client, start(client, [completion("a"), completion("b")]).id)
        assert batch.status == "expired"
        lines = results(client, batch.error_file_id)
        assert [(line["custom_id"], line["error"]["code"]) for line in lines] == [
            ("a", "batch_expired"),
            ("b", "batch_expired"),
        ]


class PunaServe:
    """``puna serve`` in a process of its own."""

    def __init__(self, store: Store, port: int) -> None:
        command = [sys.executable, "-m", "puna", "serve", "--port", str(port), "--threads", "1"]
        self.process = subprocess.Popen(command, env={**os.environ, "PUNA_HOME": str(store.home)})
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        while True:
            try:
                self.client.models.list()
                return
            except openai.APIConnectionError:
                assert self.process.poll() is None, "the server did not start"
                time.sleep(0.05)

    def end(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        self.process.wait(timeout=60)
        self.client.close()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_killed_server_loses_and_repeats_nothing(tiny_store: Store) -> None:
    port = free_port()
    first = PunaServe(tiny_store, port)
    count = 60
    try:
        made = start(first.client, [completion(f"{i}", f"{i}", 200, ignore_eos=True) for i in range(count)])
        while True:
            batch = first.client.batches.retrieve(made.id)
            if batch.request_counts is not None and batch.request_counts.completed >= 3:
                break
    finally:
        first.end(signal.SIGKILL)
    journal = tiny_store.home / "server" / "batches" / made.id / "journal.jsonl"
    kept = [json.loads(line) for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 3 <= len(kept) < count
    second = PunaServe(tiny_store, port)
    try:
        batch = wait(second.client, made.id)
        assert batch.status == "completed"
        found = {line["custom_id"]: line for line in results(second.client, batch.output_file_id)}
        lines = results(second.client, batch.output_file_id)
    finally:
        second.end(signal.SIGTERM)
    assert sorted(found, key=int) == [str(i) for i in range(count)]
    assert len(lines) == count
    assert all(found[line["custom_id"]] == line for line in kept)


def test_two_servers_run_a_batch_once(tiny_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "RESCAN", 0.05)
    with RunningServer(tiny_store) as one, RunningServer(tiny_store) as other:
        clients = [openai.OpenAI(base_url=f"{server.url}/v1", api_key="-") for server in (one, other)]
        made = start(clients[0], [completion(f"{i}", f"{i}", 100) for i in range(40)])
        batch = wait(clients[1], made.id)
        lines = results(clients[1], batch.output_file_id)
        assert sorted(int(line["custom_id"]) for line in lines) == list(range(40))


def test_what_was_never_begun_is_removed(tmp_path: Path) -> None:
    store = batch_runner.BatchStore(tmp_path)
    abandoned, fresh, kept = (store.folder(new_id("batch_")) for _ in range(3))
    for folder in (abandoned, fresh, kept):
        folder.mkdir(parents=True)
    store.records.write("", {"id": kept.name})
    for folder in (abandoned, kept):
        os.utime(folder, (0, 0))
    store.clean()
    assert not abandoned.exists()
    assert fresh.exists()
    assert kept.exists()


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    good = [json.dumps({"custom_id": f"{i}", "response": {"status_code": 200 + 200 * i}}).encode() for i in range(2)]
    whole = b"\n".join(good) + b"\n"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal = Journal(path)
        complete = whole[:cut].count(b"\n")
        assert journal.done == {f"{i}" for i in range(complete)}
        assert journal.failed == max(0, complete - 1)
        journal.append("x", json.dumps({"custom_id": "x", "response": {"status_code": 200}}).encode(), False)
        journal.close()
        assert len(path.read_bytes().splitlines()) == complete + 1
        assert [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()][-1] == "x"


def test_a_full_disk_does_not_tear_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from puna.errors import CapacityError

    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("a", b'{"custom_id": "a", "response": null}', True)
    before = path.read_bytes()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CapacityError, match="disk is full"):
            journal.append("b", b'{"custom_id": "b", "response": null}', True)
    assert path.read_bytes() == before
    assert journal.done == {"a"}
    journal.close()


def test_closing_waits_for_what_is_written() -> None:
    """A thread that still writes must not outlive the journal and the lock."""
    written = []

    async def run() -> None:
        task = asyncio.create_task(batch_runner._to_its_end(lambda: (time.sleep(0.05), written.append(1))[0]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert written == [1]

    asyncio.run(run())
