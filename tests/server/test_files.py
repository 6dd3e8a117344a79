"""/v1/files by OpenAI's client, and uploads that break."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_schemas import check
from running_server import RunningServer
from starlette.exceptions import HTTPException

from puna.errors import CapacityError, NotFoundError, RequestError
from puna.server.file_store import FileStore
from puna.server.openai import files
from puna.server.records import Records, new_id
from puna.server.uploads import Upload, receive
from puna.store import Store

LINES = b'{"custom_id": "a"}\n\xff\x00\r\n--boundary\n'


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_life_of_a_file(client: openai.OpenAI, model_store: Store, shared_data: Path) -> None:
    made = client.files.create(file=("requests.jsonl", LINES), purpose="batch")
    check(shared_data, "OpenAIFile", made.to_dict())
    assert (made.bytes, made.filename, made.purpose) == (len(LINES), "requests.jsonl", "batch")
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == LINES
    listed = client.files.list(purpose="batch", limit=1)
    check(shared_data, "ListFilesResponse", listed.to_dict())
    assert listed.data[0] == made
    folder = model_store.home / "server" / "files"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    deleted = client.files.delete(made.id)
    check(shared_data, "DeleteFileResponse", deleted.to_dict())
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="no file"):
            call(made.id)
    assert not list(folder.glob(f"*{made.id}*"))


def test_lists_go_on_page_by_page(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{i}.jsonl", b"{}"), purpose="batch").id for i in range(5)]
    assert [file.id for file in client.files.list(limit=2)][:5] == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")][-5:] == made
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-nothing").data  # noqa: B018


def test_what_is_refused(client: openai.OpenAI, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose must be batch"):
        client.files.create(file=("x", b"{}"), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="colour"):
        client.files.create(file=("x", b"{}"), purpose="batch", extra_body={"colour": "red"})
    with pytest.raises(openai.BadRequestError, match="3600"):
        client.files.create(file=("x", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 5})
    assert http.post("/v1/files", json={"file": "x"}).status_code == 400
    assert http.post("/v1/files", data={"purpose": "batch"}, files={"other": b"x"}).status_code == 400
    monkeypatch.setattr(files, "MAX_FILE", 1000)
    with pytest.raises(openai.APIStatusError, match="more than 1000 bytes") as caught:
        client.files.create(file=("x", b"x" * 1001), purpose="batch")
    assert caught.value.status_code == 413


@pytest.mark.parametrize("bad", ["..", "..%2F..%2Fkeys", "file-", "file-" + "0" * 31 + "%00", "batch_" + "0" * 32])
def test_ids_are_no_paths(http: httpx.Client, bad: str) -> None:
    assert http.get(f"/v1/files/{bad}/content").status_code == 404


def test_a_file_is_its_tenants_own(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with store.create() as new:
        new.stream.write(b"x")
        record = new.keep("ann", "x", "batch")
    assert store.record("ann", record["id"]) == record
    assert store.of("bob") == []
    for call in (store.record, store.content, store.delete):
        with pytest.raises(NotFoundError):
            call("bob", record["id"])
    assert store.content("ann", record["id"]).read_bytes() == b"x"


def test_expired_and_abandoned_files_go(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with store.create() as new:
        old = new.keep("", "x", "batch", expires_at=1)
    with store.create() as new:
        kept = new.keep("", "x", "batch")
    folder = store.records.folder
    for name in ("file-1.data", ".file-2.data.partial", "file-3.data"):
        (folder / name).write_bytes(b"x")
        if "3" not in name:
            os.utime(folder / name, (0, 0))
    os.utime(store.content("", kept["id"]), (0, 0))
    store.clean()
    left = {path.name for path in folder.iterdir()}
    assert left == {f"{kept['id']}.json", f"{kept['id']}.data", "file-3.data"}
    assert old["id"] not in {record["id"] for record in store.of("")}


def test_a_damaged_record_hides_no_other(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with store.create() as new:
        record = new.keep("", "x", "batch")
    for content in (b"", b"{", b"[]", b"{}"):
        (store.records.folder / f"{new_id('file-')}.json").write_bytes(content)
    assert store.of("") == [record]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = FileStore(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match="disk is full"), store.create() as new:
        new.keep("", "x", "batch")
    with pytest.raises(CapacityError, match="disk is full"):
        Records(tmp_path / "r", "thing").write("", {"id": new_id("thing-")})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def form(boundary: str, *parts: tuple[str, str | None, bytes]) -> bytes:
    body = b""
    for name, filename, data in parts:
        disposition = f'form-data; name="{name}"' + ("" if filename is None else f'; filename="{filename}"')
        body += f"--{boundary}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + data + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


def upload(body: bytes, chunk: int, boundary: str = "XyZ") -> tuple[Upload, bytes]:
    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(body), chunk):
            yield body[start : start + chunk]

    target = io.BytesIO()
    result = asyncio.run(receive(f"multipart/form-data; boundary={boundary}", stream(), target, 10**6))
    return result, target.getvalue()


@given(st.binary(max_size=300).filter(lambda data: b"--XyZ" not in data), st.integers(1, 400))
def test_uploads_arrive_whole_however_they_are_cut(data: bytes, chunk: int) -> None:
    found, content = upload(form("XyZ", ("purpose", None, b"batch"), ("file", "a.jsonl", data)), chunk)
    assert (found, content) == (Upload("a.jsonl", len(data), {"purpose": "batch"}), data)


@given(st.binary(max_size=200), st.integers(0, 250))
def test_broken_uploads_are_refused_in_a_sentence(noise: bytes, at: int) -> None:
    whole = form("XyZ", ("purpose", None, b"batch"), ("file", "a.jsonl", b"{}"))
    with suppress(RequestError, HTTPException):
        upload(whole[:at] + noise + whole[at:], 50)
    with pytest.raises(RequestError):
        upload(whole[: min(at, len(whole) - 4)], 50)


def test_forms_of_another_kind(server: RunningServer) -> None:
    for parts in (
        [("file", "a", b"1"), ("file", "b", b"2")],
        [("purpose", None, b"x" * 2000)],
        [(f"f{i}", None, b"x") for i in range(20)],
        [("file", None, b"x")],
        [("other", "name", b"x")],
    ):
        with pytest.raises(RequestError):
            upload(form("XyZ", *parts), 100)
    reply = httpx.post(f"{server.url}/v1/files", content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert reply.status_code == 400
    assert "boundary" in json.loads(reply.text)["error"]["message"]
