"""Logits of every architecture variant against transformers in float32, which shares no code with ours."""

import numpy as np
import pytest
from tiny_models import VARIANTS, random_weights

from puna.config import ModelConfig
from puna.model.model import Model
from puna.ops.protocol import Batch
from puna.ops.reference import ReferenceOps

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTHS = [96, 2, 40]  # one longer than the context that the scaled variants were "trained" with
BLOCK_SIZE = 16


def paged_batch(ids: list[np.ndarray], starts: list[int], ends: list[int]) -> Batch:
    """Tokens starts[s]:ends[s] of each sequence, in shuffled blocks of one pool."""
    blocks_each = -(-max(len(i) for i in ids) // BLOCK_SIZE)
    tables = np.random.default_rng(3).permutation(len(ids) * blocks_each).reshape(len(ids), -1).astype(np.int32)
    tokens, positions, slots = [], [], []
    for s, sequence in enumerate(ids):
        at = np.arange(starts[s], ends[s], dtype=np.int32)
        tokens.append(sequence[at])
        positions.append(at)
        slots.append(tables[s, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE)
    counts = [len(t) for t in tokens]
    return Batch(
        tokens=np.concatenate(tokens).astype(np.int32),
        positions=np.concatenate(positions),
        seq_starts=np.cumsum([0, *counts], dtype=np.int32),
        slots=np.concatenate(slots).astype(np.int32),
        block_tables=tables,
        context_lens=np.asarray(ends, np.int32),
        logit_rows=np.arange(sum(counts), dtype=np.int32),
    )


def transformers_logits(config: ModelConfig, weights: dict, ids: np.ndarray) -> np.ndarray:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf())).eval().float()
    state = {name: torch.from_numpy(w.dequantize().copy()) for name, w in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name == "lm_head.weight" for name in missing)
    with torch.no_grad():
        return model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_agree(name: str) -> None:
    config = VARIANTS[name]
    weights = random_weights(config, seed=1)
    ids = [np.random.default_rng(n).integers(0, config.vocab_size, n) for n in LENGTHS]
    expected = np.concatenate([transformers_logits(config, weights, i) for i in ids])

    ops = ReferenceOps()
    model = Model.bind(ops, config, weights)
    batch = paged_batch(ids, [0] * len(ids), LENGTHS)
    logits = ops.to_host(model.forward(batch, ops.new_kv(config, batch.block_tables.size, BLOCK_SIZE)))

    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert error <= 1e-4, f"maximum relative error {error:.2e}"


def test_continuing_from_the_cache_equals_computing_at_once() -> None:
    config = VARIANTS["gqa"]
    ops = ReferenceOps()
    model = Model.bind(ops, config, random_weights(config, seed=1))
    ids = [np.random.default_rng(n).integers(0, config.vocab_size, n) for n in LENGTHS]
    whole = paged_batch(ids, [0, 0, 0], LENGTHS)
    at_once = model.forward(whole, ops.new_kv(config, whole.block_tables.size, BLOCK_SIZE))

    kv = ops.new_kv(config, whole.block_tables.size, BLOCK_SIZE)
    first = model.forward(paged_batch(ids, [0, 0, 0], [50, 1, 7]), kv)
    second = model.forward(paged_batch(ids, [50, 1, 7], LENGTHS), kv)
    pieces = [first[:50], second[:46], first[50:51], second[46:47], first[51:58], second[47:]]
    np.testing.assert_allclose(np.concatenate(pieces), at_once, rtol=1e-4, atol=1e-5)
