"""The native encoders give the numpy encoders' bytes, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import CheckpointError
from puna.tensor import QUANT_TYPES

native_ops = pytest.importorskip("puna.ops.native_ops", reason="the native extension was not built")
_native = pytest.importorskip("puna._native")

ISAS = _native.instruction_sets()
TYPES = [name for name, kind in QUANT_TYPES.items() if kind.block_size > 1 and kind.can_encode]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", TYPES)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 5), seed=st.integers(0, 2**32), weighted=st.booleans())
@settings(max_examples=12, deadline=None)
def test_the_same_bytes(isa: str, name: str, rows: int, blocks: int, seed: int, weighted: bool) -> None:
    kind = QUANT_TYPES[name]
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, (rows, blocks * kind.block_size)).astype(np.float32)
    x *= np.float32(10.0) ** rng.integers(-4, 3, (rows, 1))
    x[rng.integers(rows)] = 0
    x[rng.integers(rows), ::2] = 0.5
    x[rng.integers(rows), : kind.block_size] = -5
    importance = (rng.random(x.shape[1]) ** 2).astype(np.float32) if weighted else None
    if importance is not None:
        importance[::7] = 0
    encoded = native_ops.NativeOps(2, isa).encode(kind, x, importance)
    np.testing.assert_array_equal(encoded, kind.encode(x, importance))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_refuses_what_the_numpy_encoder_refuses(name: str, bad: float) -> None:
    values = np.ones((3, 512), np.float32)
    values[2, 300] = bad
    with pytest.raises(CheckpointError, match="float16"):
        native_ops.NativeOps(2).encode(QUANT_TYPES[name], values)


def test_types_that_only_numpy_encodes() -> None:
    x = np.ones((2, 256), np.float32)
    ops = native_ops.NativeOps(1)
    np.testing.assert_array_equal(ops.encode(QUANT_TYPES["BF16"], x), QUANT_TYPES["BF16"].encode(x))
    with pytest.raises(CheckpointError, match="Q8_K can be read but not written"):
        ops.encode(QUANT_TYPES["Q8_K"], x)
