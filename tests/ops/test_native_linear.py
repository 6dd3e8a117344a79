"""The native linear layers against the formula they promise, for every weight type and instruction set.

Expected products are float64, with weights decoded by the gguf package where it can, and activations quantized in numpy
as csrc/activations.hpp describes.
"""

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_reference import FLOATS, TYPES, as_multiplied, block_of, decoded, random_weight

from puna.errors import RequestError
from puna.tensor import QUANT_TYPES, Weight

native = pytest.importorskip("puna._native", reason="the native extension is not built")

from puna.ops.native_ops import NativeOps  # noqa: E402

ISAS = native.instruction_sets()


@pytest.fixture(scope="module", params=ISAS)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(2, request.param)


def assert_formula(ops: NativeOps, weight: Weight, x: np.ndarray) -> None:
    """The product with rounded activations, to float32 rounding of the sum's terms."""
    inputs = as_multiplied(x, weight.type.name, ops.isa)
    w = decoded(weight)
    difference = np.abs(ops.linear(x, ops.weight(weight)) - inputs @ w.T)
    magnitude = np.abs(inputs) @ np.abs(w).T + 1e-30
    assert (difference / magnitude).max() < 2e-6


@pytest.mark.parametrize("name", TYPES)
def test_matches_the_formula(ops: NativeOps, name: str) -> None:
    rng = np.random.default_rng(1)
    block = block_of(name)
    shapes = {
        1: [(5, 7), (16, 33), (48, 576)],
        32: [(1, 32), (37, 96), (48, 576)],
        256: [(1, 256), (37, 768), (33, 1536)],
    }
    for rows, columns in shapes[block]:
        weight = random_weight(name, rows, columns)
        for tokens in (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 23, 48, 70):
            assert_formula(ops, weight, rng.standard_normal((tokens, columns), np.float32))


@pytest.mark.parametrize("name", TYPES)
def test_extreme_codes_do_not_overflow(ops: NativeOps, name: str) -> None:
    """Codes at the ends of their range against activations of +-127 steps: 16-bit partial sums are at their limit."""
    rng = np.random.default_rng(2)
    for codes in ((0x00,), (0xFF,), (0x80,), (0x7F,), (0x00, 0xFF), (0x0F, 0xF0), (0x80, 0x7F)):
        weight = random_weight(name, 20, 512, codes=codes)
        for x in (np.ones((3, 512)), -np.ones((3, 512)), rng.choice([-1.0, 1.0], (13, 512))):
            assert_formula(ops, weight, x.astype(np.float32))


@pytest.mark.parametrize("name", TYPES)
def test_close_to_the_unquantized_product(ops: NativeOps, name: str) -> None:
    """Rounding Gaussian activations to int8 in groups of 32 costs 0.6 % of the result's size, to bfloat16 0.2 %."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((64, 1024), np.float32)
    kind = QUANT_TYPES[name]
    weight = Weight.from_array("w", values, name) if kind.can_encode else random_weight(name, 64, 1024)
    x = rng.standard_normal((9, 1024), np.float32)
    expected = x.astype(np.float64) @ decoded(weight).T
    error = ops.linear(x, ops.weight(weight)) - expected
    limit = 0.012 if name not in FLOATS else 0.002 if (name, ops.isa) == ("BF16", "avx512bf16") else 1e-6
    assert np.sqrt(np.mean(error**2) / np.mean(expected**2)) < limit


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_depend_on_the_batch_or_the_threads(isa: str, name: str) -> None:
    columns = 512
    x = np.random.default_rng(4).standard_normal((70, columns), np.float32)
    weight = random_weight(name, 37, columns)
    alone = None
    for threads in (1, 2, 3):
        ops = NativeOps(threads, isa)
        w = ops.weight(weight)
        if alone is None:
            alone = np.concatenate([ops.linear(x[i : i + 1], w) for i in range(70)])
        for tokens in range(1, 71):
            first = 70 - tokens if tokens % 2 else 0
            np.testing.assert_array_equal(ops.linear(x[first : first + tokens], w), alone[first : first + tokens])


@pytest.mark.skipif("avx512" not in ISAS, reason="this machine has no AVX512-VNNI")
@pytest.mark.parametrize("name", TYPES)
def test_avx2_and_avx512_give_the_same_bits(name: str) -> None:
    weight = random_weight(name, 40, 768)
    x = np.random.default_rng(5).standard_normal((14, 768), np.float32)
    wide, narrow = (ops.linear(x, ops.weight(weight)) for ops in (NativeOps(1, "avx512"), NativeOps(1, "avx2")))
    np.testing.assert_array_equal(wide, narrow)


@pytest.mark.skipif("avx512bf16" not in ISAS, reason="this machine has no AVX512-BF16, or a slow one")
@pytest.mark.parametrize("name", [name for name in TYPES if name != "BF16"])
def test_bfloat16_products_are_for_bfloat16_weights_alone(name: str) -> None:
    weight = random_weight(name, 40, 768)
    x = np.random.default_rng(5).standard_normal((14, 768), np.float32)
    with_them, without = (
        ops.linear(x, ops.weight(weight)) for ops in (NativeOps(1, "avx512bf16"), NativeOps(1, "avx512"))
    )
    np.testing.assert_array_equal(with_them, without)


def test_linears_of_mixed_types_equal_one_at_a_time(ops: NativeOps) -> None:
    rng = np.random.default_rng(6)
    names = ("Q4_K", "Q6_K", "Q8_0", "F16", "Q4_0", "BF16", "Q2_K", "IQ4_XS")
    weights = [ops.weight(random_weight(name, 20 + 7 * i, 512, seed=i)) for i, name in enumerate(names)]
    biases = [rng.standard_normal(w.shape[0]).astype(np.float32) if i % 2 else None for i, w in enumerate(weights)]
    for tokens in (1, 6, 100):
        x = rng.standard_normal((tokens, 512), np.float32)
        for out, w, bias in zip(ops.linears(x, weights, biases), weights, biases, strict=True):
            np.testing.assert_array_equal(out, ops.linear(x, w, bias))


@pytest.mark.parametrize("rows", [1, 16, 23, 45])
def test_bias_and_residual_are_added_in_that_order(ops: NativeOps, rows: int) -> None:
    rng = np.random.default_rng(7)
    w = ops.weight(random_weight("Q4_1", rows, 64))
    x = rng.standard_normal((14, 64), np.float32)
    bias, residual = rng.standard_normal(rows).astype(np.float32), rng.standard_normal((14, rows), np.float32)
    plain = ops.linear(x, w)
    np.testing.assert_array_equal(ops.linear(x, w, bias), plain + bias)
    np.testing.assert_array_equal(ops.linear(x, w, None, residual), plain + residual)
    np.testing.assert_array_equal(ops.linear(x, w, bias, residual), plain + bias + residual)


def test_no_tokens(ops: NativeOps) -> None:
    out = ops.linear(np.empty((0, 64), np.float32), ops.weight(random_weight("Q8_0", 20, 64)))
    assert out.shape == (0, 20)


@pytest.mark.parametrize("name", ["Q4_0", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_activation_shows_in_its_row_and_no_other(ops: NativeOps, name: str, bad: float) -> None:
    w = ops.weight(random_weight(name, 20, 128))
    x = np.random.default_rng(8).standard_normal((14, 128), np.float32)
    clean = ops.linear(x, w)
    x[5, 77] = bad
    out = ops.linear(x, w)
    assert not np.isfinite(out[5]).any()
    np.testing.assert_array_equal(np.delete(out, 5, axis=0), np.delete(clean, 5, axis=0))


def test_tiny_and_zero_activations(ops: NativeOps) -> None:
    w = ops.weight(random_weight("Q8_0", 20, 64))
    assert not ops.linear(np.zeros((2, 64), np.float32), w).any()
    assert np.abs(ops.linear(np.full((2, 64), 1e-42, np.float32), w)).max() < 1e-37


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from([n for n in TYPES if n not in FLOATS]), seed=st.integers(0, 2**32 - 1))
def test_any_weight_bytes_are_survived(name: str, seed: int) -> None:
    """Hostile scales (NaN, infinite) reach only their own output rows."""
    rng = np.random.default_rng(seed)
    kind = QUANT_TYPES[name]
    data = rng.integers(0, 256, (35, kind.row_bytes(256)), np.uint8)
    x = rng.standard_normal((3, 256), np.float32)
    ops = NativeOps(1)
    out = ops.linear(x, ops.weight(Weight("w", (35, 256), kind, data)))
    with np.errstate(all="ignore"):
        sane = (np.abs(kind.decode(data)) < 1e30).all(axis=1)
    assert np.isfinite(out[:, sane]).all()


def test_a_tied_embedding_serves_both_uses(ops: NativeOps) -> None:
    weight = random_weight("Q8_0", 40, 64)
    table = ops.weight(weight)
    x = ops.embed(table, np.array([3, 39, 0], np.int32))
    np.testing.assert_allclose(x, decoded(weight)[[3, 39, 0]], rtol=1e-6)
    assert_formula(ops, weight, x)
    ops.linear(x, table)
    np.testing.assert_array_equal(ops.embed(table, np.array([3, 39, 0], np.int32)), x)


def test_mapped_files_are_read_and_left(ops: NativeOps, tmp_path: Path) -> None:
    expected = random_weight("Q4_0", 300, 512)
    path = tmp_path / "weights"
    path.write_bytes(b"header" + expected.data.tobytes())
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(mapped, np.uint8, offset=6).reshape(expected.data.shape)
    weight = Weight("w", expected.shape, expected.type, data)
    x = np.ones((2, 512), np.float32)
    np.testing.assert_array_equal(ops.linear(x, ops.weight(weight)), ops.linear(x, ops.weight(expected)))
    np.testing.assert_array_equal(weight.data, expected.data)


def test_wrong_shapes_are_refused() -> None:
    ops = NativeOps(1)
    w = ops.weight(random_weight("Q8_0", 20, 64))
    good = np.zeros((2, 64), np.float32)
    for x, bias, residual in (
        (np.zeros((2, 32), np.float32), None, None),
        (good, np.zeros(19, np.float32), None),
        (good, None, np.zeros((1, 20), np.float32)),
    ):
        with pytest.raises(ValueError, match="linears"):
            ops.linear(x, w, bias, residual)
    core = native.Native(1, ISAS[0])
    with pytest.raises(TypeError):  # a copy would be written to in the output's place
        core.linears(good, [w.panels], [None], None, [np.zeros((2, 20), np.float64)])
    for kind, rows, columns, size in ((8, 16, 31, 64), (99, 16, 32, 64), (8, 16, 32, 543), (8, -16, 32, 544)):
        with pytest.raises(ValueError, match="Panels"):
            native.Panels(kind, rows, columns, np.zeros(size, np.uint8))
    with pytest.raises(ValueError, match="pack"):
        core.pack(8, 16, 32, np.zeros((15, 34), np.uint8), np.zeros(544, np.uint8))


def test_an_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNA_ISA", "portable")
    assert NativeOps(1).isa == "portable"
    monkeypatch.setenv("PUNA_ISA", "mmx")
    with pytest.raises(RequestError, match=r"mmx.*portable"):
        NativeOps(1)
