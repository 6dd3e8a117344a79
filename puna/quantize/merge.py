"""``merge_adapter``: one model of a model and its adapter, in any format and type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from puna.checkpoint.convert import convert_checkpoint
from puna.checkpoint.recode import FLOAT_TYPES
from puna.errors import RequestError
from puna.quantize.calibration import Progress
from puna.quantize.folder import quantize_to_folder
from puna.quantize.folder_settings import METHODS, FolderSettings
from puna.quantize.quantize import QuantizeSettings, quantize
from puna.quantize.source import Source
from puna.tensor import Adapter


def merge_adapter(
    base: Source,
    adapter: Adapter,
    destination: Path,
    type_name: str | None = None,
    *,
    calibrate: Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write ``base`` with ``adapter`` in its matrices; it appears whole or not at all.

    The sums are computed in float32, one tensor at a time. Without ``type_name`` they get the type that the matrix had,
    or F16 where that is quantized; with a float type, all matrices get that one; with any other, the model is quantized
    as ``quantize`` and ``quantize_to_folder`` do it, on the text ``calibrate``. A .gguf destination is GGUF, any other
    a folder. ``progress`` and ``check`` are as in ``quantize``. Raises what these raise.
    """
    if type_name is None or type_name.upper() in FLOAT_TYPES:
        if calibrate is not None:
            raise RequestError(
                "a calibration text is for quantizing; name a quantized --type, or leave out --calibrate"
            )
        whole = base.merged(adapter, keep_types=type_name is None)
        convert_checkpoint(whole.checkpoint, base.path, destination, None, type_name, progress, overwrite, check)
    elif type_name.lower() in METHODS:
        folder = FolderSettings(type_name.lower(), requantize=True)
        quantize_to_folder(base.merged(adapter), destination, folder, calibrate, overwrite, threads, progress, check)
    else:
        settings = QuantizeSettings(mix=type_name, calibrate=calibrate, requantize=True, overwrite=overwrite)
        quantize(base.merged(adapter), destination, settings, threads, progress, check)
