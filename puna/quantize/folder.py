"""``quantize_folder``: a Hugging Face folder of fewer bits: rounded plainly, or by GPTQ, AWQ or SmoothQuant."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from puna import __version__
from puna.checkpoint import Checkpoint, open_checkpoint
from puna.checkpoint.convert import check_destination, put
from puna.checkpoint.hf_quantized.awq import awq_config, awq_tensors
from puna.checkpoint.hf_quantized.bitsandbytes import nf4_config, nf4_tensors
from puna.checkpoint.hf_quantized.compressed_tensors import compressed_config, fp8_tensors, int_tensors, packed_tensors
from puna.checkpoint.hf_quantized.gptq import gptq_config, gptq_tensors
from puna.checkpoint.hf_quantized.write import write_quantized_folder
from puna.checkpoint.safetensors import StoredTensor
from puna.errors import CheckpointError
from puna.model.shapes import parameter_count
from puna.quantize.calibrated import calibrated
from puna.quantize.calibration import Progress, Windows, read_windows
from puna.quantize.folder_settings import FolderSettings, check_settings
from puna.quantize.layer_journal import LayerJournal
from puna.quantize.rtn import round_to_nearest
from puna.quantize.source import Source
from puna.tensor import Weight
from puna.tensor.groupwise import Grouped


@dataclass(frozen=True)
class QuantizedFolder:
    """What was written, in ``seconds`` without the check; ``continued`` layers were finished by an earlier run.

    ``size`` is that of the files with the weights.
    """

    path: Path
    title: str
    size: int
    bits_per_weight: float
    seconds: float
    continued: int

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "quantization": self.title,
            "bytes": self.size,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "seconds": round(self.seconds, 3),
            "layers_continued": self.continued,
        }


def quantize_to_folder(
    source: str | Path | Source,
    destination: Path,
    settings: FolderSettings,
    calibrate: Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> QuantizedFolder:
    """As ``quantize_folder``, from a stored model or a path, calibrated on the text ``calibrate``.

    A calibrated run that was killed is continued by the same call. ``check`` gets the finished folder before it takes
    its name; when it raises, nothing is left.
    Raises CheckpointError when the destination exists and ``overwrite`` is false, RequestError for a text that is too
    short, and what quantize_folder raises.
    """
    began = time.monotonic()
    destination = destination.expanduser()
    source = source if isinstance(source, Source) else Source.open(source)
    check_destination(source.path, destination, overwrite)
    checkpoint = source.checkpoint
    windows = None if calibrate is None else read_windows(checkpoint, calibrate)
    made: list[QuantizedFolder] = []

    def write(fresh: Path, journal: LayerJournal | None = None) -> None:
        continued = quantize_folder(checkpoint, fresh, settings, windows, threads, progress, journal)
        size = sum(file.stat().st_size for file in fresh.glob("*.safetensors"))
        title = str(open_checkpoint(fresh).description["quantization"])
        bits = 8 * size / parameter_count(checkpoint.config)
        made.append(QuantizedFolder(destination, title, size, bits, time.monotonic() - began, continued))

    if windows is None:
        put(destination, write, check)
    else:
        identity = f"{__version__} {source.identity} {settings} {windows}"
        with LayerJournal(destination, identity) as journal:
            put(destination, lambda fresh: write(fresh, journal), check)
            journal.finish()
    return made[0]


def quantize_folder(
    checkpoint: Checkpoint,
    path: Path,
    settings: FolderSettings,
    windows: Windows | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    journal: LayerJournal | None = None,
) -> int:
    """Write the folder ``path``, which appears whole or not at all.

    GPTQ, AWQ and SmoothQuant need ``windows`` of calibration text and take the layers in turn; those that ``journal``
    has are not quantized again, and how many these were is returned. ``progress`` is called with what is done, how many
    layers or tensors came before it, and how many there are.
    Raises RequestError for settings that contradict each other, CheckpointError for weights that are quantized
    already, are not finite, or have rows that are not whole groups.
    """
    check_settings(checkpoint, settings, has_text=bool(windows))
    matrices: Mapping[str, Grouped] = {}
    continued = 0
    if windows:
        checkpoint, matrices, continued = calibrated(checkpoint, settings, windows, threads, progress, journal)
    config, tensors = _layout(settings)

    def write_module(module: str, weight: Weight) -> Iterable[StoredTensor]:
        if settings.method in ("nf4", "fp8"):
            values = weight.dequantize()
            if not np.isfinite(values).all():
                raise CheckpointError(f"{weight.name} holds numbers that are not finite; the model is damaged")
            return nf4_tensors(module, values) if settings.method == "nf4" else fp8_tensors(module, values)
        grouped = matrices[weight.name] if weight.name in matrices else rounded(weight, settings)
        return tensors(module, grouped)

    write_quantized_folder(checkpoint, path, config, write_module, progress)
    return continued


def rounded(weight: Weight, settings: FolderSettings) -> Grouped:
    """Rounded plainly, as int8 or int4. Raises CheckpointError naming the tensor."""
    try:
        if settings.method == "int8":
            return round_to_nearest(weight.dequantize(), 8, -1, symmetric=True)
        return round_to_nearest(weight.dequantize(), 4, settings.group_size, settings.symmetric)
    except CheckpointError as error:
        raise CheckpointError(f"{weight.name}: {error}") from None


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
