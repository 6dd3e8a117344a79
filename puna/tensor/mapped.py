"""Memory-mapped files behind arrays."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


def drop_mapped_pages(data: NDArray[np.uint8]) -> bool:
    """Tell the system that these pages of a mapped file are not needed soon. False when no file is behind them."""
    owner: Any = data
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap):
        return False
    if hasattr(mmap, "MADV_DONTNEED"):
        start = data.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # pages that lie wholly within
        length = (start + data.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            owner.madvise(mmap.MADV_DONTNEED, first, length)
    return True
