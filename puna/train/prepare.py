"""The data of a recipe: opened strictly, split by what its rows say, and streamed as the objective takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.errors import DataError
from puna.store import ResolvedModel
from puna.tokenizer import Tokenizer
from puna.train.data.answers import AnswerStream
from puna.train.data.dataset import Dataset, Scan, Subset, open_dataset
from puna.train.data.examples import Continuation, Conversation
from puna.train.data.for_model import renderer_for
from puna.train.data.order import Order
from puna.train.data.packing import PackedStream
from puna.train.data.render import Renderer
from puna.train.data.tokens import Tokens, Truncation
from puna.train.recipe import DataSource, Recipe
from puna.train.rollouts import Prompt, prompt_of
from puna.train.runs import DataFacts
from puna.train.trainer import Stream

MOST_HELD_OUT = {"documents": 1000, "pairs": 1000, "labelled": 1000, "prompts": 100}  # rows; prompts are answered
FEWEST_TO_HOLD_OUT = 20  # of fewer, none is held out by itself
_KINDS = {"documents": ("sft", "text"), "pairs": ("preference",), "labelled": ("kto",), "prompts": ("sft",)}
_NEEDED = {
    "documents": "conversations or texts",
    "pairs": "pairs with chosen and rejected",
    "labelled": "answers with a label",
    "prompts": "conversations, or prompts with their completions",
}

OnSource = Callable[[str], None]


@dataclass(frozen=True)
class PreparedSource:
    """One file: how its rows are rendered, which of them can be used, and which are held out."""

    dataset: Dataset
    renderer: Renderer
    scan: Scan
    train: Subset
    held_out: Subset
    weight: float | None

    def prompt(self, subset: Subset, place: int) -> Prompt:
        """Raises DataError naming the row that has none."""
        try:
            return prompt_of(self.renderer, subset[place])
        except DataError as error:
            raise DataError(f"{subset.where(place)}: {error}") from None

    def asking(self) -> Iterator[Prompt]:
        """The prompts of those rows held out that have one."""
        for example in self.held_out:
            if isinstance(example, Conversation) or (isinstance(example, Continuation) and example.prompt):
                try:
                    prompt = prompt_of(self.renderer, example)
                except DataError:
                    continue  # everything of it is learnt
                yield prompt

    def facts(self) -> DataFacts:
        """As the run's folder tells it. Tokens are about those of the rows that are trained on."""
        rows = len(self.scan.good)
        share = len(self.train) / max(rows, 1)
        tokens, trained = (int(share * int(_known(n).sum())) for n in (self.scan.lengths, self.scan.trained))
        return DataFacts(self.dataset.name, self.scan.digest, rows, len(self.held_out), tokens, trained)


@dataclass(frozen=True)
class PreparedData:
    """All files of a recipe. ``rows`` is what the objective takes, see ``Knobs``."""

    sources: Sequence[PreparedSource]
    rows: str

    @property
    def digest(self) -> str:
        """Of all that the files say: it tells whether a run is continued on the data that it began with."""
        return blake2b("".join(source.scan.digest for source in self.sources).encode(), digest_size=16).hexdigest()

    @property
    def tokenizer(self) -> Tokenizer:
        return self.sources[0].renderer.tokenizer

    @property
    def train_rows(self) -> int:
        return sum(len(source.train) for source in self.sources)

    @property
    def held_out_rows(self) -> int:
        return sum(len(source.held_out) for source in self.sources)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """int32[D]: the tokens of each document, those held out too."""
        return np.concatenate([_known(source.scan.lengths) for source in self.sources])

    @property
    def trained(self) -> NDArray[np.int32]:
        """int32[D]: those of them that are learnt."""
        return np.concatenate([_known(source.scan.trained) for source in self.sources])

    @property
    def bad_rows(self) -> list[str]:
        """What is wrong with the rows that are left out."""
        return [row.message for source in self.sources for row in source.scan.bad]

    def stream(self, seed: int, length: int, truncation: Truncation, answers: int) -> Stream:
        """The micro-batches to train on, without end."""
        return self._stream(self.order(seed), [source.train for source in self.sources], length, truncation, answers)

    def order(self, seed: int) -> Order:
        """In which the rows to train on are visited, without end."""
        weights = [source.weight for source in self.sources]
        mixture = [weight for weight in weights if weight is not None] or None
        return Order([len(source.train) for source in self.sources], weights=mixture, seed=seed)

    def prompt(self, source: int, place: int) -> Prompt:
        """Of a row to train on. Raises DataError naming the row that has none."""
        return self.sources[source].prompt(self.sources[source].train, place)

    def held_out_prompts(self) -> list[Prompt]:
        """Of all rows that are held out. Raises DataError as ``prompt``."""
        return [
            source.prompt(source.held_out, place) for source in self.sources for place in range(len(source.held_out))
        ]

    def prompts_to_show(self, count: int, length: int) -> list[Prompt]:
        """The first of at most ``length`` tokens; rows that ask for nothing are passed over."""
        fitting = (prompt for source in self.sources for prompt in source.asking() if len(prompt.ids) <= length)
        return list(islice(fitting, count))

    def held_out(self, length: int, truncation: Truncation, answers: int) -> list[Any]:
        """The micro-batches that the model is measured by; none where no row is held out."""
        subsets = [source.held_out for source in self.sources]
        if not sum(map(len, subsets)):
            return []
        order = Order([len(subset) for subset in subsets], shuffle=False, epochs=1)
        return list(self._stream(order, subsets, length, truncation, answers))

    def _stream(
        self, order: Order, subsets: Sequence[Subset], length: int, truncation: Truncation, answers: int
    ) -> PackedStream | AnswerStream:
        bos = self.tokenizer.bos_id
        if self.rows == "documents":

            def documents(source: int, place: int) -> list[Tokens]:
                return self.sources[source].renderer.documents(subsets[source][place])

            return PackedStream(order, documents, length, truncation=truncation, bos=bos)
        assert truncation != "split"
        return AnswerStream(
            order,
            lambda source, place: subsets[source][place],
            self.sources[0].renderer.documents,
            count=answers,
            length=length,
            truncation=truncation,
            bos=bos,
        )


def prepare_data(
    recipe: Recipe, found: ResolvedModel, pinned: Mapping[str, Any], on_source: OnSource = lambda path: None
) -> PreparedData:
    """Open, check and render all files of a recipe for the model. ``pinned`` are variables of the template.

    Raises DataError naming the file, the line and the field; StoreError, CheckpointError, TokenizerError.
    """
    sources = []
    for source in recipe.data:
        on_source(source.path)
        sources.append(_prepared(recipe, source, found, pinned))
    prepared = PreparedData(sources, recipe.rows)
    if not prepared.train_rows:
        raise DataError("every row is held out for validation; give more rows, or a smaller share")
    if not prepared.trained.any():
        raise DataError("nothing in the data is learnt; see puna data check, and train_on")
    return prepared


def _prepared(recipe: Recipe, source: DataSource, found: ResolvedModel, pinned: Mapping[str, Any]) -> PreparedSource:
    usual: Any = {"pretrain": "everything", "grpo": "last"}.get(recipe.objective_name, "assistant")
    renderer = renderer_for(found, train_on=source.train_on or usual, variables={**pinned, **source.variables})
    dataset = open_dataset(source.path, source.format, source.columns)
    if dataset.format.kind not in _KINDS[recipe.rows]:
        raise DataError(
            f"{dataset.name} has rows of the format {dataset.format.name}, but the objective {recipe.objective_name} "
            f"learns from {_NEEDED[recipe.rows]}; choose another objective, or other data"
        )
    scan = dataset.checked(source.skip_bad, renderer)
    share = (
        _share_held_out(len(scan.good), MOST_HELD_OUT[recipe.rows]) if source.validation is None else source.validation
    )
    train, held_out = (Subset(dataset, numbers) for numbers in scan.split(share))
    return PreparedSource(dataset, renderer, scan, train, held_out, source.weight)


def _share_held_out(rows: int, most: int) -> float:
    return 0.0 if rows < FEWEST_TO_HOLD_OUT else min(0.1, most / rows)


def _known(lengths: NDArray[np.int32] | None) -> NDArray[np.int32]:
    assert lengths is not None
    return lengths
