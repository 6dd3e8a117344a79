"""The training loop: that it learns, that nothing but the data decides its numbers, and that it survives its death."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VARIANTS, random_weights

torch = pytest.importorskip("torch")

from puna.errors import TrainingError  # noqa: E402
from puna.ops.torch_ops import TorchOps  # noqa: E402
from puna.train.module import Full, LlamaModule, LoRA  # noqa: E402
from puna.train.parallel import ALONE, Ranks  # noqa: E402
from puna.train.trainer import NextToken, Objective, Settings, StepReport, Trainer, evaluate  # noqa: E402
from puna.train.training_state import best_state, newest_state  # noqa: E402

CONFIG = VARIANTS["gqa"]


@dataclass(frozen=True)
class Documents:
    ids: np.ndarray
    trained: np.ndarray
    seq_starts: np.ndarray


class RandomDocuments:
    """Pack number n is always the same: two documents that count upwards, of which the beginning is not trained."""

    def __init__(self, end: int = 1000) -> None:
        self.taken, self.end = 0, end

    def __next__(self) -> Any:
        if self.taken == self.end:
            raise StopIteration
        rng = np.random.default_rng(self.taken)
        self.taken += 1
        lengths = rng.integers(5, 20, 2)
        ids = np.concatenate([rng.integers(0, 256) + np.arange(length) for length in lengths]) % 256
        starts = np.array([0, lengths[0], lengths.sum()], np.int32)
        trained = np.arange(len(ids)) - np.repeat(starts[:-1], lengths) > 2
        return Documents(ids.astype(np.int32), trained, starts)

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]


LORA = LoRA(rank=8, alpha=16, dropout=0.1)


def trainer(
    folder: Path,
    method: Full | LoRA = LORA,
    *,
    end: int = 1000,
    validate: int = 0,
    kind: str | None = None,
    recompute: bool = False,
    objective: Callable[[LlamaModule], Objective] = lambda module: NextToken(),
    stream: type[RandomDocuments] = RandomDocuments,
    ranks: Ranks = ALONE,
    **options: Any,
) -> Trainer:
    warmup = min(3, options.get("steps", 12) - 1)
    settings = {"steps": 12, "learning_rate": 0.01, "warmup": warmup, "save_every": 4, "weight_decay": 0.1} | options
    kind = kind or ("Q8_0" if isinstance(method, LoRA) else "F32")
    ops = TorchOps(settings.pop("dtype", torch.float32))
    weights = random_weights(CONFIG, seed=1, weight_type=kind)
    module = LlamaModule(ops, CONFIG, weights, method, recompute=recompute, ranks=ranks)
    validation = stream()
    validation.taken = 500
    packs = [next(validation) for _ in range(validate)]
    return Trainer(module, objective(module), stream(end), Settings(**settings), folder, packs, ranks)


def reports(run: Trainer, stop_at: int | None = None) -> list[StepReport]:
    found: list[StepReport] = []

    def on_step(report: StepReport) -> None:
        found.append(report)
        if report.step == stop_at:
            raise KeyboardInterrupt

    try:
        run.run(on_step)
    except KeyboardInterrupt:
        assert stop_at is not None
    return found


@pytest.mark.parametrize("method", [Full(), LORA], ids=["full", "qlora"])
def test_it_learns(tmp_path: Path, method: Full | LoRA) -> None:
    run = trainer(tmp_path, method, steps=40, accumulate=2, validate=2, evaluate_every=1000)
    before = evaluate(run.module, run.objective, run.validation)
    after = reports(run)[-1].validation_loss
    assert before == pytest.approx(math.log(256), abs=1.5)
    assert after is not None
    assert after < before - 0.7


@pytest.mark.parametrize("method", [Full(), LORA], ids=["full", "qlora"])
@pytest.mark.parametrize("stop_at", [2, 6, 8])
def test_resumed_is_bit_for_bit_the_same(tmp_path: Path, method: Full | LoRA, stop_at: int) -> None:
    whole = trainer(tmp_path / "whole", method)
    expected = reports(whole)
    assert [report.step for report in expected] == list(range(1, 13))
    reports(trainer(tmp_path / "cut", method), stop_at)
    again = trainer(tmp_path / "cut", method)
    found = reports(again)
    # A state is saved after a step is reported, so that of step 8 is not there yet.
    assert found == expected[4 * ((stop_at - 1) // 4) :]
    for one, other in zip(whole.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(one, other)
    assert reports(trainer(tmp_path / "cut", method)) == []


def test_killed_and_resumed(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import os, signal, torch; from pathlib import Path; from test_trainer import trainer
torch.set_num_threads(1)
trainer(Path({str(tmp_path / "cut")!r})).run(lambda report: report.step == 7 and os.kill(os.getpid(), signal.SIGKILL))
"""
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == -signal.SIGKILL
    left = tmp_path / "cut" / ".step-8.0123abcd.partial"
    left.mkdir()
    assert reports(trainer(tmp_path / "cut")) == reports(trainer(tmp_path / "whole"))[4:]
    assert not left.exists()


def test_accumulating_is_a_larger_batch(tmp_path: Path) -> None:
    """The gradient of four packs at once, by hand, is that of a step of four; so are the first losses."""
    run = trainer(tmp_path, Full(), accumulate=4, steps=1, dtype=torch.float64)
    stream = RandomDocuments()
    packs = [next(stream) for _ in range(4)]
    starts = np.cumsum([0, *np.concatenate([np.diff(pack.seq_starts) for pack in packs])])
    one = Documents(
        np.concatenate([pack.ids for pack in packs]), np.concatenate([pack.trained for pack in packs]), starts
    )
    objective = NextToken()
    assert objective.count(one) == sum(pack.trained.sum() for pack in packs)
    expected = objective.loss(run.module, one, objective.count(one))
    expected.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in run.module.parameters()))
    run.module.zero_grad()
    report = reports(run)[0]
    assert report.loss == pytest.approx(expected.item(), rel=1e-9)
    assert report.gradient_norm == pytest.approx(norm, rel=1e-9)


def test_float64_states_are_exact(tmp_path: Path) -> None:
    expected = reports(trainer(tmp_path / "whole", Full(), dtype=torch.float64))
    reports(trainer(tmp_path / "cut", Full(), dtype=torch.float64), stop_at=5)
    assert reports(trainer(tmp_path / "cut", Full(), dtype=torch.float64)) == expected[4:]


def test_the_steps_are_those_of_adamw_by_hand(tmp_path: Path) -> None:
    """The first step moves every number by the rate against its gradient's sign (Kingma & Ba 2014), after decay."""
    run = trainer(tmp_path, Full(), steps=1, warmup=0, epsilon=1e-30, dtype=torch.float64)
    objective, pack = NextToken(), next(RandomDocuments())
    before = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    objective.loss(run.module, pack, objective.count(pack)).backward()
    signs = {name: p.grad.sign() for name, p in run.module.named_parameters()}
    run.module.zero_grad()
    reports(run)
    for name, parameter in run.module.named_parameters():
        decay = 0.01 * 0.1 if parameter.ndim > 1 else 0
        expected = before[name] * (1 - decay) - 0.01 * signs[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-8)


def test_learning_rates() -> None:
    settings = Settings(steps=10, learning_rate=1.0, warmup=2, final_rate=0.2)
    assert [settings.rate(step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert settings.rate(6) == pytest.approx(0.6)
    assert settings.rate(10) == pytest.approx(0.2)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """Steps of plain sums would differ; those of Adam only by its epsilon."""
    plain, clipped = (reports(trainer(tmp_path / str(clip), steps=2, clip=clip)) for clip in (1e9, 1e-9))
    assert plain[0].gradient_norm == clipped[0].gradient_norm > 1e-3
    assert plain[1].loss != clipped[1].loss


def test_not_a_number_stops_with_the_data_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path, Full(), accumulate=2)
    before = [p.detach().clone() for p in run.module.parameters()]
    with torch.no_grad():
        run.module.get_parameter("model.norm.weight")[0] = math.nan
    with pytest.raises(TrainingError, match=r"step 1 gave a loss of nan.*failed-step-1\.npz"):
        run.run()
    stream = RandomDocuments()
    with np.load(tmp_path / "failed-step-1.npz", allow_pickle=False) as saved:
        for number in range(2):
            pack = next(stream)
            for name in ("ids", "trained", "seq_starts"):
                np.testing.assert_array_equal(saved[f"{number}.{name}"], getattr(pack, name))
    for one, other in zip(run.module.parameters(), before, strict=True):
        assert int((one != other).sum()) <= 1  # the number that was broken above


def test_the_newest_and_the_best_states_are_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=8, save_every=1, evaluate_every=1, keep=2, validate=2)
    losses = [report.validation_loss for report in reports(run)]
    best = min(range(8), key=lambda number: losses[number]) + 1
    kept = {int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()}
    assert kept == {7, 8, best}
    state, newest = best_state(tmp_path), newest_state(tmp_path)
    assert state is not None
    assert newest is not None
    assert (state.step, state.cost, newest.step) == (best, losses[best - 1], 8)


def test_a_worse_end_does_not_lose_the_best(tmp_path: Path) -> None:
    """A learning rate that ruins the model after the first steps."""
    run = trainer(
        tmp_path, Full(), steps=6, learning_rate=3.0, warmup=5, save_every=1, evaluate_every=1, keep=1, validate=2
    )
    losses = [report.validation_loss for report in reports(run)]
    best = min(range(6), key=lambda number: losses[number]) + 1
    assert best < 6
    assert {path.name for path in tmp_path.iterdir()} == {"step-6", f"step-{best}"}


def test_the_best_by_reward_has_the_highest(tmp_path: Path) -> None:
    """Of equal ones the last. It is measured in place of the loss, and only where held-out rows are."""
    run = trainer(tmp_path, steps=8, save_every=1, evaluate_every=2, keep=1, validate=2)
    rewards = [0.25, 0.75, 0.75, 0.5]
    run.reward = iter(rewards).__next__
    found = reports(run)
    assert [report.validation_reward for report in found] == [None, 0.25, None, 0.75, None, 0.75, None, 0.5]
    assert {report.validation_loss for report in found} == {None}
    assert {path.name for path in tmp_path.iterdir()} == {"step-6", "step-8"}
    state = best_state(tmp_path)
    assert state is not None
    assert (state.step, state.cost) == (6, -0.75)


def test_the_end_of_the_stream_ends_the_training(tmp_path: Path) -> None:
    assert [report.step for report in reports(trainer(tmp_path, accumulate=2, end=5))] == [1, 2, 3]
    state = newest_state(tmp_path)
    assert state is not None
    assert (state.step, state.stream) == (3, {"taken": 5})


def test_it_ends_when_it_is_told_to(tmp_path: Path) -> None:
    """With a state of the last step, from which another run goes on."""
    trainer(tmp_path, save_every=100).run(lambda report: report.step == 5)
    state = newest_state(tmp_path)
    assert state is not None
    assert state.step == 5
    assert [report.step for report in reports(trainer(tmp_path))] == list(range(6, 13))


class Counting(NextToken):
    """Measures the tokens of each micro-batch, in training and in evaluation."""

    def __init__(self) -> None:
        self.metrics, self.sums = self, dict[str, tuple[float, int]]()

    def loss(self, module: LlamaModule, micro_batch: Any, total: int) -> torch.Tensor:
        name = "length" if torch.is_grad_enabled() else "validation_length"
        self.sums = {name: (float(len(micro_batch.ids)), 1)}
        return super().loss(module, micro_batch, total)

    def take(self) -> dict[str, tuple[float, int]]:
        return self.sums


def test_what_objectives_measure_is_reported(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=2, warmup=0, accumulate=3, validate=2, evaluate_every=2)
    run.objective = Counting()
    found, stream = reports(run), RandomDocuments()
    lengths = [len(next(stream).ids) for _ in range(6)]
    assert [report.metrics["length"] for report in found] == [sum(lengths[:3]) / 3, sum(lengths[3:]) / 3]
    assert "validation_length" not in found[0].metrics
    assert found[1].metrics["validation_length"] == sum(len(pack.ids) for pack in run.validation) / 2
    assert all(report.seconds > 0 for report in found)


@pytest.mark.parametrize("stop_at", [6, 8])
def test_states_of_8_bits_are_exact(tmp_path: Path, stop_at: int) -> None:
    options: dict[str, Any] = {"method": Full(), "optimizer": "adamw8bit"}
    expected = reports(trainer(tmp_path / "whole", **options))
    assert expected != reports(trainer(tmp_path / "other", Full()))
    reports(trainer(tmp_path / "cut", **options), stop_at)
    assert reports(trainer(tmp_path / "cut", **options)) == expected[4:]


def test_another_training_is_refused(tmp_path: Path) -> None:
    reports(trainer(tmp_path, steps=1, warmup=0))
    with pytest.raises(TrainingError, match="another training"):
        trainer(tmp_path, Full()).run()


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"accumulate": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"warmup": 9},
        {"final_rate": 2},
    ],
)
def test_impossible_settings(options: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=next(iter(options))):
        Settings(**{"steps": 5, "learning_rate": 0.1} | options)
