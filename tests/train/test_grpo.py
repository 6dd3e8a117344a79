"""GRPO: the loss against TRL's, rollouts by the engine with the weights of the moment, and rewards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VARIANTS, random_weights

torch = pytest.importorskip("torch")

from puna.errors import DataError, TrainingError  # noqa: E402
from puna.ops.torch_ops import TorchOps  # noqa: E402
from puna.train.data.order import Order  # noqa: E402
from puna.train.data.tokens import Tokens, concatenate  # noqa: E402
from puna.train.json_check import check_schema, is_valid  # noqa: E402
from puna.train.module import Full, LlamaModule, LoRA  # noqa: E402
from puna.train.objectives import knobs_of  # noqa: E402
from puna.train.objectives.documents import policy_logprobs  # noqa: E402
from puna.train.objectives.grpo import GRPO, Rollouts, group_advantages  # noqa: E402
from puna.train.rewards import reward_named  # noqa: E402
from puna.train.rollouts import Prompt, RolloutStream  # noqa: E402
from puna.train.trainer import Settings, StepReport, Trainer  # noqa: E402

CONFIG = VARIANTS["gqa"]
TRL = json.loads((Path(__file__).parent / "trl_objectives.json").read_text(encoding="utf-8"))


def module(method: Full | LoRA, seed: int = 1, dtype: torch.dtype = torch.float32) -> LlamaModule:
    return LlamaModule(TorchOps(dtype), CONFIG, random_weights(CONFIG, seed=seed), method)


def test_loss_and_gradients_are_those_of_trl() -> None:
    """The policy of seed 2, sampled by that of seed 3, with the reference of seed 1; tests/golden made the numbers."""
    group = TRL["group"]
    start = len(group["prompt"])
    packed = concatenate([Tokens.of([*group["prompt"], *a], [(start, start + len(a))]) for a in group["answers"]])
    with torch.no_grad():
        sampled, reference = (policy_logprobs(module(Full(), seed), packed, 1.0)[0].double().numpy() for seed in (3, 1))
    rewards = np.array(group["rewards"])
    batch = Rollouts(**vars(packed), rewards=rewards, advantages=group_advantages(rewards), sampled=sampled,
                     reference=reference)  # fmt: skip
    built, objective = module(Full(), 2), GRPO("exact").objective(module(Full()))
    loss = objective.loss(built, batch, objective.count(batch))
    loss.backward()
    expected = TRL["grpo"]
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-4, rel=1e-4)
    assert objective.metrics.means()["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    for name, parameter in built.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(expected["gradients"][name]["norm"], rel=1e-4)
        np.testing.assert_allclose(
            parameter.grad.flatten()[:4], expected["gradients"][name]["first"], atol=1e-4, rtol=1e-4
        )


def test_advantages_by_hand() -> None:
    """Mean 1/2; deviation, of the sample, 1 / sqrt(3)."""
    np.testing.assert_allclose(group_advantages(np.array([1.0, 0, 0, 1])), np.array([1, -1, -1, 1]) * 0.866, atol=1e-3)
    np.testing.assert_array_equal(group_advantages(np.array([1.0, 1, 1])), 0)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_ids = frozenset({2})

    def decode(self, ids: list[int]) -> bytes:
        return bytes(ids)


KNOBS = {"reward": "regex", "pattern": "^[@-\x7f]", "group": 8, "prompts": 4, "max_tokens": 3}


def stream(built: LlamaModule, seed: int = 0, **knobs: Any) -> RolloutStream:
    def prompt(source: int, number: int) -> Prompt:
        return Prompt([1, 100 + number, 50], "")

    made = knobs_of("grpo", KNOBS | knobs)
    assert isinstance(made, GRPO)
    return RolloutStream(built, made, Order([6], seed=seed), prompt, Bytes(), length=32, seed=seed)  # type: ignore[arg-type]


def trainer(folder: Path, method: Full | LoRA, steps: int, **knobs: Any) -> Trainer:
    built = module(method)
    rate = 0.03 if isinstance(method, LoRA) else 0.003
    settings = Settings(steps, rate, accumulate=4, save_every=3)
    return Trainer(built, knobs_of("grpo", KNOBS | knobs).objective(built), stream(built, **knobs), settings, folder)


@pytest.mark.parametrize(
    "method", [Full(), LoRA(rank=4, alpha=8), LoRA(rank=4, alpha=8, dora=True)], ids=["full", "lora", "dora"]
)
def test_the_reward_rises(tmp_path: Path, method: Full | LoRA) -> None:
    run = trainer(tmp_path, method, 40, beta=0.001)
    rewards: list[float] = []
    run.run(lambda report: rewards.append(report.metrics["reward"]))
    assert np.mean(rewards[:2]) < 0.5
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.2


def test_rollouts_are_of_the_weights_of_the_moment() -> None:
    """LoRA's change is loaded into the engine: what is sampled is probable by the module as it is."""
    built = module(LoRA(rank=4, alpha=8))
    rollouts = stream(built, temperature=0.05)
    first = next(rollouts)
    np.testing.assert_array_equal(first.sampled, first.reference)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        next(rollouts)  # of the same rollout
    changed = next(rollouts)
    assert np.exp(changed.sampled).mean() > 0.7  # nearly greedy
    assert np.exp(changed.reference).mean() < 0.3


def test_the_seed_decides_what_is_sampled() -> None:
    built = module(LoRA(rank=4, alpha=8))
    one, same, other = (next(stream(built, seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.ids, same.ids)
    assert one.ids.tolist() != other.ids.tolist()
    assert len({tuple(document.ids) for document in one.packed.documents}) > 1


@pytest.mark.parametrize("updates", [1, 2])
def test_resumed_is_bit_for_bit_the_same(tmp_path: Path, updates: int) -> None:
    """Also where the state was saved with half of a rollout left."""
    method = LoRA(rank=4, alpha=8)
    expected: list[StepReport] = []
    trainer(tmp_path / "whole", method, 5, updates=updates).run(expected.append)

    def stop(report: StepReport) -> None:
        if report.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", method, 5, updates=updates).run(stop)
    found: list[StepReport] = []
    trainer(tmp_path / "cut", method, 5, updates=updates).run(found.append)
    assert found == expected[3:]


def test_prompts_that_are_too_long_are_left_out() -> None:
    rollouts = stream(module(LoRA(rank=4, alpha=8)), max_tokens=30)
    with pytest.raises(DataError, match="no prompt leaves room for 30 tokens of answer in 32"):
        next(rollouts)
    assert rollouts.left_out == 6


@pytest.mark.parametrize(
    ("name", "answer", "expected", "reward"),
    [
        ("exact", " Paris\n", "Paris", 1),
        ("exact", "paris", "Paris", 0),
        ("number", "5 + 7 = 12\n#### 12", "He has 5 and 7.\n#### 12", 1),
        ("number", "It is 1,200.50 in all.", "#### 1200.5", 1),
        ("number", "#### -3 of 9", "-3", 1),
        ("number", "#### 12 or 13", "13", 0),
        ("number", "none", "12", 0),
        ("json", '{"a": [1, 2]}', "", 1),
        ("json", '{"a": NaN}', "", 0),
        ("json", "Here it is: {}", "", 0),
        ("json", "[" * 100_000, "", 0),
    ],
)
def test_rewards(name: str, answer: str, expected: str, reward: float) -> None:
    assert reward_named(name)(answer, expected) == reward


def test_rewards_with_a_pattern_and_a_schema(tmp_path: Path) -> None:
    assert reward_named("regex", r"^\d+$")("12", "") == 1
    assert reward_named("regex", r"^\d+$")("12a", "") == 0
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}')
    judge = reward_named("json", schema=str(path))
    assert [judge(text, "") for text in ('{"a": 1}', '{"a": "1"}', "{}", "3")] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"reward": "best"}, "one of exact, number, regex, json"),
        ({"reward": "regex"}, "needs one"),
        ({"reward": "regex", "pattern": "("}, "no regular expression"),
        ({"reward": "json", "schema": "missing.json"}, "missing.json is not readable"),
        ({"reward": "exact", "group": 1}, "group of grpo must be a whole number of at least 2"),
        ({"reward": "exact", "epsilon": 0}, "epsilon"),
        ({}, "needs 'reward'"),
    ],
)
def test_impossible_knobs(table: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        knobs_of("grpo", table)


def test_schemas_are_read_as_the_suite_of_json_schema_says(shared_data: Path) -> None:
    """Of its draft 7, the cases whose keywords are all known."""
    checked = 0
    for path in sorted((shared_data / "grammar" / "json-schema-draft7").rglob("*.json")):
        if "optional" in path.parts:  # regular expressions of another language, formats
            continue
        for case in json.loads(path.read_text(encoding="utf-8")):
            try:
                check_schema(case["schema"])
            except TrainingError:
                continue
            for test in case["tests"]:
                assert is_valid(test["data"], case["schema"]) == test["valid"], (path.name, test["description"])
                checked += 1
    assert checked > 300
