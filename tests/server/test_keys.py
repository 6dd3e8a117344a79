"""Keys: what is stored, who is let in, and what a change or damage of the file does."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from puna.errors import StoreError
from puna.server.keys import KeyFile, Keys
from puna.store import Store


@pytest.fixture
def key_file(tmp_path: Path) -> KeyFile:
    return KeyFile(Store(tmp_path / "home", notify=lambda _: None))


def test_only_the_hash_is_stored_and_only_the_owner_may_read_it(key_file: KeyFile) -> None:
    secret = key_file.add("alice", "admin", max_tokens=7)
    assert len(secret.removeprefix("puna-")) == 43  # 32 bytes in base64
    text = key_file.path.read_text()
    assert secret not in text
    assert json.loads(text)["keys"][0]["digest"] == hashlib.sha256(secret.encode()).hexdigest()
    assert stat.S_IMODE(key_file.path.stat().st_mode) == 0o600
    assert [path.name for path in key_file.path.parent.iterdir() if path.name.startswith(".")] == []
    found = Keys(file=key_file).find(secret.encode())
    assert found is not None
    assert (found.name, found.scope, found.max_tokens, found.requests_per_minute) == ("alice", "admin", 7, None)


@pytest.mark.parametrize("wrong", [b"", b"puna-", b"\xff\xfe", b"x" * 100_000])
def test_wrong_secrets_find_nothing(key_file: KeyFile, wrong: bytes) -> None:
    secret = key_file.add("alice")
    keys = Keys(["started-with"], key_file)
    assert keys.find(wrong) is None
    assert keys.find(secret.encode()[:-1]) is None
    assert keys.find(key_file.read()[0].digest.encode()) is None
    started = keys.find(b"started-with")
    assert started is not None
    assert (started.name, started.scope) == ("api-key:1", "admin")


def test_a_running_server_follows_the_file(key_file: KeyFile) -> None:
    keys = Keys(file=key_file)
    assert not keys.required
    first = key_file.add("first").encode()
    assert keys.required
    assert keys.find(first) is not None
    second = key_file.add("second").encode()
    key_file.remove("first")
    assert keys.find(first) is None
    assert keys.find(second) is not None
    key_file.remove("second")
    assert keys.required, "without its last key, the server must not be open"
    key_file.path.unlink()
    assert keys.required


def test_damage_keeps_the_keys_as_they_were(key_file: KeyFile, caplog: pytest.LogCaptureFixture) -> None:
    secret = key_file.add("alice").encode()
    keys = Keys(file=key_file)
    key_file.path.write_text('{"keys": [')
    assert keys.find(secret) is not None
    assert keys.find(secret) is not None
    (warning,) = caplog.messages
    assert f"{key_file.path} is damaged" in warning
    with pytest.raises(StoreError, match="is damaged"):
        Keys(file=key_file)
    with pytest.raises(StoreError, match="is damaged"):
        key_file.add("bob")


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[]",
        '{"keys": 1}',
        '{"keys": [{}]}',
        "[" * 100_000,
        "\xff",
        '{"keys": [{"name": "a", "scope": "root", "digest": "%s"}]}' % ("0" * 64),
        '{"keys": [{"name": "a", "scope": "admin", "digest": ""}]}',
        '{"keys": [{"name": "../a", "scope": "admin", "digest": "%s"}]}' % ("0" * 64),
        '{"keys": [{"name": "a", "scope": "admin", "digest": "%s", "max_tokens": -1}]}' % ("0" * 64),
        '{"keys": [{"name": "a", "scope": "admin", "digest": "%s", "surprise": 1}]}' % ("0" * 64),
    ],
)
def test_hostile_files_are_refused_in_one_sentence(key_file: KeyFile, content: str) -> None:
    key_file.path.parent.mkdir(parents=True)
    key_file.path.write_bytes(content.encode("latin-1"))
    with pytest.raises(StoreError, match="is damaged"):
        key_file.read()


@pytest.mark.parametrize("name", ["", "a b", "../a", "a" * 65, "-a", "api-key:1", "é"])
def test_names_that_are_none(key_file: KeyFile, name: str) -> None:
    with pytest.raises(StoreError, match="the name of a key must be"):
        key_file.add(name)


def test_processes_that_add_at_once_lose_nothing(key_file: KeyFile) -> None:
    code = "import sys; from puna.server.keys import *; from puna.store import Store; KeyFile(Store()).add(sys.argv[1])"
    environment = {**os.environ, "PUNA_HOME": str(key_file.path.parent.parent)}
    processes = [subprocess.Popen([sys.executable, "-c", code, f"k{i}"], env=environment) for i in range(6)]
    assert [process.wait() for process in processes] == [0] * 6
    assert [key.name for key in key_file.read()] == [f"k{i}" for i in range(6)]
    with pytest.raises(StoreError, match="there is a key k3 already"):
        key_file.add("k3")
    with pytest.raises(StoreError, match="there is no key nobody"):
        key_file.remove("nobody")
