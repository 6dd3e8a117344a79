"""OpenAI's own description of its API, to check responses against."""

from __future__ import annotations

import functools
import lzma
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator


def check(shared_data: Path, name: str, value: object) -> None:
    """Assert that ``value`` is valid under the schema of that name."""
    problems = [f"{e.json_path}: {e.message[:200]}" for e in _validator(shared_data, name).iter_errors(value)]
    assert not problems, f"{name}: {problems}"


@functools.lru_cache
def _validator(shared_data: Path, name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": _components(shared_data)})


@functools.lru_cache
def _components(shared_data: Path) -> Any:
    with lzma.open(shared_data / "api" / "openai-openapi.yaml.xz") as file:
        document = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return _as_json_schema(document["components"])


def _as_json_schema(node: Any) -> Any:
    """OpenAPI 3.0's ``nullable``, which the document still uses, is unknown to JSON Schema."""
    if isinstance(node, list):
        return [_as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {key: _as_json_schema(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if node.get("nullable") is True else plain
