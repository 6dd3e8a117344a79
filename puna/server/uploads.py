"""Multipart uploads (RFC 7578), written to disk as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from puna.errors import RequestError

MAX_FIELD = 1024  # bytes of a field that is no file
MAX_FIELDS = 16
MAX_HEADER = 4096


@dataclass
class Upload:
    """What came beside the file's bytes: its name, None when there was no file, and the other fields."""

    filename: str | None = None
    size: int = 0
    fields: dict[str, str] = field(default_factory=dict)


async def receive(content_type: str, body: AsyncIterator[bytes], target: BinaryIO, max_size: int) -> Upload:
    """Write the one file of a form, its field ``file``, to ``target``.

    Raises RequestError for what is no such form, HTTPException (413) for a file of more than ``max_size`` bytes.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise RequestError("the body must be multipart/form-data with a boundary, as clients send files")
    reader = _Reader(target, max_size)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": reader.part_begin,
                "on_part_data": reader.part_data,
                "on_part_end": reader.part_end,
                "on_header_field": reader.header_field,
                "on_header_value": reader.header_value,
                "on_header_end": reader.header_end,
                "on_headers_finished": reader.headers_finished,
                "on_end": reader.end,
            },
        )
        async for chunk in body:
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise RequestError(f"the multipart body is malformed: {error}") from None
    if not reader.ended:
        raise RequestError("the multipart body is cut off; send it whole")
    return reader.upload


class _Reader:
    """Takes the parser's calls."""

    def __init__(self, target: BinaryIO, max_size: int) -> None:
        self.upload = Upload()
        self.ended = False
        self._target = target
        self._max_size = max_size
        self._name = ""
        self._data = bytearray()
        self._header = (bytearray(), bytearray())
        self._disposition = b""

    def part_begin(self) -> None:
        self._data.clear()
        self._disposition = b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._add_to_header(0, data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._add_to_header(1, data[start:end])

    def header_end(self) -> None:
        name, value = map(bytes, self._header)
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = (bytearray(), bytearray())

    def headers_finished(self) -> None:
        _kind, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if self._name in self.upload.fields or (self._name == "file" and self.upload.filename is not None):
            raise RequestError(f"the form has the field {self._name!r} twice")
        if (self._name == "file") != (filename is not None):
            raise RequestError(f"the form must have one file, in the field file; found the field {self._name!r}")
        if filename is not None:
            self.upload.filename = filename.decode("utf-8", "replace")
        elif len(self.upload.fields) == MAX_FIELDS:
            raise RequestError(f"the form has more than {MAX_FIELDS} fields")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name != "file":
            self._data += data[start:end]
            if len(self._data) > MAX_FIELD:
                raise RequestError(f"the form's field {self._name!r} has more than {MAX_FIELD} bytes")
            return
        self.upload.size += end - start
        if self.upload.size > self._max_size:
            raise HTTPException(413, f"the file has more than {self._max_size} bytes; split it")
        self._target.write(data[start:end])

    def part_end(self) -> None:
        if self._name != "file":
            self.upload.fields[self._name] = self._data.decode("utf-8", "replace")

    def end(self) -> None:
        self.ended = True

    def _add_to_header(self, part: int, data: bytes) -> None:
        self._header[part].extend(data)
        if len(self._header[part]) > MAX_HEADER:
            raise RequestError(f"a header of the multipart body has more than {MAX_HEADER} bytes")
