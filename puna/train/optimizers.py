"""AdamW (Loshchilov & Hutter 2017), with moments of 32 bits or of 8 (Dettmers et al. 2022).

An optimizer knows its parameters by name, and its state is plain tensors by name, which can be stored and taken up
again bit for bit: ``NAME:mean`` and ``NAME:variance`` of each parameter, and of moments of 8 bits the scales of their
blocks, ``NAME:mean_scale`` and ``NAME:variance_scale``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puna.errors import TrainingError
from puna.train.parallel import as_rows_of, own_rows

BLOCK = 256  # numbers of a row that share a scale, at most
_SMALLEST_ENCODED = 4096  # smaller matrices keep moments of 32 bits: they take no memory, and norms are delicate
_CHUNK = 1 << 16  # numbers that are worked on at once: what is decoded of them stays in the cache


class Optimizer(Protocol):
    """Changes parameters by their gradients."""

    def step(self, rate: float) -> None:
        """One step at this learning rate. Parameters without a gradient stay as they are."""

    def zero_grad(self) -> None:
        """Drop all gradients and their memory."""

    def state(self) -> dict[str, Tensor]:
        """The state, not copied; empty before the first step."""

    def restore(self, steps: int, state: Mapping[str, Tensor]) -> None:
        """Go on from the ``state`` after ``steps`` steps; other names in it are passed over.

        Raises TrainingError where it is not the state of these parameters under this optimizer.
        """


def make_optimizer(
    kind: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Of one of the names in OPTIMIZERS. Matrices decay, vectors do not. Raises TrainingError for another name."""
    if kind not in OPTIMIZERS:
        raise TrainingError(f"unknown optimizer {kind!r}; there are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[kind](parameters, betas, epsilon, weight_decay)


def state_bytes(kind: str, shape: Sequence[int], itemsize: int) -> int:
    """Of what ``kind`` keeps of a parameter of this shape, whose numbers have ``itemsize`` bytes."""
    numbers = math.prod(shape)
    if kind == "adamw":
        return 2 * numbers * itemsize
    return 2 * (numbers + 4 * shape[0] * _block_count(shape[1]) if _is_encoded(shape) else 4 * numbers)


class AdamW:
    """torch's fused AdamW, moments in the parameters' dtype: 8 bytes a number over float32."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], betas: tuple[float, float], epsilon: float, weight_decay: float
    ) -> None:
        self._parameters = dict(parameters)
        groups = [
            {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=True)

    def step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if moments := self._optimizer.state.get(parameter):
                found |= {f"{name}:mean": moments["exp_avg"], f"{name}:variance": moments["exp_avg_sq"]}
        return found

    def restore(self, steps: int, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(steps), device=parameter.device),
                "exp_avg": _stored(state, f"{name}:mean", parameter, parameter.shape, parameter.dtype),
                "exp_avg_sq": _stored(state, f"{name}:variance", parameter, parameter.shape, parameter.dtype),
            }


class AdamW8Bit:
    """AdamW whose moments are kept in 8 bits: 2.03 bytes a number. Parameters and arithmetic stay as wide as they are.

    Numbers that share a scale are of one row, so that rows can be shared out. Moments of vectors, and of matrices with
    fewer than 4096 numbers, are float32.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], betas: tuple[float, float], epsilon: float, weight_decay: float
    ) -> None:
        self._parameters = dict(parameters)
        self._betas, self._epsilon, self._weight_decay = betas, epsilon, weight_decay
        self._steps = 0
        self._moments: dict[str, tuple[_Moment, _Moment]] = {}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self._steps += 1
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            values, gradient = own_rows(parameter), own_rows(parameter.grad)
            if name not in self._moments:
                encoded = _is_encoded(parameter.shape)
                self._moments[name] = (
                    _Moment.zeros(values, _SIGNED, encoded),
                    _Moment.zeros(values, _UNSIGNED, encoded),
                )
            decay = rate * self._weight_decay if parameter.ndim > 1 else 0.0
            for chunk in _chunks(values):
                self._update(values[chunk], gradient[chunk].float(), self._moments[name], chunk, rate, decay)

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, moments in self._moments.items():
            for key, moment in zip(("mean", "variance"), moments, strict=True):
                parameter = self._parameters[name]
                found[f"{name}:{key}"] = as_rows_of(parameter, moment.values)
                if moment.scales is not None:
                    found[f"{name}:{key}_scale"] = as_rows_of(parameter, moment.scales)
        return found

    def restore(self, steps: int, state: Mapping[str, Tensor]) -> None:
        self._steps = steps
        for name, parameter in self._parameters.items():
            encoded = _is_encoded(parameter.shape)
            dtype = torch.uint8 if encoded else torch.float32
            found = []
            for key, code in (("mean", _SIGNED), ("variance", _UNSIGNED)):
                values, scales = own_rows(_stored(state, f"{name}:{key}", parameter, parameter.shape, dtype)), None
                if encoded:
                    shape = torch.Size([parameter.shape[0], _block_count(parameter.shape[1])])
                    scales = own_rows(_stored(state, f"{name}:{key}_scale", parameter, shape, torch.float32))
                found.append(_Moment(values, scales, code))
            self._moments[name] = (found[0], found[1])

    def _update(
        self,
        values: Tensor,
        gradient: Tensor,
        moments: tuple[_Moment, _Moment],
        chunk: slice,
        rate: float,
        decay: float,
    ) -> None:
        (beta1, beta2), (mean_store, variance_store) = self._betas, moments
        mean = mean_store.read(chunk).lerp_(gradient, 1 - beta1)
        variance = variance_store.read(chunk).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # Before the update: it overwrites both.
        mean_store.write(chunk, mean)
        variance_store.write(chunk, variance)
        divisor = variance.sqrt_().div_(math.sqrt(1 - beta2**self._steps)).add_(self._epsilon)
        change = mean.div_(divisor).mul_(rate / (1 - beta1**self._steps))
        values.mul_(1 - decay).sub_(change)


OPTIMIZERS: dict[str, type[AdamW] | type[AdamW8Bit]] = {"adamw": AdamW, "adamw8bit": AdamW8Bit}


@dataclass(frozen=True)
class _Moment:
    """Of this process's rows: uint8 codes with a scale for each block of a row, or plain float32 numbers."""

    values: Tensor
    scales: Tensor | None
    code: DynamicCode

    @classmethod
    def zeros(cls, rows: Tensor, code: DynamicCode, encoded: bool) -> _Moment:
        if not encoded:
            return cls(torch.zeros_like(rows, dtype=torch.float32), None, code)
        scales = torch.zeros(len(rows), _block_count(rows.shape[1]), device=rows.device)
        return cls(torch.full_like(rows, code.zero, dtype=torch.uint8), scales, code)

    def read(self, chunk: slice) -> Tensor:
        """A copy in float32."""
        if self.scales is None:
            return self.values[chunk].clone()
        return self.code.decode(self.values[chunk], self.scales[chunk])

    def write(self, chunk: slice, numbers: Tensor) -> None:
        if self.scales is None:
            self.values[chunk] = numbers
        else:
            self.values[chunk], self.scales[chunk] = self.code.encode(numbers)


class DynamicCode:
    """Dynamic blockwise quantization to 256 values from -1 or 0 to 1, times the largest magnitude of the block.

    Dettmers et al. 2022, §1.3 and §2: of the seven decades from 1e-7 to 1, number i from 0 is cut into 2**i equal
    parts, twice as many without a sign, whose middles are values; 0 and 1 are values too.
    """

    def __init__(self, signed: bool) -> None:
        decades = []
        for decade in range(7):
            edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
            decades.append(10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        positive = torch.cat(decades)
        values = torch.cat([-positive, positive, ends] if signed else [positive, ends]).sort().values
        self.values, self.zero = values.float(), int(torch.searchsorted(values, 0.0))
        # A code is found by the leading bits of the float32, 10 of them of the mantissa: it is that of the nearest
        # value, but for numbers within a thousandth of the middle between two.
        cells = torch.arange(_FIRST_CELL, _LAST_CELL + 1, dtype=torch.int32)
        centres = (cells << _SHIFT) + (1 << (_SHIFT - 1))
        numbers = centres.view(torch.float32).double()
        numbers[0] = 0
        middles = (values[1:] + values[:-1]) / 2
        signs = (1, -1) if signed else (1,)
        self._codes = torch.cat([torch.bucketize(sign * numbers, middles) for sign in signs]).to(torch.uint8)
        self._signed = signed

    def encode(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """float32[rows, n] -> codes uint8[rows, n] and the scales of blocks, float32[rows, ⌈n / BLOCK⌉]."""
        blocks = _in_blocks(numbers)
        scales = blocks.abs().amax(2)
        # A block of zeros is divided by the smallest float32 rather than by 0.
        scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        cells = scaled.abs().view(torch.int32).bitwise_right_shift_(_SHIFT)
        cells = cells.clamp_(_FIRST_CELL, _LAST_CELL).sub_(_FIRST_CELL)
        if self._signed:
            cells.add_(torch.signbit(scaled), alpha=_LAST_CELL + 1 - _FIRST_CELL)
        codes = self._codes.to(numbers.device).index_select(0, cells.view(-1))
        return codes.view(len(numbers), -1)[:, : numbers.shape[1]], scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """What ``encode`` made, as float32[rows, n]."""
        numbers = self.values.to(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)
        scaled = _in_blocks(numbers).mul_(scales[..., None])
        return scaled.view(len(codes), -1)[:, : codes.shape[1]]


_SHIFT = 13
_FIRST_CELL, _LAST_CELL = 0x34000000 >> _SHIFT, 0x3F800000 >> _SHIFT  # those of 2**-23 and 1
_SIGNED, _UNSIGNED = DynamicCode(signed=True), DynamicCode(signed=False)


def _is_encoded(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and math.prod(shape) >= _SMALLEST_ENCODED


def _block_count(columns: int) -> int:
    """How many blocks a row has."""
    return -(-columns // BLOCK)


def _in_blocks(numbers: Tensor) -> Tensor:
    """[rows, n] -> [rows, blocks, size]: a row's blocks are as long as each other, with zeros behind the last one."""
    rows, columns = numbers.shape
    blocks = _block_count(columns)
    missing = -columns % blocks
    return (F.pad(numbers, (0, missing)) if missing else numbers).view(rows, blocks, (columns + missing) // blocks)


def _chunks(values: Tensor) -> Iterator[slice]:
    """Some rows at a time."""
    step = max(1, _CHUNK * len(values) // max(1, values.numel()))
    return (slice(start, start + step) for start in range(0, len(values), step))


def _stored(state: Mapping[str, Tensor], name: str, parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    found = state.get(name)
    if found is None or found.shape != shape or found.dtype != dtype:
        what = "missing" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
        raise TrainingError(
            f"the state of the optimizer does not fit: {name} is {what}, expected {dtype} of shape {tuple(shape)}; "
            "continue with the optimizer that the training began with, or start anew"
        )
    # A copy, which no other holder of the state sees change.
    return found.to(parameter.device, copy=True)
