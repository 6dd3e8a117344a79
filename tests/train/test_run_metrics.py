"""metrics.jsonl: whatever a kill leaves of it, the rows that were written are read."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import TrainingError
from puna.train.runs.metrics import append_metrics, curve, cut_metrics, read_metrics

VALUES = st.floats() | st.integers(-(1 << 62), 1 << 62)
ROWS = st.dictionaries(st.integers(0, 1 << 50), st.dictionaries(st.text(max_size=6), VALUES, max_size=3), max_size=5)


def same(a: float, b: float) -> bool:
    return a == b or (not math.isfinite(a) and math.isnan(b))


@settings(deadline=None)
@given(ROWS, st.data())
def test_rows_survive_storage_and_a_torn_end(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[int, dict[str, float]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    written = [{**numbers, "step": step} for step, numbers in sorted(rows.items())]
    ends = [0]
    for row in written:
        append_metrics(path, row)
        ends.append(path.stat().st_size)
    whole = path.read_bytes() if written else b""
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    read = read_metrics(path)
    assert len(read) == sum(end <= cut for end in ends) - 1
    for row, back in zip(written, read, strict=False):
        assert row.keys() == back.keys()
        assert all(same(value, back[name]) for name, value in row.items())


def test_going_on_cuts_the_steps_to_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    cut_metrics(path, 3)
    assert path.read_text().count("\n") == 2
    append_metrics(path, {"step": 3, "loss": 2.5})
    assert curve(read_metrics(path), "loss") == [(1, 3), (3, 2.5)]
    cut_metrics(path, 0)
    assert path.read_bytes() == b""


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "{}", '{"step": -1}', '{"step": 1.5}', '{"step": true}', '{"step": 2, "loss": "1"}', "\xff"]
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'.encode("latin-1"))
    with pytest.raises(TrainingError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        read_metrics(path)


def test_steps_that_go_back_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 2}\n')
    with pytest.raises(TrainingError, match="line 2"):
        read_metrics(path)
