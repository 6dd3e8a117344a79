"""Whatever happens while writing, the name shows the old contents or the new, and no litter stays."""

from pathlib import Path

import pytest

from puna.checkpoint.atomic import atomic_folder, atomic_path
from puna.errors import CheckpointError


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model.bin"
    with atomic_path(target) as path:
        path.write_bytes(b"half")
        assert not target.exists()
        path.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    target.write_bytes(b"old")

    def interrupted() -> None:
        with atomic_path(target) as path:
            path.write_bytes(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    target.write_bytes(b"old")
    with atomic_path(target) as path:
        path.write_bytes(b"new")
    assert target.read_bytes() == b"new"


def test_a_refusing_disk_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot write"), atomic_path(tmp_path / "file" / "model.bin") as path:
        path.write_bytes(b"")


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "config.json").write_text("{}")
        assert not target.exists()
    assert (target / "inner" / "config.json").read_text() == "{}"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> None:
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "config.json").write_text("{}")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        failing()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(CheckpointError, match="exists already"), atomic_folder(target):
        pass
    assert (target / "a").read_text() == "1"
