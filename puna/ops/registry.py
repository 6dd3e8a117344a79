"""Which implementation of the ops to use."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec

from puna.errors import RequestError
from puna.ops.protocol import Ops

OPS: dict[str, str] = {
    "native": "puna.ops.native_ops:NativeOps",
    "reference": "puna.ops.reference:ReferenceOps",
    "torch": "puna.ops.torch_ops:TorchOps",
}
MAX_THREADS = 1024


def make_ops(name: str | None = None, threads: int | None = None) -> Ops:
    """The ops of that name; by default the native ones, or, with a warning, the reference where they were not built.

    ``threads`` defaults to the physical cores this process may use. Raises RequestError for an unknown name, and for
    an impossible number of threads.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise RequestError(f"threads must be from 1 to {MAX_THREADS}, found {threads}")
    if name is None:
        try:
            return make_ops("native", threads)
        except ImportError as error:
            reason = f"does not load ({error})" if find_spec("puna._native") else "was not built"
            warnings.warn(
                f"Puna's native extension {reason}; running on the slow reference ops. "
                "Install a C++ compiler and reinstall puna for full speed.",
                stacklevel=2,
            )
            name = "reference"
    if name not in OPS:
        raise RequestError(f"unknown ops {name!r}; known: {', '.join(OPS)}")
    if name == "torch" and find_spec("torch") is None:
        raise RequestError("the ops 'torch' need PyTorch, which is not installed; pip install 'puna[torch]'")
    module, attribute = OPS[name].split(":")
    implementation = getattr(import_module(module), attribute)
    ops: Ops = implementation(threads) if name == "native" else implementation()
    return ops
