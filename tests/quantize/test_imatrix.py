"""Importance matrices: the same numbers as llama-imatrix's, in its two formats, and damaged files.

stories260k.imatrix.{gguf,dat} are what llama-imatrix (0.6.0-dev, -c 512 --chunks 4) made of stories260K.gguf and the
first 12,000 bytes of tinyshakespeare.txt.
"""

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.checkpoint import open_checkpoint
from puna.errors import CheckpointError, PunaError, RequestError
from puna.ops.registry import make_ops
from puna.quantize.calibration import measure_importance, read_windows
from puna.quantize.imatrix import ImportanceMatrix, read_imatrix, write_imatrix

HERE = Path(__file__).parent
DAT, GGUF = HERE / "stories260k.imatrix.dat", HERE / "stories260k.imatrix.gguf"


def test_both_formats_of_llama_cpp_hold_the_same() -> None:
    old, new = read_imatrix(DAT), read_imatrix(GGUF)
    assert old.datasets == new.datasets == ("shakespeare.txt",)
    assert (old.windows, old.window) == (new.windows, new.window) == (4, 512)
    assert set(old.means) == set(new.means)
    assert len(new.means) == 35
    for name, mean in new.means.items():
        np.testing.assert_allclose(old.means[name], mean, rtol=1e-6)


@pytest.mark.parametrize("ops", ["reference", "native"])
def test_what_we_measure_is_what_llama_imatrix_measures(shared_data: Path, tmp_path: Path, ops: str) -> None:
    if ops == "native":
        pytest.importorskip("puna.ops.native_ops")
    text = tmp_path / "shakespeare.txt"
    text.write_bytes((shared_data / "text" / "tinyshakespeare.txt").read_bytes()[:12000])
    checkpoint = open_checkpoint(shared_data / "weights" / "stories260K" / "stories260K.gguf")
    windows = read_windows(checkpoint, text, 4)
    assert [len(window) for window in windows] == [512] * 4
    ours, theirs = measure_importance(checkpoint, make_ops(ops), windows, text.name), read_imatrix(GGUF)
    assert set(ours.means) == set(theirs.means)
    for name, mean in theirs.means.items():
        np.testing.assert_allclose(ours.means[name], mean, rtol=0.02, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["a.gguf", "a.dat"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    means = {"blk.0.ffn_up.weight": np.array([1, 0.25, 0], np.float32), "blk.0.attn_q.weight": np.ones(2, np.float32)}
    write_imatrix(tmp_path / name, ImportanceMatrix(means, ("wörter.txt",), 3))
    found = read_imatrix(tmp_path / name)
    assert (found.datasets, found.windows, found.window) == (("wörter.txt",), 3, 512)
    assert set(found.means) == set(means)
    for key, mean in means.items():
        np.testing.assert_allclose(found.means[key], mean, rtol=1e-6)


def test_no_column_counts_nothing_and_another_models_matrix_is_refused() -> None:
    matrix = ImportanceMatrix({"a": np.array([4, 0, 0, 0], np.float32), "b": np.zeros(2, np.float32)}, (), 1)
    found = matrix.of("a", 4)
    assert found is not None
    assert found[0] == 4
    assert (found[1:] > 0).all()
    assert matrix.of("b", 2) is None
    assert matrix.of("c", 9) is None
    with pytest.raises(CheckpointError, match="4 columns for a, which has 5; it was made from another model"):
        matrix.of("a", 5)


def test_damaged_files_are_told(tmp_path: Path, shared_data: Path) -> None:
    path = tmp_path / "x.dat"
    for content in (b"", b"abc", struct.pack("<i", -1), struct.pack("<i", 2**31 - 1), DAT.read_bytes()[:5000]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not an importance matrix, or is damaged at byte"):
            read_imatrix(path)
    write_imatrix(path, ImportanceMatrix({"a": np.array([np.nan], np.float32)}, (), 1))
    with pytest.raises(CheckpointError, match="the importance of a holds numbers that are negative or not finite"):
        read_imatrix(path)
    with pytest.raises(CheckpointError, match="but not an importance matrix"):
        read_imatrix(shared_data / "weights" / "stories260K" / "stories260K.gguf")
    with pytest.raises(CheckpointError, match=r"cannot read .*: No such file"):
        read_imatrix(tmp_path / "absent")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 12_000), st.binary(min_size=1, max_size=8))
def test_any_damage_is_an_error_or_other_numbers(tmp_path: Path, at: int, damage: bytes) -> None:
    for source in (DAT, GGUF):
        content = bytearray(source.read_bytes())
        content[at : at + len(damage)] = damage
        (tmp_path / "x").write_bytes(content)
        with suppress(PunaError):
            read_imatrix(tmp_path / "x")


def test_a_text_that_is_too_short_or_not_text_is_told(shared_data: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shared_data / "weights" / "stories260K" / "stories260K.gguf")
    (tmp_path / "t.txt").write_text("Once upon a time")
    with pytest.raises(RequestError, match=r"t\.txt has \d+ tokens; at least 512 are needed"):
        read_windows(checkpoint, tmp_path / "t.txt")
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="cannot read the calibration text"):
        read_windows(checkpoint, tmp_path / "b")
    with pytest.raises(RequestError, match="cannot read the calibration text"):
        read_windows(checkpoint, tmp_path / "absent")
