"""A mix made to measure: which tensor gets how many bits so that a file of some size does least damage.

The damage is the KL divergence of the model's predictions on the calibration text from the source's. Three steps:

1. Noise: how much of a linear's output each type turns into error, from the error of its weights, each column weighted
   by its importance: Σ m (w - ŵ)² / Σ m w², on some rows of each tensor.
2. Sensitivity: how much divergence such noise causes, measured for each role (``attn_v``, ``ffn_down``, …) by running
   the model with the tensors of that role alone quantized. Noise of several tensors adds up, to first order.
3. Choice: all tensors start at their smallest type; bits go wherever a byte takes away most expected damage.

A bound on the divergence is met by measurement: mixes on the way of step 3 are run, and their sizes bisected.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint import Checkpoint
from puna.checkpoint.gguf import GGUFTensors
from puna.checkpoint.gguf_writer import tensor_bytes
from puna.errors import RequestError
from puna.model.model import Model
from puna.ops.protocol import Ops, UploadedWeight
from puna.quantize.calibration import Progress, Windows, divergence, log_probabilities
from puna.quantize.encoding import Encode, encode_weight
from puna.quantize.imatrix import ImportanceMatrix
from puna.quantize.mix import Overrides, TensorPlan, head_name, layer_and_role, plan_types
from puna.tensor import QuantType, quant_type

# By the rows' multiple, types of rising size of which none is worse than a smaller one.
LADDERS = {256: ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"), 32: ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0")}
NOISE_ROWS = 256
WINDOWS = 2
SIZE_TOLERANCE = 0.01

Types = dict[str, QuantType]


@dataclass(frozen=True)
class Step:
    """Giving one tensor more bits: what that costs and what it saves."""

    name: str
    kind: QuantType
    cost: int
    saved: float


class Search:
    """The measurements on one model; each is made once, when it is first needed. Names are GGUF's."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensors: GGUFTensors,
        ops: Ops,
        encode: Encode,
        importance: ImportanceMatrix | None,
        overrides: Overrides,
        windows: Windows,
        progress: Progress | None,
    ) -> None:
        self._checkpoint, self._tensors, self._ops = checkpoint, tensors, ops
        self._encode, self._importance, self._overrides = encode, importance, overrides
        self._windows = windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS]
        self._progress = progress or (lambda *_: None)
        self._matrices = [name for name, shape in tensors.shapes.items() if len(shape) == 2]
        self.ladders = {name: self._ladder(name) for name in self._matrices}

    @property
    def smallest(self) -> Types:
        return {name: ladder[0] for name, ladder in self.ladders.items()}

    @property
    def largest(self) -> Types:
        return {name: ladder[-1] for name, ladder in self.ladders.items()}

    def plans(self, types: Types) -> list[TensorPlan]:
        return plan_types(types, self._tensors.shapes, self._overrides)

    def size(self, types: Types) -> int:
        """Bytes of all tensors."""
        return sum(tensor_bytes(plan.shape, plan.type) for plan in self.plans(types))

    def steps(self) -> list[Step]:
        """Every step worth taking, the best first; those of one tensor in the order of its types."""
        steps = [step for name in self._matrices for step in self._steps_of(name)]
        return sorted(steps, key=lambda step: step.saved / step.cost, reverse=True)

    def measure(self, types: Types) -> float:
        """The divergence of the model with its matrices (those in ``types``) quantized, as these ops run it."""
        uploaded = dict(self._source)
        for name, kind in types.items():
            source = self._tensors.source(name)
            assert source is not None
            weight = self._checkpoint.tensors[source]
            uploaded[source] = self._ops.weight(encode_weight(weight, kind, self._encode, self._columns(name)))
        model = Model.bind(self._ops, self._checkpoint.config, self._checkpoint.tensors, uploaded)
        found = [
            divergence(known, log_probabilities(model, w)) for known, w in zip(self._known, self._windows, strict=True)
        ]
        return float(np.mean(found))

    def _ladder(self, name: str) -> Sequence[QuantType]:
        columns = self._tensors.shapes[name][-1]
        fixed = self._overrides.type_of(name, is_head=name == head_name(self._tensors.shapes))
        if fixed is not None:
            return (fixed,)
        fitting = next((types for multiple, types in LADDERS.items() if columns % multiple == 0), ("F16",))
        return tuple(map(quant_type, fitting))

    def _columns(self, name: str) -> NDArray[np.float32] | None:
        return self._importance.of(name, self._tensors.shapes[name][-1]) if self._importance else None

    def _steps_of(self, name: str) -> Iterator[Step]:
        """The steps along the lower convex hull of a tensor's (bytes, damage): each saves less by the byte."""
        role = layer_and_role(name)[1]
        shape = self._tensors.shapes[name]
        points = [
            (tensor_bytes(shape, kind), self._sensitivity[role] * noise, kind)
            for kind, noise in zip(self.ladders[name], self._noise[name], strict=True)
        ]
        hull = points[:1]
        for point in points[1:]:
            while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(point)
        for before, after in pairwise(hull):
            if after[1] < before[1]:
                yield Step(name, after[2], after[0] - before[0], before[1] - after[1])

    @cached_property
    def _source(self) -> Mapping[str, UploadedWeight]:
        tensors = self._checkpoint.tensors
        return {name: self._ops.weight(tensors[name]) for name in tensors}

    @cached_property
    def _known(self) -> NDArray[np.float32]:
        """float32[windows, T, V]: log probabilities of the source, in a file that is gone when this process is."""
        shape = (len(self._windows), len(self._windows[0]), self._checkpoint.config.vocab_size)
        with tempfile.TemporaryFile() as file:
            known = np.memmap(file, np.float32, "w+", shape=shape)
        model = Model.bind(self._ops, self._checkpoint.config, self._checkpoint.tensors, self._source)
        for number, window in enumerate(self._windows):
            self._progress("running the source", number, len(self._windows))
            known[number] = log_probabilities(model, window)
        return known

    @cached_property
    def _noise(self) -> dict[str, list[float]]:
        """For each matrix and each type it may have, the share of its output that is error."""
        noise: dict[str, list[float]] = {}
        for number, name in enumerate(self._matrices):
            self._progress("measuring noise", number, len(self._matrices))
            weight = self._tensors[name]
            rows = weight.take_rows(slice(None, None, max(1, weight.shape[0] // NOISE_ROWS)))
            columns = self._columns(name)
            values = rows.dequantize()
            scale = np.ones(values.shape[1], np.float32) if columns is None else columns
            whole = float((scale * values**2).sum(dtype=np.float64)) or 1.0
            noise[name] = []
            for kind in self.ladders[name]:
                error = encode_weight(rows, kind, self._encode, columns).dequantize() - values
                noise[name].append(float((scale * error**2).sum(dtype=np.float64)) / whole)
        return noise

    @cached_property
    def _sensitivity(self) -> dict[str, float]:
        """Divergence by the noise of one tensor, for each role, from running it at its second smallest type."""
        roles: dict[str, list[str]] = {}
        for name in self._matrices:
            roles.setdefault(layer_and_role(name)[1], []).append(name)
        sensitivity = {}
        for number, (role, names) in enumerate(roles.items()):
            self._progress(f"measuring {role}", number, len(roles))
            probe = {name: min(1, len(self.ladders[name]) - 1) for name in names}
            noise = sum(self._noise[name][at] for name, at in probe.items())
            found = self.measure({name: self.ladders[name][at] for name, at in probe.items()})
            sensitivity[role] = found / noise if noise > 0 else 0.0
        return sensitivity


def plan_within(search: Search, size: int) -> tuple[list[TensorPlan], float]:
    """The mix of least expected damage whose tensors take at most ``size`` bytes, and its measured divergence.

    Raises RequestError when even the smallest types take more.
    """
    types = search.smallest
    left = size - search.size(types)
    if left < 0:
        raise RequestError(
            f"the model cannot fit: with the smallest types its tensors take {search.size(types):,} bytes, "
            f"{-left:,} more than there is room for"
        )
    full: set[str] = set()
    for step in search.steps():
        if step.name in full or step.cost > left:
            full.add(step.name)  # what comes after a step of a tensor needs that step
            continue
        types[step.name] = step.kind
        left -= step.cost
    return search.plans(types), search.measure(types)


def plan_within_divergence(search: Search, most: float) -> tuple[list[TensorPlan], float]:
    """The smallest mix found whose measured divergence is at most ``most``, and that divergence.

    Raises RequestError when even the largest types diverge more.
    """
    steps = search.steps()

    def types_after(count: int) -> Types:
        return search.smallest | {step.name: step.kind for step in steps[:count]}

    low, high = 0, len(steps)
    best, found = types_after(high), search.measure(types_after(high))
    if found > most:
        raise RequestError(f"no mix diverges so little: with the largest types the KL is {found:.5f}, above {most}")
    while low < high and search.size(types_after(high)) > (1 + SIZE_TOLERANCE) * search.size(types_after(low)):
        middle = _middle(low, high, lambda count: search.size(types_after(count)))
        measured = search.measure(types_after(middle))
        if measured <= most:
            high, best, found = middle, types_after(middle), measured
        else:
            low = middle + 1
    return search.plans(best), found


def _middle(low: int, high: int, size: Callable[[int], int]) -> int:
    """A number of steps from ``low`` to ``high - 1`` whose size is nearest the middle."""
    wanted = (size(low) + size(high)) / 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if size(middle) > wanted else (middle, high)
    return low


def _slope(before: tuple[int, float, QuantType], after: tuple[int, float, QuantType]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])
