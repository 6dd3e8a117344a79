"""Manifests: what is written is read, and damage is told, never swallowed."""

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.errors import StoreError
from puna.store import Lineage, Manifest, StoredFile
from puna.store.manifest import StoredAdapter

DIGEST = "ab" * 32
FULL = Manifest(
    "llama-3.2-1b",
    "q4",
    (StoredFile("model.gguf", DIGEST, 5), StoredFile("model-2.gguf", DIGEST, 7)),
    template="{{ x }}",
    system="Be kind. Sé amable. 你好",
    parameters={"temperature": 0.5, "stop": ["a", "b"], "seed": 1, "raw": True},
    licence="llama3.2",
    source="url",
    lineage=Lineage("llama-3.2-1b:latest", "quantize"),
)


def test_round_trip() -> None:
    assert Manifest.from_json(FULL.to_json(), "here") == FULL
    bare = Manifest("a", "latest", (StoredFile("a.gguf", DIGEST, 0),))
    assert Manifest.from_json(bare.to_json(), "here") == bare


def test_content_digest_depends_on_files_alone() -> None:
    assert replace(FULL, name="other", system=None, files=FULL.files[::-1]).content_digest == FULL.content_digest
    assert replace(FULL, files=FULL.files[:1]).content_digest != FULL.content_digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 3}, "newer version of Puna"),
        ({"schema": None}, "schema"),
        ({"files": []}, "files"),
        ({"files": [{"file": "../x", "sha256": DIGEST, "size": 1}]}, "file name '../x'"),
        ({"files": [{"file": "a/b", "sha256": DIGEST, "size": 1}]}, "file name"),
        ({"files": [{"file": ".bashrc", "sha256": DIGEST, "size": 1}]}, "file name"),
        ({"files": [{"file": "x", "sha256": "../../etc", "size": 1}]}, "digest of x"),
        ({"files": [{"file": "x", "sha256": DIGEST.upper(), "size": 1}]}, "digest of x"),
        ({"files": [{"file": "x", "sha256": DIGEST, "size": -1}]}, "size of x"),
        ({"files": [{"file": "x", "sha256": DIGEST, "size": True}]}, "size of x"),
        ({"files": [{"file": "x", "sha256": DIGEST}]}, "files"),
        ({"files": [{"file": "x", "sha256": DIGEST, "size": 1}] * 2}, "twice"),
        ({"name": 5}, "name is not a string"),
        ({"system": ["x"]}, "system is not a string"),
        ({"parameters": {"t": {"x": 1}}}, "parameters.t"),
        ({"parameters": []}, "parameters"),
        ({"lineage": {"parent": "x"}}, "lineage"),
        ({"surprise": 1}, "'surprise'"),
    ],
)
def test_damage_is_named(change: dict[str, Any], message: str) -> None:
    raw = json.loads(FULL.to_json()) | change
    with pytest.raises(StoreError, match=message):
        Manifest.from_json(json.dumps(raw), "here")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"schema": 1}', '{"schema": 1e999}'])
def test_not_a_manifest(text: str) -> None:
    with pytest.raises(StoreError, match="here"):
        Manifest.from_json(text, "here")


@given(st.integers(0, 600), st.integers(0, 600), st.text(max_size=5))
def test_any_cut_or_splice_gives_a_manifest_or_a_store_error(start: int, end: int, middle: str) -> None:
    text = FULL.to_json()
    with suppress(StoreError):
        Manifest.from_json(text[:start] + middle + text[end:], "here")


def test_infinite_parameters_are_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        replace(FULL, parameters={"temperature": float("inf")}).to_json()


def test_what_schema_2_brought() -> None:
    adapter = StoredAdapter("mine", (StoredFile("lora.gguf", DIGEST, 3),))
    newer = replace(FULL, messages=(("user", "hi"),), licence_texts=("whole text",), adapters=(adapter,))
    assert Manifest.from_json(newer.to_json(), "here") == newer
    assert (json.loads(newer.to_json())["schema"], json.loads(FULL.to_json())["schema"]) == (2, 1)
    assert "adapters" not in FULL.to_json()
    assert (newer.size, newer.content_digest) == (FULL.size + 3, FULL.content_digest)
    for change in ({"messages": [["robot", "x"]]}, {"adapters": [{"name": "x"}]}, {"licence_texts": "x"}):
        with pytest.raises(StoreError, match=next(iter(change))):
            Manifest.from_json(json.dumps({**json.loads(newer.to_json()), **change}), "here")
