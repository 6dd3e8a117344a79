"""Linears quantized by what a text makes of their inputs, layer by layer: GPTQ, AWQ and SmoothQuant."""

from __future__ import annotations

import time
from dataclasses import replace

from puna.checkpoint import Checkpoint
from puna.quantize.awq import awq
from puna.quantize.calibration import Progress, Windows
from puna.quantize.folder_settings import FolderSettings
from puna.quantize.gptq import gptq
from puna.quantize.layer_journal import Layer, LayerJournal
from puna.quantize.layerwise import STAGES, LayerByLayer
from puna.quantize.smoothquant import InputSamples, smoothquant
from puna.tensor import Weight
from puna.tensor.groupwise import Grouped


def calibrated(
    checkpoint: Checkpoint,
    settings: FolderSettings,
    windows: Windows,
    threads: int | None = None,
    progress: Progress | None = None,
    journal: LayerJournal | None = None,
) -> tuple[Checkpoint, dict[str, Grouped], int]:
    """The checkpoint with what was scaled, the quantized matrices by name, and how many layers ``journal`` had.

    Those are passed through, not quantized again. ``progress`` hears the seconds that a layer takes.
    """
    walk = LayerByLayer(checkpoint.config, checkpoint.tensors, windows, threads)
    layers = checkpoint.config.num_hidden_layers
    changed: dict[str, Weight] = {}
    matrices: dict[str, Grouped] = {}
    continued = 0
    saying = settings.method
    for number in range(layers):
        if progress:
            progress(saying, number, layers)
        finished = journal.load(number) if journal else None
        if finished is not None:
            continued += 1
            _pass_through(walk, settings, finished)
        else:
            began = time.monotonic()
            finished = _quantized(walk, settings, windows)
            saying = f"{settings.method}, {time.monotonic() - began:.1f} s a layer"
            if journal:
                finished = journal.save(number, *finished)
        prefix = f"model.layers.{number}."
        matrices |= {f"{prefix}{name}.weight": matrix for name, matrix in finished[0].items()}
        changed |= {prefix + name: Weight.from_array(prefix + name, values) for name, values in finished[1].items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **changed}), matrices, continued


def _quantized(walk: LayerByLayer, settings: FolderSettings, windows: Windows) -> Layer:
    """The current layer, by what follows ``model.layers.N.``; the walk goes on to the next."""
    values = walk.values
    if settings.method == "gptq":
        found = _gptq_layer(walk, settings)
        walk.advance()
        return found, {}
    if settings.method == "awq":
        found = awq(values, walk.advance(STAGES), settings.group_size)
    else:
        inputs = InputSamples(len(windows))
        walk.show(inputs.see)
        found = smoothquant(values, inputs)
    return found, {name: numbers for name, numbers in values.items() if not name.endswith("_proj.weight")}


def _pass_through(walk: LayerByLayer, settings: FolderSettings, finished: Layer) -> None:
    """Go on to the next layer as after quantizing this one: only what GPTQ makes is read by the layers that follow."""
    if settings.method == "gptq":
        walk.values |= {f"{name}.weight": matrix.dequantize() for name, matrix in finished[0].items()}
    walk.advance()


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
