"""The facts of one comparison, as they are shown, stored and read again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from puna.errors import StoreError
from puna.evaluate.statistics import QUANTILES

SCHEMA = 1


@dataclass(frozen=True)
class ModelFacts:
    """One of the two models. ``types`` are numbers of tensors by the encoding they are computed with in, ``bytes`` what
    all take on disk."""

    name: str
    types: Mapping[str, int]
    bytes: int
    bits_per_weight: float
    perplexity: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class TextFacts:
    """What was read: ``windows`` of ``window_tokens``, of which ``scored_tokens`` altogether were predicted."""

    name: str
    digest: str
    windows: int
    window_tokens: int
    scored_tokens: int


@dataclass(frozen=True)
class Divergence:
    """KL(source ‖ derived) over the scored tokens, in nats; ``quantiles`` at 0, 5, … 100 %."""

    mean: float
    median: float
    p99: float
    max: float
    quantiles: Sequence[float]


@dataclass(frozen=True)
class Report:
    """A derived model beside its source, whose ``source_identity`` differs where its weights do.

    ``token_ids`` and ``template`` say, in sentences, where sample texts become other ids and sample conversations other
    prompts; none where all are the same. ``top1_agreement`` is the share of places with the same most probable token.
    ``layer_errors`` are ‖derived - source‖ / ‖source‖ of the normalised hidden state after each layer; none where the
    models' shapes differ. ``created`` is UTC in ISO 8601.
    """

    created: str
    source_identity: str
    source: ModelFacts
    derived: ModelFacts
    text: TextFacts
    token_ids: Sequence[str]
    template: Sequence[str]
    kl: Divergence
    top1_agreement: float
    layer_errors: Sequence[float]

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, raw: Any, where: str) -> Report:
        """Read what ``as_json`` gave; ``where`` names it in errors. Raises StoreError when it is something else."""
        reader = _Reader(where)
        facts = reader.object(raw, cls, "the report", extra=("schema",))
        if facts["schema"] != SCHEMA:
            raise StoreError(f"{where} has a report of schema {facts['schema']!r:.40}, not {SCHEMA}; measure it again")
        kl = reader.object(facts["kl"], Divergence, "kl")
        return cls(
            created=reader.text(facts["created"], "created"),
            source_identity=reader.text(facts["source_identity"], "source_identity"),
            source=reader.model(facts["source"], "source"),
            derived=reader.model(facts["derived"], "derived"),
            text=reader.text_facts(facts["text"]),
            token_ids=reader.texts(facts["token_ids"], "token_ids"),
            template=reader.texts(facts["template"], "template"),
            kl=Divergence(
                mean=reader.number(kl["mean"], "kl.mean"),
                median=reader.number(kl["median"], "kl.median"),
                p99=reader.number(kl["p99"], "kl.p99"),
                max=reader.number(kl["max"], "kl.max"),
                quantiles=reader.numbers(kl["quantiles"], "kl.quantiles", QUANTILES),
            ),
            top1_agreement=reader.number(facts["top1_agreement"], "top1_agreement"),
            layer_errors=reader.numbers(facts["layer_errors"], "layer_errors"),
        )


class _Reader:
    """Typed access to parsed JSON, naming the place and the field when something is wrong."""

    def __init__(self, where: str) -> None:
        self.where = where

    def check(self, good: bool, key: str) -> None:
        if not good:
            raise StoreError(f"the report in {self.where} is damaged: unexpected {key}; measure it again")

    def object(self, raw: Any, kind: type, key: str, extra: Sequence[str] = ()) -> dict[str, Any]:
        self.check(isinstance(raw, dict) and raw.keys() == {*(f.name for f in fields(kind)), *extra}, key)
        return dict(raw)

    def model(self, raw: Any, key: str) -> ModelFacts:
        facts = self.object(raw, ModelFacts, key)
        types = facts["types"]
        self.check(isinstance(types, dict), f"{key}.types")
        return ModelFacts(
            name=self.text(facts["name"], f"{key}.name"),
            types={name: self.count(count, f"{key}.types") for name, count in types.items()},
            bytes=self.count(facts["bytes"], f"{key}.bytes"),
            bits_per_weight=self.positive(facts["bits_per_weight"], f"{key}.bits_per_weight"),
            perplexity=self.positive(facts["perplexity"], f"{key}.perplexity"),
            decode_tokens_per_second=self.positive(
                facts["decode_tokens_per_second"], f"{key}.decode_tokens_per_second"
            ),
        )

    def text_facts(self, raw: Any) -> TextFacts:
        facts = self.object(raw, TextFacts, "text")
        return TextFacts(
            name=self.text(facts["name"], "text.name"),
            digest=self.text(facts["digest"], "text.digest"),
            windows=self.count(facts["windows"], "text.windows"),
            window_tokens=self.count(facts["window_tokens"], "text.window_tokens"),
            scored_tokens=self.count(facts["scored_tokens"], "text.scored_tokens"),
        )

    def text(self, raw: Any, key: str) -> str:
        self.check(isinstance(raw, str), key)
        return str(raw)

    def texts(self, raw: Any, key: str) -> list[str]:
        self.check(isinstance(raw, list), key)
        return [self.text(item, key) for item in raw]

    def count(self, raw: Any, key: str) -> int:
        self.check(isinstance(raw, int) and not isinstance(raw, bool) and 0 < raw < 1 << 63, key)
        return int(raw)

    def number(self, raw: Any, key: str) -> float:
        """From 0 on; a NaN is not."""
        self.check(isinstance(raw, (int, float)) and not isinstance(raw, bool) and 0 <= raw <= 1e300, key)
        return float(raw)

    def positive(self, raw: Any, key: str) -> float:
        self.check(self.number(raw, key) > 0, key)
        return float(raw)

    def numbers(self, raw: Any, key: str, count: int | None = None) -> list[float]:
        self.check(isinstance(raw, list) and count in (None, len(raw)), key)
        return [self.number(item, key) for item in raw]
