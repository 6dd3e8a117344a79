"""From any weights format to any other."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from puna.checkpoint.checkpoint import open_checkpoint, save_checkpoint
from puna.errors import CheckpointError
from puna.tensor import Weight

Progress = Callable[[str, int, int], None]


def convert(
    source: str | Path,
    destination: str | Path,
    format_name: str | None = None,
    weight_type: str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> None:
    """Read ``source`` and write ``destination``, which appears whole or not at all.

    Without ``format_name``, a destination ending in .gguf is GGUF, any other a safetensors folder. ``weight_type``
    re-encodes the matrices. ``progress`` is called with a tensor's name, how many came before it, and how many there are.
    Raises CheckpointError when the destination exists and ``overwrite`` is false.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    format_name = format_name or ("gguf" if destination.suffix == ".gguf" else "safetensors")
    if destination.exists():
        if not overwrite:
            raise CheckpointError(f"{destination} exists already; choose another name or ask to overwrite it")
        if _overlap(source, destination):
            raise CheckpointError(f"{destination} holds what is being converted; choose another name")
    checkpoint = open_checkpoint(source)
    if progress:
        checkpoint = replace(checkpoint, tensors=_Watched(checkpoint.tensors, progress))
    if not destination.exists():
        save_checkpoint(checkpoint, destination, format_name, weight_type)
        return
    # Written in full before the old one is touched.
    fresh = destination.with_name(f".{destination.name}.{uuid4().hex[:8]}.new{destination.suffix}")
    try:
        save_checkpoint(checkpoint, fresh, format_name, weight_type)
        _replace(fresh, destination)
    finally:
        _remove(fresh)


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

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _overlap(source: Path, destination: Path) -> bool:
    source, destination = source.resolve(), destination.resolve()
    return source == destination or destination in source.parents


def _replace(fresh: Path, destination: Path) -> None:
    """Put ``fresh`` in the place of what is there. Folders cannot be exchanged at once, so the old one steps aside."""
    try:
        old = destination.with_name(f".{destination.name}.{uuid4().hex[:8]}.old")
        destination.rename(old)
        fresh.rename(destination)
        _remove(old)
    except OSError as error:
        raise CheckpointError(f"cannot replace {destination}: {error}") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
