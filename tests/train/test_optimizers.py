"""AdamW with moments of 32 and of 8 bits: against torch's, against the paper's code, and from its stored state."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VARIANTS, random_weights

torch = pytest.importorskip("torch")

from puna.errors import TrainingError  # noqa: E402
from puna.ops.torch_ops import TorchOps  # noqa: E402
from puna.train import optimizers  # noqa: E402
from puna.train.module import Full, LlamaModule, LoRA  # noqa: E402
from puna.train.optimizers import BLOCK, OPTIMIZERS, DynamicCode, Optimizer, make_optimizer  # noqa: E402
from puna.train.trainer import NextToken  # noqa: E402

CONFIG = VARIANTS["gqa"]


class Documents:
    """Two that count upwards."""

    def __init__(self, number: int) -> None:
        rng = np.random.default_rng(number)
        self.ids = np.concatenate([rng.integers(0, 256) + np.arange(30) for _ in range(2)]).astype(np.int32) % 256
        self.trained = np.ones(60, bool)
        self.seq_starts = np.array([0, 30, 60], np.int32)


def parameters(seed: int = 0, shapes: tuple[tuple[int, ...], ...] = ((70, 100), (5, 3), (9,))) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {f"p{n}": torch.nn.Parameter(torch.randn(*shape, generator=generator)) for n, shape in enumerate(shapes)}


def give_gradients(params: dict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in params.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(optimizer: Optimizer, params: dict, steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step(0.1 / (1 + step))
        optimizer.zero_grad()


@pytest.mark.parametrize("signed", [True, False])
def test_the_values_are_the_papers(signed: bool) -> None:
    """The ends of the map, and how many values each decade has: 7 bits of magnitude with a sign, 8 without."""
    values = DynamicCode(signed).values.double()
    assert len(values.unique()) == 256
    assert values[-1] == 1
    assert values[DynamicCode(signed).zero] == 0
    positive = values[values > 0]
    assert positive[0].item() == pytest.approx(0.55e-6 if signed else 0.325e-6)
    assert positive[-2].item() == pytest.approx(1 - 0.9 / (128 if signed else 256))
    counts = [int(((positive > 10.0**e) & (positive < 10.0 ** (e + 1))).sum()) for e in range(-7, 0)]
    assert counts == [(1 if signed else 2) << n for n in range(7)]
    if signed:
        torch.testing.assert_close(values[:127], -positive[:-1].flip(0), rtol=0, atol=0)
    else:
        assert values[0] == 0


@pytest.mark.parametrize("signed", [True, False])
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=2 * BLOCK + 1),
)
def test_every_number_gets_the_nearest_value(signed: bool, numbers: list[float]) -> None:
    """But for numbers within a thousandth of the middle between two; a row's blocks are as long as each other."""
    code = DynamicCode(signed)
    given_numbers = torch.tensor(numbers, dtype=torch.float32)
    given_numbers = given_numbers if signed else given_numbers.abs()
    codes, scales = (part[0] for part in code.encode(given_numbers[None]))
    size = -(-len(numbers) // len(scales))
    assert (len(scales) - 1) * BLOCK < len(numbers) <= len(scales) * BLOCK
    for number, start in enumerate(range(0, len(numbers), size)):
        block = given_numbers[start : start + size].double()
        scale = block.abs().max()
        assert scales[number] == scale
        scaled = block / scale if scale > 0 else block
        distances = (scaled[:, None] - code.values.double()).abs()
        found = distances.gather(1, codes[start : start + size, None].long())[:, 0]
        assert (found <= distances.min(1).values + 1e-3 * scaled.abs() + 1e-12).all()
    expected = code.values[codes.long()] * scales.repeat_interleave(size)[: len(numbers)]
    torch.testing.assert_close(code.decode(codes[None], scales[None])[0], expected, rtol=0, atol=0)


def test_what_is_decoded_is_encoded_to_itself() -> None:
    for signed in (True, False):
        code = DynamicCode(signed)
        codes = torch.arange(256, dtype=torch.uint8)[None]
        again, scales = code.encode(code.decode(codes, torch.tensor([[3.0]])))
        assert scales.item() == 3
        torch.testing.assert_close(again, codes)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_against_torch(kind: str) -> None:
    """Only the matrix of 7,000 numbers is encoded: it comes near to torch's, all others are equal to it."""
    ours, theirs = parameters(), parameters()
    optimizer = make_optimizer(kind, ours, betas=(0.8, 0.95), epsilon=1e-6, weight_decay=0.3)
    decayed, plain = [p for p in theirs.values() if p.ndim == 2], [p for p in theirs.values() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)
    before = parameters()
    for step in range(10):
        give_gradients(theirs, step)
        for group in peer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        peer.step()
    train(optimizer, ours, range(10))
    for name, parameter in ours.items():
        moved = (theirs[name] - before[name]).abs().max()
        error = (parameter - theirs[name]).abs().max()
        assert error <= (0.05 if kind == "adamw8bit" and name == "p0" else 1e-5) * moved, name


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_stored_state_goes_on_bit_for_bit(kind: str) -> None:
    whole, halves = parameters(), parameters()
    train(make_optimizer(kind, whole), whole, range(6))
    first = make_optimizer(kind, halves)
    assert first.state() == {}
    train(first, halves, range(3))
    stored = {name: tensor.clone() for name, tensor in first.state().items()}
    second = make_optimizer(kind, halves)
    second.restore(3, stored | {"another": torch.zeros(1)})
    train(second, halves, range(3, 6))
    for name, parameter in whole.items():
        assert torch.equal(parameter, halves[name])
    assert set(stored) == set(second.state())


def test_a_state_that_does_not_fit() -> None:
    params = parameters()
    narrow, wide = make_optimizer("adamw8bit", params), make_optimizer("adamw", params)
    train(narrow, params, range(1))
    with pytest.raises(TrainingError, match=r"p0:mean is torch.uint8 of shape \(70, 100\), expected torch.float32"):
        wide.restore(1, narrow.state())
    with pytest.raises(TrainingError, match="p0:mean is missing"):
        narrow.restore(1, {})
    with pytest.raises(TrainingError, match="unknown optimizer 'sgd'; there are adamw, adamw8bit"):
        make_optimizer("sgd", params)


def test_a_quarter_of_the_bytes() -> None:
    sizes = []
    for kind in OPTIMIZERS:
        params = parameters(shapes=((512, 512),))
        optimizer = make_optimizer(kind, params)
        train(optimizer, params, range(1))
        sizes.append(sum(tensor.nbytes for tensor in optimizer.state().values()))
    assert sizes[1] == pytest.approx(sizes[0] / 4, rel=0.02)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_has_no_gradient_stays(kind: str) -> None:
    params = parameters()
    optimizer = make_optimizer(kind, params, weight_decay=0.1)
    give_gradients(params, 0)
    params["p0"].grad = None
    optimizer.step(0.1)
    assert torch.equal(params["p0"], parameters()["p0"])
    assert not torch.equal(params["p1"], parameters()["p1"])


@pytest.mark.parametrize("method", [Full(), LoRA(rank=8)], ids=["full", "lora"])
def test_the_loss_falls_as_with_32_bits(method: Full | LoRA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "_SMALLEST_ENCODED", 1)
    curves = []
    for kind in OPTIMIZERS:
        module = LlamaModule(TorchOps(), CONFIG, random_weights(CONFIG, seed=1), method)
        optimizer = make_optimizer(kind, {n: p for n, p in module.named_parameters() if p.requires_grad})
        losses = []
        for step in range(30):
            loss = NextToken().loss(module, Documents(step % 4), 58)
            loss.backward()
            optimizer.step(3e-3)
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    wide, narrow = np.array(curves)
    assert wide[-1] < wide[0] / 2
    assert np.abs(narrow - wide).max() <= 0.05 * wide[0]
