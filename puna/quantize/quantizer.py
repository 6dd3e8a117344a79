"""``quantizer``: quantizing as a step of making a stored model, as ollama's /api/create does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from puna.errors import RequestError
from puna.quantize.mix import mix_name
from puna.quantize.quantize import QuantizeSettings, quantize
from puna.quantize.source import Source
from puna.store import Progress
from puna.store.progress import Meter


def quantizer(type_name: str, threads: int | None = None) -> Callable[[Path, Path, Progress], None]:
    """What writes the model at a path as the .gguf file of the other, and tells its progress in ollama's words.

    ``type_name`` is one of ``MIXES``. Raises RequestError for another; so does what is returned, for a model that is
    quantized already.
    """
    mix = mix_name(type_name)

    def write(path: Path, destination: Path, progress: Progress) -> None:
        source = Source.open(path)
        kinds = {weight.type.name for weight in source.checkpoint.tensors.values() if len(weight.shape) > 1}
        if not kinds <= {"F32", "F16", "BF16"}:
            raise RequestError(
                "quantization is only supported for F16 and F32 models (and BF16), and this one is quantized already; "
                "begin from its original weights"
            )
        saying = f"quantizing {'/'.join(sorted(kinds))} model to {mix}"
        progress.status(saying)
        meters: list[Meter] = []

        def on_tensor(name: str, done: int, total: int) -> None:
            if not meters:
                meters.append(Meter(progress, saying, total))
            meters[0].update(done)

        quantize(source, destination, QuantizeSettings(mix=mix, overwrite=True), threads, on_tensor)

    return write
