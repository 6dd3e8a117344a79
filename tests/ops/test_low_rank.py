"""LoRA adapters in the ops: against merged weights, native against reference, and alone against together."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VARIANTS, merged, random_adapter, random_weights

from puna.config import ModelConfig
from puna.model.model import Model
from puna.ops.protocol import Batch, Ops
from puna.ops.reference import ReferenceOps
from puna.tensor import Adapter, LowRank, Weight

native = pytest.importorskip("puna._native", reason="the native extension is not built")

from puna.ops.native_ops import NativeOps  # noqa: E402

BLOCK_SIZE = 16
BLOCKS = 48
CONFIG = VARIANTS["gqa"]


def make_batch(counts: list[int], adapters: list[int] | None, vocab_size: int, first: int = 0) -> Batch:
    """Whole prompts, with logits of all tokens. Each sequence has tokens of its own, decided by ``first + s``."""
    tables = np.arange(BLOCKS, dtype=np.int32)[: BLOCKS // len(counts) * len(counts)].reshape(len(counts), -1)
    positions = [np.arange(count, dtype=np.int32) for count in counts]
    slots = [tables[s, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for s, at in enumerate(positions)]
    tokens = [
        np.random.default_rng(first + s).integers(0, vocab_size, count, np.int32) for s, count in enumerate(counts)
    ]
    return Batch(
        tokens=np.concatenate(tokens),
        positions=np.concatenate(positions),
        seq_starts=np.cumsum([0, *counts], dtype=np.int32),
        slots=np.concatenate(slots).astype(np.int32),
        block_tables=tables,
        context_lens=np.array(counts, np.int32),
        logit_rows=np.arange(sum(counts), dtype=np.int32),
        adapters=None if adapters is None else np.array(adapters, np.int32),
    )


def logits(model: Model, batch: Batch, kv_type: str = "f32") -> np.ndarray:
    return model.forward(batch, model.ops.new_kv(model.config, BLOCKS, BLOCK_SIZE, kv_type))


def adapted(ops: Ops, config: ModelConfig, adapters: list[Adapter | None], weight_type: str = "F32") -> Model:
    base = Model.bind(ops, config, random_weights(config, seed=1, weight_type=weight_type))
    return base.adapted([None if adapter is None else base.upload(adapter) for adapter in adapters])


def all_ops() -> list[Ops]:
    return [ReferenceOps(), *(NativeOps(2, isa) for isa in native.instruction_sets())]


@pytest.mark.parametrize("ops", all_ops(), ids=lambda ops: getattr(ops, "isa", ops.name))
@pytest.mark.parametrize("name", ["gqa", "mha", "both_biases", "rope_dynamic", "tied"])
def test_adapters_are_merged_weights(ops: Ops, name: str) -> None:
    """Every target, several ranks in one batch; rope_dynamic is a forward that can't be traced."""
    config = VARIANTS[name]
    adapters = [random_adapter(config, rank, seed=rank) for rank in (1, 7, 16)]
    batch = make_batch([9, 5, 3, 6], [2, -1, 0, 1], config.vocab_size)
    found = logits(adapted(ops, config, list(adapters)), batch)
    weights = random_weights(config, seed=1)
    plain = replace(batch, adapters=None)
    for s, adapter in enumerate([adapters[2], None, adapters[0], adapters[1]]):
        tensors = merged(weights, adapter) if adapter else weights
        expected = logits(Model.bind(ReferenceOps(), config, tensors), plain)
        rows = slice(batch.seq_starts[s], batch.seq_starts[s + 1])
        np.testing.assert_allclose(found[rows], expected[rows], atol=1e-4 * max(1, np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("weight_type", ["F32", "Q8_0"])
def test_a_sequence_does_not_see_the_others(isa: str, weight_type: str) -> None:
    """Each sequence of a mixed batch gives the bits that it gives alone, on any number of threads."""
    adapters = [random_adapter(CONFIG, rank, seed=rank) for rank in (3, 16, 40)]
    counts, chosen = [1, 9, 70, 1, 33, 2], [1, 0, 2, -1, 1, 1]
    together = logits(
        adapted(NativeOps(3, isa), CONFIG, list(adapters), weight_type), make_batch(counts, chosen, CONFIG.vocab_size)
    )
    alone = adapted(NativeOps(1, isa), CONFIG, list(adapters), weight_type)
    starts = np.cumsum([0, *counts])
    for s, (count, adapter) in enumerate(zip(counts, chosen, strict=True)):
        expected = logits(alone, make_batch([count], [adapter], CONFIG.vocab_size, first=s))
        np.testing.assert_array_equal(together[starts[s] : starts[s + 1]], expected)


@pytest.mark.parametrize("name", ["gqa", "rope_dynamic"])
def test_tokens_without_an_adapter_get_the_bare_model(name: str) -> None:
    config = VARIANTS[name]
    adapters: list[Adapter | None] = [random_adapter(config, 8), None]
    bare = Model.bind(NativeOps(2), config, random_weights(config, seed=1))
    model = adapted(NativeOps(2), config, adapters)
    expected = logits(bare, make_batch([5, 9, 4], None, config.vocab_size))
    mixed = logits(model, make_batch([5, 9, 4], [-1, 0, 1], config.vocab_size))
    np.testing.assert_array_equal(mixed[:5], expected[:5])
    np.testing.assert_array_equal(mixed[14:], expected[14:])
    assert not np.array_equal(mixed[5:14], expected[5:14])
    for none in (None, [-1, -1, -1]):
        np.testing.assert_array_equal(logits(model, make_batch([5, 9, 4], none, config.vocab_size)), expected)


def test_adapters_come_and_go_without_touching_each_other() -> None:
    """A number stays an adapter's own while others are added and removed."""
    base = Model.bind(NativeOps(2), CONFIG, random_weights(CONFIG, seed=1))
    first, second = (base.upload(random_adapter(CONFIG, 4, seed)) for seed in (1, 2))
    batch = make_batch([9], [1], CONFIG.vocab_size)
    expected = logits(base.adapted([None, second]), batch)
    np.testing.assert_array_equal(logits(base.adapted([first, second]), batch), expected)
    np.testing.assert_array_equal(logits(base.adapted([first, second, first]), batch), expected)
    assert not np.array_equal(logits(base.adapted([second, first]), batch), expected)


def test_an_adapter_may_change_few_matrices() -> None:
    adapters = [
        random_adapter(CONFIG, 4, targets=("q_proj",)),
        random_adapter(CONFIG, 6, seed=1, targets=("v_proj", "down_proj")),
    ]
    batch = make_batch([6, 7], [0, 1], CONFIG.vocab_size)
    expected = logits(adapted(ReferenceOps(), CONFIG, list(adapters)), batch)
    found = logits(adapted(NativeOps(2), CONFIG, list(adapters)), batch)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gqa", "rope_dynamic"])
def test_an_unknown_number_is_refused(name: str) -> None:
    model = adapted(NativeOps(2), VARIANTS[name], [random_adapter(VARIANTS[name], 4)])
    for adapters in ([1], [0, 0]):
        with pytest.raises(ValueError, match="adapters"):
            logits(model, make_batch([9], adapters, CONFIG.vocab_size))


def test_wrong_operands_are_refused() -> None:
    a, b = np.zeros((2, 8), np.float32), np.zeros((2, 6), np.float32)
    for change in ((a, b[:1], 1.0), (b, b, 1.0), (a, a, 1.0), (a[:0], b[:0], 1.0)):
        with pytest.raises(ValueError, match=r"ranks|shape"):
            native.Changes(6, 8, [change])
    changes = native.Changes(6, 8, [None, (a, b, 1.0)])
    ops = native.Native(1, "portable")
    x, out = np.zeros((3, 8), np.float32), np.zeros((3, 6), np.float32)
    good = np.array([1], np.int32), np.array([0, 3], np.int32)
    ops.add_low_rank(x, *good, [changes], [out])
    for adapters, starts in (([2], [0, 3]), ([1], [0, 2]), ([1], [1, 3]), ([1, 1], [0, 4, 3]), ([1], [0, 1, 3])):
        with pytest.raises(ValueError, match="adapters"):
            ops.add_low_rank(x, np.array(adapters, np.int32), np.array(starts, np.int32), [changes], [out])
    with pytest.raises(ValueError, match="add_low_rank"):
        ops.add_low_rank(x[:, :7].copy(), *good, [changes], [out])
    with pytest.raises(ValueError, match="add_low_rank"):
        ops.add_low_rank(x, *good, [changes], [out[:2]])


@settings(max_examples=60, deadline=None)
@given(
    columns=st.integers(1, 70),
    rows=st.integers(1, 600),
    ranks=st.lists(st.integers(0, 19), min_size=1, max_size=3),
    counts=st.lists(st.tuples(st.integers(0, 40), st.integers(-1, 2)), min_size=1, max_size=5),
    isa=st.sampled_from(native.instruction_sets()),
    seed=st.integers(0, 99),
)
def test_the_kernel_on_any_shape(
    columns: int, rows: int, ranks: list[int], counts: list[tuple[int, int]], isa: str, seed: int
) -> None:
    """Against float64; a rank of 0 stands for an adapter that does not change the matrix."""
    rng = np.random.default_rng(seed)
    changes = [
        LowRank(
            rng.standard_normal((rank, columns), np.float32), rng.standard_normal((rows, rank), np.float32), 0.5 + rank
        )
        if rank
        else None
        for rank in ranks
    ]
    ops = NativeOps(2, isa)
    weight = ops.adapted(
        ops.weight(Weight.from_array("w", np.zeros((rows, columns), np.float32))),
        [ops.low_rank(change) if change else None for change in changes],
    )
    adapters = np.array([min(adapter, len(ranks) - 1) for _, adapter in counts], np.int32)
    starts = np.cumsum([0, *(count for count, _ in counts)], dtype=np.int32)
    x, out = rng.standard_normal((starts[-1], columns), np.float32), rng.standard_normal((starts[-1], rows), np.float32)
    expected, size = out.astype(np.float64), np.abs(out)
    for s, adapter in enumerate(adapters):
        change = changes[adapter] if adapter >= 0 else None
        if change is not None:
            at = slice(starts[s], starts[s + 1])
            expected[at] += change.scale * (x[at].astype(np.float64) @ change.a.T) @ change.b.T
            size[at] += change.scale * (np.abs(x[at]) @ np.abs(change.a.T)) @ np.abs(change.b.T)
    ops._native.add_low_rank(x, adapters, starts, [weight.changes, None], [out, out])
    assert (np.abs(out - expected) <= 1e-6 * size).all()
