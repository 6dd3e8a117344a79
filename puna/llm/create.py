"""Making a stored model from another one, or from files, as a Modelfile or ollama's /api/create asks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from puna.chat.go_template import GoTemplate, is_go_template
from puna.chat.messages import parse_messages
from puna.chat.template import ChatTemplate
from puna.checkpoint import open_checkpoint
from puna.engine import SamplingParams
from puna.errors import StoreError
from puna.llm.ollama_options import parameters_from_text, parse_options
from puna.store import Lineage, Manifest, ModelName, Progress, Silent, Store, StoredFile
from puna.store.disk import digest_file, disk_errors, link_or_copy
from puna.store.importing import files_of_model, take_file
from puna.store.manifest import MESSAGE_ROLES, StoredAdapter, is_file_name
from puna.store.modelfile import Modelfile, parse_modelfile
from puna.store.names import name_part_from
from puna.store.resolve import existing_path

# Writes the model at a path as the .gguf file of the other, in another type, and gives the report to keep of that.
Quantize = Callable[[Path, Path, Progress], Mapping[str, Any] | None]

_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def create(
    store: Store,
    name: str,
    *,
    from_: str | Path | None = None,
    files: Mapping[str, str] | None = None,
    template: str | None = None,
    system: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    license: str | Sequence[str] | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    adapters: Sequence[str | Path] | Mapping[str, str] | None = None,
    quantize: Quantize | None = None,
    paths: bool = True,
    progress: Progress | None = None,
) -> Manifest:
    """Store a model under ``name``, replacing what had the name, all or nothing.

    ``from_`` is a stored model, or, where ``paths`` allows it, a .gguf file or checkpoint folder. ``files`` (name →
    ``sha256:…``) are blobs that were sent before. What is given replaces what the base has; parameters are merged,
    licences added. ``adapters`` are paths, or blobs like ``files``. ``quantize`` (``puna.quantize.quantizer``) makes
    the weights of the base's. ``progress`` hears ollama's status lines, but for the last, ``success``. Raises
    StoreError, RequestError, TemplateError, CheckpointError; nothing is stored then.
    """
    progress = progress or Silent()
    model_name = ModelName.parse(name)
    if (from_ is None) == (files is None):
        raise StoreError("give one of from (a model, a file, a folder) and files (blobs that were sent)")
    if template is not None:
        check_template(template)
    parsed = parse_messages(messages) if messages else []
    for i, message in enumerate(parsed):
        if message.role not in MESSAGE_ROLES:
            raise StoreError(f"messages[{i}].role must be one of {', '.join(MESSAGE_ROLES)}, found {message.role!r}")
    SamplingParams(**parse_options(parameters or {}).sampling)  # a wrong value is refused now, not at every answer
    licences = (license,) if isinstance(license, str) else tuple(license or ())
    if adapters and not paths and not isinstance(adapters, Mapping):
        raise StoreError("adapters must be blobs that were sent before (name: digest), not paths")

    def make() -> Manifest:
        base = _base(store, model_name, from_, files, quantize, paths, progress)
        stored = _adapters(store, adapters, progress) if adapters else base.adapters
        for file in (*base.files, *(file for adapter in stored for file in adapter.files)):
            here = store.blobs.path(file.sha256).is_file()
            progress.status(f"{'using existing' if here else 'creating new'} layer sha256:{file.sha256}")
        progress.status("writing manifest")
        return replace(
            base,
            template=base.template if template is None else template,
            system=base.system if system is None else system,
            parameters={**base.parameters, **(parameters or {})},
            messages=tuple((message.role, message.text) for message in parsed) or base.messages,
            licence_texts=(*base.licence_texts, *(text for text in licences if text not in base.licence_texts)),
            adapters=stored,
        )

    return store.add(make)


def create_from_modelfile(
    store: Store,
    name: str,
    modelfile: Modelfile,
    folder: Path,
    progress: Progress | None = None,
    quantize: Quantize | None = None,
) -> Manifest:
    """``create`` as a Modelfile says, whose relative paths begin at ``folder``."""
    beside = folder / Path(modelfile.from_).expanduser()
    is_path = os.sep in modelfile.from_ or beside.suffix.lower() in (".gguf", ".safetensors")
    return create(
        store,
        name,
        from_=beside if beside.exists() and (is_path or not _is_stored(store, modelfile.from_)) else modelfile.from_,
        template=modelfile.template,
        system=modelfile.system,
        parameters=parameters_from_text(modelfile.parameters),
        license=modelfile.licences,
        messages=[{"role": role, "content": content} for role, content in modelfile.messages],
        adapters=[folder / Path(path).expanduser() for path in modelfile.adapters],
        quantize=quantize,
        progress=progress,
    )


def read_modelfile(path: Path) -> Modelfile:
    """Read and parse a file. Raises StoreError naming it."""
    try:
        return parse_modelfile(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; name the Modelfile with -f") from None
    except UnicodeDecodeError:
        raise StoreError(f"{path} is not text in UTF-8; save it as such") from None


def modelfile_of(manifest: Manifest, store: Store, template: str | None = None) -> Modelfile:
    """The Modelfile that makes the model again on this machine. ``template`` is what its files bring along."""
    parameters = [
        (key, str(value).lower() if isinstance(value, bool) else str(value))
        for key, values in manifest.parameters.items()
        for value in (values if isinstance(values, list) else [values])
    ]
    return Modelfile(
        str(store.path_of(manifest)),
        tuple(parameters),
        manifest.template or template,
        manifest.system,
        tuple(str(path) for path in store.adapter_paths(manifest).values()),
        manifest.licence_texts,
        manifest.messages,
    )


def check_template(source: str) -> None:
    """Raise TemplateError when a template, Jinja or Go, does not compile."""
    GoTemplate(source) if is_go_template(source) else ChatTemplate(source)


def _is_stored(store: Store, name: str) -> bool:
    try:
        store.locate(name)
    except StoreError:
        return False
    return True


def _base(
    store: Store,
    name: ModelName,
    from_: str | Path | None,
    files: Mapping[str, str] | None,
    quantize: Quantize | None,
    paths: bool,
    progress: Progress,
) -> Manifest:
    """What the new model begins with, under its name. Files are staged."""
    path = existing_path(from_) if paths and from_ is not None else None
    if path is not None:
        path = path.absolute()
        progress.status(f"gathering model components of {path.name}")
        if quantize is not None:
            return _quantized(store, Manifest(name.name, name.tag, (), source=str(path)), path, quantize, progress)
        folder, names = files_of_model(path)
        open_checkpoint(path)  # a file that can't be read as a model is refused before it is stored
        stored = tuple(take_file(store, folder / file, progress) for file in names)
        return Manifest(name.name, name.tag, stored, source=str(path))
    if from_ is None:
        stored = tuple(_blob(store, file, digest) for file, digest in (files or {}).items())
        base = Manifest(name.name, name.tag, stored)
    else:
        parent = store.find(str(from_))
        lineage = Lineage(str(parent.model_name), "create" if quantize is None else "quantize")
        fresh = Manifest(name.name, name.tag, parent.files).created
        base = replace(parent, name=name.name, tag=name.tag, lineage=lineage, created=fresh)
    if quantize is not None:
        with _linked(store, base.files) as path:
            return _quantized(store, base, path, quantize, progress)
    if from_ is None:
        with _linked(store, base.files) as path:
            open_checkpoint(path)
    return base


def _blob(store: Store, file: str, digest: str) -> StoredFile:
    hexadecimal = digest.removeprefix("sha256:")
    if not is_file_name(file):
        raise StoreError(f"files: the name {file!r} has unusual characters; use letters, digits, '.', '_', '-'")
    if len(hexadecimal) != 64 or not set(hexadecimal) <= set("0123456789abcdef"):
        raise StoreError(f"files.{file}: a digest is sha256: and 64 hexadecimal digits, found {digest[:100]!r}")
    return StoredFile(file, hexadecimal, _place(store, hexadecimal).stat().st_size)


def _place(store: Store, digest: str) -> Path:
    for path in store.blobs.places(digest):
        if path.is_file():
            return path
    raise StoreError(f"no blob sha256:{digest} is here; send it first to /api/blobs/sha256:{digest}")


@contextmanager
def _linked(store: Store, files: Sequence[StoredFile]) -> Iterator[Path]:
    """What to open of the model that these blobs are, under their names in a folder that is gone afterwards."""
    with disk_errors(store.blobs.partial), TemporaryDirectory(dir=store.blobs.partial) as folder:
        for file in files:
            link_or_copy(_place(store, file.sha256), Path(folder) / file.file)
        whole, names = files_of_model(Path(folder))
        yield whole / min(names) if all(name.endswith(".gguf") for name in names) else whole


def _quantized(store: Store, base: Manifest, path: Path, quantize: Quantize, progress: Progress) -> Manifest:
    """The model with the weights at ``path`` quantized, which are staged.

    Being killed leaves what the same call continues.
    """
    store.blobs.partial.mkdir(parents=True, exist_ok=True)
    place = store.blobs.partial / f"quantizing-{sha256(str(base.model_name).encode()).hexdigest()}.gguf"
    report = quantize(path, place, progress)
    with disk_errors(place):
        file = StoredFile("model.gguf", digest_file(place), place.stat().st_size)
        store.blobs.stage(place, file.sha256)
    return replace(base, files=(file,), report=report)


def _adapters(
    store: Store, adapters: Sequence[str | Path] | Mapping[str, str], progress: Progress
) -> tuple[StoredAdapter, ...]:
    if isinstance(adapters, Mapping):
        files = tuple(_blob(store, file, digest) for file, digest in adapters.items())
        return tuple(_named([("adapter" if len(files) > 1 else Path(files[0].file).stem, files)]))
    found = []
    for given in adapters:
        path = Path(given).expanduser().absolute()
        if path.is_dir():
            missing = [file for file in _PEFT_FILES if not (path / file).is_file()]
            if missing:
                raise StoreError(f"the adapter folder {path} has no {missing[0]}; give a folder that PEFT saved")
            sources = [path / file for file in _PEFT_FILES]
        elif path.is_file() and path.suffix.lower() == ".gguf":
            sources = [path]
        else:
            raise StoreError(f"the adapter {path} is neither a .gguf file nor a folder that PEFT saved")
        found.append((path.stem, tuple(take_file(store, source, progress) for source in sources)))
    return tuple(_named(found))


def _named(adapters: Sequence[tuple[str, tuple[StoredFile, ...]]]) -> list[StoredAdapter]:
    """Adapters under names of their own, numbered where two are alike."""
    made: list[StoredAdapter] = []
    for stem, files in adapters:
        name = name_part_from(stem)
        taken = {adapter.name for adapter in made}
        number = 2
        while name in taken:
            name = f"{name_part_from(stem)}-{number}"
            number += 1
        made.append(StoredAdapter(name, files))
    return made
