"""The layers of a folder in the making that are finished, kept beside it, so that a run that was killed continues."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint.atomic import atomic_folder
from puna.checkpoint.safetensors import StoredTensor, map_safetensors, write_stored
from puna.errors import CheckpointError
from puna.store.lock import file_lock
from puna.tensor.groupwise import Grouped

Arrays = Mapping[str, NDArray[np.float32]]
Layer = tuple[Mapping[str, Grouped], Arrays]

_FILE = "model.safetensors"


class LayerJournal:
    """A folder ``.NAME.layers`` with one of each finished layer; ``identity`` differs wherever their numbers would.

    Use as a context: an exception removes it, being killed or interrupted (Ctrl-C) leaves it to be continued.
    ``finish`` removes it. Raises CheckpointError while another process writes the same, and when the disk refuses.
    """

    def __init__(self, destination: Path, identity: str) -> None:
        self._destination = destination.absolute()
        self._folder = self._destination.with_name(f".{destination.name}.layers")
        self._own = self._folder / sha256(identity.encode()).hexdigest()
        self._stack = ExitStack()

    def __enter__(self) -> LayerJournal:
        def busy() -> None:
            raise CheckpointError(f"another process is writing {self._destination}")

        try:
            lock = self._destination.with_name(f".{self._destination.name}.lock")
            self._stack.enter_context(file_lock(lock, busy, discard=True))
            if not self._own.is_dir():
                self.finish()  # what is there is of other work
                self._own.mkdir(parents=True)
        except OSError as error:
            self._stack.close()
            raise CheckpointError(f"cannot write {self._destination}: {error}") from error
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, Exception):
            self.finish()
        self._stack.close()

    def finish(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def save(self, layer: int, matrices: Mapping[str, Grouped], changed: Arrays) -> Layer:
        """Keep what became of a layer: its quantized linears, and other tensors that changed, by name.

        Returns the same, mapped from its file, so that no more than a layer need be in memory.
        """
        arrays: dict[str, NDArray[Any]] = {f"changed {name}": values for name, values in changed.items()}
        for name, matrix in matrices.items():
            arrays |= {
                f"codes {name}": matrix.codes,
                f"scales {name}": matrix.scales,
                f"zeros {name}": matrix.zeros.astype("<i4"),
                f"groups {name}": matrix.groups.astype("<i8"),
                f"bits {name}": np.array([matrix.bits], "<i4"),
            }
        with atomic_folder(self._place(layer)) as folder:
            write_stored(folder, arrays, (StoredTensor.from_array(name, array) for name, array in arrays.items()))
        return self._read(layer)

    def load(self, layer: int) -> Layer | None:
        """What ``save`` returned; None where that layer is not finished."""
        return self._read(layer) if (self._place(layer) / _FILE).exists() else None

    def _read(self, layer: int) -> Layer:
        arrays = {name: tensor.array() for name, tensor in map_safetensors(self._place(layer) / _FILE).items()}
        matrices = {
            name: Grouped(
                arrays[f"codes {name}"],
                arrays[f"scales {name}"],
                arrays[f"zeros {name}"].astype(np.int16),
                arrays[f"groups {name}"].astype(np.intp),
                int(arrays[f"bits {name}"][0]),
            )
            for name in _named(arrays, "codes")
        }
        return matrices, {name: arrays[f"changed {name}"] for name in _named(arrays, "changed")}

    def _place(self, layer: int) -> Path:
        return self._own / f"layer-{layer}"


def _named(arrays: Mapping[str, Any], kind: str) -> Iterator[str]:
    return (name.removeprefix(f"{kind} ") for name in arrays if name.startswith(f"{kind} "))
