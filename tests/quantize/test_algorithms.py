"""GPTQ and AWQ against the least squares that they approximate, and plain rounding against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_models import VARIANTS, tiny_checkpoint, tiny_config

from puna.errors import CheckpointError, RequestError
from puna.model.model import Model
from puna.ops.reference import ReferenceOps
from puna.quantize.awq import awq
from puna.quantize.calibration import one_sequence
from puna.quantize.gptq import gptq
from puna.quantize.layerwise import STAGES, LayerByLayer
from puna.quantize.rtn import round_to_nearest, spacing

WINDOWS = [np.random.default_rng(i).integers(0, 256, 40).tolist() for i in range(4)]


def correlated(columns: int, seed: int = 0) -> np.ndarray:
    """Second moments of inputs that depend on each other, of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * columns, columns)) @ rng.standard_normal((columns, columns))
    x *= np.exp(rng.standard_normal(columns))
    return x.T @ x / len(x)


def loss(change: np.ndarray, second: np.ndarray) -> float:
    return float(np.einsum("ri,ij,rj->", change, second, change))


finite = st.floats(-100, 100, width=32, allow_subnormal=False)


@given(
    values=arrays(np.float32, (3, 96), elements=finite),
    bits=st.sampled_from([2, 4, 8]),
    size=st.sampled_from([32, 64, -1]),
    symmetric=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_rounds_within_half_a_step(values: np.ndarray, bits: int, size: int, symmetric: bool) -> None:
    grouped = round_to_nearest(values, bits, size, symmetric)
    step = grouped.scales[:, grouped.groups]
    error = np.abs(grouped.dequantize() - values)
    # A whole step at the end that symmetric codes, or a rounded zero point, do not reach; the step is a float16.
    reach = step * (1.0 if symmetric else 1.01) + np.abs(values).max() * 2.0**-9 + 1e-6
    assert (error <= reach).all()
    assert (error <= step * 0.51 + np.abs(values).max() * 2.0**-9 + 1e-6).mean() > 0.5
    assert grouped.zeros.min() > 0


def test_numbers_above_zero_reach_their_largest_without_a_zero_point_of_zero() -> None:
    """The first version of the layout gptq stores zero points less 1, in fields that hold nothing below 0."""
    values = np.linspace(0, 14, 32, dtype=np.float32)[None]
    grouped = round_to_nearest(values, 4, 32, symmetric=False)
    assert (grouped.zeros.item(), grouped.scales.item()) == (1, 1.0)
    np.testing.assert_array_equal(grouped.dequantize(), np.rint(values))


def test_refuses_what_float16_cannot_scale() -> None:
    with pytest.raises(CheckpointError, match="float16"):
        spacing(np.full((1, 4), 3e38, np.float32), 4, True)


def test_gptq_groups_that_follow_the_order() -> None:
    """The same as GPTQ in order, of a matrix whose columns were put in that order before."""
    second, values = correlated(96, 5), np.random.default_rng(5).standard_normal((6, 96)).astype(np.float32)
    order = np.argsort(-np.diag(second), kind="stable")
    found = gptq(values, second, 4, 32, False, act_order=True, static_groups=False)
    expected = gptq(values[:, order], second[np.ix_(order, order)], 4, 32, False, act_order=False)
    np.testing.assert_array_equal(found.codes[:, order], expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)
    np.testing.assert_array_equal(found.groups[order], expected.groups)
    assert not found.in_order
    static = gptq(values, second, 4, 32, False)
    assert static.in_order
    assert loss(found.dequantize() - values, second) < loss(static.dequantize() - values, second)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_makes_errors_good_as_least_squares_says(act_order: bool) -> None:
    """After each column the others are the least-squares solution, given the columns that are rounded already."""
    columns, rows = 48, 5
    second = correlated(columns)
    values = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
    found = gptq(values, second, 4, -1, False, act_order)
    damped = second + np.eye(columns) * 0.01 * np.diag(second).mean()
    order = np.argsort(-np.diag(second), kind="stable") if act_order else np.arange(columns)
    scales, zeros = spacing(values, 4, False)
    errors = np.zeros((rows, columns))
    for at, column in enumerate(order):
        done, ahead = order[:at], order[at:]
        # minimise (e H eᵀ) over the errors of the columns ahead, those done being fixed
        best = -errors[:, done] @ damped[np.ix_(done, ahead)] @ np.linalg.inv(damped[np.ix_(ahead, ahead)])
        current = values[:, column] + best[:, 0]
        code = np.clip(np.rint(current / scales) + zeros, 0, 15)
        np.testing.assert_array_equal(found.codes[:, column], code)
        errors[:, column] = (code - zeros) * scales - values[:, column]


def test_gptq_rounds_plainly_where_inputs_do_not_depend_on_each_other() -> None:
    values = np.random.default_rng(2).standard_normal((8, 160)).astype(np.float32)
    plain = round_to_nearest(values, 4, 64, False)
    for act_order in (False, True):
        found = gptq(values, np.eye(160), 4, 64, False, act_order)
        np.testing.assert_array_equal(found.codes, plain.codes)
        np.testing.assert_array_equal(found.scales, plain.scales)


@pytest.mark.parametrize("size", [32, 96, 128, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_beats_plain_rounding(size: int, symmetric: bool) -> None:
    columns = 320
    second, values = correlated(columns, 3), np.random.default_rng(3).standard_normal((24, columns)).astype(np.float32)
    plain = loss(round_to_nearest(values, 4, size, symmetric).dequantize() - values, second)
    for act_order in (False, True):
        assert loss(gptq(values, second, 4, size, symmetric, act_order).dequantize() - values, second) < 0.6 * plain


def test_gptq_survives_columns_that_are_never_used() -> None:
    second = correlated(64)
    second[5], second[:, 5] = 0, 0
    values = np.random.default_rng(4).standard_normal((4, 64)).astype(np.float32)
    assert not gptq(values, second, 4, 32).dequantize()[:, 5].any()


def test_gptq_refuses_inputs_that_are_not_finite() -> None:
    with pytest.raises(RequestError, match="not finite"):
        gptq(np.ones((2, 32), np.float32), np.full((32, 32), np.nan), 4, 32)


@pytest.mark.parametrize("name", ["gqa", "mha", "both_biases", "rope_llama3"])
def test_layer_by_layer_is_the_model(name: str) -> None:
    checkpoint = tiny_checkpoint(VARIANTS[name])
    config = checkpoint.config
    walk = LayerByLayer(config, checkpoint.tensors, WINDOWS)
    for _ in range(config.num_hidden_layers):
        walk.advance()
    ops = ReferenceOps()
    model = Model.bind(ops, config, checkpoint.tensors)
    for window, state in zip(WINDOWS, walk._states, strict=True):
        expected = model.hidden(one_sequence(window), ops.new_kv(config, 1, len(window)))
        normed = ops.rms_norm(state, model.weights.norm, config.rms_norm_eps)
        np.testing.assert_allclose(normed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gqa", "mha", "both_biases"])
def test_awq_scales_without_changing_the_layer_and_loses_less(name: str) -> None:
    config = VARIANTS[name] if name != "gqa" else tiny_config()
    checkpoint = tiny_checkpoint(config)
    before, after, plain = (LayerByLayer(config, checkpoint.tensors, WINDOWS) for _ in range(3))
    # inputs of different sizes, which is what the method is for
    uneven = np.exp(np.random.default_rng(5).standard_normal(config.hidden_size)).astype(np.float32)
    for walk in (before, after, plain):
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            walk.values[norm] = walk.values[norm] * uneven
    moments = before.inputs(STAGES)
    original = {key: values.copy() for key, values in before.values.items()}
    quantized = awq(after.values, moments, 32)
    assert not np.array_equal(after.values["input_layernorm.weight"], original["input_layernorm.weight"])
    before.advance()
    scaled = after.values
    after.values = dict(scaled)
    after.advance()
    for one, other in zip(before._states, after._states, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    # the error of a stage's outputs: scaled weights read scaled inputs
    second = moments["mlp.gate_proj"].second
    scale = original["post_attention_layernorm.weight"] / scaled["post_attention_layernorm.weight"]
    for proj in ("mlp.gate_proj",):
        found = quantized[proj].dequantize() / scale - original[f"{proj}.weight"]
        rounded = round_to_nearest(original[f"{proj}.weight"], 4, 32, False).dequantize() - original[f"{proj}.weight"]
        assert loss(found, second) < loss(rounded, second)
