"""Objectives through the model: against TRL's trainers on the same batch, by hand, and what must not change them."""

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VARIANTS, random_weights

torch = pytest.importorskip("torch")

from puna.errors import DataError, TrainingError  # noqa: E402
from puna.ops.torch_ops import TorchOps, document_batch  # noqa: E402
from puna.train.data.answers import Answers  # noqa: E402
from puna.train.data.tokens import Tokens, concatenate  # noqa: E402
from puna.train.module import Full, LlamaModule, LoRA  # noqa: E402
from puna.train.objectives import OBJECTIVES, knobs_of  # noqa: E402
from puna.train.objectives.documents import document_logprobs  # noqa: E402
from puna.train.objectives.frozen import Reference  # noqa: E402
from puna.train.objectives.labelled import mismatch  # noqa: E402
from puna.train.trainer import Settings, Trainer  # noqa: E402

CONFIG = VARIANTS["gqa"]
# Made by tests/golden/make_trl_objectives.py.
TRL = json.loads((Path(__file__).parent / "trl_objectives.json").read_text(encoding="utf-8"))
PREFERENCES = ("dpo", "ipo", "orpo", "simpo", "kto", "reward")


def document(prompt: list[int], answer: list[int]) -> Tokens:
    return Tokens.of([*prompt, *answer], [(len(prompt), len(prompt) + len(answer))])


def pairs(rows: list[dict[str, Any]]) -> Answers:
    documents = [document(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    return Answers(concatenate(documents), np.array([True, False] * len(rows)))


def labelled(rows: list[dict[str, Any]]) -> Answers:
    documents = [document(row["prompt"], row["completion"]) for row in rows]
    return Answers(concatenate(documents), np.array([row["label"] for row in rows]))


def batch_of(name: str) -> Answers:
    if name == "kto":
        return labelled(TRL["labelled"])
    return pairs(TRL["short_pairs" if name == "orpo" else "pairs"])


def module(method: Full | LoRA | None = None, dtype: torch.dtype = torch.float32) -> LlamaModule:
    """It began as the reference of seed 1 and has become the policy of seed 2, or is at the beginning of LoRA."""
    built = LlamaModule(TorchOps(dtype), CONFIG, random_weights(CONFIG, seed=1), method or Full())
    if method is None:
        with torch.no_grad():
            for name, weight in random_weights(CONFIG, seed=2).items():
                built.get_parameter(name).copy_(torch.from_numpy(weight.dequantize()))
    return built


def knobs(name: str) -> Any:
    return knobs_of(name, {"desirable_weight": 1.5, "undesirable_weight": 0.5} if name == "kto" else {})


class Same:
    """A stream of one micro-batch, again and again."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __next__(self) -> Any:
        return self.batch

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


def check_gradients(built: LlamaModule, expected: dict[str, Any]) -> None:
    for name, parameter in built.named_parameters():
        if name not in expected:
            assert parameter.grad is None, name
            continue
        assert parameter.grad.norm().item() == pytest.approx(expected[name]["norm"], rel=1e-4)
        np.testing.assert_allclose(parameter.grad.flatten()[:4], expected[name]["first"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PREFERENCES)
def test_loss_and_gradients_are_those_of_trl(name: str) -> None:
    built, batch = module(), batch_of(name)
    objective = knobs(name).objective(built)
    if name == "reward":
        with torch.no_grad():
            built.get_parameter("score.weight").copy_(torch.linspace(-1, 1, CONFIG.hidden_size)[None])
    loss = objective.loss(built, batch, objective.count(batch))
    loss.backward()
    expected = {key.removeprefix("base_model."): value for key, value in TRL[name]["gradients"].items()}
    assert loss.item() == pytest.approx(TRL[name]["loss"], abs=1e-4, rel=1e-4)
    check_gradients(built, expected)
    if name == "kto":
        assert objective.metrics.means()["kl"] == pytest.approx(TRL["kto"]["kl"], rel=1e-4)


@pytest.mark.parametrize("mean", [False, True])
def test_log_probabilities_of_documents(mean: bool) -> None:
    """Against each document's logits, computed alone."""
    built, packed = module(LoRA(rank=4, alpha=8)), batch_of("dpo").packed
    found = document_logprobs(built, packed, mean=mean).detach()
    for number, (start, end) in enumerate(pairwise(packed.seq_starts)):
        ids, trained = packed.ids[start:end], packed.trained[start:end]
        logits = built(document_batch(ids, np.array([0, end - start]))).detach()
        each = [torch.log_softmax(logits[t - 1], -1)[ids[t]].item() for t in np.flatnonzero(trained)]
        assert found[number].item() == pytest.approx(sum(each) / (len(each) if mean else 1), rel=1e-5)


@pytest.mark.parametrize("method", [Full(), LoRA(rank=4, alpha=8, dropout=0.5)], ids=["full", "lora"])
def test_the_reference_is_what_the_module_was(method: Full | LoRA) -> None:
    built, packed = module(method), batch_of("dpo").packed
    reference = Reference(built)
    with torch.no_grad():
        before = document_logprobs(built.eval(), packed)
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    found = reference.logprobs(packed)
    torch.testing.assert_close(found, before, rtol=0, atol=0)
    assert not found.requires_grad
    assert (document_logprobs(built, packed) - before).abs().min() > 1e-3


def test_the_reference_shares_the_memory_of_the_file() -> None:
    weights = random_weights(CONFIG, seed=1)
    built = LlamaModule(TorchOps(), CONFIG, weights, Full())
    frozen = Reference(built)._frozen
    assert frozen is not None
    for name, tensor in frozen._model.tensors.items():
        assert tensor.data_ptr() == weights[name].data.ctypes.data


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("dpo", math.log(2)),  # no margin yet
        ("ipo", 25.0),  # (0 - 1 / 0.2)²
        ("kto", (2 * 1.5 + 0.5) / 3 / 2),  # every sigmoid is 1/2: two good answers and a bad one
        ("reward", math.log(2)),  # all scores are 0
    ],
)
def test_the_loss_before_training_by_hand(name: str, loss: float) -> None:
    built, batch = module(LoRA(rank=4, alpha=8)), batch_of(name)
    objective = knobs(name).objective(built)
    assert objective.count(batch) == (3 if name == "kto" else 2)
    assert objective.loss(built, batch, objective.count(batch)).item() == pytest.approx(loss, rel=1e-5)
    assert objective.metrics.means().get("accuracy", 0.5) == 0.5


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_split_into_micro_batches_changes_nothing(name: str) -> None:
    """In float64. KTO's z is of the micro-batch by definition, so its parts are two equal ones."""
    whole = labelled([*TRL["labelled"][:2]] * 2) if name == "kto" else batch_of(name)
    half = len(whole.desirable) // 2
    documents = whole.packed.documents
    parts = [
        Answers(concatenate(documents[part]), whole.desirable[part]) for part in (slice(0, half), slice(half, None))
    ]
    found = []
    for batches in ([whole], parts):
        built = module(dtype=torch.float64)
        objective = knobs(name).objective(built)
        total, loss = sum(map(objective.count, batches)), 0.0
        for batch in batches:
            part = objective.loss(built, batch, total)
            part.backward()
            loss += part.item()
        gradients = {n: p.grad for n, p in built.named_parameters() if p.grad is not None}
        found.append((loss, gradients, objective.metrics.means()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-9)
    assert found[0][1].keys() == found[1][1].keys() != set()
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("method", [Full(), LoRA(rank=4, alpha=8)], ids=["full", "lora"])
def test_training_prefers_the_chosen(tmp_path: Path, name: str, method: Full | LoRA) -> None:
    built, batch = module(method), batch_of(name)
    objective = knobs(name).objective(built)
    rate = 0.003 if isinstance(method, Full) else 0.01
    Trainer(built, objective, Same(batch), Settings(steps=12, learning_rate=rate, save_every=8), tmp_path).run()
    objective.metrics.means()
    objective.loss(built, batch, 1)
    measured = objective.metrics.means()
    if name == "kto":
        assert measured["reward_desirable"] > measured["reward_undesirable"]
    else:
        assert measured["accuracy"] == 1
        assert measured["margin"] == pytest.approx(measured["reward_chosen"] - measured["reward_rejected"])


def test_mismatched_answers_by_hand() -> None:
    found = mismatch([document([1, 2], [3, 4]), document([5], [6]), document([7, 8], [9])])
    np.testing.assert_array_equal(found.ids, [1, 2, 9, 5, 3, 4, 7, 8, 6])
    np.testing.assert_array_equal(np.flatnonzero(found.trained), [2, 4, 5, 8])
    np.testing.assert_array_equal(found.seq_starts, [0, 3, 6, 9])


def test_evaluations_are_measured_apart() -> None:
    built, batch = module(), batch_of("dpo")
    objective = knobs("dpo").objective(built)
    with torch.no_grad():
        objective.loss(built, batch, 2)
    objective.loss(built, batch, 2)
    found = objective.metrics.means()
    assert found["validation_margin"] == found["margin"] != 0
    assert objective.metrics.means() == {}


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_rows_of_another_kind_are_refused(name: str) -> None:
    objective = knobs(name).objective(module())
    with pytest.raises(DataError, match="chosen and rejected"):
        objective.count(labelled(TRL["labelled"]))


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("dpo", {"beta": 0}, "beta of dpo must be a number above 0, found 0"),
        ("dpo", {"beta": "much"}, "found 'much'"),
        ("dpo", {"label_smoothing": 0.6}, "at most 0.5"),
        ("simpo", {"gama": 1.0}, "did you mean 'gamma'"),
        ("kto", {"desirable_weight": -1}, "desirable_weight of kto"),
        ("dpoo", {}, "did you mean 'dpo'"),
        ("sft", {"beta": 1}, "sft has no 'beta'"),
    ],
)
def test_impossible_knobs(name: str, table: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        knobs_of(name, table)


def test_every_objective_says_which_rows_it_learns_from() -> None:
    rows = {name: kind.rows for name, kind in OBJECTIVES.items()}
    assert rows["sft"] == rows["pretrain"] == "documents"
    assert rows["dpo"] == rows["orpo"] == rows["reward"] == "pairs"
    assert rows["kto"] == "labelled"
