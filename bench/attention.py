"""Speed of native attention over the paged cache: decoding and prefill at several contexts, for each type of cache.

    python bench/attention.py --kv-types f16,q8_0 --contexts 512,2048,8192 --threads 2

Decoding is one token over the context; prefill the last 512 tokens of it. GB/s are the cache's bytes read per second of
decoding (layers enough that they are read from memory), GFLOP/s the products that causal attention needs.
Prints a table, then one JSON line. Quote figures of a quiet machine only.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from puna.catalog import get
from puna.config import ModelConfig
from puna.ops.native_ops import NativeOps
from puna.ops.protocol import Batch

SHAPES = {"9/3x64": (9, 3, 64), "32/8x64": (32, 8, 64)}  # SmolLM2-135M, Llama-3.2-1B
STREAMED_BYTES, BLOCK_SIZE, PREFILL = 150_000_000, 32, 512
REPEATS = 5


def measure(ops: NativeOps, config: ModelConfig, kv_type: str, context: int, tokens: int) -> dict[str, Any]:
    """Best time of one layer's call for the last ``tokens`` of a context."""
    blocks = -(-context // BLOCK_SIZE)
    layer_bytes = ops.kv_bytes_per_token(config, kv_type) // config.num_hidden_layers * context
    layers = max(1, min(64, STREAMED_BYTES // layer_bytes)) if tokens == 1 else 1
    kv = ops.new_kv(replace(config, num_hidden_layers=layers), blocks, BLOCK_SIZE, kv_type)
    kv_width, q_width = (n * config.head_dim for n in (config.num_key_value_heads, config.num_attention_heads))

    def run(start: int, end: int, layer: int) -> float:
        rng = np.random.default_rng(layer)
        positions = np.arange(start, end, dtype=np.int32)
        batch = Batch(
            tokens=positions,
            positions=positions,
            seq_starts=np.array([0, end - start], np.int32),
            slots=positions,
            block_tables=np.arange(blocks, dtype=np.int32)[None],
            context_lens=np.array([end], np.int32),
            logit_rows=positions[:0],
        )
        q, k, v = (rng.standard_normal((end - start, w), np.float32) for w in (q_width, kv_width, kv_width))
        began = time.perf_counter()
        ops.attend(q, k, v, kv, layer, batch)
        return time.perf_counter() - began

    assert isinstance(kv.data, np.ndarray)
    kv.data.view(np.uint16)[:] = 0x0C0C  # small numbers in every type
    seconds = min(
        sum(run(context - tokens, context, layer) for layer in range(layers)) / layers for _ in range(REPEATS)
    )
    pairs = tokens * (context - tokens) + tokens * (tokens + 1) // 2
    return {
        "kv_type": kv_type,
        "context": context,
        "tokens": tokens,
        "us": seconds * 1e6,
        "ns_per_head_row": seconds * 1e9 / (config.num_attention_heads * pairs),
        "gb_per_s": layer_bytes / seconds / 1e9,
        "gflop_per_s": 4 * config.num_attention_heads * config.head_dim * pairs / seconds / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-types", default="f16,bf16,q8_0,f32")
    parser.add_argument("--contexts", default="512,2048,8192")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa")
    args = parser.parse_args()
    ops = NativeOps(args.threads, args.isa)
    results = []
    print(f"{'heads':9}{'type':6}{'context':>8}{'tokens':>7}{'us':>10}{'ns/head,row':>13}{'GB/s':>8}{'GFLOP/s':>9}")
    for shape, kv_type, context in product(SHAPES, args.kv_types.split(","), map(int, args.contexts.split(","))):
        heads, kv_heads, head_dim = SHAPES[shape]
        config = replace(
            get("smollm2-135m").config, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim
        )
        for tokens in (1, min(PREFILL, context)):
            r = {"heads": shape, **measure(ops, config, kv_type, context, tokens)}
            gb_per_s = f"{r['gb_per_s']:8.1f}" if tokens == 1 else " " * 8
            print(
                f"{shape:9}{kv_type:6}{context:8}{tokens:7}{r['us']:10.1f}{r['ns_per_head_row']:13.2f}{gb_per_s}"
                f"{r['gflop_per_s']:9.1f}",
                flush=True,
            )
            results.append(r)
    print(json.dumps({"threads": ops.threads, "isa": ops.isa, "results": results}))


if __name__ == "__main__":
    main()
