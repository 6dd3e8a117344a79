"""Packing keeps every document whole and apart; truncation does what its name says; streams continue exactly."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import DataError
from puna.train.data.answers import AnswerStream
from puna.train.data.examples import Continuation, Example, Labelled, Preference
from puna.train.data.order import Order
from puna.train.data.packing import PackedStream
from puna.train.data.tokens import Tokens, Truncation, pack, truncate

LENGTH = 16


def document(size: int, first: int = 0) -> Tokens:
    return Tokens.of(range(first, first + size), [(size // 2, size)])


def as_lists(tokens: Tokens) -> tuple[list[int], list[bool]]:
    return tokens.ids.tolist(), tokens.trained.tolist()


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, LENGTH), max_size=40))
def test_packed_is_unpacked(sizes: list[int]) -> None:
    documents = [document(size, 100 * number) for number, size in enumerate(sizes)]
    packed = pack(documents, LENGTH)
    apart = sorted(as_lists(one) for sequence in packed for one in sequence.documents)
    assert apart == sorted(map(as_lists, documents))
    for sequence in packed:
        assert len(sequence.ids) == len(sequence.trained) == sequence.seq_starts[-1] <= LENGTH
        assert sequence.ids.dtype == sequence.seq_starts.dtype == sequence.positions.dtype == np.int32
        expected = [place for one in sequence.documents for place in range(len(one))]
        assert sequence.positions.tolist() == expected
        assert not sequence.trained[sequence.seq_starts[:-1]].any()  # nothing crosses from one into the next
    # Any two sequences hold more than one can: otherwise the later document would have gone into the earlier.
    filled = sorted(len(sequence.ids) for sequence in packed)
    assert len(filled) < 2 or filled[0] + filled[1] > LENGTH


def test_packing_is_tight() -> None:
    assert [len(sequence.ids) for sequence in pack([document(n) for n in (9, 7, 12, 4, 8, 8)], LENGTH)] == [16, 16, 16]
    with pytest.raises(ValueError, match="17 tokens"):
        pack([document(17)], LENGTH)


def test_truncation_policies() -> None:
    long = Tokens.of([1, *range(10, 19)], [(3, 5), (8, 10)])  # BOS is 1

    def cut(policy: Truncation, bos: int | None = 1, length: int = 6) -> list[tuple[list[int], list[int]]]:
        return [
            (part.ids.tolist(), np.flatnonzero(part.trained).tolist()) for part in truncate(long, length, policy, bos)
        ]

    assert cut("drop", length=10) == [([1, *range(10, 19)], [3, 4, 8, 9])]
    assert cut("drop") == []
    assert cut("cut_right") == [([1, 10, 11, 12, 13, 14], [3, 4])]
    assert cut("cut_left") == [([1, 14, 15, 16, 17, 18], [4, 5])]
    assert cut("cut_left", bos=None) == [([13, 14, 15, 16, 17, 18], [4, 5])]
    assert cut("split") == [([1, 10, 11, 12, 13, 14], [3, 4]), ([15, 16, 17, 18], [2, 3])]
    assert cut("cut_right", length=3) == []  # nothing to learn is left
    # The first token of a part has nothing before it to be predicted from.
    assert cut("cut_left", bos=None, length=2) == [([17, 18], [1])]


def stream(truncation: Truncation = "cut_right", *, epochs: int | None = None, window: int = 7) -> PackedStream:
    sizes = [3, 30, 5, 8, 2, 2, 16, 11, 4, 9]
    return PackedStream(
        Order([len(sizes)], seed=3, epochs=epochs),
        lambda _, number: [document(sizes[number], 100 * number)],
        LENGTH,
        truncation=truncation,
        bos=None,
        window=window,
    )


def test_an_epoch_holds_every_document_once() -> None:
    found = sorted(int(one.ids[0]) for sequence in stream(epochs=2) for one in sequence.documents)
    # Of number 1 the first 16 of 30 tokens are kept, in which one is trained.
    assert found == sorted([100 * number for number in range(10)] * 2)
    dropping = stream("drop", epochs=1)
    assert sum(len(sequence.documents) for sequence in dropping) == 9
    assert dropping.left_out == 1


@settings(max_examples=30, deadline=None)
@given(before=st.integers(0, 25), window=st.integers(1, 12))
def test_a_stream_goes_on_where_its_state_was_taken(before: int, window: int) -> None:
    one = stream("drop", window=window)
    list(islice(one, before))
    state = one.state()
    rest = [sequence.ids.tolist() for sequence in islice(one, 12)]
    other = stream("drop", window=window)
    other.restore(state)
    assert [sequence.ids.tolist() for sequence in islice(other, 12)] == rest
    assert other.left_out == one.left_out


def test_data_of_which_nothing_fits_is_refused() -> None:
    order = Order([3])
    packed = PackedStream(order, lambda *_: [document(20)], LENGTH, truncation="drop", bos=None, window=2)
    with pytest.raises(DataError, match="no example fits into 16 tokens"):
        next(packed)


def answers(count: int = 2, epochs: int | None = None) -> AnswerStream:
    """Pairs of whose answers number 1's rejected is too long."""
    sizes = [(3, 4), (5, 30), (6, 7), (8, 9), (10, 11)]
    return AnswerStream(
        Order([len(sizes)], seed=4, epochs=epochs),
        lambda _, number: Preference(Continuation(f"{number}"), Continuation("")),
        lambda example: [document(size, 100 * int(example.chosen.text)) for size in sizes[int(example.chosen.text)]],
        count=count,
        length=LENGTH,
        truncation="drop",
        bos=None,
    )


def test_answers_keep_their_pairs() -> None:
    stream = answers(epochs=1)
    batches = list(stream)
    assert [len(batch.desirable) for batch in batches] == [4, 4]
    assert stream.left_out == 1
    pairs = [
        (one.ids.tolist(), other.ids.tolist())
        for batch in batches
        for one, other in zip(batch.packed.documents[::2], batch.packed.documents[1::2], strict=True)
    ]
    expected = [(3, 4, 0), (6, 7, 200), (8, 9, 300), (10, 11, 400)]
    assert sorted(pairs) == [
        (list(range(first, first + one)), list(range(first, first + other))) for one, other, first in expected
    ]
    for batch in batches:
        assert batch.desirable.tolist() == [True, False] * 2


def test_answers_go_on_where_their_state_was_taken() -> None:
    stream = answers(3)
    list(islice(stream, 5))
    state = stream.state()
    rest = [batch.packed.ids.tolist() for batch in islice(stream, 4)]
    other = answers(3)
    other.restore(state)
    assert [batch.packed.ids.tolist() for batch in islice(other, 4)] == rest
    assert other.left_out == stream.left_out


def test_answers_need_labels_and_room() -> None:
    def stream(example: Example, size: int) -> AnswerStream:
        def render(_: Example) -> list[Tokens]:
            return [document(size)]

        return AnswerStream(Order([2]), lambda *_: example, render, count=1, length=LENGTH, truncation="drop", bos=None)

    text = Continuation("a")
    assert next(stream(Labelled(text, False), 9)).desirable.tolist() == [False]
    with pytest.raises(DataError, match="chosen and rejected, or with a label"):
        next(stream(text, 9))
    with pytest.raises(DataError, match="no answer fits into 16 tokens"):
        next(stream(Labelled(text, True), 17))
