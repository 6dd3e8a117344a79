"""What the store knows of one model: its files by digest, and how it is meant to be used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from hashlib import sha256
from typing import Any

from puna.errors import StoreError
from puna.store.names import ModelName

SCHEMA = 2
_SINCE_2 = ("messages", "licence_texts", "adapters", "report")
MESSAGE_ROLES = ("system", "user", "assistant")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}")


@dataclass(frozen=True)
class StoredFile:
    """One file of a model: its name in the checkpoint, its sha256 as 64 hexadecimal digits, its size in bytes."""

    file: str
    sha256: str
    size: int


@dataclass(frozen=True)
class StoredAdapter:
    """A LoRA adapter of a model: one GGUF file, or the files of a folder that PEFT saved."""

    name: str
    files: tuple[StoredFile, ...]

    @property
    def content_digest(self) -> str:
        """A digest of the files and their names."""
        return _content_digest(self.files)


@dataclass(frozen=True)
class Lineage:
    """Where a derived model came from: its parent, and how it was made (``quantize``, ``import``, ``lora`` …)."""

    parent: str
    method: str


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Manifest:
    """A stored model.

    ``files`` is one GGUF, the parts of a split one, or the files of a checkpoint folder. ``template`` and ``system``
    override what the files say; ``parameters`` are defaults for generation by ollama's names (``num_ctx``, ``stop`` …).
    ``licence`` is an identifier, ``licence_texts`` are whole licences. ``messages`` (role, text) begin every chat.
    ``adapters`` lie beside the weights and are no part of them. ``source`` says where the files came from; ``created``
    is UTC in ISO 8601. ``report`` says, as JSON values, what the model lost when it was made from another one.
    """

    name: str
    tag: str
    files: tuple[StoredFile, ...]
    template: str | None = None
    system: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    licence: str | None = None
    source: str | None = None
    lineage: Lineage | None = None
    created: str = field(default_factory=_now)
    messages: tuple[tuple[str, str], ...] = ()
    licence_texts: tuple[str, ...] = ()
    adapters: tuple[StoredAdapter, ...] = ()
    report: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def model_name(self) -> ModelName:
        return ModelName(self.name, self.tag)

    @property
    def size(self) -> int:
        """Bytes of all files, adapters included."""
        return sum(file.size for file in self.all_files)

    @property
    def all_files(self) -> tuple[StoredFile, ...]:
        """The weights' files and the adapters'."""
        return (*self.files, *(file for adapter in self.adapters for file in adapter.files))

    @property
    def parts(self) -> tuple[Manifest | StoredAdapter, ...]:
        """What has a folder of its own: the weights, and each adapter."""
        return (self, *self.adapters)

    @property
    def is_gguf(self) -> bool:
        return all(file.file.endswith(".gguf") for file in self.files)

    @property
    def content_digest(self) -> str:
        """A digest of the weights' files and their names: equal for two names of the same model."""
        return _content_digest(self.files)

    def to_json(self) -> str:
        """The manifest as it is stored; without what schema 2 brought, also an earlier version can read it."""
        newer = any(getattr(self, name) for name in _SINCE_2)
        raw: dict[str, Any] = {"schema": SCHEMA if newer else 1}
        raw |= {f.name: getattr(self, f.name) for f in fields(self)}
        raw["files"] = [vars(file) for file in self.files]
        raw["parameters"] = dict(self.parameters)
        raw["lineage"] = None if self.lineage is None else vars(self.lineage)
        raw["adapters"] = [{"name": a.name, "files": [vars(file) for file in a.files]} for a in self.adapters]
        for name in _SINCE_2:
            if not raw[name]:
                del raw[name]
        return json.dumps(raw, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read a stored manifest; ``where`` names it in errors. Raises StoreError when it is damaged or too new."""
        reader = _Reader(where)
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raise reader.error("it is not valid JSON") from None
        if not isinstance(raw, dict):
            raise reader.error("it is not a JSON object")
        schema = raw.pop("schema", None)
        if isinstance(schema, int) and schema > SCHEMA:
            raise StoreError(f"{where} was written by a newer version of Puna (schema {schema}); update this one")
        reader.check("schema", schema in (1, SCHEMA) and not isinstance(schema, bool))
        unknown = raw.keys() - {f.name for f in fields(cls)}
        reader.check(", ".join(sorted(map(repr, unknown))), not unknown)
        return cls(
            name=reader.text(raw, "name"),
            tag=reader.text(raw, "tag"),
            files=reader.files(raw.get("files")),
            template=reader.optional_text(raw, "template"),
            system=reader.optional_text(raw, "system"),
            parameters=reader.parameters(raw.get("parameters")),
            licence=reader.optional_text(raw, "licence"),
            source=reader.optional_text(raw, "source"),
            lineage=reader.lineage(raw.get("lineage")),
            created=reader.text(raw, "created"),
            messages=reader.messages(raw.get("messages", [])),
            licence_texts=reader.texts(raw.get("licence_texts", []), "licence_texts"),
            adapters=reader.adapters(raw.get("adapters", [])),
            report=reader.report(raw.get("report")),
        )


class _Reader:
    """Typed access to parsed JSON, naming the manifest and the field when something is wrong."""

    def __init__(self, where: str) -> None:
        self.where = where

    def error(self, problem: str) -> StoreError:
        return StoreError(f"the manifest {self.where} is damaged: {problem}; remove the model and pull it again")

    def check(self, key: str, good: bool) -> None:
        if not good:
            raise self.error(f"unexpected {key}")

    def text(self, raw: Mapping[str, Any], key: str) -> str:
        value = raw.get(key)
        if not isinstance(value, str):
            raise self.error(f"{key} is not a string")
        return value

    def optional_text(self, raw: Mapping[str, Any], key: str) -> str | None:
        return None if raw.get(key) is None else self.text(raw, key)

    def files(self, raw: Any) -> tuple[StoredFile, ...]:
        if not isinstance(raw, list) or not raw:
            raise self.error("files is not a list of at least one file")
        files = []
        for item in raw:
            good = isinstance(item, dict) and item.keys() == {"file", "sha256", "size"}
            self.check("files", good)
            file, digest, size = self.text(item, "file"), self.text(item, "sha256"), item["size"]
            self.check(f"the file name {file!r}", is_file_name(file))
            self.check(f"the digest of {file}", _DIGEST.fullmatch(digest) is not None)
            self.check(f"the size of {file}", isinstance(size, int) and not isinstance(size, bool) and size >= 0)
            files.append(StoredFile(file, digest, size))
        self.check("files (a name occurs twice)", len({file.file for file in files}) == len(files))
        return tuple(files)

    def parameters(self, raw: Any) -> dict[str, Any]:
        if not isinstance(raw, dict):
            raise self.error("parameters is not an object")
        for key, value in raw.items():
            values = value if isinstance(value, list) else [value]
            good = all(isinstance(v, (bool, int, float, str)) for v in values)
            good = good and all(math.isfinite(v) for v in values if isinstance(v, float))
            self.check(f"parameters.{key}", good)
        return raw

    def texts(self, raw: Any, key: str) -> tuple[str, ...]:
        self.check(key, isinstance(raw, list) and all(isinstance(text, str) for text in raw))
        return tuple(raw)

    def messages(self, raw: Any) -> tuple[tuple[str, str], ...]:
        self.check("messages", isinstance(raw, list))
        pairs = [self.texts(pair, "messages") for pair in raw]
        self.check("messages", all(len(pair) == 2 and pair[0] in MESSAGE_ROLES for pair in pairs))
        return tuple((role, content) for role, content in pairs)

    def adapters(self, raw: Any) -> tuple[StoredAdapter, ...]:
        self.check("adapters", isinstance(raw, list))
        for item in raw:
            self.check("adapters", isinstance(item, dict) and item.keys() == {"name", "files"})
        return tuple(StoredAdapter(self.text(item, "name"), self.files(item["files"])) for item in raw)

    def report(self, raw: Any) -> Mapping[str, Any] | None:
        """What is in it is checked by those who show it; here it need only be JSON that can be written again."""
        if raw is None:
            return None
        self.check("report", isinstance(raw, dict))
        try:
            json.dumps(raw, allow_nan=False)
        except ValueError:
            raise self.error("report has a number that is none") from None
        return dict(raw)

    def lineage(self, raw: Any) -> Lineage | None:
        if raw is None:
            return None
        self.check("lineage", isinstance(raw, dict) and raw.keys() == {"parent", "method"})
        return Lineage(self.text(raw, "parent"), self.text(raw, "method"))


def _content_digest(files: Iterable[StoredFile]) -> str:
    lines = sorted(f"{file.sha256} {file.file}" for file in files)
    return sha256("\n".join(lines).encode()).hexdigest()


def is_file_name(name: str) -> bool:
    """Whether a file may have that name in the store: no folders, no hidden files, only harmless characters."""
    return _FILE.fullmatch(name) is not None
