"""Where ``puna quantize`` puts a GGUF model: in a file, or in the store under a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.cli.fidelity import Deriving

if TYPE_CHECKING:
    from puna.evaluate import Report
    from puna.quantize import Quantized, QuantizeSettings
    from puna.store import Progress


def is_store_name(destination: Path) -> bool:
    """Whether a model's name is meant: one without folders that ends like no file of weights."""
    return len(destination.parts) == 1 and destination.suffix not in (".gguf", ".safetensors")


def quantize_into_file(
    source: str, destination: Path, settings: QuantizeSettings, deriving: Deriving
) -> tuple[Quantized, Report | None]:
    """Write ``destination``, a .gguf file, and its report beside it."""
    from puna.quantize import quantize

    with deriving.watched(source, destination) as (progress, review):
        result = quantize(source, destination, settings, deriving.threads, progress, check=review)
    return result, deriving.keep(review, destination)


def quantize_into_store(
    source: str, name: str, settings: QuantizeSettings, deriving: Deriving
) -> tuple[Quantized, Report | None]:
    """Store the model under ``name``, with its report, and all else that a stored source has beside its weights."""
    from puna.llm.create import create
    from puna.quantize import quantize
    from puna.store import ModelName, Store, resolve

    store, found = Store(), resolve(source)
    if not deriving.force:
        store.check_free(ModelName.parse(name))
    made: list[Quantized] = []
    with deriving.watched(source, Path(name)) as (progress, review):

        def write(path: Path, destination: Path, _: Progress) -> Mapping[str, Any] | None:
            wish = replace(settings, overwrite=True)
            made.append(quantize(path, destination, wish, deriving.threads, progress, check=review))
            return review.report.as_json() if review and review.report else None

        manifest = create(store, name, from_=source if found.manifest else found.path, quantize=write)
    report = deriving.tell(review, f"puna show {manifest.model_name}", Path.cwd())
    return replace(made[-1], path=store.path_of(manifest)), report
