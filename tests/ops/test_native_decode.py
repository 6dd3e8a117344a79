"""The native decoder gives the numpy codecs' numbers, bit for bit."""

import numpy as np
import pytest
from kernel_reference import TYPES

from puna.tensor.types import QUANT_TYPES

native = pytest.importorskip("puna._native", reason="the native extension is not built")


@pytest.fixture(params=native.instruction_sets())
def ops(request):
    return native.Native(2, request.param)


def random_rows(kind, rows, columns, seed=0):
    """Any bytes at all: every code, scale, subnormal, infinity and NaN."""
    return np.random.default_rng(seed).integers(0, 256, (rows, kind.row_bytes(columns)), np.uint8)


def same_bits(a, b):
    return np.array_equal(np.isnan(a), np.isnan(b)) and np.array_equal(
        np.nan_to_num(a, nan=0).view(np.uint32), np.nan_to_num(b, nan=0).view(np.uint32)
    )


@pytest.mark.parametrize("kind", [QUANT_TYPES[name] for name in TYPES], ids=TYPES)
def test_decoding_is_that_of_the_numpy_codec(ops, kind):
    columns = 3 * kind.block_size
    data = random_rows(kind, 400, columns)
    with np.errstate(all="ignore"):
        expected = kind.decode(data)
    out = np.empty((len(data), columns), np.float32)
    ops.decode_rows(kind.gguf_id, data, None, out)
    assert same_bits(out, expected)


@pytest.mark.parametrize("kind", [QUANT_TYPES[name] for name in TYPES], ids=TYPES)
def test_rows_are_picked_by_index(ops, kind):
    columns = 2 * kind.block_size
    data = random_rows(kind, 50, columns, seed=1)
    index = np.array([49, 0, 7, 7, 31], np.int32)
    out = np.empty((len(index), columns), np.float32)
    ops.decode_rows(kind.gguf_id, data, index, out)
    with np.errstate(all="ignore"):
        assert same_bits(out, kind.decode(data[index]))


def test_every_half(ops):
    halves = np.arange(65536, dtype=np.uint16)
    out = np.empty((1, 65536), np.float32)
    ops.decode_rows(QUANT_TYPES["F16"].gguf_id, halves.view(np.uint8)[None], None, out)
    assert same_bits(out[0], halves.view(np.float16).astype(np.float32))


def test_wild_requests_are_refused(ops):
    data, out = random_rows(QUANT_TYPES["Q4_0"], 4, 64), np.empty((1, 64), np.float32)
    for bad in (-1, 4):
        with pytest.raises(ValueError, match="out of range"):
            ops.decode_rows(2, data, np.array([bad], np.int32), out)
    with pytest.raises(ValueError, match="unknown type"):
        ops.decode_rows(99, data, np.array([0], np.int32), out)
    with pytest.raises(ValueError, match="rows"):
        ops.decode_rows(2, data, np.array([0], np.int32), np.empty((1, 32), np.float32))
