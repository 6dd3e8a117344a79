"""The recipe of a training: every knob there is, with its default. ``puna train`` reads it from TOML.

What is None is chosen for the model and the data (puna/train/plan.py).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from puna.errors import StoreError, TrainingError
from puna.store import ModelName
from puna.tensor import QUANT_TYPES
from puna.train.data.render import TrainOn
from puna.train.data.tokens import Truncation
from puna.train.module import LINEAR_LAYERS, Full, LoRA
from puna.train.objectives import OBJECTIVES, Knobs
from puna.train.objectives.next_token import SFT
from puna.train.objectives.reward import Reward
from puna.train.optimizers import OPTIMIZERS
from puna.train.tables import nearest, read_table, to_toml, write_table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RANK = 16  # of LoRA, if nothing else is said
_LORA_ONLY = ("rank", "alpha", "targets", "dropout", "rank_stabilised", "dora")


@dataclass(frozen=True)
class DataSource:
    """A file of rows, ``[[data]]`` (docs/training-data.md).

    ``weight`` is its share of a mixture, relative to the others'; without any, all rows are one set. ``validation`` is
    the share of rows that is held out. Up to ``skip_bad`` bad rows are left out. ``variables`` are the template's.
    """

    path: str
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float | None = None
    validation: float | None = None
    train_on: TrainOn | None = None
    skip_bad: int = 0
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight is not None and self.weight <= 0:
            raise TrainingError(f"the weight of {self.path} must be above 0, found {self.weight:g}")
        if self.validation is not None and not 0 <= self.validation <= 1:
            raise TrainingError(f"validation, of {self.path}, is a share from 0 to 1, found {self.validation:g}")
        if self.skip_bad < 0:
            raise TrainingError(f"skip_bad, of {self.path}, must be at least 0, found {self.skip_bad}")


@dataclass(frozen=True)
class Method:
    """What of the model is trained.

    ``lora``: low-rank changes over the model as it is, quantized or not (``LoRA``). ``qlora``: the same, but matrices
    of floats are kept in memory as ``base_type``. ``full``: every weight but those whose names the regular expression
    ``frozen`` finds. Of a model with an adapter, that is what is trained; ``rank``, ``targets`` and ``alpha`` are then
    its own (puna/train/continued.py), else 16, all linear layers, and twice the rank.

    With ``layers`` the model keeps only these of its layers, in this order, and what is made is a smaller model of its
    own (puna/train/student.py).
    """

    type: Literal["lora", "qlora", "full"] = "lora"
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    rank_stabilised: bool = False
    dora: bool = False
    base_type: str | None = None
    frozen: str | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.type == "full":
            plain = Method.__dataclass_fields__
            for name in (*_LORA_ONLY, "base_type"):
                if getattr(self, name) != plain[name].default:
                    raise TrainingError(f"method.{name} is LoRA's, but method.type is full; take one of them out")
        elif self.frozen is not None:
            raise TrainingError(f"method.frozen goes with type full only: {self.type} freezes every weight anyway")
        if self.base_type is not None:
            if self.type != "qlora":
                raise TrainingError("method.base_type goes with type qlora only")
            kind = QUANT_TYPES.get(self.base_type.upper())
            if kind is None or kind.block_size == 1 or not kind.can_encode:
                known = [name for name, kind in QUANT_TYPES.items() if kind.block_size > 1 and kind.can_encode]
                raise TrainingError(f"method.base_type is {self.base_type!r}; {nearest(self.base_type, known)}")
        if self.frozen is not None:
            try:
                re.compile(self.frozen)
            except re.error as error:
                raise TrainingError(f"method.frozen is no regular expression: {error}, in {self.frozen!r}") from None
        self.trained()

    def trained(self) -> Full | LoRA:
        """As the module takes it. Raises TrainingError."""
        if self.type == "full":
            return Full(self.frozen)
        rank = RANK if self.rank is None else self.rank
        alpha = 2.0 * rank if self.alpha is None else self.alpha
        targets = LINEAR_LAYERS if self.targets is None else self.targets
        return LoRA(rank, alpha, targets, self.dropout, self.rank_stabilised, self.dora)


@dataclass(frozen=True)
class Training:
    """How it is trained: by ``epochs`` or ``steps``, of ``batch`` micro-batches each.

    A micro-batch is a sequence of at most ``length`` tokens into which documents are packed, or, where answers are
    compared, ``answers`` examples. A document that is longer falls to ``truncation``. ``recompute`` computes layers
    again in the backward pass, for less memory. ``keep_best``: what is saved in the end is the state of the lowest
    held-out loss, or the highest held-out reward. The others are ``Settings``'.
    """

    epochs: float | None = None
    steps: int | None = None
    length: int | None = None
    truncation: Truncation | None = None
    batch: int | None = None
    answers: int | None = None
    learning_rate: float | None = None
    warmup: int | None = None
    final_rate: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    evaluate_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    keep_best: bool = True
    recompute: bool | None = None
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise TrainingError("training.epochs and training.steps say the same in two ways; take one of them out")
        for name, least in (("steps", 1), ("length", 8), ("batch", 1), ("answers", 1), ("keep", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise TrainingError(f"training.{name} must be at least {least}, found {value}")
        for name in ("evaluate_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainingError(f"training.{name} must be at least 1, found {value}")
        for name in ("epochs", "learning_rate", "clip", "epsilon"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise TrainingError(f"training.{name} must be above 0, found {value:g}")
        for name in ("final_rate", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"training.{name} must be from 0 to 1, found {getattr(self, name):g}")
        if self.optimizer not in OPTIMIZERS:
            raise TrainingError(f"training.optimizer is {self.optimizer!r}; {nearest(self.optimizer, OPTIMIZERS)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise TrainingError(f"training.betas must be from 0 to below 1, found {list(self.betas)}")
        if None not in (self.steps, self.warmup) and self.warmup > self.steps:  # type: ignore[operator]
            raise TrainingError(f"training.warmup is {self.warmup}, more than the {self.steps} steps there are")


@dataclass(frozen=True)
class Saving:
    """What is made of it. LoRA's result is an adapter beside the model, or merged into it (``merge``).

    A whole model is written in ``format``, with matrices of ``type`` (F32, F16, BF16, or in GGUF any quantized type);
    by default as the model it was made from, its quantized matrices as F16.
    """

    merge: bool = False
    format: Literal["gguf", "safetensors"] | None = None
    type: str | None = None

    def __post_init__(self) -> None:
        if self.type is None:
            return
        kind = QUANT_TYPES.get(self.type.upper())
        known = [name for name, kind in QUANT_TYPES.items() if kind.can_encode]
        if kind is None or not kind.can_encode:
            raise TrainingError(f"save.type is {self.type!r}; {nearest(self.type, known)}")
        if self.format == "safetensors" and kind.name not in ("F32", "F16", "BF16"):
            raise TrainingError(
                f"save.type {self.type} is GGUF's, but save.format is safetensors; choose F32, F16, BF16"
            )


@dataclass(frozen=True)
class Recipe:
    """``output`` is the name in the store of what is made of ``model``; a reward model stays in the run's folder.
    ``device`` is torch's name of it."""

    model: str
    output: str
    data: tuple[DataSource, ...]
    objective: Knobs = field(default_factory=SFT)
    method: Method = field(default_factory=Method)
    training: Training = field(default_factory=Training)
    save: Saving = field(default_factory=Saving)
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        """Raises TrainingError for what cannot be together."""
        try:
            output = ModelName.parse(self.output)
        except StoreError as error:
            raise TrainingError(f"output: {error}") from None
        if output == _stored_name(self.model):
            raise TrainingError(f"output is the model itself, {self.model}; choose a name for what is made of it")
        if not self.data:
            raise TrainingError("the recipe has no [[data]]; give at least one file of rows")
        weighted = [source.weight is not None for source in self.data]
        if any(weighted) and not all(weighted):
            source = self.data[weighted.index(False)]
            raise TrainingError(f"data: {source.path} has no weight, but others have; give all of them one, or none")
        if all(source.validation == 1 for source in self.data):
            raise TrainingError("data: everything is held out for validation, so nothing is left to train on")
        if self.rows in ("pairs", "labelled") and any(
            source.variables != self.data[0].variables for source in self.data
        ):
            raise TrainingError("data: variables differ, but answers are compared under one template; make them equal")
        if self.rows != "documents" and self.training.truncation == "split":
            raise TrainingError("training.truncation is split, but whole answers are compared; choose cut_left or drop")
        if self.rows == "prompts":
            self._check_prompts()
        if self.rows == "documents" and self.training.answers is not None:
            raise TrainingError(
                f"training.answers is for objectives that compare answers, which {self.objective_name} does not"
            )
        for source in self.data:
            if self.objective_name == "pretrain" and source.train_on not in (None, "everything"):
                raise TrainingError(
                    f"train_on is {source.train_on} for {source.path}, but pretraining learns everything"
                )
        if self.makes_reward_model and self.save != Saving():
            raise TrainingError("[save] is not for a reward model, which is always merged, in safetensors; take it out")
        if self.makes_adapter and self.method.dora:
            raise TrainingError("method.dora makes no adapter that can be served; set save.merge to true")
        if self.makes_adapter and self.method.layers is not None:
            raise TrainingError("method.layers makes a model of its own, not an adapter; set save.merge to true")
        if self.makes_adapter and (self.save.format or self.save.type):
            raise TrainingError("save.format and save.type are of whole models; an adapter has none: set save.merge")

    def _check_prompts(self) -> None:
        for name, remedy in (
            ("truncation", "a prompt that is too long is left out"),
            ("batch", "objective.prompts is how many prompts a step answers"),
            ("answers", "objective.group is how many answers a prompt gets"),
        ):
            if getattr(self.training, name) is not None:
                raise TrainingError(f"training.{name} is not for {self.objective_name}: {remedy}; take it out")
        for source in self.data:
            if source.train_on not in (None, "last"):
                raise TrainingError(
                    f"train_on is {source.train_on} for {source.path}, but of prompts only the last answer is expected"
                )

    @property
    def objective_name(self) -> str:
        return next(name for name, kind in OBJECTIVES.items() if type(self.objective) is kind)

    @property
    def measure(self) -> str:
        """What held-out rows say of the model, first of all."""
        return "reward" if self.rows == "prompts" else "loss"

    @property
    def makes_reward_model(self) -> bool:
        """Whether the result scores answers, and gives none."""
        return isinstance(self.objective, Reward)

    @property
    def makes_adapter(self) -> bool:
        """Whether the result is an adapter beside the model, and not a model of its own."""
        return self.method.type != "full" and not self.save.merge and not self.makes_reward_model

    @property
    def rows(self) -> str:
        """What its micro-batches are made of: ``documents``, ``pairs``, ``labelled`` or ``prompts``."""
        return self.objective.rows


def read_recipe(path: str | Path) -> Recipe:
    """A recipe from a TOML file; paths in it begin at its folder. Raises TrainingError naming the file or the field."""
    path = Path(path).expanduser()
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}; name the recipe's TOML file") from None
    except UnicodeDecodeError:
        raise TrainingError(f"{path} is not text in UTF-8; save it as such") from None
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"{path} is not TOML: {error}") from None
    return recipe_from(raw, path.absolute().parent)


def recipe_from(raw: Mapping[str, Any], folder: Path | None = None) -> Recipe:
    """A recipe from plain values. Relative paths begin at ``folder``. Raises TrainingError."""
    table = raw.get("objective", {})
    if not isinstance(table, Mapping):
        raise TrainingError(f'objective must be a table, [objective], with type = "sft" or another; found {table!r}')
    name = table.get("type", "sft")
    if name not in OBJECTIVES:
        raise TrainingError(f"objective.type is {name!r}; {nearest(str(name), OBJECTIVES)}")
    own = {key: value if folder is None else _beside(key, value, folder) for key, value in table.items()}
    own.pop("type", None)
    knobs = read_table(OBJECTIVES[name], own, "objective.")
    rest = {key: own for key, own in raw.items() if key != "objective"}
    recipe = read_table(Recipe, rest, objective=knobs)
    if folder is None:
        return recipe
    data = tuple(replace(source, path=str(folder / Path(source.path).expanduser())) for source in recipe.data)
    return replace(recipe, data=data, model=_model_beside(recipe.model, folder))


def recipe_to_toml(recipe: Recipe) -> str:
    """The document that ``read_recipe`` reads it from, without what is as the defaults say."""
    table = write_table(recipe)
    table["objective"] = {"type": recipe.objective_name, **write_table(recipe.objective)}
    return to_toml(table)


def _model_beside(model: str, folder: Path) -> str:
    beside = folder / Path(model).expanduser()
    return str(beside) if beside.exists() and ("/" in model or beside.suffix == ".gguf") else model


def _beside(key: str, value: Any, folder: Path) -> Any:
    """A knob of an objective that is a path: before it is read, for some are opened then."""
    if not isinstance(value, str):
        return value
    if key == "teacher":
        return _model_beside(value, folder)
    return str(folder / Path(value).expanduser()) if key in ("cache", "schema") else value


def _stored_name(model: str) -> ModelName | None:
    try:
        return ModelName.parse(model)
    except StoreError:
        return None  # a path
