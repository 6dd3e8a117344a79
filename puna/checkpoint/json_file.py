"""The JSON and text files beside a model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from puna.errors import CheckpointError

_MAX_BYTES = 100_000_000


def read_text(path: Path) -> str:
    """UTF-8 text. Raises CheckpointError when it is not, or is absurdly large."""
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; expected at most {_MAX_BYTES}")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError when the file holds anything else."""
    try:
        raw = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return raw


def write_json(path: Path, raw: dict[str, Any]) -> None:
    path.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
