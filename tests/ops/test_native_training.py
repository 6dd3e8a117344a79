"""The native steps of training against torch's in float64, gradients by its autograd, on every instruction set here."""

from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")
native = pytest.importorskip("puna._native", reason="the native extension is not built")

from puna.ops import torch_native  # noqa: E402
from puna.ops.torch_native import array  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # relative: half a unit of bfloat16's last place, doubled
SIZES = [1, 5, 16, 31, 64, 576, 2051]


@pytest.fixture(params=native.instruction_sets())
def kernels(request: pytest.FixtureRequest):
    return native.Native(2, request.param)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


def random(dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def gradients(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], output: torch.Tensor):
    """The value in float64 and what ``output``, the gradient of it, becomes for each input."""
    wide = [x.double().requires_grad_() for x in inputs]
    value = function(*wide)
    return value.detach(), torch.autograd.grad(value, wide, output.double())


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, terms: float = 0.0) -> None:
    """Within a rounding of each number, and of the arithmetic's before, whose largest ``terms`` may cancel."""
    error = (found.double() - expected).abs()
    allowed = ROUNDING[dtype] * expected.abs() + 3e-6 * max(float(expected.abs().max()), terms) + 1e-30
    assert (error <= allowed).all(), (error / allowed).max()


@pytest.mark.parametrize("columns", SIZES)
def test_norm(kernels, dtype: torch.dtype, columns: int) -> None:
    x, weight = random(dtype, 4, columns, scale=3), random(torch.float32, columns, seed=1)
    gradient = random(dtype, 4, columns, seed=2)
    x[1] *= 1e-3  # here eps matters

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    value, (x_gradient, _) = gradients(norm, [x, weight], gradient)
    out, inverse = torch.empty_like(x), torch.empty(4)
    kernels.norm(array(x), array(weight), 1e-5, array(out), array(inverse))
    for row in range(4):
        assert_near(out[row], value[row], dtype)
    kernels.norm_backward(array(x), array(weight), array(inverse), array(gradient), array(out))
    for row in range(4):
        terms = float((inverse[row] * gradient[row] * weight).abs().max())
        assert_near(out[row], x_gradient[row], dtype, terms)


@pytest.mark.parametrize(("heads", "half"), [(1, 1), (3, 5), (9, 32), (2, 40)])
def test_rotation_and_back(kernels, dtype: torch.dtype, heads: int, half: int) -> None:
    x, angles = random(dtype, 5, heads * 2 * half), random(torch.float32, 5, half, seed=1, scale=3)
    cosines, sines = angles.cos(), angles.sin()
    first, second = x.double().view(5, heads, 2, half).unbind(2)
    turned = torch.complex(first, second) * torch.complex(cosines.double(), sines.double())[:, None]
    out = torch.empty_like(x)
    kernels.rotate(array(x), array(cosines), array(sines), False, array(out))
    assert_near(out, torch.stack([turned.real, turned.imag], 2).view(x.shape), dtype)
    turned = torch.complex(first, second) * torch.complex(cosines.double(), -sines.double())[:, None]
    kernels.rotate(array(x), array(cosines), array(sines), True, array(out))
    assert_near(out, torch.stack([turned.real, turned.imag], 2).view(x.shape), dtype)


@pytest.mark.parametrize("columns", SIZES)
def test_gate(kernels, dtype: torch.dtype, columns: int) -> None:
    gate, up, gradient = (random(dtype, 3, columns, seed=seed, scale=4) for seed in range(3))
    gate[0, 0], gate[1, 0] = 90, -90  # where the sigmoid is 1, and where it is 0
    value, expected = gradients(lambda g, u: torch.nn.functional.silu(g) * u, [gate, up], gradient)
    out = torch.empty_like(gate)
    kernels.gate(array(gate), array(up), array(out))
    assert_near(out, value, dtype)
    found = torch.empty_like(gate), torch.empty_like(up)
    kernels.gate_backward(array(gate), array(up), array(gradient), *map(array, found))
    for ours, exact in zip(found, expected, strict=True):
        assert_near(ours, exact, dtype)


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 2051])
def test_cross_entropy(kernels, dtype: torch.dtype, vocabulary: int) -> None:
    logits, weights = random(dtype, 7, vocabulary, scale=5), torch.rand(7, generator=torch.Generator().manual_seed(1))
    targets = torch.randint(0, vocabulary, (7,), generator=torch.Generator().manual_seed(2))

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights.double()

    value, (expected,) = gradients(loss, [logits], torch.ones(7))
    losses, kept = torch.empty(7), logits.clone()
    kernels.cross_entropy(array(logits), array(targets), array(weights), False, array(losses))
    assert torch.equal(logits, kept)
    assert_near(losses, value, torch.float32)
    kernels.cross_entropy(array(logits), array(targets), array(weights), True, array(losses))
    assert_near(losses, value, torch.float32)
    assert_near(logits, expected, dtype)


def test_cross_entropy_refuses_targets_beyond_the_vocabulary(kernels) -> None:
    one = np.ones(1, np.float32)
    for target in (-1, 4):
        with pytest.raises(ValueError, match="out of range"):
            kernels.cross_entropy(np.ones((1, 4), np.float32), np.array([target]), one, True, one)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (5, 40), (128, 256)])
def test_causal_softmax(kernels, dtype: torch.dtype, queries: int, keys: int) -> None:
    scores, gradient = random(torch.float32, 2, queries, 3, keys, scale=9), random(dtype, 2, queries, 3, keys, seed=1)
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)[:, None]

    def softmax(scores: torch.Tensor) -> torch.Tensor:
        return (0.3 * scores.masked_fill(hidden, -torch.inf)).softmax(-1)

    value, (expected,) = gradients(softmax, [scores], gradient)
    weights = torch.empty(scores.shape, dtype=dtype)
    kernels.causal_softmax(array(scores), 0.3, array(weights))
    assert_near(weights, value, dtype)
    assert not weights[hidden.expand_as(weights)].any()
    exact = weights.double() * (gradient - (weights * gradient.double()).sum(-1, keepdim=True)) * 0.3
    kernels.softmax_backward(array(weights.flatten(0, 2)), 0.3, array(gradient.view(-1, keys)))
    assert_near(gradient, exact, dtype)
    # The weights' own rounding is what is left towards the gradient of the unrounded ones.
    assert (gradient - expected).norm() <= 3 * ROUNDING[dtype] * expected.norm() + 1e-9


def test_numbers_that_are_not_finite_stay_visible(kernels, dtype: torch.dtype) -> None:
    """So that training stops where they come up."""
    for bad in (float("nan"), float("inf")):
        logits, losses = random(dtype, 1, 40), torch.empty(1)
        logits[0, 7] = bad
        kernels.cross_entropy(array(logits), array(torch.tensor([3])), array(torch.ones(1)), True, array(losses))
        assert not losses.isfinite().any()
        x, out = random(dtype, 1, 40), torch.empty(1, 40, dtype=dtype)
        x[0, 7] = bad
        kernels.gate(array(x), array(torch.ones_like(x)), array(out))
        assert not out.isfinite().all()
        kernels.norm(array(x), array(torch.ones(40)), 1e-5, array(out), array(losses))
        assert not out.isfinite().all()


def test_torchs_threads_give_the_same_numbers() -> None:
    x = random(torch.bfloat16, 300, 576)
    shared = torch_native.training_kernels(x)
    if shared is None:
        pytest.skip("this torch brings no OpenMP runtime of GNU's")
    outs = []
    for kernels in (shared, native.Native(1, shared.isa)):
        outs.append(torch.empty_like(x))
        kernels.gate(array(x), array(x), array(outs[-1]))
    assert torch.equal(*outs)


def test_other_numbers_are_left_to_torch() -> None:
    assert torch_native.training_kernels(torch.ones(1, dtype=torch.float64)) is None
    assert torch_native.training_kernels(torch.ones(1, device="meta")) is None
