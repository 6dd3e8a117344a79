"""What the kernels promise, in numpy, and random weights of every type to hold them to it."""

import gguf
import numpy as np

from puna.tensor import QUANT_TYPES, QuantType, Weight

# Encodings without kernels, whose weights are turned into Q8_0 when they are loaded.
WIDENED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "MXFP4")
TYPES = sorted(set(QUANT_TYPES) - set(WIDENED))
FLOATS = ("F32", "F16", "BF16")
HALF_FIELDS = {  # byte offsets of a block's float16 scales and minima (ggml-common.h)
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def with_scales(kind: QuantType, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sane scales in place of random ones in blocks [rows, blocks, block_bytes]."""
    for offset in HALF_FIELDS.get(kind.name, ()):
        data[:, :, offset : offset + 2] = rng.uniform(-0.1, 0.1, (*data.shape[:2], 1)).astype("<f2").view(np.uint8)
    if kind.name == "Q8_K":
        data[:, :, :4] = rng.uniform(-0.1, 0.1, (*data.shape[:2], 1)).astype("<f4").view(np.uint8)
    return data.reshape(len(data), -1)


def random_weight(name: str, rows: int, columns: int, seed: int = 0, codes: tuple[int, ...] = ()) -> Weight:
    """Random valid blocks; with ``codes``, of these bytes only."""
    kind, rng = QUANT_TYPES[name], np.random.default_rng(seed)
    if name in FLOATS:
        data = kind.encode(rng.standard_normal((rows, columns), np.float32))
    else:
        shape = (rows, columns // kind.block_size, kind.block_bytes)
        data = rng.choice(np.array(codes, np.uint8), shape) if codes else rng.integers(0, 256, shape, np.uint8)
        data = with_scales(kind, data, rng)
    return Weight("w", (rows, columns), kind, data)


def decoded(weight: Weight) -> np.ndarray:
    kind = gguf.GGMLQuantizationType(weight.type.gguf_id)
    try:
        return gguf.quants.dequantize(weight.data, kind).reshape(weight.shape).astype(np.float64)
    except NotImplementedError:
        return weight.dequantize().astype(np.float64)


def quantized(x: np.ndarray) -> np.ndarray:
    """Groups of 32 rounded to 127 steps of their largest magnitude, as the kernels see them; float64."""
    groups = x.reshape(len(x), -1, 32)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    inverse = np.where(largest < 1e-30, 0, np.float32(127) / np.maximum(largest, np.float32(1e-30)))
    codes = np.rint(groups * inverse.astype(np.float32))
    return (codes.astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(
        gguf.quants.quantize(x, gguf.GGMLQuantizationType.BF16), gguf.GGMLQuantizationType.BF16
    )


def as_multiplied(x: np.ndarray, name: str, isa: str) -> np.ndarray:
    """Activations as the kernels of a weight type see them; float64."""
    if name == "BF16" and isa == "avx512bf16":
        return as_bfloat16(x).astype(np.float64)
    return x.astype(np.float64) if name in FLOATS else quantized(x)


def block_of(name: str) -> int:
    return 1 if name in FLOATS else QUANT_TYPES[name].block_size


def dense(q, k, v, heads, kv_heads, kv_type="f16"):
    """Causal attention of one sequence in float64, on keys and values rounded as the cache holds them."""
    n = len(q)
    q = q.astype(np.float64).reshape(n, heads, -1).swapaxes(0, 1)
    k, v = (x.reshape(n, kv_heads, -1).swapaxes(0, 1) for x in (k, v))
    k, v = (
        QUANT_TYPES[kv_type.upper()].decode(QUANT_TYPES[kv_type.upper()].encode(x)).astype(np.float64) for x in (k, v)
    )
    k, v = (np.repeat(x, heads // kv_heads, axis=0) for x in (k, v))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).swapaxes(0, 1).reshape(n, -1)
