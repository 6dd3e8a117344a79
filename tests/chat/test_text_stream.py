"""Streaming must give what decoding and cutting the whole answer would give, however the tokens fall."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.chat.text_stream import TextStream
from puna.errors import RequestError


def stream(chunks: list[bytes], stop: list[str]) -> tuple[list[str], str | None]:
    text = TextStream(chunks.__getitem__, stop)
    given_out = [text.push(i) for i in range(len(chunks))]
    return [*given_out, text.finish()], text.stopped


def naive(data: bytes, stop: list[str]) -> tuple[str, str | None]:
    """Decode everything, then look at every prefix: the first that ends with a stop string is the end."""
    text = data.decode("utf-8", "replace")
    for end in range(1, len(text) + 1):
        for candidate in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(candidate):
                return text[: end - len(candidate)], candidate
    return text, None


def chunked(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


TEXT = st.text(alphabet="ab€👍", max_size=20).map(str.encode)
BYTES = st.one_of(
    TEXT, st.binary(max_size=20), st.lists(st.one_of(TEXT, st.binary(max_size=3)), max_size=6).map(b"".join)
)
STOPS = st.lists(st.text(alphabet="ab€\ufffd", min_size=1, max_size=4), max_size=4)


@given(BYTES, st.lists(st.integers(0, 100), max_size=20), STOPS)
def test_any_chunking_gives_the_naive_answer(data: bytes, cuts: list[int], stop: list[str]) -> None:
    pieces, stopped = stream(chunked(data, cuts), stop)
    assert ("".join(pieces), stopped) == naive(data, stop)


@given(st.text(alphabet="ab€👍 ", max_size=30))
def test_text_without_a_stop_beginning_is_not_held_back(text: str) -> None:
    pieces, _ = stream([c.encode() for c in text], ["<stop>"])
    assert pieces == [*text, ""]


def test_characters_are_handed_out_when_whole() -> None:
    thumb = "👍".encode()
    assert stream([thumb[:1], thumb[1:3], thumb[3:]], [])[0] == ["", "", "👍", ""]
    assert stream([thumb[:3]], [])[0] == ["", "\ufffd"]


def test_a_stop_string_across_tokens_is_never_shown() -> None:
    pieces, stopped = stream([b"Hello <", b"|st", b"op|> more"], ["<|stop|>"])
    assert pieces == ["Hello ", "", "", ""]
    assert stopped == "<|stop|>"
    pieces, stopped = stream([b"a <", b"|st", b"ay"], ["<|stop|>"])
    assert pieces == ["a ", "", "<|stay", ""]
    assert stopped is None


def test_what_was_held_back_comes_at_the_end() -> None:
    assert stream([b"ends with <|st"], ["<|stop|>"])[0] == ["ends with ", "<|st"]


def test_nothing_comes_after_the_stop() -> None:
    text = TextStream([b"one STOP two", b"three"].__getitem__, ["STOP"])
    assert text.push(0) == "one "
    assert text.push(1) == ""
    assert text.finish() == ""


def test_of_stops_that_end_together_the_longest_counts() -> None:
    assert stream([b"xxabc"], ["bc", "abc"]) == (["xx", ""], "abc")
    assert stream([b"abcd"], ["abcd", "bc"]) == (["a", ""], "bc")


def test_control_tokens_can_be_left_out() -> None:
    text = TextStream([b"a", b"<|eot|>"].__getitem__, skip={1})
    assert text.push(0) + text.push(1) + text.finish() == "a"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="stop string"):
        TextStream([b""].__getitem__, ["a", ""])
