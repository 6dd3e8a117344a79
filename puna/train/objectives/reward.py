"""A reward model: one number for a whole answer, learnt from which of two answers is preferred."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puna.checkpoint import Checkpoint
from puna.checkpoint.huggingface import write_model_folder
from puna.checkpoint.safetensors import write_safetensors
from puna.config import ModelConfig
from puna.errors import TrainingError
from puna.ops.torch_ops import document_batch
from puna.tensor import Weight
from puna.train.data.answers import Answers
from puna.train.data.tokens import Packed
from puna.train.module import LlamaModule
from puna.train.objectives.metrics import Metrics
from puna.train.objectives.objective import Rows
from puna.train.objectives.pairs import count_pairs, measure_rewards
from puna.train.parallel import ALONE, Ranks, asked_by_first, whole
from puna.train.preferences import reward

SCORE, HEAD = "score.weight", "lm_head.weight"


@dataclass(frozen=True)
class Reward:
    """A reward model (Bradley & Terry 1952; Stiennon et al. 2020): what is chosen is to have the higher score."""

    rows: ClassVar[Rows] = "pairs"

    def objective(self, module: LlamaModule) -> RewardModel:
        return RewardModel(module)


class RewardModel:
    """Adds the head ``score.weight`` [1, H] to the module, which starts at 0: no answer is preferred. It counts pairs.

    A head of the vocabulary's own is no longer read, and so not trained.
    """

    def __init__(self, module: LlamaModule) -> None:
        self.metrics = Metrics()
        like = next(parameter for parameter in module.parameters() if parameter.requires_grad)
        zeros = torch.zeros(1, module.config.hidden_size, dtype=like.dtype, device=like.device)
        module.add_module("score", nn.Module())
        module.get_submodule("score").register_parameter("weight", nn.Parameter(zeros))
        if HEAD in module.tensors:
            module.get_parameter(HEAD).requires_grad_(False)

    def count(self, micro_batch: Answers) -> int:
        return count_pairs(micro_batch)

    def loss(self, module: LlamaModule, micro_batch: Answers, total: int) -> Tensor:
        scores = document_scores(module, micro_batch.packed)
        measure_rewards(self.metrics, scores[::2], scores[1::2])
        return reward(scores[::2], scores[1::2]).sum() / max(total, 1)


def document_scores(module: LlamaModule, documents: Packed) -> Tensor:
    """The reward of each document, [D], read at its last token."""
    hidden = module.hidden(document_batch(documents.ids, documents.seq_starts))
    last = torch.from_numpy(documents.seq_starts[1:].astype("int64") - 1).to(hidden.device)
    weight = module.get_parameter(SCORE)
    return F.linear(hidden[last].to(weight.dtype), weight)[:, 0]


def save_reward_model(module: LlamaModule, checkpoint: Checkpoint, folder: str | Path, ranks: Ranks = ALONE) -> None:
    """A folder that transformers' AutoModelForSequenceClassification loads. LoRA is merged into the model.

    ``checkpoint`` is what the module was made of. The first of the ``ranks`` writes what it gathers from all. Raises
    CheckpointError when the folder holds something already or the disk refuses, TrainingError for a module without a
    score.
    """
    names = {name for name, _ in module.named_parameters()}
    if SCORE not in names:
        raise TrainingError("the module has no score; save a module that was trained as a reward model")
    score = Weight.from_array(SCORE, whole(module.get_parameter(SCORE).detach()).float().cpu().numpy())
    extra = {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": _padding(checkpoint.config),
    }
    with asked_by_first(module.merged(), ranks) as merged:
        if ranks.first:
            tensors, path = _WithScore(merged, score), Path(folder).expanduser()
            write_model_folder(checkpoint, path, extra, lambda place: write_safetensors(place, tensors))


class _WithScore(Mapping[str, Weight]):
    """A model's tensors, each made when it is written, with a score in place of the vocabulary's head."""

    def __init__(self, tensors: Mapping[str, Weight], score: Weight) -> None:
        self._tensors, self._score = tensors, score
        self._names = [name for name in tensors if name != HEAD]

    def __getitem__(self, name: str) -> Weight:
        return self._score if name == SCORE else self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield SCORE

    def __len__(self) -> int:
        return len(self._names) + 1


def _padding(config: ModelConfig) -> int | None:
    """transformers reads the score at the last token that is not this one, so it must not be one that ends answers."""
    choices = (config.pad_token_id, config.bos_token_id)
    return next((token for token in choices if token is not None and token not in config.eos_token_ids), None)
