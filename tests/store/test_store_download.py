"""Downloads from a server that interrupts, lies, changes its mind and refuses."""

import hashlib
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from local_server import LocalServer, chunked, redirect, refuse, serve, wrong_range

from puna.errors import SourceError, StoreError
from puna.store import Manifest, Silent, Store, pull, resolve
from puna.store.http_download import Http, Remote, shown
from puna.store.progress import Meter


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Recorder(Silent):
    """Progress, remembered."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.transfers: list[tuple[int, int]] = []

    def status(self, text: str) -> None:
        self.texts.append(text)

    def transfer(self, label: str, done: int, total: int, speed: float) -> None:
        assert speed >= 0
        self.transfers.append((done, total))


def parts(store: Store) -> list[Path]:
    return list(store.blobs.partial.glob("*.part"))


def test_a_plain_download(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    server.routes["/files/Tiny.Q8_0.gguf"] = [serve(model)]
    progress = Recorder()
    manifest = pull(f"{server.address}/files/Tiny.Q8_0.gguf", store=store, http=http, progress=progress)
    assert manifest == store.find("tiny.q8_0")
    assert manifest.source == f"{server.address}/files/Tiny.Q8_0.gguf"
    path = resolve("tiny.q8_0", store).path
    assert path.name == "Tiny.Q8_0.gguf"
    assert path.read_bytes() == model
    assert progress.transfers[-1] == (len(model), len(model))
    assert store.verify() == []
    assert list(store.blobs.partial.iterdir()) == []


def test_nothing_but_the_request_is_sent(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    server.routes["/a.gguf"] = [serve(model)]
    pull(f"{server.address}/a.gguf", store=store, http=http, token="hf_secret")
    headers = server.requests[0][1]
    assert headers.keys() == {"host", "accept", "accept-encoding", "connection", "user-agent"}
    assert headers["user-agent"].startswith("puna/")
    assert headers["accept-encoding"] == "identity"


def test_interruptions_are_resumed(
    store: Store, server: LocalServer, http: Http, model: bytes, waits: list[float]
) -> None:
    cut = serve(model, etag='"v1"', stop_after=100_000)
    server.routes["/a.gguf"] = [cut, cut, serve(model, etag='"v1"')]
    pull(f"{server.address}/a.gguf", store=store, http=http)
    assert resolve("a", store).path.read_bytes() == model
    assert server.ranges("/a.gguf") == [None, "bytes=100000-", "bytes=200000-"]
    assert [headers.get("if-range") for _, headers in server.requests] == [None, '"v1"', '"v1"']
    assert waits == [1.0, 2.0]


def test_a_later_pull_goes_on_where_the_first_gave_up(
    store: Store, server: LocalServer, http: Http, model: bytes
) -> None:
    server.routes["/a.gguf"] = [serve(model, etag='"v1"', stop_after=1000), refuse(503)]
    with pytest.raises(SourceError, match="gave up after 4 attempts: HTTP 503; pull again later to go on"):
        pull(f"{server.address}/a.gguf", store=store, http=http)
    assert [part.stat().st_size for part in parts(store)] == [1000]
    assert store.models() == []
    server.routes["/a.gguf"] = [serve(model, etag='"v1"')]
    pull(f"{server.address}/a.gguf", store=store, http=http)
    assert server.ranges("/a.gguf")[-1] == "bytes=1000-"
    assert resolve("a", store).path.read_bytes() == model


def test_a_file_that_changed_between_tries_starts_over(
    store: Store, server: LocalServer, http: Http, model: bytes
) -> None:
    """The bytes of two versions must never be glued together: If-Range makes the server send the new one whole."""
    newer = b"GGUF" + model[:3:-1]
    server.routes["/a.gguf"] = [serve(model, etag='"v1"', stop_after=100_000), serve(newer, etag='"v2"')]
    pull(f"{server.address}/a.gguf", store=store, http=http)
    assert resolve("a", store).path.read_bytes() == newer


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_proof_of_sameness_it_starts_over(
    store: Store, server: LocalServer, http: Http, model: bytes, etag: str | None
) -> None:
    server.routes["/a.gguf"] = [serve(model, etag=etag, stop_after=100_000), serve(model, etag=etag)]
    pull(f"{server.address}/a.gguf", store=store, http=http)
    assert server.ranges("/a.gguf") == [None, None]
    assert resolve("a", store).path.read_bytes() == model


def test_a_known_digest_proves_sameness(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    server.routes["/a.gguf"] = [serve(model, stop_after=100_000), serve(model)]
    pull(f"{server.address}/a.gguf#sha256={sha256(model)}", store=store, http=http)
    assert server.ranges("/a.gguf") == [None, "bytes=100000-"]


@pytest.mark.parametrize("second", [serve, wrong_range], ids=["ignores the range", "sends another range"])
def test_servers_without_ranges(
    store: Store, server: LocalServer, http: Http, model: bytes, second: Callable[[bytes], object]
) -> None:
    last = serve(model, ranges=False)
    middle = [wrong_range(model)] if second is wrong_range else []
    server.routes["/a.gguf"] = [serve(model, etag='"v1"', stop_after=100_000), *middle, last]
    pull(f"{server.address}/a.gguf", store=store, http=http)
    assert resolve("a", store).path.read_bytes() == model


def test_a_server_that_ignores_ranges_and_always_breaks_is_given_up(
    store: Store, server: LocalServer, http: Http, model: bytes
) -> None:
    """Going in circles is not progress, however many bytes come each time."""
    large = model * 8
    server.routes["/a.gguf"] = [serve(large, etag='"v1"', ranges=False, stop_after=2_000_000)]
    with pytest.raises(SourceError, match="gave up after 4 attempts"):
        pull(f"{server.address}/a.gguf", store=store, http=http)
    assert len(server.requests) == 5  # the first brought a megabyte, so it does not count


def test_kept_bytes_longer_than_the_file(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    digest = sha256(model)
    store.blobs.partial.mkdir(parents=True)
    (store.blobs.partial / f"{digest}.part").write_bytes(model + b"more")
    server.routes["/a.gguf"] = [serve(model)]
    pull(f"{server.address}/a.gguf#sha256={digest}", store=store, http=http)
    assert server.ranges("/a.gguf") == [f"bytes={len(model) + 4}-", None]


def test_kept_bytes_that_are_wrong(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    digest = sha256(model)
    store.blobs.partial.mkdir(parents=True)
    (store.blobs.partial / f"{digest}.part").write_bytes(b"x" * 1000)
    server.routes["/a.gguf"] = [serve(model)]
    pull(f"{server.address}/a.gguf#sha256={digest}", store=store, http=http)
    assert server.ranges("/a.gguf") == ["bytes=1000-", None]
    assert resolve("a", store).path.read_bytes() == model


def test_kept_bytes_that_are_whole_need_no_request(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    digest = sha256(model)
    store.blobs.partial.mkdir(parents=True)
    (store.blobs.partial / f"{digest}.part").write_bytes(model)
    pull(f"{server.address}/a.gguf#sha256={digest}", store=store, http=http)
    assert server.requests == []
    assert store.verify() == []


def test_wrong_bytes_are_not_stored(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    wrong = model[:-1] + bytes([model[-1] ^ 1])
    server.routes["/a.gguf"] = [serve(wrong)]
    with pytest.raises(SourceError, match=f"expected sha256 {sha256(model)}, found {sha256(wrong)}"):
        pull(f"{server.address}/a.gguf#sha256={sha256(model)}", store=store, http=http)
    assert store.models() == []
    assert all(part.stat().st_size == 0 for part in parts(store))


def test_a_promise_of_too_many_bytes(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    server.routes["/a.gguf"] = [serve(model, claim=len(model) + 1)]
    with pytest.raises(SourceError, match="gave up after"):
        pull(f"{server.address}/a.gguf", store=store, http=http)
    assert store.models() == []


def test_a_promise_of_too_few_bytes(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    server.routes["/a.gguf"] = [serve(model, claim=len(model) - 1)]
    with pytest.raises(SourceError, match="wrong bytes"):
        pull(f"{server.address}/a.gguf#sha256={sha256(model)}", store=store, http=http)


def test_a_file_larger_than_the_disk_is_refused_before_it_comes(
    store: Store, server: LocalServer, http: Http, model: bytes
) -> None:
    server.routes["/a.gguf"] = [serve(model, claim=10**18)]
    with pytest.raises(StoreError, match=r"a\.gguf needs 1000 PB more, but the disk of .* free"):
        pull(f"{server.address}/a.gguf", store=store, http=http)


def test_a_size_other_than_the_known_one(tmp_path: Path, server: LocalServer, http: Http, model: bytes) -> None:
    server.routes["/a"] = [serve(model)]
    with pytest.raises(SourceError, match=f"expected 5 bytes, but the server offers {len(model)}"):
        http.download(Remote(f"{server.address}/a", "a", size=5), tmp_path / "a.part", Silent())


def test_more_bytes_than_known(tmp_path: Path, server: LocalServer, http: Http, model: bytes) -> None:
    server.routes["/a"] = [chunked(model)]
    with pytest.raises(SourceError, match="sent more than the 5 bytes it promised"):
        http.download(Remote(f"{server.address}/a", "a", size=5), tmp_path / "a.part", Silent())
    assert (tmp_path / "a.part").stat().st_size <= 5


def test_an_unknown_size_is_refused(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    server.routes["/a.gguf"] = [chunked(model)]
    with pytest.raises(SourceError, match="does not say how large"):
        pull(f"{server.address}/a.gguf", store=store, http=http)


def test_an_error_page_is_not_a_model(store: Store, server: LocalServer, http: Http) -> None:
    server.routes["/a.gguf"] = [serve(b"<html>Please log in</html>")]
    with pytest.raises(SourceError, match="is not a GGUF file: it begins with b'<htm'"):
        pull(f"{server.address}/a.gguf", store=store, http=http)
    assert parts(store) == []


def test_compressed_content_is_refused(store: Store, server: LocalServer, http: Http) -> None:
    server.routes["/a.gguf"] = [refuse(200, Content_Encoding="gzip")]
    with pytest.raises(SourceError, match="compressed"):
        pull(f"{server.address}/a.gguf", store=store, http=http)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses access"), (403, "refuses access"), (404, "does not exist"), (410, "does not exist"), (418, "418")],
)
def test_refusals_are_final(store: Store, server: LocalServer, http: Http, status: int, message: str) -> None:
    server.routes["/a.gguf"] = [refuse(status)]
    with pytest.raises(SourceError, match=message):
        pull(f"{server.address}/a.gguf", store=store, http=http)
    assert len(server.requests) == 1


def test_passing_troubles_are_waited_out(
    store: Store, server: LocalServer, http: Http, model: bytes, waits: list[float]
) -> None:
    server.routes["/a.gguf"] = [
        refuse(429, Retry_After="7"),
        refuse(500),
        refuse(503, Retry_After="9999"),
        serve(model),
    ]
    progress = Recorder()
    pull(f"{server.address}/a.gguf", store=store, http=http, progress=progress)
    assert waits == [7.0, 2.0, 60.0]
    assert "a.gguf: HTTP 429; trying again in 7 s" in progress.texts


def test_a_silent_server_is_asked_again(store: Store, server: LocalServer, model: bytes) -> None:
    released = threading.Event()
    half = serve(model, etag='"v1"', piece=150_002, before={150_002: lambda: released.wait(20)})
    server.routes["/a.gguf"] = [half, serve(model, etag='"v1"')]
    with Http(timeout=0.5, sleep=lambda seconds: None) as impatient:
        pull(f"{server.address}/a.gguf", store=store, http=impatient)
    released.set()
    assert server.ranges("/a.gguf") == [None, "bytes=150002-"]
    assert resolve("a", store).path.read_bytes() == model


def test_a_trickle_is_fine(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    server.routes["/a.gguf"] = [serve(model[:3000], piece=7)]
    pull(f"{server.address}/a.gguf", store=store, http=http)
    assert resolve("a", store).path.read_bytes() == model[:3000]


def test_redirects_are_followed_but_not_forever(
    store: Store, server: LocalServer, start_server: Callable[[], LocalServer], http: Http, model: bytes
) -> None:
    other = start_server()
    other.routes["/b"] = [serve(model)]
    server.routes["/a.gguf"] = [redirect(f"{other.address}/b")]
    pull(f"{server.address}/a.gguf", store=store, http=http)
    server.routes["/c.gguf"] = [redirect(f"{server.address}/c.gguf")]
    with pytest.raises(SourceError, match=r"c\.gguf cannot be fetched: Exceeded maximum allowed redirects"):
        pull(f"{server.address}/c.gguf", store=store, http=http)
    server.routes["/d.gguf"] = [redirect("file:///etc/passwd")]
    with pytest.raises(SourceError, match=r"d\.gguf cannot be fetched"):
        pull(f"{server.address}/d.gguf", store=store, http=http)


def test_nobody_there(store: Store, start_server: Callable[[], LocalServer], http: Http, waits: list[float]) -> None:
    gone = start_server()
    gone.close()
    with pytest.raises(SourceError, match=r"cannot reach http://127\.0\.0\.1:\d+/a\.gguf: .*check the network"):
        pull(f"{gone.address}/a.gguf", store=store, http=http)
    assert waits == []  # an offline user hears so at once


def test_a_full_disk(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    digest = sha256(model)
    store.blobs.partial.mkdir(parents=True)
    (store.blobs.partial / f"{digest}.etag").symlink_to(full)
    server.routes["/a.gguf"] = [serve(model, etag='"v1"')]
    with pytest.raises(StoreError, match=r"disk is full.*free some space"):
        pull(f"{server.address}/a.gguf#sha256={digest}", store=store, http=http)


def test_a_store_that_cannot_be_written(tmp_path: Path, server: LocalServer, http: Http, model: bytes) -> None:
    (tmp_path / "file").write_text("not a folder")
    server.routes["/a.gguf"] = [serve(model)]
    with pytest.raises(StoreError, match="file"):
        pull(f"{server.address}/a.gguf", store=Store(tmp_path / "file"), http=http)


def test_no_space_is_told_before_the_download(
    store: Store, server: LocalServer, http: Http, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    server.routes["/a.gguf"] = [serve(model)]
    with pytest.raises(StoreError, match=r"needs 300\.0 kB more, but the disk of .* has 1\.0 kB free"):
        pull(f"{server.address}/a.gguf", store=store, http=http)


def test_a_second_pull_of_pinned_bytes_asks_nobody(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    server.routes["/a.gguf"] = [serve(model)]
    address = f"{server.address}/a.gguf#sha256={sha256(model)}"
    first: Manifest = pull(address, store=store, http=http)
    assert pull(address, store=store, http=http) == first
    assert len(server.requests) == 1


def test_secrets_in_an_address_are_not_kept(store: Store, server: LocalServer, http: Http, model: bytes) -> None:
    server.routes["/a.gguf"] = [serve(model)]
    address = server.address.replace("http://", "http://user:secret@")
    manifest = pull(f"{address}/a.gguf?signature=secret", store=store, http=http)
    assert manifest.source == f"{server.address}/a.gguf"
    assert shown("https://u:p@h:1/x?y#z") == "https://h:1/x"
    assert all(b"secret" not in path.read_bytes() for path in store.home.rglob("*.json"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("https://example.com/model.bin", "not the address of a .gguf"),
        ("https://example.com/", "not the address of a .gguf"),
        ("https://[bad/x.gguf", "not an address"),
        ("https://example.com/a.gguf#sha256=12", "64 hexadecimal digits"),
        ("no-such-model", "no model named 'no-such-model' is in the catalog"),
        ("./missing.gguf", "does not exist"),
    ],
)
def test_mistakes_cost_no_request(store: Store, what: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        pull(what, store=store)


def test_the_meter_knows_the_speed() -> None:
    seen: list[tuple[int, float]] = []

    class Progress(Silent):
        def transfer(self, label: str, done: int, total: int, speed: float) -> None:
            seen.append((done, speed))

    times = iter([0.0, 0.05, 1.0, 2.0, 2.01, 3.0])
    meter = Meter(Progress(), "x", 1000, clock=lambda: next(times))
    for done in (0, 50, 100, 200, 1000, 10):
        meter.update(done)
    # 50 comes too soon to be shown; the last bytes always are; fewer bytes than before begin anew.
    assert seen == [(0, 0.0), (100, 100.0), (200, 100.0), (1000, pytest.approx(1000 / 2.01)), (10, 0.0)]
