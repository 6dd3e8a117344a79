"""What a training will take in memory and time, told before anything is loaded."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from puna.checkpoint import Checkpoint
from puna.config import ModelConfig
from puna.errors import CapacityError
from puna.model.shapes import flops_per_token, tensor_shapes
from puna.ops.torch_causal import kept_weights
from puna.ops.torch_weights import FLOAT_DTYPES
from puna.tensor import quant_type
from puna.train.losses import CHUNK_BYTES
from puna.train.module import Full, is_target
from puna.train.optimizers import state_bytes
from puna.train.plan import Plan
from puna.train.quantized_base import as_quantized
from puna.train.recipe import Recipe

OVERHEAD = 512 << 20  # torch, the tokenizer, Python's own
_PART_OF_PEAK = 0.5  # of the speed of one large product that a whole step reaches


@dataclass(frozen=True)
class Estimate:
    """Bytes: of the weights as they are kept, of numbers that are made and dropped on the way, of what is trained, its
    gradients and the optimizer's, of what a micro-batch keeps for the backward pass, of the loss, of ``other_models``
    that are read beside it. ``available`` is what the device has now. ``seconds`` is about what all steps take."""

    weights: int
    scratch: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    other_models: int
    available: int
    trained_parameters: int
    seconds: float

    @property
    def total(self) -> int:
        parts = (self.weights, self.scratch, self.parameters, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.loss + self.other_models + OVERHEAD

    @property
    def fits(self) -> bool:
        return self.total <= self.available


def fitted(
    recipe: Recipe, checkpoint: Checkpoint, plan: Plan, force: bool = False, processes: int = 1, other_models: int = 0
) -> tuple[Plan, Estimate]:
    """The plan, with ``recompute`` where only so it fits and the recipe does not say, and its estimate.

    Raises CapacityError when it does not fit, unless by ``force``.
    """
    found = estimate(recipe, checkpoint, plan, processes, other_models)
    if not found.fits and recipe.training.recompute is None:
        plan = replace(plan, recompute=True)
        found = estimate(recipe, checkpoint, plan, processes, other_models)
    if not found.fits and not force:
        raise CapacityError(
            f"the training needs about {_gigabytes(found.total)} of memory, but {_gigabytes(found.available)} are "
            f"free; {_remedy(recipe, plan)}, or go on nevertheless with --force"
        )
    return plan, found


def estimate(recipe: Recipe, checkpoint: Checkpoint, plan: Plan, processes: int = 1, other_models: int = 0) -> Estimate:
    """Of a recipe and its plan, for each of several ``processes``, which all have the ``other_models``.

    Reads shapes and types of the weights only.
    """
    config, method = checkpoint.config, recipe.method.trained()
    dtype = getattr(torch, plan.dtype)
    master = torch.promote_types(dtype, torch.float32).itemsize
    shapes = _trained_shapes(recipe, config)
    trained = sum(map(math.prod, shapes))
    kept, largest = _frozen(recipe, checkpoint, dtype)
    documents = {"documents": 1, "prompts": plan.answers}.get(recipe.rows, 2 * plan.answers)
    tokens = documents * plan.length
    of_token = _kept_numbers(config, 0 if isinstance(method, Full) else method.rank)
    if plan.device == "cpu" and dtype == torch.bfloat16:
        of_token += config.num_attention_heads * kept_weights(plan.length)
    numbers = math.ceil(tokens * of_token)
    layer = numbers * dtype.itemsize
    between = tokens * config.hidden_size * dtype.itemsize
    layers = config.num_hidden_layers
    activations = layers * between + layer if plan.recompute else layers * layer
    head = config.vocab_size * config.hidden_size
    loss = 3 * min(CHUNK_BYTES, tokens * config.vocab_size * 4) + 3 * between
    loss += head * (master if isinstance(method, Full) else dtype.itemsize)
    own = trained * master // processes
    on_one = processes if plan.device == "cpu" else 1  # who share its memory
    return Estimate(
        weights=kept // processes,
        scratch=2 * largest,
        parameters=own,
        gradients=own,
        optimizer=sum(state_bytes(recipe.training.optimizer, shape, master) for shape in shapes) // processes,
        activations=activations,
        loss=loss,
        other_models=other_models,
        available=_available(plan.device) // on_one,
        trained_parameters=trained,
        seconds=_seconds(recipe, config, plan, dtype) / processes,
    )


def weight_bytes(checkpoint: Checkpoint) -> int:
    """Of all weights as they are in the file. Reads shapes and types only."""
    return sum(weight.nbytes for weight in checkpoint.tensors.values())


def _trained_shapes(recipe: Recipe, config: ModelConfig) -> list[tuple[int, ...]]:
    """Of each trained parameter."""
    method = recipe.method.trained()
    shapes = tensor_shapes(config)
    if isinstance(method, Full):
        frozen = None if method.frozen is None else re.compile(method.frozen)
        return [shape for name, shape in shapes.items() if not (frozen and frozen.search(name))]
    found: list[tuple[int, ...]] = []
    for name, shape in shapes.items():
        if is_target(name, method.targets):
            rows, columns = shape
            found += [(method.rank, columns), (rows, method.rank), *[(rows,)] * method.dora]
    return found


def _frozen(recipe: Recipe, checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the weights that aren't trained, and of the largest matrix once it is decoded."""
    method = recipe.method.trained()
    frozen = re.compile(method.frozen) if isinstance(method, Full) and method.frozen is not None else None
    kept = largest = 0
    tensors: Mapping[str, object] = checkpoint.tensors
    for name, shape in tensor_shapes(checkpoint.config).items():
        if isinstance(method, Full) and not (frozen and frozen.search(name)):
            continue
        if name not in tensors:
            continue
        if len(shape) != 2:
            kept += math.prod(shape) * 4
            continue
        weight = checkpoint.tensors[name]
        kind = weight.type
        if as_quantized(recipe.method, weight):
            kind = quant_type(as_quantized(recipe.method, weight) or "")
        kept += shape[0] * kind.row_bytes(shape[1])
        if FLOAT_DTYPES.get(kind.name) != dtype:
            largest = max(largest, math.prod(shape) * dtype.itemsize)
    return kept, largest


def _kept_numbers(config: ModelConfig, rank: int) -> float:
    """What one layer keeps of one token for the backward pass, in numbers: the inputs of norms and linear layers,
    queries, keys and values (padded by at most a fifth), gate and up."""
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    attention = 1.2 * (2 * queries + 2 * keys) + queries
    return 4 * config.hidden_size + attention + 3 * config.intermediate_size + 7 * rank


def _seconds(recipe: Recipe, config: ModelConfig, plan: Plan, dtype: torch.dtype) -> float:
    """Forward is one, the gradients of inputs another, those of weights a third (Kaplan et al. 2020)."""
    passes = (3 if recipe.method.type == "full" else 2) + plan.recompute
    operations = passes * flops_per_token(config, plan.length // 2) * plan.step_tokens * plan.steps
    return operations / (_PART_OF_PEAK * _operations_per_second(plan.device, dtype))


def _operations_per_second(device: str, dtype: torch.dtype) -> float:
    """Of a product of two matrices, measured in some hundredths of a second."""
    a, b = (torch.ones(512, 1024, dtype=dtype, device=device) for _ in range(2))
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        float((a @ b.T)[0, 0])  # which waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * 512 * 512 * 1024 / best


def _available(device: str) -> int:
    if torch.device(device).type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available: int = psutil.virtual_memory().available
    return available


def _remedy(recipe: Recipe, plan: Plan) -> str:
    if recipe.method.type == "full":
        return "train with LoRA (--method lora)"
    if recipe.training.recompute is False:
        return "set training.recompute to true"
    return f"choose a smaller --length than {plan.length}, or a smaller or quantized model"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
