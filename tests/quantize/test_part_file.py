"""Files that are continued: what is taken from an earlier run, and what never is."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from puna.quantize.part_file import PartFile

HEADER, SIZE = b"head", 12
ONE, TWO = np.arange(4, dtype=np.uint8), np.arange(4, 8, dtype=np.uint8)


def cut_off(path: Path, identity: str = "a", header: bytes = HEADER, *, write: bool = False) -> bool:
    """A run that is interrupted, perhaps after its first tensor: whether it found that tensor there."""
    try:
        with PartFile(path, identity, header, SIZE) as part:
            found = part.has("one", 4, 4)
            if write:
                part.write("one", 4, [ONE[:2], ONE[2:]])
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return found


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_that_was_cut_off_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    cut_off(path, write=True)
    assert files(tmp_path) == {".x.gguf.part", ".x.gguf.part.journal"}
    with PartFile(path, "a", HEADER, SIZE) as part:
        assert part.has("one", 4, 4)
        assert not part.has("two", 8, 4)
        assert part.write("two", 8, [TWO]) == 4
        part.finish()
    assert path.read_bytes() == b"head" + bytes(range(8))
    assert files(tmp_path) == {"x.gguf"}


def test_nothing_is_taken_from_other_work_damaged_bytes_or_a_torn_journal(tmp_path: Path) -> None:
    path, data, journal = (tmp_path / name for name in ("x.gguf", ".x.gguf.part", ".x.gguf.part.journal"))
    cut_off(path, write=True)
    assert not cut_off(path, identity="b")
    cut_off(path, write=True)
    assert not cut_off(path, header=b"HEAD")
    cut_off(path, write=True)
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    assert not cut_off(path)
    cut_off(path, write=True)
    lines = journal.read_text().splitlines()
    assert json.loads(lines[1])["tensor"] == "one"
    for text in (
        "",
        "{",
        lines[0][:9],
        lines[0] + "\n" + lines[1][:20],
        "[]\n1",
        lines[0] + "\n[]\n" + '{"tensor": 1}',
    ):
        journal.write_text(text)
        assert not cut_off(path)
    cut_off(path, write=True)
    data.unlink()
    assert not cut_off(path)


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield ONE[:2]
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"), PartFile(tmp_path / "x.gguf", "a", HEADER, SIZE) as part:
        part.write("one", 4, broken())
    assert not files(tmp_path)
