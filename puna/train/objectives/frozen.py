"""The models that an objective reads beside the one in training: what that was before, and a teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from puna.config import ModelConfig
from puna.model.model import Model
from puna.ops.protocol import Batch
from puna.ops.torch_ops import NoCache, TorchOps
from puna.tensor import Weight
from puna.train.data.tokens import Packed
from puna.train.module import LlamaModule, LoRA
from puna.train.objectives.documents import document_logprobs, policy_logprobs


class FrozenModel:
    """A model that is only read. Quantized weights stay quantized, and the others are not copied where the ops compute
    in the file's own type."""

    def __init__(self, ops: TorchOps, config: ModelConfig, tensors: Mapping[str, Weight]) -> None:
        self.ops, self.config = ops, config
        self._model = Model.bind(ops, config, tensors)

    def hidden(self, batch: Batch) -> Tensor:
        """As LlamaModule.hidden, without gradients."""
        with torch.no_grad():
            found: Tensor = self._model.hidden(batch, NoCache(self.config.head_dim))
        return found

    def head(self) -> Tensor:
        """The head [V, H] in numbers."""
        with torch.no_grad():
            return self.ops.dense(self._model.weights.head)


class Reference:
    """What a module was before its training.

    With LoRA that is the module itself, its change switched off; otherwise a second model over the same mapped file.
    """

    def __init__(self, module: LlamaModule) -> None:
        self._module = module
        lora = isinstance(module.method, LoRA)
        self._frozen = None if lora else FrozenModel(module.ops, module.config, module.tensors)

    def logprobs(self, documents: Packed, *, mean: bool = False) -> Tensor:
        """As ``document_logprobs``, without gradients or dropout."""
        with torch.no_grad(), self._module.unchanged():
            return document_logprobs(self._frozen or self._module, documents, mean=mean)

    def token_logprobs(self, documents: Packed, temperature: float) -> Tensor:
        """As ``policy_logprobs`` of the trained tokens, [R], without gradients or dropout."""
        with torch.no_grad(), self._module.unchanged():
            return policy_logprobs(self._frozen or self._module, documents, temperature)[0]
