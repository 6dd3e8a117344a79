"""Losses: exact values and gradients, and what must not change them."""

import math

import numpy as np
import pytest
from tiny_models import VARIANTS, random_weights

torch = pytest.importorskip("torch")

from puna.ops.torch_ops import TorchOps, document_batch  # noqa: E402
from puna.train import losses, preferences  # noqa: E402
from puna.train.module import Full, LlamaModule  # noqa: E402

# TRL 1.16.0: ORPOTrainer.odds_ratio_loss (negated), CPOTrainer.cpo_loss with simpo, GKDTrainer.generalized_jsd_loss.
CHOSEN, REJECTED = [-0.5, -1.25, -0.01], [-0.75, -0.9, -2.0]
TRL_ORPO = [0.045791272073984146, 0.09955374151468277, 0.0001571792090544477]
TRL_ORPO_GRADIENT = [-0.09337381273508072, -0.08836432546377182, -0.015784233808517456]
TRL_SIMPO = [0.9740769863128662, 1.8677860498428345, 0.04954495653510094]
TRL_SIMPO_GRADIENT = [-1.2449185848236084, -1.691069483757019, -0.09667525440454483]
STUDENT = [[1.0, -0.5, 0.25, 2.0], [0.0, 3.0, -1.0, 0.5]]
TEACHER = [[0.5, 0.5, -1.0, 1.0], [1.0, 2.0, 0.0, -2.0]]
TRL_FORWARD_KL, TRL_REVERSE_KL = 0.24569743871688843, 0.2306923121213913  # temperature 2, without its square
TRL_FORWARD_GRADIENT = [-0.0018169432878494263, -0.07108967006206512, 0.027358844876289368, 0.04554775357246399]
TRL_REVERSE_GRADIENT = [-0.010881289839744568, -0.051652539521455765, 0.026359111070632935, 0.03617472946643829]


def problem(rows: int = 23, columns: int = 11) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    head = torch.randn(columns, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(columns, (rows,), generator=generator)
    weights = torch.rand(rows, dtype=torch.float64, generator=generator)
    return hidden, head, targets, weights


@pytest.mark.parametrize("rows_at_once", [1, 5, 23, 100])
class TestByChunks:
    @pytest.fixture(autouse=True)
    def _chunks(self, monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
        monkeypatch.setattr(losses, "CHUNK_BYTES", 88 * rows_at_once)

    def test_cross_entropy_is_exact(self) -> None:
        hidden, head, targets, weights = problem()
        plain = (torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum()
        expected = torch.autograd.grad(3 * plain, (hidden, head))
        loss = losses.cross_entropy(hidden, head, targets, weights)
        found = torch.autograd.grad(3 * loss, (hidden, head))
        torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)

    def test_token_logprobs_are_exact(self) -> None:
        hidden, head, targets, weights = problem()
        plain = torch.log_softmax(hidden @ head.T, -1)[torch.arange(23), targets]
        found = losses.token_logprobs(hidden, head, targets)
        torch.testing.assert_close(found, plain, rtol=1e-13, atol=1e-14)
        expected = torch.autograd.grad((plain * weights).square().sum(), (hidden, head))
        gradients = torch.autograd.grad((found * weights).square().sum(), (hidden, head))
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-14)

    def test_distillation_by_chunks(self) -> None:
        hidden, head, _, _ = problem()
        teacher = torch.randn(23, 11, dtype=torch.float64)
        plain = losses.forward_kl(hidden @ head.T, teacher)
        found = losses.by_chunks(hidden, head, lambda logits, chunk: losses.forward_kl(logits, teacher[chunk]))
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)
        expected = torch.autograd.grad(plain.sum(), (hidden, head))
        torch.testing.assert_close(torch.autograd.grad(found.sum(), (hidden, head)), expected, rtol=1e-12, atol=1e-14)


def test_a_frozen_head_costs_no_gradient() -> None:
    hidden, head, targets, weights = problem()
    losses.cross_entropy(hidden, head.detach(), targets, weights).backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not losses.cross_entropy(hidden, head, targets, weights).requires_grad


def test_cross_entropy_by_hand() -> None:
    """Logits (ln 3, 0): probabilities 3/4 and 1/4."""
    hidden, head = torch.tensor([[math.log(3.0)]] * 2, requires_grad=True), torch.tensor([[1.0], [0.0]])
    loss = losses.cross_entropy(hidden, head, torch.tensor([0, 1]), torch.tensor([1.0, 0.5]))
    assert loss.item() == pytest.approx(math.log(4 / 3) + 0.5 * math.log(4))
    loss.backward()
    np.testing.assert_allclose(hidden.grad[:, 0], [-0.25, 0.375], rtol=1e-6)


def test_no_rows() -> None:
    hidden, head = torch.zeros(0, 6, requires_grad=True), torch.zeros(11, 6, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    losses.cross_entropy(hidden, head, none, torch.zeros(0)).backward()
    assert head.grad.abs().max() == 0
    assert losses.token_logprobs(hidden, head, none).shape == (0,)


def test_what_is_predicted() -> None:
    trained = np.array([True, True, False, True, True, False, True])
    # Documents of 3, 1 and 3 tokens: token 1 from 0; 3 and 4 begin documents; 6 from 5.
    np.testing.assert_array_equal(losses.prediction_rows(trained, np.array([0, 3, 4, 7])), [0, 5])


def gradients_of_splits(splits: list[list[int]], lengths: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """The same documents, in packs of those of each split's numbers, with gradients accumulated over packs."""
    config = VARIANTS["gqa"]
    module = LlamaModule(TorchOps(torch.float64), config, random_weights(config, seed=1), Full())
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, config.vocab_size, length) for length in lengths]
    trained = [rng.random(length) < 0.6 for length in lengths]
    for mask in trained:
        mask[0] = False
    count, total = sum(mask.sum() for mask in trained), 0.0
    for pack in splits:
        tokens = np.concatenate([documents[i] for i in pack])
        starts = np.cumsum([0, *(lengths[i] for i in pack)])
        rows = losses.prediction_rows(np.concatenate([trained[i] for i in pack]), starts)
        hidden = module.hidden(document_batch(tokens, starts))[torch.from_numpy(rows)]
        weights = torch.full((len(rows),), 1 / count, dtype=torch.float64)
        loss = losses.cross_entropy(hidden, module.head(), torch.from_numpy(tokens[rows + 1]), weights)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in module.named_parameters()}


def test_packing_splitting_and_accumulating_change_nothing() -> None:
    lengths = [17, 40, 9, 25, 2]
    expected, expected_gradients = gradients_of_splits([[0], [1], [2], [3], [4]], lengths)
    for split in ([[0, 1, 2, 3, 4]], [[3, 0], [4, 1, 2]], [[4], [2, 3, 1, 0]]):
        loss, gradients = gradients_of_splits(split, lengths)
        assert loss == pytest.approx(expected, rel=1e-6)
        for name, gradient in gradients.items():
            scale = expected_gradients[name].abs().max().item()
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-6 * scale)


def test_kl_by_hand() -> None:
    """Teacher (1/2, 1/2), student (3/4, 1/4)."""
    student, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert losses.forward_kl(student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3))
    reverse = 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    assert losses.reverse_kl(student, teacher).item() == pytest.approx(reverse)
    assert losses.forward_kl(2 * student, 2 * teacher, 2.0).item() == pytest.approx(4 * 0.5 * math.log(4 / 3))


def test_kl_is_that_of_trl() -> None:
    for loss, expected, gradient in (
        (losses.forward_kl, TRL_FORWARD_KL, TRL_FORWARD_GRADIENT),
        (losses.reverse_kl, TRL_REVERSE_KL, TRL_REVERSE_GRADIENT),
    ):
        student = torch.tensor(STUDENT, requires_grad=True)
        found = loss(student, torch.tensor(TEACHER), 2.0).sum() / 4
        assert found.item() == pytest.approx(expected, abs=1e-6)
        found.backward()
        np.testing.assert_allclose(student.grad[0], gradient, atol=1e-6)


def test_top_k_of_the_teacher() -> None:
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
    ids = torch.arange(4).expand(2, 4)
    torch.testing.assert_close(
        losses.top_k_forward_kl(student, ids, teacher, 2.0), losses.forward_kl(student, teacher, 2.0)
    )
    # One token: all of the teacher's probability, so the cross entropy of it.
    expected = -torch.log_softmax(student, -1)[:, 1]
    torch.testing.assert_close(losses.top_k_forward_kl(student, ids[:, 1:2], teacher[:, 1:2]), expected)


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class TestPreferences:
    # The margin is (-10 + 12) - (-11 + 9) = 4.
    FOUR = (of(-10.0), of(-11.0), of(-12.0), of(-9.0))

    def test_dpo(self) -> None:
        assert preferences.dpo(*self.FOUR, beta=0.25).item() == pytest.approx(math.log(1 + math.exp(-1)))
        smoothed = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.e)
        assert preferences.dpo(*self.FOUR, beta=0.25, label_smoothing=0.1).item() == pytest.approx(smoothed)

    def test_dpo_gradient(self) -> None:
        chosen = self.FOUR[0].clone().requires_grad_()
        preferences.dpo(chosen, *self.FOUR[1:], beta=0.25).backward()
        assert chosen.grad.item() == pytest.approx(-0.25 / (1 + math.e))  # -beta · sigmoid(-beta · margin)

    def test_ipo(self) -> None:
        assert preferences.ipo(*self.FOUR, beta=0.25).item() == pytest.approx((4 - 2) ** 2)

    def test_kto(self) -> None:
        logprobs = of(-10, -10).requires_grad_()
        found = preferences.kto(logprobs, of(-13, -13), torch.tensor([True, False]), of(1.0), 0.5, desirable_weight=2.0)
        gained = 1 / (1 + math.exp(-1))  # sigmoid(0.5 · (3 - 1))
        np.testing.assert_allclose(found.detach(), [2 * (1 - gained), gained])
        found.sum().backward()
        slope = 0.5 * gained * (1 - gained)
        np.testing.assert_allclose(logprobs.grad, [-2 * slope, slope])

    def test_the_divergence_of_kto(self) -> None:
        assert preferences.kto_kl(of(-5, -7), of(-6, -8)).item() == 1
        assert preferences.kto_kl(of(-5, -7), of(-4, -6)).item() == 0

    def test_orpo(self) -> None:
        """p = 3/4 and 1/4: odds of 3 and 1/3, so sigmoid(ln 9) = 9/10."""
        found = preferences.orpo(of(math.log(0.75)), of(math.log(0.25)), beta=0.5)
        assert found.item() == pytest.approx(0.5 * math.log(10 / 9))
        certain = of(0.0).requires_grad_()
        preferences.orpo(certain, of(-1.0)).backward()
        assert torch.isfinite(certain.grad).all()

    def test_simpo(self) -> None:
        assert preferences.simpo(of(-1.0), of(-2.0), beta=3.0, gamma=1.0).item() == pytest.approx(
            math.log(1 + math.exp(-2))
        )

    def test_reward(self) -> None:
        assert preferences.reward(of(3.0), of(1.0)).item() == pytest.approx(math.log(1 + math.exp(-2)))
        assert preferences.reward(of(3.0), of(1.0), 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))

    @pytest.mark.parametrize(
        ("loss", "expected", "gradient"),
        [
            (lambda c, r: preferences.orpo(c, r, 0.1), TRL_ORPO, TRL_ORPO_GRADIENT),
            (lambda c, r: preferences.simpo(c, r, 2.0, 1.0), TRL_SIMPO, TRL_SIMPO_GRADIENT),
        ],
        ids=["orpo", "simpo"],
    )
    def test_values_and_gradients_are_those_of_trl(self, loss, expected, gradient) -> None:  # type: ignore[no-untyped-def]
        chosen = torch.tensor(CHOSEN, requires_grad=True)
        found = loss(chosen, torch.tensor(REJECTED))
        np.testing.assert_allclose(found.detach(), expected, rtol=1e-4)
        found.sum().backward()
        np.testing.assert_allclose(chosen.grad, gradient, rtol=1e-4)

    def test_logprobs_of_answers(self) -> None:
        answers = torch.tensor([0, 0, 2, 2])
        sums = preferences.answer_logprobs(of(-1, -2, -3, -5), answers, 3)
        np.testing.assert_array_equal(sums, [-3, 0, -8])
        means = preferences.answer_logprobs(of(-1, -2, -3, -5), answers, 3, mean=True)
        np.testing.assert_array_equal(means, [-1.5, 0, -4])
