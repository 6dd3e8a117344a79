"""Rows of Parquet and Arrow files, and of folders that Hugging Face's ``datasets`` saved. Needs pyarrow.

The folder's layout: ``datasets``' ``save_to_disk``, whose ``state.json`` names the Arrow streams in order.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from puna.errors import DataError
from puna.train.data.rows import Row, Rows


def open_arrow(path: Path) -> Rows:
    """Open a ``.parquet`` or ``.arrow`` file, or a saved folder. Raises DataError."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{path.name} is read with pyarrow, which is not installed; pip install 'puna[data]'") from None
    try:
        if path.is_dir():
            tables = [_mapped(pa, file) for file in _files_of(path)]
        else:
            tables = [_spooled(pa, path) if path.suffix.lower() == ".parquet" else _mapped(pa, path)]
        return ArrowRows(path, pa.concat_tables(tables))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path.name} cannot be read: {str(error).splitlines()[0]}") from None


class ArrowRows:
    """Rows of a table that lies on disk, mapped into memory."""

    def __init__(self, path: Path, table: Any) -> None:
        self.path = path
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, number: int) -> Row:
        # A column that a row lacks is null in a table.
        try:
            (row,) = self._table.slice(number, 1).to_pylist()
        except (ValueError, ArithmeticError) as error:
            raise DataError(f"{self.where(number)}: the row cannot be read: {error}") from None
        return {name: _plain(value) for name, value in row.items() if value is not None}

    def where(self, number: int) -> str:
        return f"{self.path.name}: row {number + 1}"


def _plain(value: Any) -> Any:
    """Without the nulls that tables put where a row of JSON has no field."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _mapped(pa: Any, path: Path) -> Any:
    """The table of an Arrow file, in its stream or its file form."""
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source).read_all()


def _spooled(pa: Any, path: Path) -> Any:
    """Parquet can only be decoded in large pieces, so rows in random order need it unpacked, which a file holds."""
    import pyarrow.parquet as parquet

    source = parquet.ParquetFile(path)
    with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
        with pa.ipc.new_stream(file, source.schema_arrow) as stream:
            for batch in source.iter_batches(1024):
                stream.write_batch(batch)
        file.flush()
        return _mapped(pa, Path(file.name))


def _files_of(folder: Path) -> list[Path]:
    splits = _read_json(folder / "dataset_dict.json")
    if splits is not None:
        names = splits.get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{folder.name}/dataset_dict.json must list the splits")
        if len(names) != 1:
            raise DataError(
                f"{folder.name} holds the splits {', '.join(names)}; give one of them, as {folder / 'train'}"
            )
        return _files_of(_inside(folder, names[0]))
    state = _read_json(folder / "state.json")
    listed = None if state is None else state.get("_data_files")
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{folder.name} is no saved dataset: it has no state.json that names its files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{folder.name}/state.json must name each data file by its filename")
    return [_inside(folder, name) for name in names]


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", ".", ".."):
        raise DataError(f"{folder.name} names {name!r}, which is not in the folder itself")
    return folder / name


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{path.parent.name}/{path.name} is not readable JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path.parent.name}/{path.name} must hold an object")
    return found
