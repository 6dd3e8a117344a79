"""From any weights format to any other."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from puna.checkpoint.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from puna.errors import CheckpointError
from puna.tensor import Weight

Progress = Callable[[str, int, int], None]

# What only a folder of a model or an adapter holds.
_MARKS = ("config.json", "params.json", "adapter_config.json")


def convert(
    source: str | Path,
    destination: str | Path,
    format_name: str | None = None,
    weight_type: str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Read ``source`` and write ``destination``, which appears whole or not at all.

    Without ``format_name``, a destination ending in .gguf is GGUF, any other a safetensors folder. ``weight_type``
    re-encodes the matrices. ``progress`` is called with a tensor's name, how many came before it, and how many there
    are in all. ``check`` gets the finished file or folder before it takes its name; when it raises, nothing is left.
    Raises CheckpointError when the destination exists and ``overwrite`` is false.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    check_destination(source, destination, overwrite)
    checkpoint = open_checkpoint(source)
    convert_checkpoint(checkpoint, source, destination, format_name, weight_type, progress, overwrite, check)


def convert_checkpoint(
    checkpoint: Checkpoint,
    source: Path,
    destination: Path,
    format_name: str | None = None,
    weight_type: str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """As ``convert``, of a model that is open; ``source`` is where its files lie, which are not overwritten."""
    destination = destination.expanduser()
    format_name = format_name or ("gguf" if destination.suffix == ".gguf" else "safetensors")
    check_destination(source, destination, overwrite)
    if progress:
        checkpoint = replace(checkpoint, tensors=_Watched(checkpoint.tensors, progress))
    put(destination, lambda path: save_checkpoint(checkpoint, path, format_name, weight_type), check)


def check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Raise CheckpointError when something is there that must not be replaced."""
    if _is_occupied(destination):
        _check_replaceable(source, destination, overwrite)


def put(destination: Path, write: Callable[[Path], None], check: Callable[[Path], None] | None = None) -> None:
    """Have a model written to ``destination``, in the place of a folder that is there.

    ``check`` gets the finished file or folder before it takes its name; when it raises, nothing is left. Raises
    CheckpointError.
    """

    def write_checked(path: Path) -> None:
        write(path)
        if check:
            check(path)

    if destination.is_dir() and _is_occupied(destination):
        _replace_folder(destination, write_checked)
    elif check is None:
        write(destination)
    else:
        _place_checked(destination, write_checked)


def _place_checked(destination: Path, write: Callable[[Path], None]) -> None:
    fresh = destination.with_name(f".{destination.name}.{uuid4().hex[:8]}.new")
    try:
        write(fresh)
        fresh.replace(destination)
    except OSError as error:
        raise CheckpointError(f"cannot write {destination}: {error}") from error
    finally:
        if fresh.is_dir():
            shutil.rmtree(fresh, ignore_errors=True)
        fresh.unlink(missing_ok=True)


def _is_occupied(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


class _Watched(Mapping[str, Weight]):
    """Tells ``progress`` of each tensor as the writer asks for it."""

    def __init__(self, tensors: Mapping[str, Weight], progress: Progress) -> None:
        self._tensors = tensors
        self._progress = progress
        self._seen: dict[str, None] = {}

    def __getitem__(self, name: str) -> Weight:
        if name not in self._seen:
            self._progress(name, len(self._seen), len(self._tensors))
            self._seen[name] = None
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _check_replaceable(source: Path, destination: Path, overwrite: bool) -> None:
    if not overwrite:
        raise CheckpointError(f"{destination} exists already; choose another name, or overwrite it (--force)")
    resolved = source.resolve()
    if destination.resolve() in (resolved, *resolved.parents):
        raise CheckpointError(f"{destination} holds what is being converted; choose another name")
    if destination.is_dir() and not any((destination / name).exists() for name in _MARKS):
        raise CheckpointError(f"{destination} is a folder, but of no model or adapter; it will not be overwritten")


def _replace_folder(destination: Path, write: Callable[[Path], None]) -> None:
    """Put a new folder in the place of an old one. Folders cannot be exchanged at once, so the old one steps aside."""
    unique = uuid4().hex[:8]
    fresh, old = (destination.with_name(f".{destination.name}.{unique}.{role}") for role in ("new", "old"))
    try:
        write(fresh)
        destination.rename(old)
        fresh.rename(destination)
    except OSError as error:
        raise CheckpointError(f"cannot replace {destination}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if destination.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.rename(destination)
