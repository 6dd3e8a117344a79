"""Event files, against vectors of TensorBoard's own protocol buffers and read back by TensorBoard where it is there."""

import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run_folder import INPUTS, RECIPE

from puna.train.runs import RunFolder
from puna.train.runs.tensorboard import append_event, begin_events, crc32c, event, record


@pytest.mark.parametrize(
    ("data", "checksum"),
    [  # RFC 3720, B.4; the first is the check value of every table of checksums
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c(data: bytes, checksum: int) -> None:
    assert crc32c(data) == checksum


def test_a_record_byte_for_byte() -> None:
    """Written by tensorboard 2.21's Event.SerializeToString and masked_crc32c."""
    row = {"step": 300, "loss": 2.5, "validation_loss": -0.1, "time": 1.5e9}
    assert record(event(row)).hex() == (
        "39000000000000008b0737f109000000c00b5ad64110ac022a2b0a110a0a747261696e2f6c6f7373150000"
        "20400a160a0f76616c69646174696f6e2f6c6f737315cdccccbd29053b48"
    )


ROWS = st.dictionaries(
    st.integers(0, 1 << 50),
    st.dictionaries(st.text(max_size=6), st.floats() | st.integers(-(1 << 60), 1 << 60), max_size=3),
    max_size=4,
)


@settings(deadline=None)
@given(ROWS)
def test_tensorboards_own_messages(tmp_path_factory: pytest.TempPathFactory, rows: dict[int, dict[str, float]]) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    written = [{**numbers, "step": step, "time": 5.0} for step, numbers in sorted(rows.items())]
    folder = tmp_path_factory.mktemp("events")
    path = begin_events(folder, 0)
    for row in written:
        append_event(path, row)
    version, session, *events = loader.LegacyEventFileLoader(str(path)).Load()
    assert version.file_version == "brain.Event:2"
    assert session.session_log.status == session.session_log.START
    assert [found.step for found in events] == [row["step"] for row in written]
    for found, row in zip(events, written, strict=True):
        assert found.wall_time == 5.0
        numbers = [value for name, value in row.items() if name not in ("step", "time")]
        for value, number in zip(found.summary.value, numbers, strict=True):
            assert value.simple_value == float32(number) or (math.isnan(number) and math.isnan(value.simple_value))


def float32(number: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)


def scalars(accumulator: Any, tag: str) -> list[tuple[int, float]]:
    accumulator.Reload()
    if hasattr(accumulator, "Scalars"):
        return [(scalar.step, scalar.value) for scalar in accumulator.Scalars(tag)]
    return [(tensor.step, float(tensor.tensor_proto.float_val[0])) for tensor in accumulator.Tensors(tag)]


@pytest.mark.parametrize("reader", ["event_accumulator", "plugin_event_accumulator"])
def test_each_step_once_after_a_resumption(tmp_path: Path, reader: str) -> None:
    """Also for a TensorBoard that looked on all the time."""
    accumulator = pytest.importorskip(f"tensorboard.backend.event_processing.{reader}").EventAccumulator
    folder, events = tmp_path / "run", str(tmp_path / "run" / "tensorboard")
    with RunFolder.start(RECIPE, INPUTS, folder) as run:
        for step in (1, 2, 3, 4):
            run.log({"step": step, "loss": float(step)})
    looking_on = accumulator(events)
    assert scalars(looking_on, "train/loss") == [(1, 1), (2, 2), (3, 3), (4, 4)]
    (file,) = (folder / "tensorboard").iterdir()
    with file.open("ab") as torn:
        torn.write(record(b"cut off")[:9])
    with RunFolder.resume(RECIPE, INPUTS, folder) as run:
        run.log({"step": 3, "loss": 30.0})
        run.log({"step": 4, "loss": 40.0, "validation_loss": 1.5})
    for fresh_or_not in (accumulator(events), looking_on):
        assert scalars(fresh_or_not, "train/loss") == [(1, 1), (2, 2), (3, 30), (4, 40)]
        assert scalars(fresh_or_not, "validation/loss") == [(4, 1.5)]
