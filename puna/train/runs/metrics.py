"""``metrics.jsonl``: the numbers of every step of a run, one JSON object a line, each step once.

Names that reports know: ``loss`` and ``validation_loss`` (nats), ``reward`` and ``validation_reward``,
``learning_rate``, ``gradient_norm``, ``tokens`` (of the step), ``tokens_per_second``, ``seconds`` (of the step),
``memory_bytes``. Any other name is kept and drawn too. ``time`` is when the line was written, in seconds since 1970.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from puna.checkpoint.atomic import atomic_path
from puna.errors import TrainingError
from puna.train.runs.record import storable

Row = dict[str, float]


def read_metrics(path: Path) -> list[Row]:
    """All rows, in order of their steps; none where there is no file. NaN where a number was not finite.

    A last line that a killed process left unfinished is passed over. Raises TrainingError for any other bad line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}") from None
    rows: list[Row] = []
    for number, line in enumerate(lines[:-1], start=1):  # behind the last newline is nothing, or a torn line
        row = _parse(line)
        if row is None or (rows and row["step"] <= rows[-1]["step"]):
            raise TrainingError(f"line {number} of {path} is damaged; restore the file, or remove it to go on without")
        rows.append(row)
    return rows


def cut_metrics(path: Path, step: int) -> None:
    """Keep only the rows before ``step``. Raises TrainingError or CheckpointError."""
    kept = [row for row in read_metrics(path) if row["step"] < step]
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(map(_line, kept)))


def append_metrics(path: Path, row: Row) -> None:
    """Write one more row. The system has it at once, so that a kill does not lose it. Raises TrainingError."""
    try:
        with path.open("ab") as file:
            file.write(_line(row))
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror}") from None


def curve(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """The steps that have a finite number of that name, and the number."""
    return [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def _line(row: Row) -> bytes:
    return json.dumps(storable(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> Row | None:
    """A row; None when the line is something else."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or not _is_step(raw.get("step")):
        return None
    row = {name: math.nan if value is None else value for name, value in raw.items()}
    return row if all(_is_number(value) for value in row.values()) else None


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)
