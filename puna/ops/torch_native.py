"""The native kernels of training (csrc/training.cpp), run on the threads that torch has already.

A second team of threads would wait for cores on which the first one spins. So only GNU's OpenMP runtime will do, which
torch brings on Linux; elsewhere torch's own operators are used.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def training_kernels(x: Tensor) -> Any:
    """The _native.Native for numbers as those of ``x``; None where it has no kernels for them."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or not x.numel():
        return None
    return _native(torch.get_num_threads())


def array(x: Tensor) -> Tensor:
    """The numbers as the kernels take them: contiguous, bfloat16 as uint16. What is contiguous is not copied.

    No numpy array is made of it, for that would fix the size of the tensor's memory, which sharding lets go of.
    """
    x = x.detach().contiguous()
    return x.view(torch.uint16) if x.dtype == torch.bfloat16 else x


@lru_cache(maxsize=1)
def _native(threads: int) -> Any:
    team = _openmp_team()
    if team is None or find_spec("puna._native") is None:
        return None
    from puna._native import Native
    from puna.ops.native_ops import instruction_set

    return Native(threads, instruction_set(), team)


def _openmp_team() -> int | None:
    """The address of GOMP_parallel in the runtime that torch has loaded."""
    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value
    return None
