"""Several processes at once, and kills at every moment."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from local_server import LocalServer, serve
from store_worker import check_invariants
from tiny_models import tiny_checkpoint, tiny_config

import puna
from puna.checkpoint import save_checkpoint
from puna.store import Store, import_file, pull, resolve
from puna.store.http_download import Http
from puna.store.lock import file_lock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and fork are of POSIX systems")

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(store: Store) -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def start_worker(*arguments: object) -> "subprocess.Popen[str]":
        command = [sys.executable, str(Path(__file__).with_name("store_worker.py")), *map(str, arguments)]
        environment = os.environ | {"PUNA_HOME": str(store.home), "PYTHONPATH": str(Path(puna.__file__).parents[1])}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
        return process

    yield start_worker
    for process in processes:
        process.kill()
        process.communicate()


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("verb", ["import", "copy", "replace", "remove", "quantize"])
def test_a_kill_before_any_change_leaves_a_sound_store(start: Start, tmp_path: Path, verb: str) -> None:
    (tmp_path / "old.gguf").write_bytes(b"GGUF" + b"old" * 1000)
    folder = tmp_path / "new"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    config = tiny_config(num_hidden_layers=1, vocab_size=32)
    save_checkpoint(tiny_checkpoint(config, weight_type="F16"), folder / "tiny.gguf", "gguf")
    process = start("die", verb, tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert int(output) >= 6  # so many moments to die at were met


def test_a_lock_ends_with_its_holder(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "some" / "lock"
    holder, waiter = start("lock", path), None
    assert line(holder) == "locked"
    waiter = start("lock", path)
    assert line(waiter) == "waiting"
    holder.send_signal(signal.SIGKILL)
    assert line(waiter) == "locked"
    waiter.communicate("go\n")
    waits: list[bool] = []
    with file_lock(path, lambda: waits.append(True)):
        pass
    assert waits == []


def test_a_discarded_lock_still_excludes(tmp_path: Path) -> None:
    """The file is removed by its holder while others wait for it: they must meet again on the new one."""
    met: list[str] = []
    inside = tmp_path / "inside"

    def work() -> None:
        for _ in range(50):
            with file_lock(tmp_path / "lock", lambda: None, discard=True):
                try:
                    inside.mkdir()
                    inside.rmdir()
                except OSError as error:
                    met.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == []
    assert not (tmp_path / "lock").exists()


def test_a_killed_pull_is_taken_up(store: Store, start: Start, server: LocalServer, http: Http, model: bytes) -> None:
    half_sent, never = threading.Event(), threading.Event()

    def hold() -> None:
        half_sent.set()
        never.wait(20)

    piece = 150_002
    server.routes["/a.gguf"] = [serve(model, etag='"v1"', piece=piece, before={piece: hold}), serve(model, etag='"v1"')]
    address = f"{server.address}/a.gguf"
    process = start("pull", address, "a")
    assert half_sent.wait(20)
    (part,) = store.blobs.partial.glob("*.part")
    while part.stat().st_size < piece:  # what was sent arrives
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    never.set()
    check_invariants(store)
    assert store.models() == []
    pull(address, store=store, http=http)
    assert server.ranges("/a.gguf")[1] == f"bytes={piece}-"
    assert resolve("a", store).path.read_bytes() == model
    check_invariants(store)


def test_two_pulls_of_one_model_share_one_download(
    store: Store, start: Start, server: LocalServer, model: bytes
) -> None:
    half_sent, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        half_sent.set()
        go_on.wait(20)

    server.routes["/a.gguf"] = [serve(model, piece=150_002, before={150_002: hold})]
    address = f"{server.address}/a.gguf#sha256={hashlib.sha256(model).hexdigest()}"
    first = start("pull", address, "a")
    assert half_sent.wait(20)
    second = start("pull", address, "a")
    assert line(second).startswith("fetching")
    assert line(second) == "waiting for another Puna process that is downloading a.gguf"
    go_on.set()
    assert first.communicate(timeout=30)[0].endswith("pulled\n")
    assert second.communicate(timeout=30)[0].endswith("pulled\n")
    assert len(server.requests) == 1
    check_invariants(store)
    assert [str(m.model_name) for m in store.models()] == ["a:latest"]


def test_removing_during_a_pull(store: Store, start: Start, server: LocalServer, model: bytes, tmp_path: Path) -> None:
    """`rm` collects garbage while another process has half a file: neither may hurt the other."""
    half_sent, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        half_sent.set()
        go_on.wait(20)

    (tmp_path / "b.gguf").write_bytes(b"GGUF b")
    import_file(tmp_path / "b.gguf", "b", store=store, copy=True)
    server.routes["/a.gguf"] = [serve(model, piece=150_002, before={150_002: hold})]
    process = start("pull", f"{server.address}/a.gguf", "a")
    assert half_sent.wait(20)
    assert store.remove("b") == 6
    go_on.set()
    assert process.communicate(timeout=30)[0].endswith("pulled\n")
    assert resolve("a", store).path.read_bytes() == model
    check_invariants(store)


def test_the_same_bytes_added_and_removed_by_many(store: Store, start: Start, tmp_path: Path) -> None:
    """Each model shares its blob with the others: a removal must never take the blob from a model just added."""
    path = tmp_path / "shared.gguf"
    path.write_bytes(b"GGUF" + b"x" * 100_000)
    workers = [start("churn", path, f"m{number}", 12) for number in range(3)]
    for worker in workers:
        assert worker.communicate(timeout=100)[0] == "churned\n"
        assert worker.returncode == 0
    check_invariants(store)
    assert store.models() == []


def test_blobs_collected_before_the_commit_are_fetched_again(
    store: Store, server: LocalServer, http: Http, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes the only model with these bytes between this pull's look and its commit."""
    server.routes["/a.gguf"] = [serve(model)]
    address = f"{server.address}/a.gguf#sha256={hashlib.sha256(model).hexdigest()}"
    pull(address, name="first", store=store, http=http)
    commit = Store.commit
    calls: list[object] = []

    def commit_late(self: Store, manifest: object, **options: bool) -> None:
        if not calls:
            Store(store.home).remove("first")
        calls.append(manifest)
        commit(self, manifest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "commit", commit_late)
    pull(address, name="second", store=store, http=http)
    assert len(calls) == 2
    assert len(server.requests) == 2
    check_invariants(store)
    assert [m.name for m in store.models()] == ["second"]
