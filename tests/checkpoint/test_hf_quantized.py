"""Quantized Hugging Face folders against what other libraries (vectors/, made by golden/make_hf_quantized.py) and the
published descriptions of the formats say their tensors mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.checkpoint.hf_quantized.awq import awq_tensors
from puna.checkpoint.hf_quantized.compressed_tensors import packed_tensors
from puna.checkpoint.hf_quantized.gptq import gptq_tensors as gptq_tensors_of
from puna.checkpoint.hf_quantized.read import read_quantized
from puna.checkpoint.safetensors import StoredTensor, map_safetensors
from puna.errors import CheckpointError
from puna.tensor import Weight
from puna.tensor.groupwise import Grouped

VECTORS = Path(__file__).parent / "vectors"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
HALF = 2.0**-11


def read(config: Any, stored: dict[str, StoredTensor]) -> Weight:
    return read_quantized("config.json", config, stored, False)["m.weight"]


def vector(name: str) -> tuple[dict[str, StoredTensor], np.ndarray]:
    stored = map_safetensors(VECTORS / f"{name}.safetensors")
    del stored["values"]
    return stored, stored.pop("expected").array()


def config_of(name: str) -> dict[str, Any]:
    if name.startswith("bnb"):
        return {"quant_method": "bitsandbytes", "load_in_4bit": "int8" not in name}
    block = [4, 32] if name.endswith("block") else None
    return COMPRESSED | {"config_groups": {"group_0": {"weights": {"block_structure": block}}}}


def block_maxima(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.abs(values).reshape(len(values), -1, 32).max(axis=2), 32, axis=1)


# --- what other libraries wrote ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ct-int4-symmetric", "Q4_0"),
        ("ct-int8-packed", "Q8_0"),
        ("ct-int8-channel", "Q8_0"),
        ("ct-int8-tensor", "Q8_0"),
    ],
)
def test_symmetric_integers_stay_exactly(name: str, kind: str) -> None:
    stored, expected = vector(name)
    weight = read(config_of(name), stored)
    assert weight.type.name == kind
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_a_zero_point_costs_the_rounding_of_the_minimum() -> None:
    stored, expected = vector("ct-int4-asymmetric")
    weight = read(COMPRESSED, stored)
    assert weight.type.name == "Q4_1"
    step = np.repeat(stored["m.weight_scale"].array().astype(np.float32), 32, axis=1)
    assert (np.abs(weight.dequantize() - expected) <= 15 * step * HALF).all()


@pytest.mark.parametrize(
    "name",
    [
        "ct-int8-asymmetric",
        "ct-fp8-channel",
        "ct-fp8-tensor",
        "ct-fp8-block",
        "bnb-nf4",
        "bnb-nf4-double",
        "bnb-fp4-double",
    ],
)
def test_others_are_encoded_anew(name: str) -> None:
    """Within half a step of 127 for the largest of 32 numbers, and the rounding of the step to float16."""
    stored, expected = vector(name)
    weight = read(config_of(name), stored)
    assert weight.type.name == "Q8_0"
    assert (np.abs(weight.dequantize() - expected) <= block_maxima(expected) * (0.5 / 127 + HALF)).all()


def test_eight_bits_of_bitsandbytes() -> None:
    stored, expected = vector("bnb-int8")
    weight = read(config_of("bnb-int8"), stored)
    np.testing.assert_allclose(weight.dequantize(), expected, rtol=1.01 * HALF)


def test_fp8_folders_of_other_makers() -> None:
    stored, expected = vector("ct-fp8-block")
    stored["m.weight_scale_inv"] = stored.pop("m.weight_scale")
    weight = read({"quant_method": "fp8", "weight_block_size": [4, 32]}, stored)
    assert (np.abs(weight.dequantize() - expected) <= block_maxima(expected) * (0.5 / 127 + HALF)).all()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gptq-v1", GPTQ | {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}),  # with zero points of 0, which borrow
        ("gptq-v2", GPTQ | {"checkpoint_format": "gptq_v2"}),
        ("awq-gemm", AWQ),
    ],
)
def test_gptq_and_awq_of_their_libraries(name: str, config: dict[str, Any]) -> None:
    stored, expected = vector(name)
    weight = read(config, stored)
    assert weight.type.name == "Q4_1"
    step = np.repeat(stored["m.scales"].array().T.astype(np.float32), 32, axis=1)
    assert (np.abs(weight.dequantize() - expected) <= 15 * step * HALF * 2).all()  # they multiply in float16, too


# --- GPTQ and AWQ, packed here number by number as their formats are described ----------------------------------------


def packed_numbers(seed: int, rows: int = 16, columns: int = 64, bits: int = 4) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (columns, rows))
    zeros = rng.integers(0, 1 << bits, (columns // 32, rows))
    scales = rng.uniform(0.005, 0.02, (columns // 32, rows)).astype(np.float16)
    return codes, zeros, scales


def i32(words: list[list[int]]) -> np.ndarray:
    return np.array(words, np.uint32).view(np.int32)


def gptq_tensors(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, less: int) -> dict:
    columns, rows = codes.shape
    per = 32 // bits
    qweight = [
        [sum(int(codes[word * per + i, row]) << bits * i for i in range(per)) for row in range(rows)]
        for word in range(columns // per)
    ]
    mask = (1 << bits) - 1
    qzeros = [
        [sum((int(group[word * per + i]) - less & mask) << bits * i for i in range(per)) for word in range(rows // per)]
        for group in zeros
    ]
    arrays = {"qweight": i32(qweight), "qzeros": i32(qzeros), "scales": scales}
    return {f"m.{name}": StoredTensor.from_array(f"m.{name}", array) for name, array in arrays.items()}


def numbers(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return ((codes - zeros[groups]) * scales[groups].astype(np.float32)).T


@pytest.mark.parametrize(("version", "less"), [("gptq", 1), ("gptq_v2", 0), (None, 1)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(version: str | None, less: int, bits: int) -> None:
    codes, zeros, scales = packed_numbers(1, bits=bits)
    stored = gptq_tensors(codes, zeros, scales, bits, less)
    config = GPTQ | {"bits": bits} | ({"checkpoint_format": version} if version else {})
    weight = read(config, stored)
    expected = numbers(codes, zeros, scales, np.arange(64) // 32)
    step = np.repeat(scales.T.astype(np.float32), 32, axis=1)
    allowed = block_maxima(expected) * (0.5 / 127 + HALF) if bits == 8 else 15 * step * HALF
    assert (np.abs(weight.dequantize() - expected) <= allowed).all()


def test_symmetric_gptq_is_exact() -> None:
    codes, zeros, scales = packed_numbers(2)
    zeros[:] = 8
    weight = read(GPTQ, gptq_tensors(codes, zeros, scales, 4, 1))
    assert weight.type.name == "Q4_0"
    np.testing.assert_array_equal(weight.dequantize(), numbers(codes, zeros, scales, np.arange(64) // 32))


def test_symmetric_eight_bit_gptq_is_exact() -> None:
    codes, zeros, scales = packed_numbers(3, bits=8)
    zeros[:] = 128
    weight = read(GPTQ | {"bits": 8}, gptq_tensors(codes, zeros, scales, 8, 1))
    assert weight.type.name == "Q8_0"
    np.testing.assert_array_equal(weight.dequantize(), numbers(codes, zeros, scales, np.arange(64) // 32))


def test_act_order() -> None:
    codes, zeros, scales = packed_numbers(4)
    groups = np.random.default_rng(4).permutation(np.arange(64) // 32).astype(np.int32)
    stored = gptq_tensors(codes, zeros, scales, 4, 1)
    stored["m.g_idx"] = StoredTensor.from_array("m.g_idx", groups)
    weight = read(GPTQ | {"desc_act": True}, stored)
    expected = numbers(codes, zeros, scales, groups)
    assert weight.type.name == "Q8_0"
    assert (np.abs(weight.dequantize() - expected) <= block_maxima(expected) * (0.5 / 127 + HALF)).all()
    stored["m.g_idx"] = StoredTensor.from_array("m.g_idx", np.repeat([1, 0], 32).astype(np.int32))
    weight = read(GPTQ | {"desc_act": True}, stored)
    assert weight.type.name == "Q4_1"  # whole blocks have one group


def test_act_order_needs_the_order() -> None:
    stored = gptq_tensors(*packed_numbers(4), 4, 1)
    with pytest.raises(CheckpointError, match=r"m\.g_idx is missing"):
        read(GPTQ | {"desc_act": True}, stored)


def test_one_group_a_row() -> None:
    codes, zeros, scales = packed_numbers(5)
    weight = read(GPTQ | {"group_size": -1}, gptq_tensors(codes, zeros[:1], scales[:1], 4, 1))
    expected = numbers(codes, zeros[:1], scales[:1], np.zeros(64, int))
    np.testing.assert_allclose(weight.dequantize(), expected, atol=15 * 0.02 * HALF)


def test_awq() -> None:
    codes, zeros, scales = packed_numbers(6)

    def interleaved(line: np.ndarray) -> list[int]:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return [sum(int(line[at + order[i]]) << 4 * i for i in range(8)) for at in range(0, len(line), 8)]

    arrays = {
        "qweight": i32([interleaved(line) for line in codes]),
        "qzeros": i32([interleaved(line) for line in zeros]),
        "scales": scales,
    }
    weight = read(AWQ, {f"m.{name}": StoredTensor.from_array(f"m.{name}", array) for name, array in arrays.items()})
    expected = numbers(codes, zeros, scales, np.arange(64) // 32)
    assert weight.type.name == "Q4_1"
    step = np.repeat(scales.T.astype(np.float32), 32, axis=1)
    assert (np.abs(weight.dequantize() - expected) <= 15 * step * HALF).all()


def test_scales_beyond_float16_keep_their_size() -> None:
    stored, expected = vector("ct-int4-symmetric")
    stored["m.weight_scale"] = StoredTensor.from_array(
        "m.weight_scale", stored["m.weight_scale"].array() * np.float32(1e-6)
    )
    weight = read(COMPRESSED, stored)
    assert weight.type.name == "BF16"
    np.testing.assert_allclose(weight.dequantize(), expected * 1e-6, rtol=2.0**-8)


def test_a_tiny_scale_among_others_changes_nothing_much() -> None:
    """AutoAWQ gives groups of zeros a scale below what float16 has."""
    stored, _ = vector("ct-int4-symmetric")
    scales = stored["m.weight_scale"].array().astype(np.float32)
    scales[3, 1] = 6.7e-7
    stored["m.weight_scale"] = StoredTensor.from_array("m.weight_scale", scales)
    weight = read(COMPRESSED, stored)
    assert weight.type.name == "Q4_0"
    assert np.abs(weight.dequantize()[3, 32:]).max() <= 8 * 8e-7


# --- what is beside the matrices --------------------------------------------------------------------------------------


def test_plain_tensors_stay_and_idle_ones_go() -> None:
    stored, _ = vector("ct-int4-symmetric")
    norm = StoredTensor.from_array("norm.weight", np.ones(4, np.float32))
    more = {
        "norm.weight": norm,
        "k_proj.bias": replace(norm, name="k_proj.bias", data=np.zeros(16, np.uint8)),
        "q_proj.bias": replace(norm, name="q_proj.bias"),
        "self_attn.k_scale": StoredTensor.from_array("self_attn.k_scale", np.array(0.5, np.float32)),
        "m.input_scale": StoredTensor.from_array("m.input_scale", np.ones(1, np.float32)),
    }
    weights = read_quantized("config.json", COMPRESSED, stored | more, False)
    assert weights.shapes == {"norm.weight": (4,), "q_proj.bias": (4,), "m.weight": (12, 64)}
    assert set(weights) == set(weights.shapes)
    assert set(read_quantized("config.json", COMPRESSED, stored | more, True)) == {*weights.shapes, "k_proj.bias"}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("gptq", "must be an object, found 'gptq'"),
        ({"bits": 4}, "method None, which is not supported; supported: gptq, awq"),
        ({"quant_method": "quip"}, "method 'quip', which is not supported"),
        ({"quant_method": ["gptq"]}, "not supported"),
        (GPTQ | {"bits": 3}, "bits is 3; supported: 2, 4, 8"),
        (GPTQ | {"bits": True}, "bits is True; supported: 2, 4, 8"),
        ({"quant_method": "gptq", "group_size": 32}, "bits is missing"),
        (GPTQ | {"group_size": 0}, "group_size is 0; expected a number of columns, or -1"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; supported: 'gptq', 'gptq_v2'"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'; supported: 'gemm'"),
        (AWQ | {"bits": 8}, "bits is 8; supported: 4"),
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'; supported"),
        (COMPRESSED | {"transform_config": {"a": 1}}, "transform_config is set: the weights are rotated"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "asks for sparse weights"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]; expected"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size"),
    ],
)
def test_refuses_configurations_by_field(config: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        read_quantized("config.json", config, {}, False)


def changed(tensor: StoredTensor, **changes: Any) -> StoredTensor:
    return replace(tensor, **changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("m.qzeros"), "m.qzeros is missing"),
        (lambda t: t.pop("m.scales"), "m.scales is missing"),
        (lambda t: t.update({"m.scales": changed(t["m.qzeros"], name="m.scales")}), "m.scales has dtype I32"),
        (lambda t: t.update({"m.scales": changed(t["m.scales"], shape=(1, 32))}), r"m.scales has shape \(1, 32\); exp"),
        (
            lambda t: t.update({"m.qweight": changed(t["m.qweight"], shape=(128,))}),
            r"shape \(128,\); expected \(any, any\)",
        ),
        (lambda t: t.update({"m.qzeros": changed(t["m.qzeros"], shape=(4, 1))}), r"m.qzeros has shape \(4, 1\)"),
        (
            lambda t: t.update({"m.g_idx": StoredTensor.from_array("m.g_idx", np.zeros(63, np.int32))}),
            r"m.g_idx has shape \(63,\); expected \(64\)",
        ),
        (
            lambda t: t.update({"m.g_idx": StoredTensor.from_array("m.g_idx", np.full(64, 2, np.int32))}),
            "m.g_idx names groups 2 to 2, but there are 2",
        ),
        (
            lambda t: t.update({"m.g_idx": StoredTensor.from_array("m.g_idx", np.full(64, -1, np.int32))}),
            "m.g_idx names groups -1 to -1",
        ),
    ],
)
def test_refuses_broken_gptq_by_tensor(edit: Any, message: str) -> None:
    stored = gptq_tensors(*packed_numbers(7), 4, 1)
    edit(stored)
    with pytest.raises(CheckpointError, match=message):
        read(GPTQ, stored)


@pytest.mark.parametrize(
    ("name", "part", "changes", "message"),
    [
        ("ct-int4-symmetric", "weight_shape", {"data": np.zeros(16, np.uint8)}, r"weight_packed has shape \(12, 8\)"),
        ("ct-int4-symmetric", "weight_scale", {"shape": (2, 12)}, r"weight_scale has shape \(2, 12\)"),
        ("ct-int4-asymmetric", "weight_zero_point", {"shape": (1, 4)}, "weight_zero_point has shape"),
        ("ct-fp8-channel", "weight_scale", {"shape": (6, 2)}, r"neither one scale nor one for each of 12 rows"),
        ("bnb-nf4-double", "weight", {"data": np.zeros(3, np.uint8)}, "weight has 3 bytes"),
        ("bnb-nf4-double", "weight.absmax", {"shape": (11,)}, r"absmax has shape \(11,\); expected \(12\)"),
        ("bnb-nf4-double", "weight.quant_state.bitsandbytes__nf4", {"data": np.zeros(3, np.uint8)}, "is not JSON"),
        (
            "bnb-nf4-double",
            "weight.quant_state.bitsandbytes__nf4",
            {"data": np.frombuffer(b'{"shape": [2, -3], "blocksize": 64}', np.uint8)},
            "no sensible shape",
        ),
        ("bnb-int8", "SCB", {"shape": (3, 4)}, r"SCB has shape \(3, 4\); expected \(12\)"),
    ],
)
def test_refuses_broken_tensors_of_others(name: str, part: str, changes: dict, message: str) -> None:
    stored, _ = vector(name)
    stored[f"m.{part}"] = changed(stored[f"m.{part}"], **changes)
    with pytest.raises(CheckpointError, match=message):
        read(config_of(name), stored)


# --- what is written is read ------------------------------------------------------------------------------------------


@given(
    bits=st.sampled_from([2, 4, 8]),
    shape=st.tuples(st.sampled_from([16, 48]), st.sampled_from([64, 96])),
    size=st.sampled_from([32, 64, -1]),
    middle=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_every_layout_gives_back_the_numbers(
    bits: int, shape: tuple[int, int], size: int, middle: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = shape
    groups = np.arange(columns) // (columns if size == -1 else size)
    count = int(groups[-1]) + 1
    scales = rng.uniform(0.001, 0.1, (rows, count)).astype(np.float16).astype(np.float32)
    zeros = np.full((rows, count), 1 << (bits - 1)) if middle else rng.integers(0, 1 << bits, (rows, count))
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    matrix = Grouped(codes, scales, zeros.astype(np.int16), groups, bits)
    expected = matrix.as_weight("m.weight").dequantize()
    stored = {"gptq": gptq_tensors_of("m", matrix, 1), "gptq_v2": gptq_tensors_of("m", matrix, 0)}
    if columns % count == 0 and (size == -1 or columns % size == 0):
        stored["compressed-tensors"] = packed_tensors("m", matrix)
        if bits == 4:
            stored["awq"] = awq_tensors("m", matrix)
    for method, tensors in stored.items():
        config = {"quant_method": method.removesuffix("_v2"), "bits": bits, "group_size": size}
        config["format"] = "pack-quantized" if method == "compressed-tensors" else method
        weight = read(config, {tensor.name: tensor for tensor in tensors})
        np.testing.assert_array_equal(weight.dequantize(), expected)
