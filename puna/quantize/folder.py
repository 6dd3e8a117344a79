"""``quantize_folder``: a Hugging Face folder of fewer bits: rounded plainly, or by GPTQ, AWQ or SmoothQuant."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from puna.checkpoint import Checkpoint
from puna.checkpoint.convert import check_destination, put
from puna.checkpoint.hf_quantized.awq import awq_config, awq_tensors
from puna.checkpoint.hf_quantized.bitsandbytes import nf4_config, nf4_tensors
from puna.checkpoint.hf_quantized.compressed_tensors import compressed_config, fp8_tensors, int_tensors, packed_tensors
from puna.checkpoint.hf_quantized.gptq import gptq_config, gptq_tensors
from puna.checkpoint.hf_quantized.write import is_quantized_matrix, write_quantized_folder
from puna.checkpoint.safetensors import StoredTensor
from puna.errors import CheckpointError, RequestError
from puna.quantize.awq import awq
from puna.quantize.calibration import Windows, read_windows
from puna.quantize.gptq import gptq
from puna.quantize.layerwise import STAGES, LayerByLayer
from puna.quantize.rtn import round_to_nearest
from puna.quantize.smoothquant import InputSamples, smoothquant
from puna.quantize.source import Source
from puna.tensor import Weight
from puna.tensor.groupwise import Grouped

METHODS = ("int8", "int4", "nf4", "fp8", "gptq", "awq", "w8a8")
CALIBRATED = ("gptq", "awq", "w8a8")
LAYOUTS = ("compressed-tensors", "gptq", "awq")
ZERO_POINTS = ("v1", "v2")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FolderSettings:
    """What to make. ``method`` is one of METHODS: ``int8`` has a scale for each row; ``int4`` is rounded plainly;
    ``w8a8`` is SmoothQuant's int8, for programs that round inputs to 8 bits as well.

    ``group_size`` (32, 64, 128, or -1 for rows) and ``symmetric`` are of int4 and GPTQ (AWQ is not symmetric);
    ``act_order``, ``static_groups`` and ``true_sequential`` of GPTQ. ``layout``, one of LAYOUTS, says whose tensors
    hold int4, GPTQ and AWQ, by default the method's own; ``zero_points``, one of ZERO_POINTS, how the layout gptq has
    them: less 1 (``v1``, which every loader reads) or as they are. ``requantize`` accepts weights that are quantized
    already, and their further loss.
    """

    method: str
    group_size: int = 128
    symmetric: bool = False
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True
    layout: str | None = None
    zero_points: str = "v1"
    requantize: bool = False

    @property
    def reorders(self) -> bool:
        """Whether groups are no runs of columns."""
        return self.method == "gptq" and self.act_order and not self.static_groups

    @property
    def stored_as(self) -> str:
        """The layout of the folder."""
        own = self.method if self.method in LAYOUTS else "compressed-tensors"
        return self.layout or own


def quantize_to_folder(
    source: str | Path | Source,
    destination: Path,
    settings: FolderSettings,
    calibrate: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """As ``quantize_folder``, from a stored model or a path, calibrated on the text ``calibrate``.

    ``check`` gets the finished folder before it takes its name; when it raises, nothing is left.
    Raises CheckpointError when the destination exists and ``overwrite`` is false, RequestError for a text that is too
    short, and what quantize_folder raises.
    """
    destination = destination.expanduser()
    source = source if isinstance(source, Source) else Source.open(source)
    check_destination(source.path, destination, overwrite)
    checkpoint = source.checkpoint
    windows = None if calibrate is None else read_windows(checkpoint, calibrate)
    put(destination, lambda fresh: quantize_folder(checkpoint, fresh, settings, windows, progress), check)


def quantize_folder(
    checkpoint: Checkpoint,
    path: Path,
    settings: FolderSettings,
    windows: Windows | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the folder ``path``, which appears whole or not at all.

    GPTQ, AWQ and SmoothQuant need ``windows`` of calibration text and take the layers in turn; ``progress`` is called
    with what is done (with the time that is left), how many layers came before it, and how many there are.
    Raises RequestError for settings that contradict each other, CheckpointError for weights that are quantized
    already, are not finite, or have rows that are not whole groups.
    """
    _check(checkpoint, settings, windows)
    matrices: Mapping[str, Grouped] = {}
    if windows is not None:
        checkpoint, matrices = calibrated(checkpoint, settings, windows, progress)
    config, tensors = _layout(settings)

    def write_module(module: str, weight: Weight) -> Iterable[StoredTensor]:
        if settings.method in ("nf4", "fp8"):
            values = weight.dequantize()
            if not np.isfinite(values).all():
                raise CheckpointError(f"{weight.name} holds numbers that are not finite; the model is damaged")
            return nf4_tensors(module, values) if settings.method == "nf4" else fp8_tensors(module, values)
        grouped = matrices[weight.name] if weight.name in matrices else rounded(weight, settings)
        return tensors(module, grouped)

    write_quantized_folder(checkpoint, path, config, write_module)


def rounded(weight: Weight, settings: FolderSettings) -> Grouped:
    """Rounded plainly, as int8 or int4. Raises CheckpointError naming the tensor."""
    try:
        if settings.method == "int8":
            return round_to_nearest(weight.dequantize(), 8, -1, symmetric=True)
        return round_to_nearest(weight.dequantize(), 4, settings.group_size, settings.symmetric)
    except CheckpointError as error:
        raise CheckpointError(f"{weight.name}: {error}") from None


def calibrated(
    checkpoint: Checkpoint, settings: FolderSettings, windows: Windows, progress: Progress | None = None
) -> tuple[Checkpoint, dict[str, Grouped]]:
    """By GPTQ, AWQ or SmoothQuant: the checkpoint with what was scaled, and the quantized matrices by name."""
    walk = LayerByLayer(checkpoint.config, checkpoint.tensors, windows)
    layers = checkpoint.config.num_hidden_layers
    changed: dict[str, Weight] = {}
    matrices: dict[str, Grouped] = {}
    began = time.monotonic()
    for layer in range(layers):
        if progress:
            left = (time.monotonic() - began) / layer * (layers - layer) if layer else None
            progress(settings.method + (f", {left:.0f} s left" if left is not None else ""), layer, layers)
        prefix = f"model.layers.{layer}."
        values = walk.values
        if settings.method == "gptq":
            found = _gptq_layer(walk, settings)
            walk.advance()
        elif settings.method == "awq":
            found = awq(values, walk.advance(STAGES), settings.group_size)
        else:
            inputs = InputSamples(len(windows))
            walk.show(inputs.see)
            found = smoothquant(values, inputs)
        if settings.method != "gptq":
            changed |= {
                prefix + name: Weight.from_array(prefix + name, numbers)
                for name, numbers in values.items()
                if not is_quantized_matrix(prefix + name)
            }
        matrices |= {f"{prefix}{name}.weight": grouped for name, grouped in found.items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **changed}), matrices


def _gptq_layer(walk: LayerByLayer, settings: FolderSettings) -> dict[str, Grouped]:
    """The linears of the current layer, in which their quantized numbers take their place."""
    found: dict[str, Grouped] = {}
    for stages in [(stage,) for stage in STAGES] if settings.true_sequential else [STAGES]:
        moments = walk.inputs(stages)
        for stage in stages:
            for name in stage:
                values = walk.values[f"{name}.weight"]
                second = moments[stage[0]].second
                found[name] = gptq(
                    values,
                    second,
                    4,
                    settings.group_size,
                    settings.symmetric,
                    settings.act_order,
                    settings.static_groups,
                )
                walk.values[f"{name}.weight"] = found[name].dequantize()
    return found


def _layout(settings: FolderSettings) -> tuple[dict[str, Any], Callable[[str, Grouped], Iterable[StoredTensor]]]:
    if settings.method == "nf4":
        return nf4_config(), packed_tensors
    if settings.method == "fp8":
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
        return compressed_config("float-quantized", weights), packed_tensors
    if settings.method == "int8":
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        return compressed_config("pack-quantized", weights), packed_tensors
    if settings.method == "w8a8":
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        return compressed_config(
            "int-quantized", weights, weights | {"strategy": "token", "dynamic": True}
        ), int_tensors
    if settings.stored_as == "gptq":
        zero_offset = 1 if settings.zero_points == "v1" else 0
        config = gptq_config(4, settings.group_size, settings.symmetric, zero_offset, settings.reorders)
        return config, partial(gptq_tensors, zero_offset=zero_offset)
    if settings.stored_as == "awq":
        return awq_config(settings.group_size), awq_tensors
    weights = {"num_bits": 4, "type": "int", "symmetric": settings.symmetric, "dynamic": False}
    by_row = settings.group_size == -1
    weights |= {"strategy": "channel"} if by_row else {"strategy": "group", "group_size": settings.group_size}
    return compressed_config("pack-quantized", weights), packed_tensors


def _check(checkpoint: Checkpoint, settings: FolderSettings, windows: Windows | None) -> None:
    if settings.method not in METHODS:
        raise RequestError(f"unknown method {settings.method!r}; known: {', '.join(METHODS)}")
    if settings.stored_as not in LAYOUTS:
        raise RequestError(f"unknown layout {settings.layout!r}; known: {', '.join(LAYOUTS)}")
    if settings.layout and settings.method not in ("int4", "gptq", "awq"):
        raise RequestError(f"{settings.method} has a layout of its own; leave out the layout {settings.layout}")
    if settings.zero_points not in ZERO_POINTS:
        raise RequestError(f"unknown zero points {settings.zero_points!r}; known: {', '.join(ZERO_POINTS)}")
    if settings.zero_points != "v1" and settings.stored_as != "gptq":
        raise RequestError(
            f"the layout {settings.stored_as} has one form of zero points; {settings.zero_points} is of gptq"
        )
    if settings.method != "gptq" and not (settings.act_order and settings.static_groups and settings.true_sequential):
        raise RequestError(f"act-order, static groups and true-sequential are of GPTQ, not of {settings.method}")
    if settings.reorders and settings.stored_as != "gptq":
        raise RequestError(f"the layout {settings.stored_as} keeps groups in order; without static groups, choose gptq")
    if settings.group_size != -1 and settings.group_size <= 0:
        raise RequestError(f"the group size is {settings.group_size}; expected 32, 64, 128, or -1 for rows")
    if settings.method in CALIBRATED and not windows:
        raise RequestError(f"{settings.method} needs a calibration text; give one (--calibrate)")
    if windows and settings.method not in CALIBRATED:
        raise RequestError(
            f"{settings.method} is rounded without a calibration text; leave it out, or choose GPTQ, AWQ or W8A8"
        )
    if settings.symmetric and settings.method == "awq":
        raise RequestError("AWQ weights have zero points; leave out the symmetric setting")
    for name, weight in checkpoint.tensors.items():
        if not is_quantized_matrix(name):
            continue
        if weight.type.block_size > 1 and not settings.requantize:
            raise CheckpointError(
                f"{name} is quantized already ({weight.type.name}); quantize the original model, or accept the further "
                "loss (--requantize)"
            )
        grouped = settings.method in ("int4", "gptq", "awq") and settings.stored_as != "gptq"
        if grouped and settings.group_size != -1 and weight.shape[1] % settings.group_size:
            raise CheckpointError(
                f"{name}: rows of {weight.shape[1]} numbers are not whole groups of {settings.group_size}; "
                "choose another group size, or the layout gptq, which allows it"
            )
