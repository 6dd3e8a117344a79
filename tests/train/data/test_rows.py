"""Files of rows: every form gives the same rows, errors name the line, hostile files do no harm."""

import csv
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import DataError
from puna.train.data import json_array
from puna.train.data.files import open_rows
from puna.train.data.rows import Rows

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=8)
HARMLESS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BLANKS = ["", "\n", "\r\n", " \n \n"]


def read(rows: Rows) -> list[dict[str, Any]]:
    return [rows[number] for number in range(len(rows))]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@HARMLESS
@given(rows=ROWS, blank=st.sampled_from(BLANKS), escape=st.booleans(), bom=st.booleans())
def test_jsonl_comes_back(rows: list[dict[str, Any]], blank: str, escape: bool, bom: bool, tmp_path: Path) -> None:
    text = "".join(json.dumps(row, ensure_ascii=escape) + "\n" + blank for row in rows)
    data = text.encode("utf-8", "surrogatepass") if escape else text.encode("utf-8", "replace")
    data = b"\xef\xbb\xbf" * bom + data
    expected = [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    assert read(open_rows(written(tmp_path / "a.jsonl", data))) == expected
    assert read(open_rows(written(tmp_path / "a.jsonl.gz", gzip.compress(data)))) == expected


@HARMLESS
@given(rows=ROWS, indent=st.sampled_from([None, 0, 2]), blank=st.sampled_from(BLANKS), chunk=st.integers(1, 40))
def test_a_json_list_comes_back_with_lines(
    rows: list[dict[str, Any]],
    indent: int | None,
    blank: str,
    chunk: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    text = blank + json.dumps(rows, indent=indent) + blank
    opened = open_rows(written(tmp_path / "a.json", text.encode()))
    assert read(opened) == rows
    # The line of a row is the line where its brace stands.
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    for number in range(len(rows)):
        at = text.index("{", at)
        assert opened.where(number) == f"a.json:{text.count(chr(10), 0, at) + 1}"
        at = decoder.raw_decode(text, at)[1]


@HARMLESS
@given(cut=st.integers(0, 200), chunk=st.integers(1, 64))
def test_a_cut_list_is_refused_with_its_line(
    cut: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    whole = json.dumps([{"text": "é" * 5, "n": [1, {"a": -1.5e3}]}] * 3, indent=1, ensure_ascii=False)
    part = whole.encode()[: min(cut, len(whole.encode()) - 1)]
    if part.strip():
        with pytest.raises(DataError, match=r"a\.json"):
            open_rows(written(tmp_path / "a.json", part))


@HARMLESS
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".jsonl.gz"]))
def test_any_bytes_are_rows_or_an_error(data: bytes, suffix: str, tmp_path: Path) -> None:
    name = f"a{suffix}"
    rows = or_error(lambda: open_rows(written(tmp_path / name, data)))
    if isinstance(rows, DataError):
        assert str(rows).startswith(name)
        return
    for number in range(len(rows)):
        row = or_error(lambda number=number: rows[number])
        assert str(row).startswith(f"{name}:") if isinstance(row, DataError) else isinstance(row, dict)


def or_error(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except DataError as error:
        return error


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"))


@HARMLESS
@given(records=st.lists(st.lists(CELL.filter(lambda text: bool(text.strip())), min_size=2, max_size=2), max_size=6))
def test_csv_comes_back(records: list[list[str]], tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "completion"], *records])
    assert [list(row.values()) for row in read(open_rows(path))] == records


def test_csv_names_lines_and_keeps_line_breaks(tmp_path: Path) -> None:
    data = b'a,b\r\n"one\r\n\r\ntwo\x0bthree",2\r\n3,4\r\n5\r\n'
    rows = open_rows(written(tmp_path / "a.csv", data))
    assert rows[0] == {"a": "one\r\n\r\ntwo\x0bthree", "b": "2"}
    assert (rows.where(0), rows.where(1)) == ("a.csv:2", "a.csv:5")
    assert rows[1] == {"a": "3", "b": "4"}
    with pytest.raises(DataError, match=r"a\.csv:6: the record has 1 fields, the first line names 2"):
        rows[2]
    with pytest.raises(DataError, match="name the fields"):
        open_rows(written(tmp_path / "b.csv", b"a,a\n1,2\n"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: the row is not JSON.*character"),
        (b'\n\n[1]\n{"a": 1}', r"a\.jsonl:3: the row must be an object.*found list"),
        (b'{"a": "\xff"}\n', r"a\.jsonl:1: byte 8 is not UTF-8"),
        (b"[" * 100_000, r"a\.jsonl:1: the row is not usable JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: the row is not usable JSON"),
    ],
)
def test_a_bad_line_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    rows = open_rows(written(tmp_path / "a.jsonl", data))
    with pytest.raises(DataError, match=message):
        read(rows)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_rows(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="suffix"):
        open_rows(written(tmp_path / "a.bin", b""))
    with pytest.raises(DataError, match="damaged gzip"):
        open_rows(written(tmp_path / "a.jsonl.gz", gzip.compress(b"{}" * 99)[:-9]))
    with pytest.raises(DataError, match="after the end"):
        open_rows(written(tmp_path / "a.json", b"[{}] 1"))


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.train.data.text_files.MAX_ROW", 100)
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line is longer"):
        open_rows(written(tmp_path / "a.jsonl", b'{"a": 1}\n' + b"x" * 200))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz"])
def test_a_large_file_is_not_held_in_memory(suffix: str, tmp_path: Path) -> None:
    row = {"text": "x" * 40_000}
    lines = {".csv": ["text", *[row["text"]] * 500], ".json": [json.dumps([row] * 500)]}
    data = "\n".join(lines.get(suffix, [json.dumps(row)] * 500)).encode()
    path = written(tmp_path / f"a{suffix}", gzip.compress(data, 1) if suffix.endswith(".gz") else data)
    tracemalloc.start()
    try:
        rows = open_rows(path)
        assert len(rows) == 500
        assert rows[499] == row
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20 < len(data)


class TestArrow:
    """What pyarrow wrote, in the layout of datasets' save_to_disk."""

    ROWS = ({"text": "a", "n": None}, {"text": "b", "n": {"x": [1, 2], "y": None}}, {"text": "c", "n": None})
    EXPECTED = ({"text": "a"}, {"text": "b", "n": {"x": [1, 2]}}, {"text": "c"})

    @pytest.fixture
    def table(self) -> Any:
        return pytest.importorskip("pyarrow").Table.from_pylist(list(self.ROWS))

    def test_parquet(self, table: Any, tmp_path: Path) -> None:
        import pyarrow.parquet as parquet

        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        rows = open_rows(tmp_path / "a.parquet")
        assert read(rows) == list(self.EXPECTED)
        assert rows.where(1) == "a.parquet: row 2"

    def save(self, table: Any, folder: Path) -> None:
        import pyarrow as pa

        folder.mkdir()
        names = []
        for number, part in enumerate((table.slice(0, 1), table.slice(1))):
            names.append({"filename": f"data-{number:05}-of-00002.arrow"})
            with pa.ipc.new_stream(str(folder / names[-1]["filename"]), part.schema) as stream:
                stream.write_table(part)
        (folder / "state.json").write_text(json.dumps({"_data_files": names}))
        (folder / "dataset_info.json").write_text("{}")

    def test_a_saved_dataset(self, table: Any, tmp_path: Path) -> None:
        self.save(table, tmp_path / "set")
        assert read(open_rows(tmp_path / "set")) == list(self.EXPECTED)
        (tmp_path / "sets").mkdir()
        (tmp_path / "sets" / "dataset_dict.json").write_text('{"splits": ["train"]}')
        self.save(table, tmp_path / "sets" / "train")
        assert read(open_rows(tmp_path / "sets")) == list(self.EXPECTED)
        (tmp_path / "sets" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        with pytest.raises(DataError, match="splits train, test"):
            open_rows(tmp_path / "sets")

    @pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": [{"filename": "../a.arrow"}]}'])
    def test_a_folder_that_is_none(self, state: str, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow")
        (tmp_path / "state.json").write_text(state)
        with pytest.raises(DataError):
            open_rows(tmp_path)

    @pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
    def test_a_damaged_file(self, name: str, table: Any, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be read"):
            open_rows(written(tmp_path / name, b"PAR1 or so"))
