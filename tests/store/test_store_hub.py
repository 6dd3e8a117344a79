"""Hugging Face's API, spoken by a server on this machine."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_server import LocalServer, as_json, chunked, redirect, refuse, serve

from puna.catalog import Source
from puna.errors import SourceError, StoreError
from puna.store import Store, pull, resolve
from puna.store.http_download import Http
from puna.store.huggingface import user_token
from puna.store.pull import _read_source
from puna.store.selection import check_parts, select_files

COMMIT = "c0ffee" * 6 + "c0de"


class Hub:
    """One repository on a LocalServer."""

    def __init__(self, server: LocalServer, repository: str = "Owner/Tiny") -> None:
        self.server, self.repository = server, repository
        self.siblings: list[dict[str, Any]] = []
        self.listing = f"/api/models/{repository}/revision/main"
        server.routes[self.listing] = [as_json({"sha": COMMIT, "siblings": self.siblings})]

    def add(self, name: str, data: bytes, *, large: bool = True, **wrong: Any) -> str:
        item: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
        if large:
            item["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130} | wrong
        self.siblings.append(item)
        self.server.routes[self.listing] = [as_json({"sha": COMMIT, "siblings": self.siblings})]
        path = f"/{self.repository}/resolve/{COMMIT}/{name}"
        self.server.routes[path] = [serve(data)]
        return path


@pytest.fixture
def hub(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_ENDPOINT", server.address + "/")
    return Hub(server)


def test_a_safetensors_repository_opens_as_a_folder(store: Store, hub: Hub, http: Http) -> None:
    files = {
        "config.json": b"{}",
        "tokenizer.json": b'{"x": 1}',
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
        "model.safetensors.index.json": b"{}",
    }
    for name, data in files.items():
        hub.add(name, data, large=name.endswith(".safetensors"))
    for name in ("README.md", "pytorch_model.bin", "original/consolidated.00.pth", "run.py", "../evil.safetensors"):
        hub.add(name, b"not wanted")
    manifest = pull("hf.co/Owner/Tiny", store=store, http=http)
    assert str(manifest.model_name) == "owner/tiny:latest"
    assert manifest.source == f"huggingface:Owner/Tiny@{COMMIT}"
    folder = resolve("owner/tiny", store).path
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert store.verify() == []


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("hf.co/Owner/Tiny:Q8_0", "owner/tiny:q8_0"),
        ("owner/tiny:q8_0", "owner/tiny:q8_0"),
        ("Owner/Tiny:Tiny.Q8_0.gguf", "owner/tiny:tiny.q8_0"),
        ("https://huggingface.co/Owner/Tiny/blob/main/Tiny.Q8_0.gguf?x=1", "owner/tiny:tiny.q8_0"),
        ("https://huggingface.co/Owner/Tiny/resolve/main/Tiny.Q8_0.gguf", "owner/tiny:tiny.q8_0"),
    ],
)
def test_choosing_a_gguf(store: Store, hub: Hub, http: Http, model: bytes, what: str, name: str) -> None:
    for repository in (hub, Hub(hub.server, "owner/tiny")):
        repository.add("Tiny.Q8_0.gguf", model)
        repository.add("Tiny.Q4_K_M.gguf", b"GGUF not this")
    manifest = pull(what, store=store, http=http)
    assert str(manifest.model_name) == name
    assert resolve(what if "://" not in what else name, store).path.read_bytes() == model


def test_a_revision_in_an_address(store: Store, hub: Hub, http: Http, model: bytes) -> None:
    hub.add("a.gguf", model)
    hub.server.routes["/api/models/Owner/Tiny/revision/v1.0"] = hub.server.routes[hub.listing]
    manifest = pull("https://hf.co/Owner/Tiny/tree/v1.0", store=store, http=http)
    assert str(manifest.model_name) == "owner/tiny:v1.0"
    assert hub.server.requests[0][0] == "/api/models/Owner/Tiny/revision/v1.0"


def test_digests_of_the_listing_count(store: Store, hub: Hub, http: Http, model: bytes) -> None:
    hub.add("a.gguf", model, sha256="0" * 64)
    with pytest.raises(SourceError, match="wrong bytes"):
        pull("Owner/Tiny", store=store, http=http)
    assert store.models() == []


def test_only_missing_files_are_fetched_again(store: Store, hub: Hub, http: Http, model: bytes) -> None:
    hub.add("config.json", b"{}", large=False)
    first = hub.add("model-00001-of-00002.safetensors", model)
    second = hub.add("model-00002-of-00002.safetensors", b"two")
    hub.server.routes[second] = [refuse(404)]
    with pytest.raises(SourceError):
        pull("Owner/Tiny", store=store, http=http)
    assert store.models() == []
    hub.server.routes[second] = [serve(b"two")]
    pull("Owner/Tiny", store=store, http=http)
    assert len(hub.server.ranges(first)) == 1
    assert store.verify() == []


@pytest.mark.parametrize("status", [401, 403])
def test_gated_models_say_what_to_do(store: Store, hub: Hub, http: Http, status: int) -> None:
    hub.server.routes[hub.listing] = [refuse(status)]
    with pytest.raises(
        SourceError, match=rf"accept its licence. Accept it at {hub.server.address}/Owner/Tiny, .*HF_TOKEN"
    ):
        pull("Owner/Tiny", store=store, http=http)
    with pytest.raises(SourceError, match="the token that was sent is not enough"):
        pull("Owner/Tiny", store=store, http=http, token="hf_x")


def test_a_gated_file_of_an_open_listing(store: Store, hub: Hub, http: Http, model: bytes) -> None:
    hub.server.routes[hub.add("a.gguf", model)] = [refuse(403)]
    with pytest.raises(SourceError, match="accept its licence"):
        pull("Owner/Tiny", store=store, http=http)


def test_the_token_stays_with_its_host(
    store: Store, hub: Hub, http: Http, model: bytes, start_server: Callable[[], LocalServer]
) -> None:
    """The hub redirects large files to a content network, which must not see the user's token."""
    content = start_server()
    content.routes["/blob"] = [serve(model, stop_after=1000), serve(model)]
    path = hub.add("a.gguf", model)
    hub.server.routes[path] = [redirect(f"{content.address}/blob")]
    pull("Owner/Tiny", store=store, http=http, token="hf_secret")
    assert {headers["authorization"] for _, headers in hub.server.requests} == {"Bearer hf_secret"}
    assert len(content.requests) == 2
    assert all("authorization" not in headers for _, headers in content.requests)
    assert content.ranges("/blob") == [None, "bytes=1000-"]


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_token() is None
    (tmp_path / "hf_home").mkdir()
    (tmp_path / "hf_home" / "token").write_text("from_file\n")
    assert user_token() == "from_file"
    monkeypatch.setenv("HF_TOKEN", "from_environment")
    assert user_token() == "from_environment"


def test_a_token_that_is_no_header(store: Store, hub: Hub, http: Http) -> None:
    for token in ("two\nlines", "ключ"):
        with pytest.raises(SourceError, match="token"):
            pull("Owner/Tiny", store=store, http=http, token=token)
    assert hub.server.requests == []


@pytest.mark.parametrize(
    "listing",
    [
        [],
        None,
        {"siblings": []},
        {"sha": "../../x", "siblings": []},
        {"sha": COMMIT, "siblings": [{}]},
        {"sha": COMMIT, "siblings": [{"rfilename": "a.gguf", "size": -1}]},
        {"sha": COMMIT, "siblings": [{"rfilename": "a.gguf", "lfs": {"sha256": "../x", "size": 1}}]},
        {"sha": COMMIT, "siblings": [{"rfilename": "a.gguf", "lfs": 5}]},
    ],
)
def test_odd_listings(store: Store, hub: Hub, http: Http, listing: Any) -> None:
    hub.server.routes[hub.listing] = [as_json(listing)]
    with pytest.raises(SourceError, match="not the listing of a model"):
        pull("Owner/Tiny", store=store, http=http)


@pytest.mark.parametrize("body", [b"<html>", b"[" * 100_000, b"\xff\xfe", b""])
def test_listings_that_are_not_json(store: Store, hub: Hub, http: Http, body: bytes) -> None:
    hub.server.routes[hub.listing] = [chunked(body) if body else serve(b"")]
    with pytest.raises(SourceError, match="not JSON"):
        pull("Owner/Tiny", store=store, http=http)


def test_a_listing_without_end(
    store: Store, hub: Hub, http: Http, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puna.store.http_download._MAX_JSON", 1000)
    hub.server.routes[hub.listing] = [serve(model)]
    with pytest.raises(SourceError, match="longer than 1000 bytes"):
        pull("Owner/Tiny", store=store, http=http)


def test_a_source_of_the_catalog(store: Store, hub: Hub, http: Http, model: bytes) -> None:
    hub.add("a.gguf", model)
    manifest = pull(Source("huggingface", "Owner/Tiny", "a.gguf"), name="mine:x", store=store, http=http)
    assert str(manifest.model_name) == "mine:x"


SAFETENSORS = ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("names", "choice", "expected"),
    [
        ([*SAFETENSORS, "x.gguf", "a/b.safetensors", "consolidated.safetensors", "x.bin"], None, SAFETENSORS),
        (["m.Q4_K_M.gguf", "m.Q8_0.gguf", "config.json"], None, ["m.Q4_K_M.gguf"]),
        (["m.gguf", "mmproj-m.gguf"], None, ["m.gguf"]),
        (["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], None, ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]),
        (["m-Q4_K.gguf", "m-Q4_K_M.gguf"], "q4_k", ["m-Q4_K.gguf"]),
        (["m-F16.gguf", "m-BF16.gguf"], "F16", ["m-F16.gguf"]),
        (
            ["m-Q8-00001-of-00002.gguf", "m-Q8-00002-of-00002.gguf", "m-Q4.gguf"],
            "m-q8-00002-of-00002.gguf",
            ["m-Q8-00001-of-00002.gguf", "m-Q8-00002-of-00002.gguf"],
        ),
        (
            ["consolidated.00.pth", "params.json", "tokenizer.model", "checklist.chk"],
            None,
            ["consolidated.00.pth", "params.json", "tokenizer.model"],
        ),
        (
            [*SAFETENSORS, "other.safetensors"],
            "other.safetensors",
            ["config.json", "other.safetensors", "tokenizer.json"],
        ),
    ],
)
def test_selection(names: list[str], choice: str | None, expected: list[str]) -> None:
    assert select_files(names, choice, "here") == expected


@pytest.mark.parametrize(
    ("names", "choice", "message"),
    [
        ([], None, "holds no model"),
        (["pytorch_model.bin", "config.json"], None, "holds no model"),
        (["model.safetensors"], None, "holds no model"),
        (["a.gguf", "b.gguf"], None, "several GGUF models; choose one of a.gguf, b.gguf"),
        (["a.Q4_0.gguf"], "Q8_0", "no file for 'Q8_0'; it has a.Q4_0.gguf"),
        (SAFETENSORS, "Q8_0", "it has no GGUF files"),
        (["a.Q4_0.gguf", "b.Q4_0.gguf"], "Q4_0", "fits several files"),
    ],
)
def test_selections_that_fail(names: list[str], choice: str | None, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        select_files(names, choice, "here")


def test_a_missing_part_is_named() -> None:
    with pytest.raises(StoreError, match=r"here lacks m-00002-of-00003.gguf, one of the 3 parts"):
        check_parts(["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"], "here")


def test_a_claim_of_many_parts_costs_no_time() -> None:
    with pytest.raises(StoreError, match=r"lacks m-00002-of-99999.gguf"):
        check_parts(["m-00001-of-99999.gguf"], "here")


def test_a_stored_name_that_asks_for_latest() -> None:
    assert _read_source("owner/tiny:latest") == Source("huggingface", "owner/tiny")
