"""A traced forward, replayed natively, against the same forward called op by op on the same ops."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_models import VARIANTS, random_weights

from puna.config import ModelConfig
from puna.model import llama
from puna.model.model import Model
from puna.ops.protocol import Batch

native = pytest.importorskip("puna._native", reason="the native extension is not built")

from puna.ops.native_ops import NativeOps  # noqa: E402
from puna.ops.native_program import trace  # noqa: E402

BLOCK_SIZE = 16
BLOCKS = 16


def make_batch(counts: list[int], starts: list[int], logit_rows: list[int], vocab_size: int) -> Batch:
    """New tokens of some sequences, each with blocks of its own."""
    tables = np.arange(BLOCKS, dtype=np.int32).reshape(len(counts), -1)
    positions = [np.arange(start, start + count, dtype=np.int32) for start, count in zip(starts, counts, strict=True)]
    slots = [tables[s, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for s, at in enumerate(positions)]
    return Batch(
        tokens=np.random.default_rng(sum(counts)).integers(0, vocab_size, sum(counts)).astype(np.int32),
        positions=np.concatenate(positions),
        seq_starts=np.cumsum([0, *counts], dtype=np.int32),
        slots=np.concatenate(slots).astype(np.int32),
        block_tables=tables,
        context_lens=np.array([s + c for s, c in zip(starts, counts, strict=True)], np.int32),
        logit_rows=np.array(logit_rows, np.int32),
    )


def bound(config: ModelConfig) -> Model:
    return Model.bind(NativeOps(2), config, random_weights(config, seed=1))


@pytest.mark.parametrize("name", VARIANTS)
def test_replayed_steps_equal_the_ops_one_by_one(name: str) -> None:
    """Prefill, then steps of other sizes, in one program: bit for bit, hidden states too, and the caches as well."""
    config = VARIANTS[name]
    model = bound(config)
    ops = model.ops
    replayed, eager = (ops.new_kv(config, BLOCKS, BLOCK_SIZE) for _ in range(2))
    steps = (
        ([40, 3], [0, 0], [39, 42]),
        ([1, 1], [40, 3], [0, 1]),
        ([2, 70], [41, 4], [1, 5, 71]),
        ([1, 1], [43, 74], []),
    )
    for counts, starts, rows in steps:
        batch = make_batch(counts, starts, rows, config.vocab_size)
        expected = llama.forward(ops, config, model.weights, batch, eager)
        np.testing.assert_array_equal(model.forward(batch, replayed), expected)
        np.testing.assert_array_equal(replayed.data, eager.data)
    expected = llama.hidden(ops, config, model.weights, batch, eager)
    np.testing.assert_array_equal(model.hidden(batch, replayed), expected)


def test_a_result_is_the_callers_own() -> None:
    config = VARIANTS["gqa"]
    model = bound(config)
    kv = model.ops.new_kv(config, BLOCKS, BLOCK_SIZE)
    first = model.forward(make_batch([5], [0], [4], config.vocab_size), kv)
    kept = first.copy()
    model.forward(make_batch([9], [5], [0], config.vocab_size), kv)
    np.testing.assert_array_equal(first, kept)


def test_only_what_does_not_depend_on_the_batch_is_traced() -> None:
    for name, traceable in (("gqa", True), ("rope_dynamic", False)):
        config = VARIANTS[name]
        model = bound(config)
        kv = model.ops.new_kv(config, BLOCKS, BLOCK_SIZE)
        batch = make_batch([5], [0], [4], config.vocab_size)
        weights = model.weights
        traced = trace(lambda o, b, k, c=config, w=weights: llama.forward(o, c, w, b, k), batch, kv, model.ops.panels)
        assert (traced is not None) == traceable
        unknown = trace(lambda o, b, k: o.to_host(b.tokens), batch, kv, model.ops.panels)
        assert unknown is None


def test_memory_does_not_grow_with_the_layers() -> None:
    """Buffers are used again: the arrays of a deep model take no more than those of a shallow one."""
    counts = []
    for layers in (2, 6):
        config = replace(VARIANTS["gqa"], num_hidden_layers=layers)
        model = bound(config)
        kv = model.ops.new_kv(config, BLOCKS, BLOCK_SIZE)
        batch = make_batch([5], [0], [4], config.vocab_size)
        weights = model.weights
        traced = trace(lambda o, b, k, c=config, w=weights: llama.forward(o, c, w, b, k), batch, kv, model.ops.panels)
        assert traced is not None
        counts.append(traced.program.num_buffers)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 256),
        ("tokens", -1),
        ("logit_rows", 5),
        ("logit_rows", -1),
        ("slots", 256),
        ("positions", 300),
        ("block_tables", 16),
    ],
)
def test_numbers_that_lead_out_of_memory_are_refused(field: str, value: int) -> None:
    config = VARIANTS["gqa"]
    model = bound(config)
    kv = model.ops.new_kv(config, BLOCKS, BLOCK_SIZE)
    batch = make_batch([5], [0], [4], config.vocab_size)
    model.forward(batch, kv)
    getattr(batch, field)[..., 0] = value
    with pytest.raises(ValueError, match=r"run|attend"):
        model.forward(batch, kv)


def test_wrong_operands_are_refused() -> None:
    program = native.Program([(64, False), (32, False), (64, True)], 2)
    weight = np.ones(64, np.float32)
    for call in (
        lambda: native.Program([(0, False)], 0),
        lambda: native.Program([(1, False)], 1),
        lambda: program.rms_norm(0, weight[:3], 1e-5, 0),
        lambda: program.rms_norm(0, weight, 1e-5, 1),
        lambda: program.rows(1, 2),
        lambda: program.swiglu(0, 1, 0),
        lambda: program.embed(8, np.zeros((4, 35), np.uint8), 1),
        lambda: program.rope(2, 0, 1),
        lambda: program.rope(0, 1, 0),
        lambda: program.rope(1, 0, 0),
        lambda: program.rope_angles(weight[:3], 1.0, 0, 1),
        lambda: program.rope_angles(weight, 1.0, 0, 0),
        lambda: program.attend(0, 0, 1, 1, 1),
    ):
        with pytest.raises(ValueError, match=r"agree|columns|buffer|row|half a head"):
            call()
    with pytest.raises(IndexError):
        program.rope(7, 1, 1)
