"""Arrays put aside on disk, so that two models need not be in memory at once."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from puna.errors import RequestError


class Tape:
    """float32 arrays, written one after another and then read in the same order; gone with this object.

    They lie in the system's folder for temporary files. Raises RequestError when that is full.
    """

    def __enter__(self) -> Tape:
        self._file = tempfile.TemporaryFile()
        self._shapes: list[tuple[int, ...]] = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk cannot take what is left, and nobody wants it
            self._file.close()

    def write(self, array: NDArray[np.float32]) -> None:
        try:
            self._file.write(np.ascontiguousarray(array, np.float32).data)
            self._file.flush()
        except OSError as error:
            raise RequestError(
                f"no room for what the first model computes in {tempfile.gettempdir()}: {error.strerror}; take fewer "
                "windows, or set TMPDIR to a folder with more room"
            ) from None
        self._shapes.append(array.shape)

    def rewind(self) -> None:
        """Begin to read."""
        self._file.seek(0)
        self._shapes.reverse()

    def read(self) -> NDArray[np.float32]:
        shape = self._shapes.pop()
        data = self._file.read(4 * int(np.prod(shape)))
        return np.frombuffer(data, np.float32).reshape(shape)
