"""NF4 and FP8 against what bitsandbytes, compressed-tensors and torch make of the same numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from puna.checkpoint.hf_quantized.bitsandbytes import nf4_tensors
from puna.checkpoint.hf_quantized.compressed_tensors import fp8_tensors
from puna.checkpoint.safetensors import map_safetensors
from puna.tensor.fp8 import decode_e4m3, encode_e4m3

VECTORS = Path(__file__).parent.parent / "checkpoint" / "vectors"


def test_double_quantized_nf4_is_that_of_bitsandbytes() -> None:
    theirs = map_safetensors(VECTORS / "bnb-nf4-double.safetensors")
    ours = {tensor.name: tensor for tensor in nf4_tensors("m", theirs["values"].array())}
    np.testing.assert_allclose(
        ours["m.weight.nested_absmax"].array(), theirs["m.weight.nested_absmax"].array(), rtol=1e-6
    )
    np.testing.assert_array_equal(ours["m.weight.absmax"].array(), theirs["m.weight.absmax"].array())
    np.testing.assert_array_equal(ours["m.weight"].array(), theirs["m.weight"].array())
    np.testing.assert_array_equal(ours["m.weight.quant_map"].array(), theirs["m.weight.quant_map"].array())
    np.testing.assert_allclose(
        ours["m.weight.nested_quant_map"].array(), theirs["m.weight.nested_quant_map"].array(), rtol=1e-6, atol=1e-9
    )
    name = "m.weight.quant_state.bitsandbytes__nf4"
    mine, other = (json.loads(tensors[name].data.tobytes()) for tensors in (ours, theirs))
    assert mine.pop("nested_offset") == pytest.approx(other.pop("nested_offset"))
    assert mine | {"dtype": other["dtype"]} == other


def test_fp8_of_a_channel_is_that_of_compressed_tensors() -> None:
    theirs = map_safetensors(VECTORS / "ct-fp8-channel.safetensors")
    values = theirs["values"].array()
    scale = theirs["m.weight_scale"].array()
    np.testing.assert_array_equal(encode_e4m3(values / scale), theirs["m.weight"].array())
    ours = {tensor.name: tensor for tensor in fp8_tensors("m", values)}
    np.testing.assert_allclose(ours["m.weight_scale"].array(), scale, rtol=2.0**-8)


def test_e4m3_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(decode_e4m3(codes), expected)
    finite = expected[np.isfinite(expected)]
    middles = (np.sort(finite)[1:] + np.sort(finite)[:-1]) / 2
    values = np.concatenate(
        [finite, middles, np.random.default_rng(0).standard_normal(5000).astype(np.float32) * 30]
    ).astype(np.float32)
    wanted = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(encode_e4m3(values), wanted)
    np.testing.assert_array_equal(decode_e4m3(encode_e4m3(np.float32([1e9, -1e9, np.nan]))), [448, -448, np.nan])
