"""A forward, traced once and replayed in one native call (csrc/program.hpp).

The forward stays the Python function that it is: called with a ``Tracer`` in the place of ops, it writes down its op
calls, with numbered buffers in the place of arrays. A forward that depends on the numbers of a batch can't be traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import puna._native as _native
from puna.ops.protocol import Array, Batch, KVCache, Ops

Floats = NDArray[np.float32]
Forward = Callable[[Ops, Batch, KVCache], Array]


class UntraceableError(Exception):
    """The forward does something that a program can't hold."""


@dataclass(frozen=True)
class Value:
    """An array of the forward: a row for each token, or for each row whose logits are wanted."""

    number: int
    columns: int
    of_logit_rows: bool = False


@dataclass
class Call:
    """One op call. ``reads`` and ``writes`` are the values whose buffers it needs at the same time."""

    method: str
    reads: list[Value]
    writes: list[Value]
    emit: Callable[[Any, Callable[[Value], int]], None]


class Tracer:
    """The ops that a forward uses, writing down calls. Weights are those of NativeOps; ``panels`` packs one."""

    name = "native"

    def __init__(self, batch: Batch, kv: KVCache, panels: Callable[[Any], Any]) -> None:
        self.calls: list[Call] = []
        self._batch, self._kv, self._panels = batch, kv, panels
        self._count = 0

    def embed(self, table: Any, tokens: NDArray[np.int32]) -> Value:
        self._expect(tokens is self._batch.tokens)
        out = self._new(table.shape[1])
        kind, data = table.lookup()
        self._call("embed", [], [out], lambda program, at: program.embed(kind, data, at(out)))
        return out

    def rms_norm(self, x: Value, weight: Floats, eps: float) -> Value:
        out = self._new(x.columns, x.of_logit_rows)
        self._call("rms_norm", [x], [out], lambda program, at: program.rms_norm(at(x), weight, eps, at(out)))
        return out

    def linear(self, x: Value, w: Any, bias: Floats | None = None, residual: Value | None = None) -> Value:
        return self._linears(x, [w], [bias], residual)[0]

    def linears(self, x: Value, weights: Sequence[Any], biases: Sequence[Floats | None] | None = None) -> list[Value]:
        return self._linears(x, weights, list(biases) if biases else [None] * len(weights), None)

    def rope_angles(self, positions: Any, inverse_frequencies: Floats, scale: float) -> tuple[Value, Value]:
        self._expect(positions is self._batch.positions and inverse_frequencies.ndim == 1)
        cosines, sines = self._new(len(inverse_frequencies)), self._new(len(inverse_frequencies))

        def emit(program: Any, at: Callable[[Value], int]) -> None:
            program.rope_angles(inverse_frequencies, scale, at(cosines), at(sines))

        self._call("rope_angles", [], [cosines, sines], emit)
        return cosines, sines

    def rope(self, x: Value, angles: tuple[Value, Value]) -> Value:
        cosines, sines = angles
        self._call("rope", [x, cosines, sines], [x], lambda program, at: program.rope(at(x), at(cosines), at(sines)))
        return x

    def attend(self, q: Value, k: Value, v: Value, kv: KVCache, layer: int, batch: Batch) -> Value:
        self._expect(kv is self._kv and batch is self._batch)
        out = self._new(q.columns)
        self._call("attend", [q, k, v], [out], lambda program, at: program.attend(layer, at(q), at(k), at(v), at(out)))
        return out

    def swiglu(self, gate: Value, up: Value) -> Value:
        self._call("swiglu", [gate, up], [gate], lambda program, at: program.swiglu(at(gate), at(up), at(gate)))
        return gate

    def rows(self, x: Value, index: NDArray[np.int32]) -> Value:
        self._expect(index is self._batch.logit_rows and not x.of_logit_rows)
        out = self._new(x.columns, of_logit_rows=True)
        self._call("rows", [x], [out], lambda program, at: program.rows(at(x), at(out)))
        return out

    def __getattr__(self, name: str) -> Any:
        raise UntraceableError(f"ops.{name}")

    def _linears(
        self, x: Value, weights: Sequence[Any], biases: list[Floats | None], residual: Value | None
    ) -> list[Value]:
        outs = [self._new(w.shape[0], x.of_logit_rows) for w in weights]
        panels = [self._panels(w) for w in weights]
        changes = [w.changes for w in weights]

        def emit(program: Any, at: Callable[[Value], int]) -> None:
            program.linears(at(x), panels, biases, at(residual) if residual else -1, [at(out) for out in outs], changes)

        self._call("linears", [x, residual] if residual else [x], outs, emit)
        return outs

    def _new(self, columns: int, of_logit_rows: bool = False) -> Value:
        self._count += 1
        return Value(self._count, columns, of_logit_rows)

    def _call(
        self, method: str, reads: list[Value], writes: list[Value], emit: Callable[[Any, Callable[[Value], int]], None]
    ) -> None:
        self.calls.append(Call(method, reads, writes, emit))

    def _expect(self, condition: bool) -> None:
        if not condition:
            raise UntraceableError("the forward depends on the batch")


@dataclass(frozen=True)
class Traced:
    """A forward as a native program, and the shape of its result."""

    program: Any
    columns: int
    of_logit_rows: bool


def trace(forward: Forward, batch: Batch, kv: KVCache, panels: Callable[[Any], Any]) -> Traced | None:
    """The program of a forward; None when it can't be traced. The batch only serves to be recognised."""
    tracer: Any = Tracer(batch, kv, panels)
    try:
        result = forward(tracer, batch, kv)
    except UntraceableError:
        return None
    if not isinstance(result, Value):
        return None
    numbers, buffers = _place(tracer.calls, result)
    program = _native.Program(buffers, numbers[result])
    for call in tracer.calls:
        call.emit(program, numbers.__getitem__)
    return Traced(program, result.columns, result.of_logit_rows)


def _place(calls: Sequence[Call], result: Value) -> tuple[dict[Value, int], list[tuple[int, bool]]]:
    """A buffer for each value, and the buffers' shapes. A buffer is used again once its value is not read any more."""
    last_use = {value: i for i, call in enumerate(calls) for value in (*call.reads, *call.writes)}
    last_use[result] = len(calls)
    numbers: dict[Value, int] = {}
    buffers: list[tuple[int, bool]] = []
    free: dict[tuple[int, bool], list[int]] = {}
    for i, call in enumerate(calls):
        for value in call.writes:
            if value in numbers:
                continue
            shape = (value.columns, value.of_logit_rows)
            if free.get(shape) and value != result:
                numbers[value] = free[shape].pop()
            else:
                numbers[value] = len(buffers)
                buffers.append(shape)
        for value in {*call.reads, *call.writes}:
            if last_use[value] == i:
                free.setdefault((value.columns, value.of_logit_rows), []).append(numbers[value])
    return numbers, buffers
