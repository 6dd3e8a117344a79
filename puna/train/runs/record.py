"""What ``run.json`` says of a training run, as typed values that a damaged file cannot give."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from puna.errors import TrainingError

SCHEMA = 1
STATUSES = ("running", "finished", "failed")


@dataclass(frozen=True)
class DataFacts:
    """One data set of a run. ``digest`` is of what its rows say; ``held_out`` of the ``rows`` are not trained on.

    ``tokens`` are those of the trained rows, of which ``trained_tokens`` have a loss; None until they are counted.
    """

    name: str
    digest: str
    rows: int
    held_out: int = 0
    tokens: int | None = None
    trained_tokens: int | None = None


@dataclass(frozen=True)
class RunInputs:
    """What a run is made from beside its recipe, and what people know it by.

    ``name`` is what the user calls the result, ``model`` the parent, whose weights have ``model_digest``; ``objective``
    and ``method`` as the field says them (sft, dpo …; full, lora …); ``steps`` are those planned; ``device`` is cpu, or
    the name of the accelerator.
    """

    name: str
    model: str
    model_digest: str
    objective: str
    method: str
    seed: int
    steps: int
    data: tuple[DataFacts, ...]
    device: str = "cpu"


@dataclass(frozen=True)
class Sample:
    """An answer to a held-out prompt; ``wanted`` is what the data says there, where it says one."""

    prompt: str
    answer: str
    wanted: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What the model makes of the held-out rows: numbers by name (``loss`` in nats a token), and sample answers."""

    numbers: Mapping[str, float]
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Start:
    """One start of the program on a run, the first or a resumption: when (UTC, ISO 8601), and on what."""

    time: str
    versions: Mapping[str, str]
    platform: str
    cpu: str
    cores: int


@dataclass(frozen=True)
class RunRecord:
    """Everything but the recipe and the metrics. ``error`` is the sentence that a failed run ended with, ``result``
    where the trained model is, ``ended`` when (UTC, ISO 8601)."""

    inputs: RunInputs
    starts: tuple[Start, ...]
    status: str = "running"
    error: str | None = None
    result: str | None = None
    ended: str | None = None
    parameters: int | None = None
    trained_parameters: int | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None

    def as_json(self) -> dict[str, Any]:
        """As JSON values; a number that is not finite becomes null."""
        values: dict[str, Any] = storable({"schema": SCHEMA, **asdict(self)})
        return values

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> RunRecord:
        """Read what ``as_json`` gave; ``where`` names it in errors. Raises TrainingError when it is something else."""
        if raw.get("schema") != SCHEMA:
            raise TrainingError(
                f"{where} describes a run in schema {raw.get('schema')!r:.40}, not {SCHEMA}; use the Puna that wrote it"
            )
        facts = {key: value for key, value in raw.items() if key != "schema"}
        record: RunRecord = _decode(cls, facts, where, "the record")
        if record.status not in STATUSES:
            raise _damaged(where, "status")
        if not record.starts:
            raise _damaged(where, "starts")
        return record


def storable(value: Any) -> Any:
    """JSON values without what a file cannot hold: numbers that are not finite are null, lone surrogates ``?``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {storable(key): storable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(inner) for inner in value]
    return value


def _decode(kind: Any, raw: Any, where: str, key: str) -> Any:
    """``raw`` as ``kind`` says: a dataclass, str, int, float, T | None, tuple[T, ...] or Mapping[str, T]."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(raw, dict) or raw.keys() != hints.keys():
            raise _damaged(where, key)
        return kind(**{name: _decode(hint, raw[name], where, name) for name, hint in hints.items()})  # type: ignore[operator]
    origin = get_origin(kind)
    if origin is types.UnionType:
        return None if raw is None else _decode(get_args(kind)[0], raw, where, key)
    if origin is tuple and isinstance(raw, list):
        return tuple(_decode(get_args(kind)[0], item, where, key) for item in raw)
    if origin is Mapping and isinstance(raw, dict):
        return {name: _decode(get_args(kind)[1], value, where, key) for name, value in raw.items()}
    if kind is float and raw is None:
        return math.nan
    if kind is float and isinstance(raw, float):
        return raw
    if kind in (int, float) and isinstance(raw, int) and not isinstance(raw, bool) and abs(raw) < 1 << 63:
        return kind(raw)
    if kind is str and isinstance(raw, str):
        return raw
    raise _damaged(where, key)


def _damaged(where: str, key: str) -> TrainingError:
    return TrainingError(f"{where} is damaged: unexpected {key}; remove the run's folder, or restore the file")
