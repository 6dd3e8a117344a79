"""LLaMA-Factory's ``dataset_info.json``: where its data sets lie and how their fields are called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.errors import DataError

# Its names of columns, by the fields that they stand for here.
_FIELDS = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "history",
        "system": "system",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
}
_EVERYWHERE = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "label"}


def read_dataset_info(path: Path, name: str) -> tuple[Path, dict[str, str]]:
    """The file of the set ``name``, and its columns (the format's field → the file's).

    Raises DataError for a set that is not there, or is not a local file.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path.name} cannot be read as JSON: {error}") from None
    if not isinstance(listed, dict) or not isinstance(listed.get(name), dict):
        known = ", ".join(sorted(listed)[:20]) if isinstance(listed, dict) else "none"
        raise DataError(f"{path.name} lists no set {name!r}; it lists: {known}")
    entry: Mapping[str, Any] = listed[name]
    file = entry.get("file_name")
    if not isinstance(file, str):
        raise DataError(f"{path.name}: {name} is not a local file (file_name); download it, then give its path")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _FIELDS:
        raise DataError(f"{path.name}: {name}.formatting must be alpaca or sharegpt, found {formatting!r}")
    columns = entry.get("columns", {})
    if not isinstance(columns, dict) or not all(isinstance(column, str) for column in columns.values()):
        raise DataError(f"{path.name}: {name}.columns must name a column for each field")
    if columns == {"prompt": "text"}:  # its way of saying plain text
        return path.parent / file, {}
    fields = {**_FIELDS[formatting], **_EVERYWHERE}
    renamed = {fields[key]: column for key, column in columns.items() if key in fields}
    return path.parent / file, {field: column for field, column in renamed.items() if field != column}
