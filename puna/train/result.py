"""What a training has made: written into its folder, and put into the store under its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from puna.checkpoint import Checkpoint, save_checkpoint
from puna.checkpoint.convert import put
from puna.checkpoint.lora_writer import merge, write_peft
from puna.errors import StoreError
from puna.store import Lineage, Manifest, ModelName, ResolvedModel, Silent, Store
from puna.store.importing import files_of_model, take_file
from puna.store.manifest import StoredAdapter, StoredFile
from puna.tensor import Weight
from puna.train.module import LlamaModule, LoRA
from puna.train.objectives.reward import save_reward_model
from puna.train.parallel import ALONE, Ranks, asked_by_first
from puna.train.recipe import Recipe

ADAPTER, MODEL, REWARD_MODEL = "adapter", "model", "reward-model"  # in the run's folder
METHOD = "finetune"  # of the lineage


def save_result(
    recipe: Recipe,
    found: ResolvedModel,
    checkpoint: Checkpoint,
    module: LlamaModule,
    folder: Path,
    ranks: Ranks = ALONE,
) -> Path:
    """Write the adapter or the model as trained, in place of an earlier one. Gives the folder or .gguf file.

    The first of the ``ranks`` writes what it gathers from all, tensor by tensor. Raises CheckpointError.
    """
    if recipe.makes_reward_model:
        path = folder / REWARD_MODEL
        put(path, lambda place: save_reward_model(module, checkpoint, place, ranks))
        return path
    if recipe.makes_adapter:
        path = folder / ADAPTER
        adapter = module.adapter()
        if ranks.first:
            put(path, lambda place: write_peft(place, adapter, checkpoint.config, base_model=recipe.model))
        return path
    is_gguf = found.path.suffix.lower() == ".gguf"
    form = recipe.save.format or ("gguf" if is_gguf else "safetensors")
    path = folder / (f"{MODEL}.gguf" if form == "gguf" else MODEL)
    weight_type = recipe.save.type or _float_type(checkpoint.tensors)
    with asked_by_first(_trained(checkpoint, module), ranks) as tensors:
        if ranks.first:
            whole = replace(checkpoint, tensors=tensors)
            put(path, lambda place: save_checkpoint(whole, place, form, weight_type))
    return path


def check_name(recipe: Recipe, folder: Path, store: Store) -> None:
    """Raise StoreError when the name is taken by what no training in ``folder`` made."""
    name = ModelName.parse(recipe.output)
    existing = store.read(name)
    if existing is None:
        return
    ours = existing.lineage is not None and existing.lineage.method == METHOD and existing.source == str(folder)
    if not ours:
        raise StoreError(f"a model {name} exists already; choose another --out, or remove it with `puna rm {name}`")


def register(recipe: Recipe, found: ResolvedModel, path: Path, store: Store) -> Manifest:
    """Store the result: an adapter beside the files of the model that it changes, or a model of its own.

    The template, system prompt, parameters and messages of the model remain. Raises StoreError.
    """
    name = ModelName.parse(recipe.output)

    def make() -> Manifest:
        parent = found.manifest or Manifest(name.name, name.tag, ())
        files, adapters = parent.files, tuple[StoredAdapter, ...]()
        if path.name == ADAPTER:
            if not files:
                files = _taken(store, found.path)
            stored = tuple(take_file(store, file, Silent()) for file in sorted(path.iterdir()))
            adapters = (StoredAdapter(ADAPTER, stored),)
        else:
            files = _taken(store, path)
        return replace(
            parent,
            name=name.name,
            tag=name.tag,
            files=files,
            adapters=adapters,
            source=str(path.parent),
            lineage=Lineage(str(found.manifest.model_name if found.manifest else found.path), METHOD),
            created=Manifest(name.name, name.tag, files).created,
            report=None,
        )

    return store.add(make)


def _taken(store: Store, path: Path) -> tuple[StoredFile, ...]:
    folder, names = files_of_model(path)
    return tuple(take_file(store, folder / name, Silent()) for name in names)


def _trained(checkpoint: Checkpoint, module: LlamaModule) -> Mapping[str, Weight]:
    """LoRA's changes are added to the model's own matrices, not to what QLoRA kept of them in memory."""
    if isinstance(module.method, LoRA) and not module.method.dora:
        return merge(checkpoint, module.adapter()).tensors
    return module.merged()


def _float_type(tensors: Mapping[str, Weight]) -> str:
    """The type that most matrices of floats have."""
    kinds = Counter(w.type.name for w in tensors.values() if len(w.shape) == 2 and w.type.block_size == 1)
    return kinds.most_common(1)[0][0] if kinds else "F16"
