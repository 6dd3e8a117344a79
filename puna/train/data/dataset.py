"""A file of training data as examples by number, checked in one pass before anything is trained on it."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.errors import DataError, PunaError
from puna.train.data.dataset_info import read_dataset_info
from puna.train.data.examples import Continuation, Example, Labelled, Sample, samples_of
from puna.train.data.files import open_rows
from puna.train.data.formats import Format, detect, format_named, parse_example, rename
from puna.train.data.render import Renderer
from puna.train.data.rows import Row, Rows
from puna.train.data.tokens import Tokens

_FIRST_ROWS = 20
_LISTED = 1000  # errors that are kept to be shown; all are counted


@dataclass(frozen=True)
class BadRow:
    """``message`` names the file, the line and the field."""

    number: int
    message: str


@dataclass(frozen=True)
class Scan:
    """``good`` int64[N]: the numbers of the rows that can be used; ``digests`` uint64[N]: what each says, hashed.

    ``bad`` lists the others, the first thousand of ``bad_count``. Where the rows were rendered, ``lengths`` and
    ``trained`` (int32[D]) are the tokens of each document and those of them that are trained.
    """

    good: NDArray[np.int64]
    digests: NDArray[np.uint64]
    bad: list[BadRow] = field(default_factory=list)
    bad_count: int = 0
    lengths: NDArray[np.int32] | None = None
    trained: NDArray[np.int32] | None = None

    @property
    def digest(self) -> str:
        """Of all that the data says, in order: it tells whether a run is continued on the data that it began with."""
        return blake2b(self.digests.astype("<u8").tobytes(), digest_size=16).hexdigest()

    def duplicates(self) -> list[NDArray[np.int64]]:
        """The numbers of the rows that say the same, by what they say, where there is more than one."""
        order = np.argsort(self.digests, kind="stable")
        starts = np.flatnonzero(np.diff(self.digests[order], prepend=~self.digests[order[:1]]))
        ends = np.append(starts[1:], len(order))
        several = np.flatnonzero(ends - starts > 1)
        groups = [np.sort(self.good[order[starts[group] : ends[group]]]) for group in several]
        return sorted(groups, key=lambda group: int(group[0]))

    def split(self, validation: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows to train on, and about that share of them to validate on, chosen by what they say.

        A row stays on its side whatever is added, taken away or moved, and so do all its duplicates.
        """
        held_out = self.digests.astype(np.float64) / 2.0**64 < validation
        return self.good[~held_out], self.good[held_out]


class Dataset:
    """Examples of one file. ``columns``: the format's field → the file's."""

    def __init__(self, rows: Rows, form: Format, columns: Mapping[str, str] | None = None) -> None:
        self.format = form
        self._rows = rows
        self._columns = dict(columns or {})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Example:
        """Raises DataError naming the file, the line and the field."""
        row = self._rows[number]
        try:
            return parse_example(self.format, rename(row, self._columns))
        except DataError as error:
            raise DataError(f"{self.where(number)}: {error}") from None

    def where(self, number: int) -> str:
        """``file:line`` of an example."""
        return self._rows.where(number)

    def _read(self, number: int, renderer: Renderer | None) -> tuple[int, list[Tokens]]:
        """An example's digest and its documents. Raises DataError naming the line, whatever is wrong with it."""
        example = self[number]
        try:
            return content_digest(example), [] if renderer is None else renderer.documents(example)
        except PunaError as error:
            raise DataError(f"{self.where(number)}: {error}") from None

    @property
    def name(self) -> str:
        return self._rows.path.name

    def scan(self, renderer: Renderer | None = None) -> Scan:
        """Read every row once, and render it for a model where ``renderer`` is given."""
        good, digests = array("q"), array("Q")
        lengths, trained = array("i"), array("i")
        bad: list[BadRow] = []
        bad_count = 0
        for number in range(len(self)):
            try:
                digest, documents = self._read(number, renderer)
            except DataError as error:
                bad_count += 1
                if len(bad) < _LISTED:
                    bad.append(BadRow(number, str(error)))
                continue
            good.append(number)
            digests.append(digest)
            lengths.extend(map(len, documents))
            trained.extend(int(document.trained.sum()) for document in documents)
        rendered = (None, None) if renderer is None else (np.array(lengths, np.int32), np.array(trained, np.int32))
        return Scan(np.array(good, np.int64), np.array(digests, np.uint64), bad, bad_count, *rendered)

    def checked(self, skip_bad: int = 0, renderer: Renderer | None = None) -> Scan:
        """``scan``, where at most ``skip_bad`` rows may be bad. Raises DataError when more are, or none is good."""
        scan = self.scan(renderer)
        if scan.bad_count > skip_bad:
            raise DataError(
                f"{scan.bad[0].message} ({scan.bad_count} of {len(self)} rows are bad; puna data check lists them, "
                f"--skip-bad {scan.bad_count} leaves them out)"
            )
        if not len(scan.good):
            raise DataError(f"{self.name} holds no row to train on")
        return scan


def open_dataset(path: str | Path, form: str | None = None, columns: Mapping[str, str] | None = None) -> Dataset:
    """Open a file of any known form (``open_rows``), or ``dataset_info.json:NAME``, a set that LLaMA-Factory lists.

    ``form`` names the format, which is otherwise told from the first rows. Raises DataError.
    """
    columns = dict(columns or {})
    listing, colon, name = str(path).rpartition(":")
    if colon and Path(listing).name == "dataset_info.json":
        path, given = read_dataset_info(Path(listing).expanduser(), name)
        columns = {**given, **columns}
    rows = open_rows(path)
    if form is not None:
        return Dataset(rows, format_named(form), columns)
    try:
        return Dataset(rows, detect(_first_rows(rows, columns)), columns)
    except DataError as error:
        raise error if str(error).startswith(rows.path.name) else DataError(f"{rows.path.name}: {error}") from None


def _first_rows(rows: Rows, columns: Mapping[str, str]) -> list[Row]:
    """Those that can be read; when none can, the first one's error is raised."""
    found: list[Row] = []
    failure: DataError | None = None
    for number in range(min(len(rows), _FIRST_ROWS)):
        try:
            found.append(rename(rows[number], columns))
        except DataError as error:
            failure = failure or error
    if not found and failure is not None:
        raise failure
    return found


@dataclass(frozen=True)
class Subset:
    """Some rows of a data set, as a sequence of examples of its own."""

    dataset: Dataset
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Example:
        return self.dataset[int(self.numbers[place])]

    def __iter__(self) -> Iterator[Example]:
        return (self[place] for place in range(len(self)))

    def where(self, place: int) -> str:
        return self.dataset.where(int(self.numbers[place]))


def content_digest(example: Example) -> int:
    """64 bits of what an example says; the format that it was written in makes no difference. Raises DataError."""
    said: list[Any] = [_content(sample) for sample in samples_of(example)]
    if isinstance(example, Labelled):
        said.append(example.desirable)
    try:
        text = json.dumps(said, ensure_ascii=False, sort_keys=True, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"the row is not usable as JSON: {error}") from None
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _content(sample: Sample) -> Sequence[Any]:
    if isinstance(sample, Continuation):
        return [sample.prompt, sample.text]
    return [[message.to_dict() for message in sample.messages], sample.trained, sample.tools]
