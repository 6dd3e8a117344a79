"""Encodings without kernels become Q8_0, exactly where their numbers allow it."""

import numpy as np
import pytest
from kernel_reference import WIDENED
from test_codecs import random_blocks

from puna.errors import CheckpointError
from puna.tensor import QUANT_TYPES, Weight
from puna.tensor.widen import as_q8_0

gguf = pytest.importorskip("gguf")

# Two scales for 32 numbers of up to 43 units cannot become one.
ENCODED_ANEW = ("IQ2_XS", "IQ2_S", "IQ1_M")


def random_weight(name: str, rows: int = 40) -> Weight:
    """Blocks of any codes with scales as models have."""
    kind = QUANT_TYPES[name]
    blocks = random_blocks(name, rows * (512 // kind.block_size))
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.001, 0.1, len(blocks)).astype("<f2").view(np.uint16)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(110, 130, len(blocks))
    elif name == "IQ1_M":
        words = blocks[:, 48:].view("<u2")
        words[:] = words & 0x0FFF | (scale[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 15) << 12
    else:
        at = {"TQ1_0": 52, "TQ2_0": 64}.get(name, 0)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return Weight("w", (rows, 512), kind, blocks.reshape(rows, -1))


@pytest.mark.parametrize("name", WIDENED)
def test_numbers_stay(name: str) -> None:
    weight = random_weight(name)
    wanted = gguf.quants.dequantize(weight.data, gguf.GGMLQuantizationType[name])
    widened = as_q8_0(weight)
    assert widened.type.name == "Q8_0"
    error = np.abs(widened.dequantize() - wanted).reshape(-1, 32).max(axis=1)
    largest = np.abs(wanted).reshape(-1, 32).max(axis=1)
    if name in ("TQ1_0", "TQ2_0", "MXFP4"):
        assert not error.any()
    elif name in ENCODED_ANEW:
        assert (error <= largest * (0.5 / 127 + 2.0**-11)).all()  # half a step, and the rounded scale
    else:
        assert (error <= largest * 2.0**-11).all()


@pytest.mark.parametrize("name", WIDENED)
def test_native_ops_compute_with_it(name: str) -> None:
    native_ops = pytest.importorskip("puna.ops.native_ops", reason="the native extension is not built")
    weight = random_weight(name)
    ops = native_ops.NativeOps(1)
    uploaded = ops.weight(weight)
    x = np.random.default_rng(2).standard_normal((3, 512), np.float32)
    expected = x @ gguf.quants.dequantize(weight.data, gguf.GGMLQuantizationType[name]).T
    assert np.sqrt(np.mean((ops.linear(x, uploaded) - expected) ** 2) / np.mean(expected**2)) < 0.012
    tokens = np.array([3, 0, 39], np.int32)
    np.testing.assert_array_equal(ops.embed(ops.weight(weight), tokens), as_q8_0(weight).dequantize()[tokens])
    assert ops.packed_matrix(weight).type == "Q8_0"
    assert ops.packed_matrix(weight).size == ops.pack(weight).nbytes


def test_says_which_weight_cannot_be_held() -> None:
    weight = random_weight("TQ2_0")
    weight.data[3, 64:66] = np.array([np.nan], "<f2").view(np.uint8)
    with pytest.raises(CheckpointError, match=r"^w: a weight is infinite"):
        as_q8_0(weight)
