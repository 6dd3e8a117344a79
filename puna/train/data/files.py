"""Files of training data, of whatever form."""

from __future__ import annotations

from pathlib import Path

from puna.errors import DataError
from puna.train.data.arrow import open_arrow
from puna.train.data.rows import Rows
from puna.train.data.text_files import open_text


def open_rows(path: str | Path) -> Rows:
    """The rows of ``.jsonl``, ``.json`` (a list, or a row a line), ``.csv``, ``.txt`` (a text a line), each also with
    ``.gz`` behind it, of ``.parquet`` and ``.arrow``, and of a folder that Hugging Face's ``save_to_disk`` wrote.

    Raises DataError when there is no such file, or it is of no such form.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist; give a file of rows, such as data.jsonl")
    try:
        if path.is_dir() or path.suffix.lower() in (".parquet", ".arrow"):
            return open_arrow(path)
        return open_text(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
