"""Paged attention: exactness against dense float64 attention, and bit-identical results however the work is cut."""

import numpy as np
import pytest
from kernel_reference import dense

from puna.tensor import QUANT_TYPES

native = pytest.importorskip("puna._native", reason="the native extension is not built")


@pytest.fixture(params=native.instruction_sets())
def isa(request):
    return request.param


class Paged:
    """Sequences in one cache, whose blocks lie in random order and hold the rubbish of earlier owners."""

    def __init__(
        self, isa, lengths, *, heads, kv_heads, head_dim, block_size=32, threads=2, seed=0, kv_type="f16", layers=1
    ):
        rng = np.random.default_rng(seed)
        self.native, self.block_size = native.Native(threads, isa), block_size
        blocks = [-(-n // block_size) for n in lengths]
        num_blocks = sum(blocks) + 3
        shape = (QUANT_TYPES[kv_type.upper()].gguf_id, num_blocks, block_size, layers, kv_heads, head_dim)
        self.data = aligned(native.cache_bytes(*shape))
        self.data[:] = 0xFF  # NaN, for floats and scales of any type
        self.cache = native.Cache(*shape, self.data)
        order = rng.permutation(num_blocks).astype(np.int32)
        self.tables = np.full((len(lengths), max(blocks)), -1, np.int32)
        for s, n in enumerate(blocks):
            self.tables[s, :n], order = order[:n], order[n:]

    def step(self, q, k, v, ranges, layer=0):
        """One call with tokens ranges[s] = (start, end) of each sequence; q, k, v are lists by sequence."""
        positions = np.concatenate([np.arange(*r) for r in ranges]).astype(np.int32)
        sequence = np.repeat(np.arange(len(ranges)), [b - a for a, b in ranges])
        slots = self.tables[sequence, positions // self.block_size] * self.block_size + positions % self.block_size
        starts = np.cumsum([0, *(b - a for a, b in ranges)]).astype(np.int32)
        flat = [np.concatenate([x[a:b] for x, (a, b) in zip(xs, ranges, strict=True)]) for xs in (q, k, v)]
        out = np.full_like(flat[0], np.nan)
        self.native.attend(self.cache, layer, *flat, out, positions, slots.astype(np.int32), starts, self.tables)
        return np.split(out, starts[1:-1])


def random_inputs(lengths, heads, kv_heads, head_dim, seed=1):
    rng = np.random.default_rng(seed)
    shapes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    return [[rng.normal(size=(n, width)).astype(np.float32) for n in lengths] for width in shapes]


def aligned(size):
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size]


SHAPES = [  # heads, kv heads, head_dim
    (9, 3, 64),
    (4, 4, 64),
    (8, 1, 128),
    (8, 2, 80),
    (2, 1, 2),
    (3, 1, 6),
    (2, 2, 30),
    (1, 1, 256),
    (50, 1, 16),  # more heads in a group than a tile has rows
    (14, 2, 48),
]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_attention_is_exact(isa, heads, kv_heads, head_dim):
    lengths = [70, 1, 300]
    q, k, v = random_inputs(lengths, heads, kv_heads, head_dim)
    cache = Paged(isa, lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    out = cache.step(q, k, v, [(0, n) for n in lengths])
    for s in range(len(lengths)):
        np.testing.assert_allclose(out[s], dense(q[s], k[s], v[s], heads, kv_heads), rtol=0, atol=3e-6)


@pytest.mark.parametrize("block_size", [1, 3, 5, 8, 16, 24, 32, 48, 64, 300])
def test_any_block_size(isa, block_size):
    lengths = [333, 40]
    q, k, v = random_inputs(lengths, 6, 2, 32)
    cache = Paged(isa, lengths, heads=6, kv_heads=2, head_dim=32, block_size=block_size)
    first = cache.step(q, k, v, [(0, 200), (0, 40)])
    rest = cache.step(q, k, v, [(200, 333), (40, 40)])
    expected = [dense(q[s], k[s], v[s], 6, 2) for s in range(2)]
    np.testing.assert_allclose(np.concatenate([first[0], rest[0]]), expected[0], rtol=0, atol=3e-6)
    np.testing.assert_allclose(first[1], expected[1], rtol=0, atol=3e-6)


def run_cut(isa, lengths, cuts, inputs, heads, kv_heads, head_dim, threads, block_size=32, kv_type="f16"):
    """Sequence 0 computed in steps that end at `cuts`; the others wholly in the first step. Returns its rows."""
    q, k, v = inputs
    cache = Paged(
        isa,
        lengths,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        threads=threads,
        block_size=block_size,
        kv_type=kv_type,
    )
    rows, start = [], 0
    for end in cuts:
        others = [(0, n) if start == 0 else (n, n) for n in lengths[1:]]
        rows.append(cache.step(q, k, v, [(start, end), *others])[0])
        start = end
    return np.concatenate(rows)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (2, 2, 128), (8, 1, 80), (3, 1, 6)])
@pytest.mark.parametrize("block_size", [32, 5])
def test_results_do_not_depend_on_how_the_work_is_cut(isa, heads, kv_heads, head_dim, block_size):
    """Same bits for one prefill, chunks of any size, one token at a time, any number of threads or neighbours."""
    n = 70
    inputs = random_inputs([n, 90, 17, 1], heads, kv_heads, head_dim)
    shape = (heads, kv_heads, head_dim)
    whole = run_cut(isa, [n], [n], inputs_of(inputs, 1), *shape, threads=1, block_size=block_size)
    for threads in (1, 2, 3):
        for neighbours in (1, 2, 4):
            lengths = [n, 90, 17, 1][:neighbours]
            for cuts in ([n], range(1, n + 1), [1, 8, 9, 40, n], range(7, n + 1, 7)):
                got = run_cut(
                    isa, lengths, cuts, inputs_of(inputs, neighbours), *shape, threads=threads, block_size=block_size
                )
                assert np.array_equal(got, whole), (threads, neighbours, list(cuts))


def inputs_of(inputs, sequences):
    return [x[:sequences] for x in inputs]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (4, 1, 128)])
def test_long_contexts_give_the_same_bits_decoded_and_prefilled(isa, heads, kv_heads, head_dim):
    """More than one chunk of keys: a lone token's chunks are spread over threads and merged, a tile's are not."""
    n = 800
    inputs = random_inputs([n], heads, kv_heads, head_dim)
    shape = (heads, kv_heads, head_dim)
    whole = run_cut(isa, [n], [n], inputs, *shape, threads=1)
    np.testing.assert_allclose(
        whole, dense(inputs[0][0], inputs[1][0], inputs[2][0], heads, kv_heads), rtol=0, atol=1e-5
    )
    tail = [250, 256, 257, 258, 511, 512, 513, 600, *range(767, 772), 799, n]
    for threads in (1, 2, 3):
        assert np.array_equal(run_cut(isa, [n], tail, inputs, *shape, threads=threads), whole)
    assert np.array_equal(run_cut(isa, [n], range(160, n + 1, 160), inputs, *shape, threads=3), whole)


def test_large_scores_do_not_overflow(isa):
    q, k, v = random_inputs([50], 2, 1, 64)
    q[0] *= 1e4
    out = Paged(isa, [50], heads=2, kv_heads=1, head_dim=64).step(q, k, v, [(0, 50)])[0]
    # The scores are near 1e5, where float32 has steps of 1/128.
    np.testing.assert_allclose(out, dense(q[0], k[0], v[0], 2, 1), rtol=0, atol=0.05)


TYPED = [
    (kv_type, *shape)
    for kv_type in ("f32", "bf16", "q8_0")
    for shape in SHAPES
    if kv_type != "q8_0" or shape[2] % 32 == 0
]


@pytest.mark.parametrize(("kv_type", "heads", "kv_heads", "head_dim"), TYPED)
@pytest.mark.parametrize("block_size", [1, 5, 32])
def test_every_type_is_exact(isa, kv_type, heads, kv_heads, head_dim, block_size):
    """Prefill, then one token at a time, across the border of a chunk."""
    n = 270
    q, k, v = random_inputs([n], heads, kv_heads, head_dim)
    cache = Paged(isa, [n], heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, kv_type=kv_type)
    rows = [cache.step(q, k, v, [r])[0] for r in [(0, 250), (250, 251), (251, 256), (256, 257), (257, n)]]
    expected = dense(q[0], k[0], v[0], heads, kv_heads, kv_type)
    np.testing.assert_allclose(np.concatenate(rows), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("kv_type", ["f32", "bf16", "q8_0"])
def test_every_type_gives_the_same_bits_decoded_and_prefilled(isa, kv_type):
    n = 600
    inputs = random_inputs([n], 6, 2, 64)
    whole = run_cut(isa, [n], [n], inputs, 6, 2, 64, threads=1, kv_type=kv_type)
    tail = [100, 255, 256, 257, 260, 511, 512, 513, n]
    for threads in (1, 2, 3):
        assert np.array_equal(run_cut(isa, [n], tail, inputs, 6, 2, 64, threads=threads, kv_type=kv_type), whole)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_cache_holds_the_nearest_numbers(isa, kv_type, layer):
    """All magnitudes, ties and subnormals included, at the places that csrc/cache.hpp says, and nowhere else."""
    rng = np.random.default_rng(2)
    tokens, kv_heads, head_dim, block_size, layers = 40, 2, 64, 24, 3
    encoding = QUANT_TYPES[kv_type.upper()]
    x = (rng.normal(size=(tokens, kv_heads * head_dim)) * 10.0 ** rng.integers(-9, 4, (tokens, 1))).astype(np.float32)
    below = rng.integers(0, 0x7BFF, x[:8].shape).astype(np.uint16)
    above = below + np.uint16(1)
    x[:8] = (below.view(np.float16).astype(np.float32) + above.view(np.float16).astype(np.float32)) / 2
    x[8:12] = rng.integers(-127, 128, x[8:12].shape) * 2.5  # ties of q8_0
    x[12] = 0
    cache = Paged(
        isa, [tokens], heads=2, kv_heads=2, head_dim=head_dim, block_size=block_size, kv_type=kv_type, layers=layers
    )
    cache.step([x], [x], [-x], [(0, tokens)], layer)
    blocks = cache.data.reshape(len(cache.tables[0]) + 3, layers, kv_heads, -1)
    padded, width, scales = 32, encoding.block_bytes, 0
    if kv_type == "q8_0":
        width, scales = 1, head_dim // 32
    keys_end = head_dim * padded * width
    values_start = keys_end + -(-2 * scales * padded // 64) * 64
    values_end = values_start + block_size * head_dim * width
    for t in range(tokens):
        block, offset = blocks[cache.tables[0, t // block_size], layer], t % block_size
        keys = block[:, :keys_end].reshape(kv_heads, head_dim, padded, width)[:, :, offset]
        values = block[:, values_start:values_end].reshape(kv_heads, block_size, head_dim, width)[:, offset]
        for sign, numbers, at in ((1, keys, keys_end), (-1, values, values_end)):
            expected = encoding.encode(sign * x[t].reshape(kv_heads, head_dim))
            if kv_type == "q8_0":
                half = block[:, at:].copy().view(np.uint16)
                found = (
                    half[:, offset : scales * padded : padded] if sign == 1 else half[:, offset * scales :][:, :scales]
                )
                expected = expected.reshape(kv_heads, scales, 34)
                assert np.array_equal(found, expected[..., :2].copy().view(np.uint16)[..., 0])
                expected = expected[..., 2:]
            assert np.array_equal(numbers.reshape(kv_heads, -1), expected.reshape(kv_heads, -1))
    others = np.delete(np.arange(layers), layer)
    assert (blocks[:, others] == 0xFF).all()


@pytest.mark.parametrize(("kv_type", "largest"), [("f16", 65504), ("q8_0", 127 * 65504)])
def test_what_a_type_cannot_hold_saturates(isa, kv_type, largest):
    q, k, v = random_inputs([3], 1, 1, 32)
    v[0][:] = [[np.inf], [-1e9], [70000]]
    k[0][:] = 0
    out = Paged(isa, [3], heads=1, kv_heads=1, head_dim=32, kv_type=kv_type).step(q, k, v, [(0, 3)])[0]
    np.testing.assert_allclose(out[:, 0], [largest, 0, min(largest, 70000) / 3], rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0"])
def test_a_broken_token_does_not_reach_its_neighbours(isa, kv_type):
    """NaN in one sequence stays there."""
    lengths = [40, 40]
    q, k, v = random_inputs(lengths, 2, 1, 32)
    k[1][3, 5], v[1][3] = np.nan, np.nan
    out = Paged(isa, lengths, heads=2, kv_heads=1, head_dim=32, kv_type=kv_type).step(q, k, v, [(0, 40), (0, 40)])
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1][3:]).all()


def test_wild_indices_are_refused():
    cache = Paged("portable", [40], heads=2, kv_heads=1, head_dim=16)
    blocks = 2 + 3
    q, k, v = (x[0] for x in random_inputs([1], 2, 1, 16))
    ok = {
        "positions": np.zeros(1, np.int32),
        "slots": np.zeros(1, np.int32),
        "seq_starts": np.array([0, 1], np.int32),
        "block_tables": np.zeros((1, 2), np.int32),
    }
    bad = [
        ("positions", [64]),
        ("positions", [-1]),
        ("slots", [-1]),
        ("slots", [32 * blocks]),
        ("seq_starts", [0, 2]),
        ("seq_starts", [1, 1]),
        ("block_tables", [[-1, 0]]),
        ("block_tables", [[blocks, 0]]),
    ]
    out = np.empty_like(q)
    cache.native.attend(cache.cache, 0, q, k, v, out, **ok)
    for name, value in bad:
        with pytest.raises(ValueError, match="attend"):
            cache.native.attend(cache.cache, 0, q, k, v, out, **{**ok, name: np.array(value, np.int32)})
    for layer in (-1, 1):
        with pytest.raises(ValueError, match="no such layer"):
            cache.native.attend(cache.cache, layer, q, k, v, out, **ok)


def test_a_cache_fits_its_buffer():
    good = (QUANT_TYPES["F16"].gguf_id, 4, 32, 2, 3, 64)
    assert native.cache_bytes(*good) == 2 * 2 * 4 * 32 * 2 * 3 * 64
    assert native.cache_bytes(QUANT_TYPES["Q8_0"].gguf_id, *good[1:]) == 2 * 4 * 32 * 2 * 3 * 64 * 34 // 32
    buffer = aligned(native.cache_bytes(*good) + 64)
    for wrong in (buffer, buffer[64:-64], buffer[1:-63]):
        with pytest.raises(ValueError, match="Cache: the buffer"):
            native.Cache(*good, wrong)
    for at, value, message in ((0, 2, "no such type"), (1, 0, "positive"), (5, 0, "positive")):
        with pytest.raises(ValueError, match=message):
            native.cache_bytes(*good[:at], value, *good[at + 1 :])
    with pytest.raises(ValueError, match="multiple of 32"):
        native.cache_bytes(QUANT_TYPES["Q8_0"].gguf_id, 4, 32, 2, 3, 80)
