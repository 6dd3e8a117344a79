"""The container of packed matrices: what is read is what was written, and nothing hostile is read at all."""

import json
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import CheckpointError
from puna.ops.packed_file import ALIGNMENT, MAGIC, PackedMatrix, read_packed, write_packed

PREFIX = struct.Struct("<8sI32s")
DATA = {name: np.frombuffer(name.encode() * 50, np.uint8) for name in ("one", "second", "ü")}
tmp_path_is_reused = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "model.packed"
    write_packed(
        path,
        1,
        "source",
        [(PackedMatrix(name, "F32", 5, 7, 0, data.nbytes), lambda data=data: data) for name, data in DATA.items()],
    )
    return path


def write_header(path: Path, header: Any) -> None:
    """A file with a right digest over any header, as someone hostile can make it, and 4096 bytes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(PREFIX.pack(MAGIC, len(text), sha256(text).digest()) + text + bytes(4096))


def header_of(path: Path) -> dict[str, Any]:
    _, length, _ = PREFIX.unpack(path.read_bytes()[: PREFIX.size])
    header: dict[str, Any] = json.loads(path.read_bytes()[PREFIX.size :][:length])
    return header


def test_what_is_read_is_what_was_written(packed: Path) -> None:
    file = read_packed(packed, 1, "source")
    assert list(file.matrices) == list(DATA)
    for name, data in DATA.items():
        matrix = file.matrices[name]
        panels = file.panels(matrix)
        assert (matrix.type, matrix.rows, matrix.columns) == ("F32", 5, 7)
        assert np.array_equal(panels, data)
        assert panels.ctypes.data % ALIGNMENT == 0
        assert not panels.flags.writeable


def test_a_file_cut_anywhere_is_refused(packed: Path) -> None:
    whole = packed.read_bytes()
    for length in range(len(whole)):
        packed.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.packed is not used: .*; `puna pack` makes it anew"):
            read_packed(packed, 1, "source")
    packed.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="its header says"):
        read_packed(packed, 1, "source")


def test_every_flipped_byte_before_the_matrices_is_noticed(packed: Path) -> None:
    whole = packed.read_bytes()
    _, length, _ = PREFIX.unpack(whole[: PREFIX.size])
    for place in range(PREFIX.size + length):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        packed.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged|no packed file"):
            read_packed(packed, 1, "source")


@pytest.mark.parametrize(
    ("layout", "source", "problem"),
    [(2, "source", "panel layout is 1, this Puna has 2"), (1, "other", "another model")],
)
def test_another_layout_or_model_is_refused(packed: Path, layout: int, source: str, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        read_packed(packed, layout, source)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
numbers = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 64, 4096, 2**31, 2**63, 2**64]) | json_values
entries = st.fixed_dictionaries(
    {"name": st.text() | json_values, "type": st.text() | json_values}
    | dict.fromkeys(("rows", "columns", "offset", "size"), numbers),
)
hostile_headers = json_values | st.fixed_dictionaries(
    {
        "layout": st.just(1) | json_values,
        "source": st.just("source") | json_values,
        "size": st.just(-1) | json_values,  # -1: to be replaced by the true size
        "matrices": st.lists(entries | json_values, max_size=3) | json_values,
    }
)


@given(hostile_headers)
@tmp_path_is_reused
def test_a_hostile_header_is_refused_or_stays_within_the_file(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "hostile.packed"
    write_header(path, header)
    if isinstance(header, dict) and header.get("size") == -1:
        for _ in range(3):  # until the number of digits has settled
            header["size"] = path.stat().st_size
            write_header(path, header)
    size = path.stat().st_size
    try:
        file = read_packed(path, 1, "source")
    except CheckpointError:
        return
    for matrix in file.matrices.values():
        assert matrix.offset % ALIGNMENT == 0
        assert 0 <= matrix.offset <= matrix.offset + matrix.size <= size
        assert file.panels(matrix).nbytes == matrix.size


@given(st.binary(max_size=200))
@tmp_path_is_reused
def test_any_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any.packed"
    path.write_bytes(MAGIC + data)
    with pytest.raises(CheckpointError):
        read_packed(path, 1, "source")
    write_header(path, data)
    with pytest.raises(CheckpointError):
        read_packed(path, 1, "source")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 3),
        ("type", None),
        ("rows", True),
        ("columns", -1),
        ("offset", 65),
        ("offset", 1 << 40),
        ("offset", -64),
        ("size", 1 << 40),
        ("size", 1.0),
        ("size", -1),
        ("unknown", 1),
    ],
)
def test_one_wrong_field_is_enough(packed: Path, field: str, value: Any) -> None:
    header = header_of(packed)
    header["matrices"][1][field] = value
    rest = packed.read_bytes()
    _, length, _ = PREFIX.unpack(rest[: PREFIX.size])
    text = json.dumps(header).encode()
    header["size"] += len(text) - length
    text = json.dumps(header).encode()
    packed.write_bytes(PREFIX.pack(MAGIC, len(text), sha256(text).digest()) + text + rest[PREFIX.size + length :])
    with pytest.raises(CheckpointError, match="describe"):
        read_packed(packed, 1, "source")


def test_deep_nesting_and_a_name_twice_are_refused(packed: Path) -> None:
    write_header(packed, b"[" * 100_000)
    with pytest.raises(CheckpointError, match="not JSON"):
        read_packed(packed, 1, "source")
    entry = {"name": "a", "type": "F32", "rows": 1, "columns": 1, "offset": 0, "size": 4}
    header: dict[str, Any] = {"layout": 1, "source": "source", "size": 0, "matrices": [entry, entry]}
    for _ in range(3):
        write_header(packed, header)
        header["size"] = packed.stat().st_size
    with pytest.raises(CheckpointError, match="the matrix 'a' wrongly"):
        read_packed(packed, 1, "source")


def test_a_folder_or_nothing_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_packed(tmp_path, 1, "source")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_packed(tmp_path / "absent", 1, "source")
