"""What every file of training data is to those who read it: rows by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]


class Rows(Protocol):
    """A file's rows. ``where`` is how a row is named in messages: ``file:line``."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row:
        """The row, with the fields that it has. Raises DataError naming the file and the line."""

    def where(self, number: int) -> str: ...
