"""The model as a torch module: which of its weights are trained, and in what form. The arithmetic is puna/model's.

Parameters have Hugging Face's names, and those of adapters PEFT's (``….q_proj.lora_A.weight``), so ``state_dict`` is
what a checkpoint of either holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from puna.config import ModelConfig
from puna.errors import TrainingError
from puna.model import llama
from puna.ops.protocol import Batch, Ops
from puna.ops.torch_ops import NoCache, TorchOps
from puna.ops.torch_weights import EncodedMatrix, LowRankMatrix, Matrix, dense
from puna.tensor import Adapter, LowRank, Weight
from puna.tensor.mapped import drop_mapped_pages
from puna.train.parallel import ALONE, Ranks, fill, shard_layer, shard_rest, whole

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Full:
    """Every weight is trained, but those in whose names the regular expression ``frozen`` is found."""

    frozen: str | None = None


@dataclass(frozen=True)
class LoRA:
    """Low-rank changes of the ``targets`` (Hu et al. 2021) over a frozen model; QLoRA where that is quantized.

    The scale is alpha / rank, or alpha / sqrt(rank) with ``rank_stabilised`` (Kalajdzievski 2023). ``dora``: directions
    and magnitudes are trained apart (Liu et al. 2024). A starts uniform, as PEFT's does, and B at 0.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LINEAR_LAYERS
    dropout: float = 0.0
    rank_stabilised: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that makes no sense."""
        if self.rank < 1:
            raise TrainingError(f"the rank of LoRA must be at least 1, found {self.rank}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise TrainingError(f"the alpha of LoRA must be a number above 0, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise TrainingError(f"the dropout of LoRA must be at least 0 and below 1, found {self.dropout}")
        unknown = [target for target in self.targets if target not in LINEAR_LAYERS]
        if unknown or not self.targets:
            found = ", ".join(map(repr, unknown)) or "none"
            raise TrainingError(f"the targets of LoRA must be among {', '.join(LINEAR_LAYERS)}; found {found}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class LlamaModule(nn.Module):
    """A model under training. Trained weights are float32 (float64 under float64 ops) whatever ``ops`` compute in.

    Frozen weights are taken over without a copy where ``ops`` can use the file's own bytes, quantized ones always.
    ``adapted`` are the names of the matrices that LoRA changes. ``recompute`` computes each layer again in the backward
    pass, so that only what is between layers is kept (Chen et al. 2016). Raises TrainingError when nothing would be
    trained.

    Over several ``ranks`` each layer is sharded as soon as it is made, and ``shard`` does the same for the rest. What
    gives away tensors (``adapter``, ``merged``, …) gathers them then, so that all ranks have to call it together.
    """

    def __init__(
        self,
        ops: TorchOps,
        config: ModelConfig,
        tensors: Mapping[str, Weight],
        method: Full | LoRA,
        *,
        recompute: bool = False,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.ops, self.config, self.method, self.recompute = ops, config, method, recompute
        self._master = torch.promote_types(ops.dtype, torch.float32)
        self._encoded: dict[str, EncodedMatrix] = {}
        self._tensors, self._names, self._ranks = tensors, tuple(tensors), ranks
        self._unchanged = False
        self._start: dict[str, tuple[Tensor, Tensor]] = {}  # A and B of what training began with, where it is not 0
        targets = method.targets if isinstance(method, LoRA) else ()
        self.adapted = tuple(name for name in self._names if is_target(name, targets))
        generator = torch.Generator().manual_seed(seed)
        self._layers = [_Layer() for _ in range(config.num_hidden_layers)]
        for number, layer in enumerate(self._layers):
            self._add(f"model.layers.{number}", layer)
            layer.names = tuple(name for name in self._names if name.startswith(f"model.layers.{number}."))
            self._add_weights(layer.names, generator)
            shard_layer(layer, ranks)
        self._add_weights([name for name in self._names if not name.startswith("model.layers.")], generator)
        if not any(p.requires_grad for p in self.parameters()):
            raise TrainingError("every weight is frozen, so nothing would be trained; freeze fewer")

    def shard(self) -> None:
        """Spread over the ranks what is not yet, once all parameters have been added and before any is used."""
        shard_rest(self, ("hidden",), self._ranks)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [R, V] of the rows that the batch of whole documents asks for."""
        weights = self.weights()
        return self.ops.linear(self.ops.rows(self._hidden(weights, batch), batch.logit_rows), weights.head)

    def hidden(self, batch: Batch) -> Tensor:
        """The normalised hidden states [T, D] that the head reads."""
        return self._hidden(self.weights(), batch)

    def head(self) -> Tensor:
        """The head [V, D] in numbers, with gradients where it is trained. Where it is sharded: after ``hidden``."""
        name = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        return self.ops.dense(self._matrix(name))

    def weights(self) -> llama.Weights:
        return llama.bind(self.config, {name: self._matrix(name) for name in self._names})

    def adapter(self) -> Adapter:
        """What LoRA has trained so far, copied. Raises TrainingError where the method is another, or DoRA."""
        if not isinstance(self.method, LoRA):
            raise TrainingError("the model itself was trained, so there is no adapter; save its weights")
        if self.method.dora:
            raise TrainingError("DoRA is more than a low-rank change; merge it into the model's weights")
        return Adapter({name: self.low_rank(name) for name in self.adapted})

    def low_rank(self, name: str) -> LowRank:
        """The low-rank change of one matrix, copied to numpy."""
        w = self._matrix(name)
        assert isinstance(w, LowRankMatrix)
        return LowRank(_host(w.a), _host(w.b), w.scale)

    def magnitudes(self) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """Of DoRA: float32[rows] by matrix; empty otherwise."""
        matrices = {name: self._matrix(name) for name in self.adapted}
        return {
            name: _host(w.magnitude)
            for name, w in matrices.items()
            if isinstance(w, LowRankMatrix) and w.magnitude is not None
        }

    def load_adapter(self, adapter: Adapter) -> None:
        """Begin training with an adapter, which counts as unchanged. Raises TrainingError unless it changes the same
        matrices at the same ranks."""
        if set(adapter.changes) != set(self.adapted):
            raise TrainingError("the adapter changes other matrices than the recipe trains; make their targets agree")
        for name, change in adapter.changes.items():
            w = self._matrix(name)
            assert isinstance(w, LowRankMatrix)
            if change.rank != len(w.a):
                raise TrainingError(f"{name}: the adapter has rank {change.rank}, but the recipe has {len(w.a)}")
            values = change.a, change.b * np.float32(change.scale / w.scale)
            a, b = (torch.from_numpy(each).to(self.ops.device, self._master) for each in values)
            fill(w.a, a)
            fill(w.b, b)
            self._start[name] = a, b

    @property
    def tensors(self) -> Mapping[str, Weight]:
        """The model's tensors as they were before training."""
        return self._tensors

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Within, what LoRA has learnt is switched off: the module computes what it did before training."""
        self._unchanged = True
        try:
            yield
        finally:
            self._unchanged = False

    def merged(self) -> Mapping[str, Weight]:
        """All tensors as trained, each made when it is asked for: float32 where it was trained, else as it was."""
        return _Trained(self)

    def _hidden(self, weights: llama.Weights, batch: Batch) -> Tensor:
        kv = NoCache(self.config.head_dim)
        hidden: Tensor = llama.hidden(self.ops, self.config, weights, batch, kv, self._call_layer)
        return hidden

    def _call_layer(
        self, ops: Ops, config: ModelConfig, _: llama.Block, x: Tensor, angles: Any, layer: int, *rest: Any
    ) -> Tensor:
        found: Tensor = self._layers[layer](self._run_layer, x, angles, layer, *rest)
        return found

    def _run_layer(self, x: Tensor, *arguments: Any) -> Tensor:
        """Within the layer's call, for its weights are whole only there."""
        layer = arguments[1]
        block = llama.bind_block({name: self._matrix(name) for name in self._layers[layer].names}, layer)
        run: Callable[..., Any] = llama.run_block
        if self.recompute and torch.is_grad_enabled():
            run = _recomputed
        found: Tensor = run(self.ops, self.config, block, x, *arguments)
        return found

    def _trained(self, weight: Weight) -> nn.Parameter:
        values = self.ops.numbers(weight, self._master).clone()
        drop_mapped_pages(weight.data)  # copied, so the file's pages need not stay in memory
        return nn.Parameter(values)

    def _frozen(self, weight: Weight) -> nn.Parameter:
        uploaded = self.ops.weight(weight)
        if isinstance(uploaded, EncodedMatrix):
            self._encoded[weight.name] = uploaded
            uploaded = uploaded.data
        return nn.Parameter(uploaded, requires_grad=False)

    def _add(self, name: str, part: nn.Parameter | nn.Module) -> None:
        """Under a name with dots: a tree of modules, as torch's tools expect."""
        *path, last = name.split(".")
        place: nn.Module = self
        for step in path:
            if step not in dict(place.named_children()):
                place.add_module(step, nn.Module())
            place = place.get_submodule(step)
        if isinstance(part, nn.Module):
            place.add_module(last, part)
        else:
            place.register_parameter(last, part)

    def _add_weights(self, names: Sequence[str], generator: torch.Generator) -> None:
        """With what LoRA adds to them."""
        method = self.method
        for name in names:
            trained = isinstance(method, Full) and not (method.frozen is not None and re.search(method.frozen, name))
            self._add(name, self._trained(self._tensors[name]) if trained else self._frozen(self._tensors[name]))
            if isinstance(method, LoRA) and name in self.adapted:
                self._add_adapter(name, method, generator)

    def _add_adapter(self, name: str, method: LoRA, generator: torch.Generator) -> None:
        base, module = self._base(name), name.removesuffix(".weight")
        rows, columns = base.shape
        a = (torch.rand(method.rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
        parameters = {"lora_A.weight": a, "lora_B.weight": torch.zeros(rows, method.rank)}
        if method.dora:
            parameters["lora_magnitude_vector"] = torch.linalg.vector_norm(dense(base, self._master), dim=1)
        for key, value in parameters.items():
            self._add(f"{module}.{key}", nn.Parameter(value.to(self.ops.device, self._master)))

    def _base(self, name: str) -> Tensor | EncodedMatrix:
        parameter = self.get_parameter(name)
        encoded = self._encoded.get(name)
        return parameter if encoded is None else replace(encoded, data=parameter)

    def _matrix(self, name: str) -> Matrix:
        base = self._base(name)
        if not isinstance(self.method, LoRA) or name not in self.adapted:
            return base
        if self._unchanged:
            return LowRankMatrix(base, *self._start[name], self.method.scale) if self._start else base
        method, module = self.method, self.get_submodule(name.removesuffix(".weight"))
        return LowRankMatrix(
            base,
            module.get_parameter("lora_A.weight"),
            module.get_parameter("lora_B.weight"),
            method.scale,
            method.dropout if self.training else 0.0,
            module.get_parameter("lora_magnitude_vector") if method.dora else None,
        )

    def _merged_tensor(self, name: str) -> Weight:
        if name in self.adapted or self.get_parameter(name).requires_grad:
            return Weight.from_array(name, _host(dense(_whole(self._matrix(name)), self._master)))
        return self._tensors[name]


class _Layer(nn.Module):
    """The parameters of one layer, which are called ``names``. It is called to run the layer, for what shards modules
    gathers their parameters before they are called."""

    names: tuple[str, ...] = ()

    def forward(self, run: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return run(*arguments)


class _Trained(Mapping[str, Weight]):
    def __init__(self, module: LlamaModule) -> None:
        self._module = module

    def __getitem__(self, name: str) -> Weight:
        if name not in self._module._names:
            raise KeyError(name)
        return self._module._merged_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._module._names)

    def __len__(self) -> int:
        return len(self._module._names)


def is_target(name: str, targets: tuple[str, ...]) -> bool:
    """Whether a tensor of this name is a matrix that LoRA with these targets changes."""
    return name.endswith(".weight") and name.split(".")[-2] in targets


def _whole(w: Any) -> Any:
    """A matrix whose parts are gathered."""
    if isinstance(w, Tensor):
        return whole(w)
    parts = {field.name: getattr(w, field.name) for field in fields(w)}
    return replace(
        w, **{name: _whole(part) for name, part in parts.items() if isinstance(part, (Tensor, EncodedMatrix))}
    )


def _recomputed(*arguments: Any) -> Tensor:
    x: Tensor = checkpoint(llama.run_block, *arguments, use_reentrant=False)
    return x


def _host(x: Tensor) -> Any:
    return whole(x.detach()).to("cpu", torch.float32).numpy().copy()
