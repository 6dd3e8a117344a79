"""``quantize``: from a checkpoint of any format to a GGUF file of fewer bits, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from puna import __version__
from puna.checkpoint import Checkpoint
from puna.checkpoint.gguf import GGUFTensors, gguf_contents
from puna.checkpoint.gguf_writer import FILE_TYPES, gguf_layout, tensor_bytes
from puna.errors import CheckpointError, RequestError
from puna.ops.protocol import Ops
from puna.ops.registry import make_ops
from puna.quantize.calibration import Progress, Windows, measure_importance, read_windows
from puna.quantize.encoding import encode_pieces, encoder
from puna.quantize.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from puna.quantize.mix import Overrides, TensorPlan, check_plan_changes, file_type, mix_name, plan_mix, plan_types
from puna.quantize.part_file import PartFile
from puna.quantize.search import Search, plan_within, plan_within_divergence
from puna.quantize.source import Source
from puna.store.lock import file_lock
from puna.tensor import quant_type
from puna.tensor.mapped import drop_mapped_pages


@dataclass(frozen=True)
class QuantizeSettings:
    """What to make. Exactly one of ``mix`` (a name of MIXES), ``fit`` (bytes of the file) and ``max_kl`` (nats) is set.

    ``calibrate`` is a text, ``imatrix`` a file of column importances (measured on the text where it is not given);
    ``tensor_types`` are ``REGEX=TYPE``, ``head`` is a type.
    """

    mix: str | None = None
    fit: int | None = None
    max_kl: float | None = None
    calibrate: Path | None = None
    imatrix: Path | None = None
    save_imatrix: Path | None = None
    tensor_types: Sequence[str] = ()
    head: str | None = None
    requantize: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Quantized:
    """What was written, in ``seconds`` without the check.

    ``divergence`` is the mean KL to the source on the calibration text, where it was measured.
    """

    path: Path
    plans: Sequence[TensorPlan]
    size: int
    seconds: float
    continued: int
    divergence: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        numbers = sum(int(np.prod(plan.shape)) for plan in self.plans)
        return 8 * sum(tensor_bytes(plan.shape, plan.type) for plan in self.plans) / numbers

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "bytes": self.size,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "seconds": round(self.seconds, 3),
            "tensors_continued": self.continued,
            "kl_divergence": self.divergence,
            "notes": self.notes,
            "types": dict(Counter(plan.type.name for plan in self.plans)),
            "tensors": [{"name": p.name, "shape": list(p.shape), "type": p.type.name} for p in self.plans],
        }


def quantize(
    source: str | Path | Source,
    destination: Path,
    settings: QuantizeSettings,
    threads: int | None = None,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> Quantized:
    """Write ``destination`` from a stored model, a file or a folder; it appears whole or not at all.

    A run that was killed is continued by the same call. ``progress`` gets what is done (a phase, or a tensor's name),
    how much of it came before, and how much there is. ``check`` gets the finished file before that takes its name; when
    it raises, nothing is left.
    Raises RequestError for settings that make no sense or a text that is too short, CheckpointError for weights that
    can't be read or quantized and when ``destination`` exists and may not be overwritten.
    """
    began = time.monotonic()
    mix, overrides = _check(settings)
    destination = destination.expanduser()
    _check_destination(destination, settings)
    source = source if isinstance(source, Source) else Source.open(source)
    if destination.exists() and source.path.is_file() and destination.samefile(source.path):
        raise CheckpointError(f"{destination} is what is being quantized; choose another name")
    checkpoint = source.checkpoint
    ops = make_ops(None, threads)
    metadata, tensors = gguf_contents(checkpoint)
    has_importance = bool(settings.imatrix or settings.calibrate)
    plans: list[TensorPlan] = []
    divergence: float | None = None
    if mix is not None:
        plans = plan_mix(mix, checkpoint.config, tensors.shapes, overrides, has_importance=has_importance)
    if not settings.requantize:
        # A mix to be measured may give a tensor any type, so nothing may be quantized already: hence F32.
        intended = plans or plan_types(dict.fromkeys(tensors.shapes, quant_type("F32")), tensors.shapes, Overrides())
        check_plan_changes(intended, {name: tensors.type(name) for name in tensors.shapes}, str(source.path))
    windows = read_windows(checkpoint, settings.calibrate) if settings.calibrate else None
    importance = _importance(checkpoint, ops, settings, windows, progress)
    if importance is not None:
        _check_names(importance, tensors, settings)
        metadata |= _imatrix_metadata(importance, settings)
    if mix is None:
        assert windows is not None
        search = Search(checkpoint, tensors, ops, encoder(ops), importance, overrides, windows, progress)
        if settings.fit is not None:
            overhead = _overhead(metadata, tensors)
            plans, divergence = plan_within(search, settings.fit - overhead)
        else:
            assert settings.max_kl is not None
            plans, divergence = plan_within_divergence(search, settings.max_kl)
    metadata |= {"general.file_type": file_type(mix) if mix else _most_common(plans), "general.quantization_version": 2}
    identity = f"{__version__} {source.identity} {_digest(importance)}"
    size, continued, finished = _write(
        destination, identity, metadata, tensors, plans, ops, importance, progress, check, str(source.path)
    )
    return Quantized(destination, plans, size, finished - began, continued, divergence, _notes(plans, importance))


def _check(settings: QuantizeSettings) -> tuple[str | None, Overrides]:
    """The mix and the overrides. Raises RequestError."""
    goals = [goal for goal in (settings.mix, settings.fit, settings.max_kl) if goal is not None]
    if len(goals) != 1:
        raise RequestError("give exactly one of --type, --fit and --max-kl")
    if settings.mix is None and settings.calibrate is None:
        raise RequestError("--fit and --max-kl choose by what they measure on a text; name one with --calibrate")
    if settings.save_imatrix and settings.imatrix is None and settings.calibrate is None:
        raise RequestError("--save-imatrix needs --calibrate: there is no importance to save")
    if settings.max_kl is not None and not settings.max_kl > 0:
        raise RequestError(f"--max-kl must be above 0, found {settings.max_kl}")
    mix = None if settings.mix is None else mix_name(settings.mix)
    return mix, Overrides.parse(settings.head, settings.tensor_types)


def _check_destination(destination: Path, settings: QuantizeSettings) -> None:
    if destination.suffix != ".gguf":
        raise RequestError(f"{destination} must end in .gguf, the format of these types")
    if destination.is_dir():
        raise CheckpointError(f"{destination} is a folder; choose another name")
    if destination.exists() and not settings.overwrite:
        raise CheckpointError(f"{destination} exists already; choose another name, or overwrite it (--force)")


def _importance(
    checkpoint: Checkpoint, ops: Ops, settings: QuantizeSettings, windows: Windows | None, progress: Progress | None
) -> ImportanceMatrix | None:
    if settings.imatrix is not None:
        importance = read_imatrix(settings.imatrix)
    elif windows is not None:
        assert settings.calibrate is not None
        importance = measure_importance(checkpoint, ops, windows, settings.calibrate.name, progress)
    else:
        return None
    if settings.save_imatrix is not None:
        write_imatrix(settings.save_imatrix, importance)
    return importance


def _check_names(importance: ImportanceMatrix, tensors: GGUFTensors, settings: QuantizeSettings) -> None:
    if not any(name in importance.means for name in tensors.shapes):
        raise CheckpointError(f"{settings.imatrix} knows no tensor of this model; it was made from another")
    for name, shape in tensors.shapes.items():
        importance.of(name, shape[-1])


def _imatrix_metadata(importance: ImportanceMatrix, settings: QuantizeSettings) -> dict[str, Any]:
    """What llama.cpp's quantizer records of the importance matrix."""
    file = settings.imatrix or settings.save_imatrix
    return ({"quantize.imatrix.file": file.name} if file else {}) | {
        "quantize.imatrix.dataset": importance.datasets[-1] if importance.datasets else "",
        "quantize.imatrix.entries_count": len(importance.means),
        "quantize.imatrix.chunks_count": importance.windows,
    }


def _write(
    destination: Path,
    identity: str,
    metadata: dict[str, Any],
    tensors: GGUFTensors,
    plans: Sequence[TensorPlan],
    ops: Ops,
    importance: ImportanceMatrix | None,
    progress: Progress | None,
    check: Callable[[Path], None] | None,
    source: str,
) -> tuple[int, int, float]:
    """Encode and write everything.

    Returns the file's bytes, how many tensors an earlier run had finished, and when (monotonic) all of them were.
    """
    header, starts, size = gguf_layout(metadata, {plan.name: (plan.shape, plan.type) for plan in plans})
    encode = encoder(ops)
    continued = 0

    def busy() -> None:
        raise CheckpointError(f"another process is writing {destination}")

    try:
        with (
            file_lock(destination.absolute().with_name(f".{destination.name}.lock"), busy, discard=True),
            PartFile(destination, identity, header, size) as part,
        ):
            for plan in plans:
                start, length = starts[plan.name], tensor_bytes(plan.shape, plan.type)
                if progress:
                    progress(plan.name, start, size)
                if part.has(plan.name, start, length):
                    continued += 1
                    continue
                columns = importance.of(plan.name, plan.shape[-1]) if importance and len(plan.shape) > 1 else None
                weight = tensors[plan.name]
                try:
                    written = part.write(plan.name, start, encode_pieces(weight, plan.type, encode, columns))
                except CheckpointError as error:
                    raise CheckpointError(
                        f"{source}: tensor {plan.name} cannot become {plan.type.name}: {error}"
                    ) from None
                assert written == length, f"{plan.name}: {written} bytes written, {length} expected"
                drop_mapped_pages(weight.data)
            finished = time.monotonic()
            if check:
                check(part.path)
            part.finish()
    except OSError as error:
        raise CheckpointError(f"cannot write {destination}: {error}") from error
    return size, continued, finished


def _overhead(metadata: dict[str, Any], tensors: GGUFTensors) -> int:
    """Bytes of the file that are no tensor's, with room for padding."""
    shapes = {name: (shape, quant_type("F32")) for name, shape in tensors.shapes.items()}
    header, _, _ = gguf_layout(metadata | {"general.file_type": 0, "general.quantization_version": 2}, shapes)
    return len(header) + 32 * (len(shapes) + 1)


def _most_common(plans: Sequence[TensorPlan]) -> int:
    numbers: Counter[str] = Counter()
    for plan in plans:
        if len(plan.shape) > 1:
            numbers[plan.type.name] += int(np.prod(plan.shape))
    return FILE_TYPES.get(numbers.most_common(1)[0][0], 0)


def _digest(importance: ImportanceMatrix | None) -> str:
    digest = hashlib.sha256()
    for name, mean in sorted(importance.means.items() if importance else ()):
        digest.update(name.encode() + mean.tobytes())
    return digest.hexdigest()


def _notes(plans: Sequence[TensorPlan], importance: ImportanceMatrix | None) -> list[str]:
    notes = []
    unfit = Counter((plan.wanted, plan.type.name, plan.shape[-1]) for plan in plans if plan.wanted)
    for (wanted, kind, columns), count in unfit.items():
        notes.append(
            f"{kind} instead of {wanted} for {count} of {len(plans)} tensors: their rows have {columns} numbers"
        )
    matrices = [plan.name for plan in plans if plan.name.startswith("blk.") and len(plan.shape) > 1]
    unknown = [name for name in matrices if importance and name not in importance.means]
    if unknown:
        notes.append(f"the importance matrix has nothing of {len(unknown)} tensors, the first {unknown[0]}")
    return notes
