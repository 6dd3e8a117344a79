"""Scalars in a file that TensorBoard reads, without its library.

The file is a row of records (length, its checksum, bytes, their checksum: tensorflow/core/lib/io/record_writer.h), each
a protocol buffer of the kind Event (tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto).
"""

from __future__ import annotations

import math
import struct
import time
from pathlib import Path

from puna.errors import TrainingError
from puna.train.runs.metrics import Row

_VERSION = b"brain.Event:2"
_SESSION_START = 1
_NOT_DRAWN = ("step", "time")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def begin_events(folder: Path, step: int) -> Path:
    """A new file of events from ``step`` on. Raises TrainingError when the disk refuses.

    It says that a session starts at ``step``, by which readers forget what older files of the folder have from there
    on. Those stay: a TensorBoard that looks on would stop at a file that went away.
    """
    # TensorBoard reads the files of a folder in the order of their names.
    path = folder / f"events.out.tfevents.{time.time_ns()}"
    start = _double(1, time.time())
    version = record(start + _bytes(3, _VERSION))
    session = record(start + _integer(2, step) + _bytes(7, _integer(1, _SESSION_START)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(version + session)
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror}") from None
    return path


def append_event(path: Path, row: Row) -> None:
    """Add one row. Raises TrainingError when the disk refuses."""
    try:
        with path.open("ab") as file:
            file.write(record(event(row)))
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror}") from None


def event(row: Row) -> bytes:
    """A row's numbers as one Event: ``train/loss``, and ``validation/loss`` for ``validation_loss``; as float32."""
    values = b"".join(
        _bytes(1, _bytes(1, _tag(name).encode("utf-8", "replace")) + _float(2, value))
        for name, value in row.items()
        if name not in _NOT_DRAWN
    )
    return _double(1, row.get("time", 0.0)) + _integer(2, int(row["step"])) + _bytes(5, values)


def record(data: bytes) -> bytes:
    """``data`` with its length and checksums."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum (RFC 3720, 12.1)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _table_entry(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value


_TABLE = [_table_entry(byte) for byte in range(256)]


def _masked(data: bytes) -> bytes:
    """Checksums of records are rotated and moved, so that one of bytes that hold checksums stays a good one."""
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _tag(name: str) -> str:
    is_validation = name.startswith("validation_")
    return f"validation/{name.removeprefix('validation_')}" if is_validation else f"train/{name}"


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _integer(field: int, value: int) -> bytes:
    return _key(field, _VARINT) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(value)) + value


def _double(field: int, value: float) -> bytes:
    return _key(field, _FIXED64) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    try:
        return _key(field, _FIXED32) + struct.pack("<f", value)
    except OverflowError:  # beyond float32
        return _key(field, _FIXED32) + struct.pack("<f", math.copysign(math.inf, value))
