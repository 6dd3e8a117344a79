"""Where reports are kept: in the manifest of a stored model, beside the file or folder of any other."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePath

from puna.checkpoint import Checkpoint
from puna.checkpoint.atomic import atomic_path
from puna.errors import StoreError
from puna.evaluate.report import Report
from puna.evaluate.sides import stored_bytes, tensor_types
from puna.store import ResolvedModel, Store

SUFFIX = ".report.json"


def report_beside(path: Path) -> Path:
    """Where the report of a model outside the store lies, or would."""
    path = path.expanduser().absolute()
    return path.with_name(path.name + SUFFIX)


def save_report(report: Report, path: Path) -> Path:
    """Write the report of the file or folder at ``path`` beside it. Raises CheckpointError when the disk refuses."""
    place = report_beside(path)
    with atomic_path(place) as fresh:
        fresh.write_text(json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return place


def forget_report(path: Path) -> None:
    """Remove the report of what was at ``path`` before."""
    with suppress(OSError):
        report_beside(path).unlink()


def load_report(found: ResolvedModel, checkpoint: Checkpoint) -> Report | None:
    """The report of a model; None where there is none, or where it is of other weights than are there now.

    A damaged one is none, with a warning.
    """
    manifest = found.manifest
    try:
        if manifest is None:
            report = _read(report_beside(found.path))
        elif manifest.report is None:
            report = None
        else:
            report = Report.from_json(manifest.report, f"the manifest of {manifest.model_name}")
    except StoreError as error:
        warnings.warn(str(error), stacklevel=2)
        return None
    here = stored_bytes(found.path, checkpoint), tensor_types(checkpoint)
    return report if report and (report.derived.bytes, report.derived.types) == here else None


def siblings(report: Report, folder: Path, store: Store | None = None) -> list[Report]:
    """The reports of other models made of the same source, measured on the same text.

    They come from the store and from beside the files in ``folder``; a damaged one is passed over.
    """
    same = {
        _key(other): other
        for other in (*_stored(store or Store()), *_in(folder))
        if other.source_identity == report.source_identity and other.text == report.text
    }
    same.pop(_key(report), None)
    return list(same.values())


def _key(report: Report) -> tuple[str, int]:
    """Equal for the report of a file and that of the stored model it became."""
    return PurePath(report.derived.name).name, report.derived.bytes


def _stored(store: Store) -> Iterator[Report]:
    for manifest in store.models():
        if manifest.report is not None:
            try:
                yield Report.from_json(manifest.report, str(manifest.model_name))
            except StoreError:
                continue


def _in(folder: Path) -> Iterator[Report]:
    for path in sorted(folder.glob("*" + SUFFIX)):
        try:
            report = _read(path)
        except StoreError:
            continue
        if report is not None:
            yield report


def _read(path: Path) -> Report | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise StoreError(f"{path} is not valid JSON; measure the model again") from None
    return Report.from_json(raw, str(path))
