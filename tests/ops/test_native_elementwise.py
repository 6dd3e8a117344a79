"""The native norm, rotation and activation against float64 formulas, on every instruction set of this machine."""

import numpy as np
import pytest

native = pytest.importorskip("puna._native", reason="the native extension is not built")


@pytest.fixture(params=native.instruction_sets())
def ops(request):
    return native.Native(2, request.param)


SIZES = [1, 2, 3, 5, 8, 17, 31, 64, 70, 576, 2051]


@pytest.mark.parametrize("columns", SIZES)
def test_rms_norm(ops, columns):
    rng = np.random.default_rng(columns)
    x, weight = rng.normal(0, 3, (4, columns)).astype(np.float32), rng.normal(size=columns).astype(np.float32)
    x[1] = 0
    x[2] *= 1e-4  # here eps matters
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    out = np.full_like(x, np.nan)
    ops.rms_norm(x, weight, 1e-5, out)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-9)
    ops.rms_norm(x, weight, 1e-5, x)  # in place
    assert np.array_equal(x, out)


def test_rms_norm_of_a_row_does_not_depend_on_the_batch(ops):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(300, 131)).astype(np.float32), rng.normal(size=131).astype(np.float32)
    together, alone = np.empty_like(x), np.empty_like(x)
    ops.rms_norm(x, weight, 1e-6, together)
    for i in range(len(x)):
        ops.rms_norm(x[i : i + 1], weight, 1e-6, alone[i : i + 1])
    assert np.array_equal(together, alone)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 6), (2, 10), (9, 64), (4, 80), (2, 128), (1, 256)])
def test_rope_is_a_complex_multiplication(ops, heads, head_dim):
    rng = np.random.default_rng(head_dim)
    x = rng.normal(size=(5, heads * head_dim)).astype(np.float32)
    angles = rng.uniform(-3, 3, (5, head_dim // 2))
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = np.split(x.astype(np.float64).reshape(5, heads, head_dim), 2, axis=-1)
    turned = (first + 1j * second) * (cosines + 1j * sines.astype(np.float64))[:, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1).reshape(x.shape)
    ops.rope(x, cosines, sines)
    np.testing.assert_allclose(x, expected, atol=1e-6)


@pytest.mark.parametrize("half", [1, 3, 16, 37, 64])
@pytest.mark.parametrize("every_token", [False, True])
def test_rope_angles_are_exact_to_float32(ops, half, every_token):
    rng = np.random.default_rng(half)
    positions = np.concatenate([[0, 1, 2, 3, 2**24 + 1, 2**31 - 1], rng.integers(0, 2**20, 300)]).astype(np.int32)
    frequencies = rng.uniform(0, 1, (len(positions), half) if every_token else half).astype(np.float32)
    frequencies[..., 0] = 1
    angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.longdouble)
    cosines, sines = np.full(angles.shape, np.nan, np.float32), np.full(angles.shape, np.nan, np.float32)
    ops.rope_angles(positions, frequencies, 1.0, cosines, sines)
    np.testing.assert_allclose(cosines, np.cos(angles).astype(np.float64), rtol=0, atol=6e-8)
    np.testing.assert_allclose(sines, np.sin(angles).astype(np.float64), rtol=0, atol=6e-8)
    scaled = np.empty_like(cosines), np.empty_like(sines)
    ops.rope_angles(positions, frequencies, 1.25, *scaled)
    assert np.array_equal(scaled[0], cosines * np.float32(1.25))
    assert np.array_equal(scaled[1], sines * np.float32(1.25))


@pytest.mark.parametrize("columns", SIZES)
def test_swiglu(ops, columns):
    rng = np.random.default_rng(columns)
    gate, up = rng.normal(0, 8, (3, columns)).astype(np.float32), rng.normal(size=(3, columns)).astype(np.float32)
    wide = gate.astype(np.float64)
    out = np.full_like(gate, np.nan)
    ops.swiglu(gate, up, out)
    np.testing.assert_allclose(out, wide / (1 + np.exp(-wide)) * up, rtol=1e-6, atol=1e-30)


def test_swiglu_at_the_ends_of_the_range(ops):
    gate = np.float32([[-1e30, -200, -90, -50, -0.0, 50, 90, 200, 1e30, np.nan]])
    out = np.empty_like(gate)
    ops.swiglu(gate, np.ones_like(gate), out)
    assert np.abs(out[0, :2]).max() < 1e-7 * 1e30 / 1e30
    np.testing.assert_allclose(out[0, 3:9], [-50 / (1 + np.exp(50.0)), 0, 50, 90, 200, 1e30], rtol=1e-6)
    assert np.isnan(out[0, 9])


def test_wrong_shapes_are_refused(ops):
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="rms_norm"):
        ops.rms_norm(x, np.zeros(7, np.float32), 1e-5, x)
    with pytest.raises(ValueError, match="rope"):
        ops.rope(x, np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32))
    angles = np.zeros((2, 4), np.float32)
    for frequencies in (np.zeros(3, np.float32), np.zeros((3, 4), np.float32), np.zeros((1, 2, 4), np.float32)):
        with pytest.raises(ValueError, match="rope_angles"):
            ops.rope_angles(np.zeros(2, np.int32), frequencies, 1.0, angles, angles.copy())
    with pytest.raises(ValueError, match="swiglu"):
        ops.swiglu(x, x, np.zeros((2, 7), np.float32))


def test_outputs_are_never_copies(ops):
    """A float64 array to write to would silently be converted, and the result lost."""
    x = np.ones((2, 8), np.float32)
    with pytest.raises(TypeError):
        ops.rms_norm(x, np.ones(8, np.float32), 1e-5, np.zeros((2, 8)))
    with pytest.raises(TypeError):
        ops.rope(np.ones((2, 8)), np.ones((2, 4), np.float32), np.ones((2, 4), np.float32))
