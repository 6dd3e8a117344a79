"""Makes tests/checkpoint/vectors/*.safetensors: one small matrix as other libraries quantize and read it.

Needs torch, safetensors, compressed-tensors (0.20.0 was used), bitsandbytes (0.50.2) and, installed with --no-deps as
tests/quantize/test_foreign_loaders.py says, gptqmodel (7.7.0) and autoawq (0.2.9): `python make_hf_quantized.py`.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parent.parent / "checkpoint" / "vectors"
ROWS, COLUMNS, PACKED_ROWS = 12, 64, 32
torch.manual_seed(0)
VALUES = torch.randn(ROWS, COLUMNS) * 0.05


def save(name: str, tensors: dict, expected: torch.Tensor) -> None:
    tensors = {f"m.{key}": value.contiguous() for key, value in tensors.items()}
    save_file(tensors | {"expected": expected.float().contiguous(), "values": VALUES}, OUT / f"{name}.safetensors")


def compressed(name: str, format_name: str, block: tuple[int, int], symmetric: bool = True, **more) -> None:
    """``block``: rows and columns that share a scale."""
    args = QuantizationArgs(symmetric=symmetric, **more)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format_name)
    blocks = VALUES.reshape(ROWS // block[0], block[0], COLUMNS // block[1], block[1]).transpose(1, 2)
    low, high = blocks.amin((2, 3)).clamp(max=0), blocks.amax((2, 3)).clamp(min=0)
    if args.type == "float":
        scale, zero = torch.maximum(-low, high) / 448, None
    elif symmetric:
        scale, zero = torch.maximum(-low, high) / (2 ** (args.num_bits - 1) - 0.5), None
    else:
        scale = (high - low) / (2**args.num_bits - 1)
        zero = (torch.round(-low / scale) - 2 ** (args.num_bits - 1)).to(torch.int8)
    scale = scale.to(torch.bfloat16).float() if args.type == "float" else scale.half().float()
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), None if zero is None else zero.reshape(1)
    state = {"weight": VALUES, "weight_scale": scale}
    if zero is not None:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(format_name)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    stored["weight_scale"] = scale.to(torch.bfloat16 if args.type == "float" else torch.float16)
    save(name, stored, expected)


def four_bits(name: str, kind: str, nested: bool) -> None:
    packed, state = bnb.quantize_4bit(VALUES, quant_type=kind, compress_statistics=nested, blocksize=64)
    parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save(name, {"weight": packed, **parts}, bnb.dequantize_4bit(packed, state))


def eight_bits() -> None:
    codes, scales, _ = bnb.int8_vectorwise_quant(VALUES.half())
    save("bnb-int8", {"weight": codes, "SCB": scales}, bnb.int8_vectorwise_dequant(codes, scales))


def spaced() -> tuple[torch.Tensor, torch.Tensor, torch.nn.Linear]:
    """Scales and zero points [rows, groups of 32 columns], some of which are 0 or 15, and a linear that they fit."""
    zeros = torch.randint(0, 16, (PACKED_ROWS, COLUMNS // 32))
    scales = torch.rand(zeros.shape).mul(0.01).add(0.005).half().float()
    linear = torch.nn.Linear(COLUMNS, len(zeros), bias=False)
    codes = torch.randint(0, 16, linear.weight.shape)
    linear.weight.data = (codes - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
    return scales, zeros, linear


def gptqmodel(name: str, version: int) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    scales, zeros, linear = spaced()
    module = TorchLinear(4, 32, False, False, COLUMNS, len(zeros))
    module.pack(linear, scales, zeros, torch.arange(COLUMNS, dtype=torch.int32) // 32)
    expected = module.dequantize_weight().T
    if version == 1:
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=4, group_size=32, sym=False))
    save(name, {key: getattr(module, key) for key in ("qweight", "qzeros", "scales", "g_idx")}, expected)


def autoawq(name: str) -> None:
    package = ModuleType("awq")  # its own __init__ wants a transformers of its time
    package.__path__ = importlib.util.find_spec("awq").submodule_search_locations
    sys.modules["awq"] = package
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    scales, zeros, linear = spaced()
    module = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    expected = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), 4, 32).T
    save(name, {key: getattr(module, key) for key in ("qweight", "qzeros", "scales")}, expected)


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    group = {"num_bits": 4, "strategy": "group", "group_size": 32}
    compressed("ct-int4-symmetric", "pack-quantized", (1, 32), **group)
    compressed("ct-int4-asymmetric", "pack-quantized", (1, 32), symmetric=False, **group)
    compressed("ct-int8-packed", "pack-quantized", (1, COLUMNS), num_bits=8, strategy="channel")
    compressed("ct-int8-channel", "int-quantized", (1, COLUMNS), num_bits=8, strategy="channel")
    compressed("ct-int8-asymmetric", "naive-quantized", (1, COLUMNS), symmetric=False, num_bits=8, strategy="channel")
    compressed("ct-int8-tensor", "naive-quantized", (ROWS, COLUMNS), num_bits=8, strategy="tensor")
    float8 = {"num_bits": 8, "type": "float"}
    compressed("ct-fp8-channel", "float-quantized", (1, COLUMNS), strategy="channel", **float8)
    compressed("ct-fp8-tensor", "float-quantized", (ROWS, COLUMNS), strategy="tensor", **float8)
    compressed("ct-fp8-block", "float-quantized", (4, 32), strategy="block", block_structure=[4, 32], **float8)
    four_bits("bnb-nf4-double", "nf4", True)
    four_bits("bnb-nf4", "nf4", False)
    four_bits("bnb-fp4-double", "fp4", True)
    eight_bits()
    gptqmodel("gptq-v1", 1)
    gptqmodel("gptq-v2", 2)
    autoawq("awq-gemm")
    print(json.dumps(sorted(path.name for path in OUT.iterdir())))
