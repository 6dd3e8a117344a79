"""Which weights a model has, told without reading all of them."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

from puna.store.resolve import ResolvedModel

SAMPLES, SAMPLE_BYTES = 16, 1 << 16


def model_identity(found: ResolvedModel) -> str:
    """A text that differs where the weights do: the digest of a stored model's content.

    For a path, a digest of the names, sizes, times of change and samples of its files. The parts of a split file count,
    and the samples tell apart models that were unpacked with one name, size and time.
    """
    if found.manifest is not None:
        return found.manifest.content_digest
    path = found.path
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file()]
    else:
        files = [file for file in path.parent.iterdir() if _without_digits(file) == _without_digits(path)]
    digest = sha256()
    for file in sorted(files):
        status = file.stat()
        digest.update(f"{file.name}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
        with file.open("rb") as content:
            for i in range(SAMPLES):
                content.seek(max(0, status.st_size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _without_digits(path: Path) -> str:
    return re.sub(r"\d+", "#", path.name)
