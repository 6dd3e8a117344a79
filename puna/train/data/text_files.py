"""Rows of JSONL, JSON, CSV and plain text, whole or compressed, without ever holding a whole file in memory.

What is kept is where each row begins. Compressed files are unpacked once into a temporary file that has no name, so
that it goes with the process.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from puna.errors import DataError
from puna.train.data.json_array import index_json_array
from puna.train.data.rows import Row, Rows

MAX_ROW = 64 << 20  # bytes; a longer row is a damaged file
_BOM = b"\xef\xbb\xbf"


def open_text(path: Path) -> Rows:
    """Index a file of text by its suffix, ``.gz`` aside. Raises DataError for one that is none; OSError."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = "".join(suffixes[-2:-1] if packed else suffixes[-1:])
    if kind not in _INDEXES:
        raise DataError(
            f"{path.name}: the form of a file is told from its suffix; known: {', '.join(_INDEXES)}, each also with "
            ".gz behind it, .parquet, .arrow"
        )
    return _INDEXES[kind](path, _unpacked(path) if packed else path.open("rb"))


def _unpacked(path: Path) -> BinaryIO:
    """The contents of a gzip file, in a temporary file without a name. Raises DataError for a damaged one."""
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 (the rows keep it)
    try:
        with gzip.open(path) as source:
            shutil.copyfileobj(source, file, 1 << 20)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        file.close()
        raise DataError(f"{path.name} is a damaged gzip file: {error}") from None
    file.seek(0)
    return file


class TextRows:
    """Rows of a file of text: ``starts`` and ``ends`` are byte offsets, ``lines`` the numbers of their first lines."""

    def __init__(self, path: Path, file: BinaryIO, read: Callable[[str], Row]) -> None:
        self.path = path
        self.starts, self.ends, self.lines = array("q"), array("q"), array("q")
        self._file = file
        self._read = read

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Row:
        where = self.where(number)
        self._file.seek(self.starts[number])
        data = self._file.read(self.ends[number] - self.starts[number])
        try:
            return self._read(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
        except DataError as error:
            raise DataError(f"{where}: {error}") from None

    def where(self, number: int) -> str:
        return f"{self.path.name}:{self.lines[number]}"

    def add(self, start: int, end: int, line: int) -> None:
        self.starts.append(start)
        self.ends.append(end)
        self.lines.append(line)


def parse_row(text: str) -> Row:
    """One row of JSON. Raises DataError."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"the row is not JSON: {error.msg} at character {error.pos + 1}; each row is one object, such as "
            '{"text": "…"}'
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"the row is not usable JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f'the row must be an object, such as {{"text": "…"}}, found {type(row).__name__}')
    return row


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, int, int, bytes]]:
    """Each line that is not blank: (start, end, number, its bytes). Raises DataError for an endless one."""
    at = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(at)
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            raise DataError(f"{path.name}:{number}: the line is longer than {MAX_ROW >> 20} MiB; is it a file of rows?")
        if line.strip():
            yield at, at + len(line), number, line
        at += len(line)


def _jsonl(path: Path, file: BinaryIO) -> TextRows:
    rows = TextRows(path, file, parse_row)
    for start, end, number, _ in _lines(path, file):
        rows.add(start, end, number)
    return rows


def _json(path: Path, file: BinaryIO) -> TextRows:
    """A list of objects; a file that does not begin as a list is read as a row a line."""
    beginning = file.read(1 << 16).removeprefix(_BOM).lstrip()
    file.seek(0)
    if not beginning.startswith(b"["):
        return _jsonl(path, file)
    rows = TextRows(path, file, parse_row)
    for start, end, line in index_json_array(path.name, file, MAX_ROW):
        rows.add(start, end, line)
    return rows


def _text(path: Path, file: BinaryIO) -> TextRows:
    rows = TextRows(path, file, lambda text: {"text": text.rstrip("\r\n")})
    for start, end, number, _ in _lines(path, file):
        rows.add(start, end, number)
    return rows


def _csv(path: Path, file: BinaryIO) -> TextRows:
    """Comma-separated, the first record being the names of the fields; quoted fields may hold line breaks."""
    lines = [0]
    ends = [0]
    failure = f"{path.name}: the file is not CSV"

    def text() -> Iterator[str]:
        for _, end, number, line in _lines(path, file):
            lines.append(number)
            ends.append(end)
            yield line.decode("utf-8", "replace")

    def read(record: str) -> Row:
        values = next(csv.reader(io.StringIO(record, newline="\n")), [])
        if len(values) != len(names):
            raise DataError(f"the record has {len(values)} fields, the first line names {len(names)}")
        return dict(zip(names, values, strict=True))

    records = csv.reader(text())
    try:
        names = next(records, [])
        if not names or len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise DataError(f"{path.name}:1: the first line must name the fields, each once, found {names!r}")
        rows = TextRows(path, file, read)
        start, line = ends[-1], lines[-1] + 1
        for _ in records:
            rows.add(start, ends[-1], line)
            start, line = ends[-1], lines[-1] + 1
    except csv.Error as error:
        raise DataError(f"{failure}: {error} at line {lines[-1]}; save such rows as JSONL") from None
    return rows


_INDEXES: dict[str, Callable[[Path, BinaryIO], TextRows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _text,
}
