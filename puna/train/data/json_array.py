"""Where the elements of a JSON list lie in its file, found in one pass with little of it in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from puna.errors import DataError

_CHUNK = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")


def index_json_array(name: str, file: BinaryIO, longest: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, line) of each element; offsets in bytes, ``end`` exclusive, lines from 1.

    ``longest`` bounds an element, in bytes. Raises DataError naming the line where the list is malformed.
    """
    reader = _Reader(name, file)
    reader.expect("[")
    if reader.peek() == "]":
        reader.expect("]")
    else:
        while True:
            reader.peek()
            start, line = reader.at, reader.line
            reader.skip_value(longest)
            yield start, reader.at, line
            if reader.peek() != ",":
                break
            reader.expect(",")
        reader.expect("]")
    if reader.peek():
        raise DataError(f"{name}:{reader.line}: there is more after the end of the list")


class _Reader:
    """A window on the file. ``at`` is the offset in bytes of what comes next, ``line`` its number."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self.at, self.line = 0, 1
        self._name, self._file = name, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._buffer, self._position, self._ended = "", 0, False
        if not self._more(_CHUNK):
            return
        if self._buffer.startswith("\ufeff"):
            self._take(1)

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            self._take(_BLANK.match(self._buffer, self._position).end() - self._position)  # type: ignore[union-attr]
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._more(_CHUNK):
                return ""

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            shown = repr(found) if found else "the end of the file"
            raise DataError(f"{self._name}:{self.line}: expected {character!r} in the list of rows, found {shown}")
        self._take(1)

    def skip_value(self, longest: int) -> None:
        size = _CHUNK
        while True:
            try:
                _, end = self._json.raw_decode(self._buffer, self._position)
                # A number may go on in the next chunk.
                if end < len(self._buffer) or not self._more(size):
                    self._take(end - self._position)
                    return
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._more(size):
                    raise self._malformed(error) from None
            size *= 2
            if len(self._buffer) - self._position > longest:
                raise self._malformed("the row is not closed, or longer than a row may be")

    def _malformed(self, error: Exception | str) -> DataError:
        line, reason = self.line, str(error)
        if isinstance(error, json.JSONDecodeError):
            line += self._buffer.count("\n", self._position, error.pos)
            reason = error.msg
        return DataError(f"{self._name}:{line}: the list of rows is not JSON: {reason}; JSONL can skip such rows")

    def _more(self, size: int) -> bool:
        """Read on; False at the end of the file."""
        if self._ended:
            return False
        data = self._file.read(size)
        self._ended = not data
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError:
            raise DataError(f"{self._name} is not UTF-8 after line {self.line}; save the file as UTF-8") from None
        self._buffer = self._buffer[self._position :] + text
        self._position = 0
        return not self._ended or bool(text)

    def _take(self, count: int) -> None:
        taken = self._buffer[self._position : self._position + count]
        self.at += len(taken.encode("utf-8"))
        self.line += taken.count("\n")
        self._position += count
