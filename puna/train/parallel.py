"""Training by several processes, one a device: who they are, what they tell each other, and how a model is sharded.

torchrun starts the processes and ends them all when one fails. Parameters, gradients and optimizer states lie in rows
on all of them; FSDP2 (Zhao et al. 2023) gathers a layer's weights before it runs and lets go of them behind it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from puna.errors import TrainingError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, of which this is number ``rank`` of ``count``.

    ``mesh`` is what torch knows them as, where there are several.
    """

    rank: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    @staticmethod
    def compute_with(threads: int) -> None:
        """How many CPU threads this process takes."""
        torch.set_num_threads(threads)

    def passes(self, micro_batches: Sequence[T]) -> Iterator[tuple[int, T, bool]]:
        """This rank's share: a number, its micro-batch, and whether it counts.

        All ranks make as many passes, for they gather the weights together; one that lacks a micro-batch in the last
        round repeats another's, which does not count.
        """
        for start in range(0, len(micro_batches), self.count):
            number = start + self.rank
            counts = number < len(micro_batches)
            yield number, micro_batches[number if counts else start], counts

    def sum(self, value: float) -> float:
        """The sum of all ranks' values, the same on each."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def sums(self, pairs: Mapping[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
        """Sums and counts by name, added over the ranks, which may know different names."""
        if self.count == 1:
            return dict(pairs)
        gathered: list[Mapping[str, tuple[float, int]]] = [{}] * self.count
        dist.all_gather_object(gathered, pairs)
        return reduce(add_sums, gathered, {})

    def tell(self, value: T) -> T:
        """What the first rank gives, on every rank."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.count > 1:
            self.tell(None)
            self.sum(0.0)


ALONE = Ranks()


def add_sums(
    one: Mapping[str, tuple[float, int]], other: Mapping[str, tuple[float, int]]
) -> dict[str, tuple[float, int]]:
    """Sums and counts by name, added where both have a name."""
    found = dict(one)
    for name, (total, count) in other.items():
        before = found.get(name, (0.0, 0))
        found[name] = before[0] + total, before[1] + count
    return found


@contextmanager
def launched(device: str | None = None) -> Iterator[Ranks]:
    """What torchrun started, by its environment variables; a process that nothing started is alone.

    Each process has the CUDA device of its local number, or all share the CPU where there is none or ``device`` says
    so. Raises TrainingError when there are more processes than devices, or ``device`` is one of several.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    if device not in (None, "cpu", "cuda"):
        raise TrainingError(f"each process trains on a device of its own, but all were given {device}; leave it out")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    devices = 0 if device == "cpu" else torch.cuda.device_count()
    if devices:
        if local >= devices:
            raise TrainingError(f"{local + 1} processes were started for {devices} CUDA devices; start one for each")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if devices else "gloo")
    try:
        yield Ranks(dist.get_rank(), count, init_device_mesh("cuda" if devices else "cpu", (count,)))
    finally:
        dist.destroy_process_group()


def shard_layer(layer: nn.Module, ranks: Ranks) -> None:
    """Spread a module's parameters over the ranks, frozen and quantized ones too; they are whole while it is called.

    Gradients are summed over the ranks, not averaged.
    """
    if ranks.mesh is None:
        return
    sharded = fully_shard(layer, mesh=ranks.mesh)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def shard_rest(module: nn.Module, entrances: Sequence[str], ranks: Ranks) -> None:
    """The same for what is left of a module whose layers are sharded: whole from a call of one of its methods
    ``entrances`` to the end of the backward pass."""
    if ranks.mesh is None or isinstance(module, FSDPModule):
        return
    shard_layer(module, ranks)
    for entrance in entrances:
        register_fsdp_forward_method(module, entrance)


def release(module: nn.Module) -> None:
    """Let go of gathered weights, where no backward pass did."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its rows; the ranks must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> Tensor:
    """What of it lies in this process, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    """``rows`` of every process as one tensor, sharded as ``tensor`` is, whose rows may have other lengths."""
    if not isinstance(tensor, DTensor):
        return rows
    shape = torch.Size([len(tensor), *rows.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def empty_rows_of(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """One of this shape to be filled, sharded as ``tensor`` is if it has as many rows."""
    if not isinstance(tensor, DTensor) or len(tensor) != shape[0]:
        return torch.empty(tuple(shape), dtype=dtype, device=tensor.device)
    return as_rows_of(tensor, torch.empty(len(tensor.to_local()), *shape[1:], dtype=dtype, device=tensor.device))


def fill(tensor: Tensor, values: Tensor) -> None:
    """Put values in it; a sharded one takes its own rows of them."""
    values = values.to(tensor.device, tensor.dtype)
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    with torch.no_grad():
        tensor.copy_(values)


class _Asked(Mapping[str, Any]):
    """On the first rank: a mapping that has every other rank read each item along with it."""

    def __init__(self, mapping: Mapping[str, Any], ranks: Ranks) -> None:
        self._mapping, self._ranks = mapping, ranks

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        self._ranks.tell(name)
        return self._mapping[name]

    def __contains__(self, name: object) -> bool:
        return name in list(self._mapping)  # not by reading, which takes all ranks

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)


@contextmanager
def asked_by_first(mapping: Mapping[str, T], ranks: Ranks) -> Iterator[Mapping[str, T]]:
    """Sharded tensors for one writer: on the first rank a mapping to read from, in any order; empty on the others.

    Every tensor is gathered when it is asked for. The others are held here until the first rank leaves.
    """
    if ranks.count == 1:
        yield mapping
    elif ranks.first:
        try:
            yield _Asked(mapping, ranks)
        finally:
            ranks.tell("")
    else:
        while name := ranks.tell(""):
            mapping[name]
        yield {}
