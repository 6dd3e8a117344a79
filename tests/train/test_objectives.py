"""Preferences through the model: log probabilities of answers, and that training on pairs prefers the chosen ones."""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VARIANTS, random_weights

torch = pytest.importorskip("torch")

from puna.ops.torch_ops import TorchOps, document_batch  # noqa: E402
from puna.train import preferences  # noqa: E402
from puna.train.module import LlamaModule, LoRA  # noqa: E402
from puna.train.objectives import PairedPreference, Pairs, document_logprobs  # noqa: E402
from puna.train.trainer import Settings, Trainer  # noqa: E402

CONFIG = VARIANTS["gqa"]
STARTS = np.array([0, 9, 20, 27, 40], np.int32)
IDS = np.random.default_rng(0).integers(0, 256, 40).astype(np.int32)
TRAINED = np.arange(40) - np.repeat(STARTS[:-1], np.diff(STARTS)) >= 4


def module() -> LlamaModule:
    return LlamaModule(TorchOps(), CONFIG, random_weights(CONFIG, seed=1, weight_type="Q8_0"), LoRA(rank=4, alpha=8))


@pytest.mark.parametrize("mean", [False, True])
def test_log_probabilities_of_documents(mean: bool) -> None:
    """Against each document's logits, computed alone."""
    built = module()
    found = document_logprobs(built, IDS, TRAINED, STARTS, mean=mean).detach()
    for document, (start, end) in enumerate(pairwise(STARTS)):
        logits = built(document_batch(IDS[start:end], np.array([0, end - start]))).detach()
        each = [torch.log_softmax(logits[t - 1], -1)[IDS[start + t]].item() for t in range(4, end - start)]
        assert found[document].item() == pytest.approx(sum(each) / (len(each) if mean else 1), rel=1e-5)


class SamePairs:
    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __next__(self) -> Pairs:
        return self.pairs

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


@pytest.mark.parametrize(("loss", "mean"), [(preferences.dpo, False), (preferences.ipo, True)], ids=["dpo", "ipo"])
def test_training_prefers_the_chosen(tmp_path: Path, loss: Any, mean: bool) -> None:
    built = module()
    with torch.no_grad():
        before = document_logprobs(built, IDS, TRAINED, STARTS, mean=mean)
    pairs = Pairs(IDS, TRAINED, STARTS, before.numpy())
    objective = PairedPreference(loss, mean)
    assert objective.count(pairs) == 2
    start = objective.loss(built, pairs, 2).item()  # no margin yet
    assert start == pytest.approx(math.log(2) if loss is preferences.dpo else 25, rel=1e-5)
    Trainer(built, objective, SamePairs(pairs), Settings(steps=15, learning_rate=0.01), tmp_path).run()
    with torch.no_grad():
        gained = document_logprobs(built, IDS, TRAINED, STARTS, mean=mean) - before
    assert (gained[::2] > gained[1::2]).all()
    assert objective.loss(built, pairs, 2).item() < 0.9 * start
