"""GGUF files of random weights in the exact shapes of published Llama models: valid for speed, meaningless as models.

    python -m bench.synthetic_models llama-1b --types Q4_0,Q4_K_M --out FOLDER

Every matrix is cut from one chunk of random blocks, so a file is written as fast as the disk takes it and no tensor is
ever held in memory. Which type a tensor gets follows llama.cpp's ``llama-quantize`` (``llama_tensor_get_type``).
The vocabulary is Llama 3's where ``--vocabulary`` (or PUNA_LLAMA3_VOCABULARY) names a GGUF file that has it, else made
up: as long, and spelling every byte.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from puna.checkpoint.gguf_writer import Encoded, write_gguf
from puna.checkpoint.names import gguf_name, hf_names
from puna.config import ModelConfig, RopeScaling, llama3_factors
from puna.gguf_file import read_gguf
from puna.tensor import QuantType, quant_type

WEIGHT_STD = 0.02
CHUNK_BLOCKS = 40_961  # a prime, so that the rows of a matrix are cut at different places of the chunk
NEIGHBOUR = Path(__file__).resolve().parents[2] / "shared/data/tokenizers/ggml-vocab-llama-bpe.gguf"


def _llama3(factor: float, **fields: Any) -> ModelConfig:
    scaling = RopeScaling("llama3", factor=factor, original_max_position_embeddings=8192)
    common: dict[str, Any] = {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": scaling}
    return ModelConfig(**common | fields)


SHAPES: dict[str, ModelConfig] = {
    "llama-1b": _llama3(
        32.0,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "llama-8b": _llama3(
        8.0,
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "tiny": _llama3(
        32.0,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    ),
}

# The main type of each mix, and what output matrix and (some layers of) attn_v and ffn_down get instead.
MIXES: dict[str, tuple[str, str, str]] = {
    "F32": ("F32", "F32", "F32"),
    "F16": ("F16", "F16", "F16"),
    "BF16": ("BF16", "BF16", "BF16"),
    "Q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "Q4_0": ("Q4_0", "Q6_K", "Q4_0"),
    "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"),
}

# For types without an encoder: where in a block its float16 factors lie, and values that give weights of WEIGHT_STD.
_FACTORS: dict[str, dict[int, float]] = {
    "Q4_K": {0: WEIGHT_STD / 258, 2: 7.5 * WEIGHT_STD / 258},  # d · scale · code − dmin · minimum
    "Q6_K": {208: WEIGHT_STD / 1369},  # d · scale · (code − 32)
}


def tensor_type(name: str, mix: str, config: ModelConfig) -> QuantType:
    """The type of a GGUF tensor. Norms are F32; "more bits" go to the first, the last and every third layer between."""
    main, output, more = MIXES[mix]
    if "norm" in name or name.startswith("rope"):
        return quant_type("F32")
    if name == ("token_embd.weight" if config.tie_word_embeddings else "output.weight"):
        return quant_type(output)
    if "attn_v" in name or "ffn_down" in name:
        layer, count = int(name.split(".")[1]), config.num_hidden_layers
        eighth = count // 8
        if layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2:
            return quant_type(more)
    return quant_type(main)


def random_blocks(kind: QuantType, rng: np.random.Generator) -> NDArray[np.uint8]:
    """uint8[CHUNK_BLOCKS, block_bytes]: blocks of normal weights (or, without an encoder, of random codes)."""
    if kind.name not in _FACTORS:
        count = CHUNK_BLOCKS * max(1, 32 // kind.block_size)
        values = rng.standard_normal((count, kind.block_size), np.float32) * np.float32(WEIGHT_STD)
        return kind.encode(values)
    blocks = rng.integers(0, 256, (CHUNK_BLOCKS, kind.block_bytes), np.uint8)
    for at, factor in _FACTORS[kind.name].items():
        blocks[:, at : at + 2] = np.array([factor], "<f2").view(np.uint8)
    return blocks


def write_model(path: Path, config: ModelConfig, mix: str, vocabulary: Path | None, seed: int = 0) -> None:
    """Write a model of random weights; the same seed gives the same file. Raises CheckpointError."""
    rng = np.random.default_rng(seed)
    chunks: dict[str, NDArray[np.uint8]] = {}
    assert config.rope_scaling is not None
    factors = llama3_factors(config.rope_scaling, config.rope_theta, config.head_dim)
    shapes: dict[str, tuple[int, ...]] = {"rope_freqs.weight": (len(factors),)}
    shapes |= {gguf_name(name): shape for name, shape in hf_names(config).items()}

    def encode(name: str) -> Encoded:
        kind = tensor_type(name, mix, config)
        if name == "rope_freqs.weight":
            return kind, [np.array(factors, np.float32).view(np.uint8)]
        if len(shapes[name]) == 1:
            return kind, [np.ones(shapes[name], np.float32).view(np.uint8)]
        if kind.name not in chunks:
            chunks[kind.name] = random_blocks(kind, rng)
        size = shapes[name][0] * kind.row_bytes(shapes[name][1])
        return kind, _cut(chunks[kind.name], int(rng.integers(len(chunks[kind.name]))), size)

    described = {"general.architecture": "llama", "general.type": "model", "general.name": f"random {path.stem}"}
    write_gguf(path, described | config.to_gguf() | _vocabulary(config.vocab_size, vocabulary), shapes, encode)


def _cut(chunk: NDArray[np.uint8], start: int, size: int) -> Iterator[NDArray[np.uint8]]:
    """``size`` bytes of the chunk repeated for ever, from block ``start`` on."""
    repeated = np.roll(chunk, -start, axis=0).reshape(-1)
    for at in range(0, size, repeated.size):
        yield repeated[: size - at]


def _vocabulary(size: int, source: Path | None) -> dict[str, Any]:
    if source is not None:
        metadata = {k: v for k, v in read_gguf(source).metadata.items() if k.startswith("tokenizer.")}
        if len(metadata.get("tokenizer.ggml.tokens", ())) == size:
            return metadata
    # GPT-2's spelling of the 256 bytes: printable ones as themselves, the others from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = [chr(byte) for byte in sorted(printable)] + [chr(0x100 + i) for i in range(256 - len(printable))]
    words = [*letters, "ab", "<|begin|>", "<|end|>"]
    tokens = words + [f"<|unused_{row}|>" for row in range(len(words), size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3] * 2 + [5] * (size - len(words)),  # normal, control, unused
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
    }


def synthetic_model(shape: str, mix: str, folder: Path, vocabulary: Path | None = None) -> Path:
    """The file ``SHAPE.MIX.gguf`` in ``folder``, written first where it is not there yet."""
    path = folder / f"{shape}.{mix}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_model(path, SHAPES[shape], mix, vocabulary or default_vocabulary())
    return path


def default_vocabulary() -> Path | None:
    path = Path(os.environ.get("PUNA_LLAMA3_VOCABULARY", NEIGHBOUR))
    return path if path.is_file() else None


def default_folder() -> Path:
    return user_cache_path("puna", appauthor=False) / "bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=f"one or more of {', '.join(SHAPES)}"
    )
    parser.add_argument("--types", default="Q4_0", help=f"comma-separated, of {', '.join(MIXES)}")
    parser.add_argument("--out", type=Path, default=default_folder(), help="folder of the files (default: %(default)s)")
    parser.add_argument("--vocabulary", type=Path, help="a GGUF file with Llama 3's vocabulary")
    options = parser.parse_args()
    mixes = options.types.split(",")
    for mix in mixes:
        if mix not in MIXES:
            parser.error(f"--types: unknown type {mix!r}; known: {', '.join(MIXES)}")
    for shape in options.shapes:
        for mix in mixes:
            path = synthetic_model(shape, mix, options.out, options.vocabulary)
            print(f"{path}  {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
