"""How fast a row could be at best: the time to read what must be read, or to compute what must be computed."""

from __future__ import annotations

from dataclasses import dataclass

from bench.models import Costs
from bench.rows import Row
from puna.ops.limits import Limits


@dataclass(frozen=True)
class Floor:
    """The work of one step (a whole prompt, or one token of each sequence), and the most tokens/s it allows."""

    operations: float
    bytes: float
    tokens_per_second: float


def floor(row: Row, costs: Costs, limits: Limits) -> Floor:
    """The longer of reading and computing counts; attention's products are left out, its reading is not.

    Prefill reads no keys and values to speak of, and computes logits for the last token only.
    """
    if row.phase == "prefill":
        tokens, read = row.tokens, 0.0
        operations = 2.0 * (costs.body_parameters * tokens + costs.head_parameters)
    else:
        tokens, context = row.parallel, row.depth + row.tokens / 2
        read = tokens * context * costs.kv_bytes_per_token
        operations = 2.0 * (costs.body_parameters + costs.head_parameters) * tokens
    moved = costs.weight_bytes + read
    peak = limits.int8_gop_per_s if costs.quantized else limits.float32_gop_per_s
    if costs.bfloat16 and limits.isa == "avx512bf16":
        peak *= 2  # one instruction multiplies twice as many numbers
    seconds = max(moved / limits.read_gb_per_s, operations / peak) / 1e9
    return Floor(operations, moved, tokens / seconds)
