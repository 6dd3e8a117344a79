from __future__ import annotations

from typing import Any

import pytest

from puna.engine import Request, SamplingParams
from puna.errors import RequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.5"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("top_p", -0.01),
        ("min_p", 2),
        ("typical_p", float("nan")),
        ("repeat_penalty", 0),
        ("repeat_penalty", -1),
        ("repeat_last_n", -2),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", None),
        ("logit_bias", [1]),
        ("logit_bias", {"1": 2.0}),
        ("logit_bias", {-1: 2.0}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: "x"}),
        ("seed", 1.0),
        ("seed", "x"),
        ("logprobs", 1),
        ("top_logprobs", -1),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", None),
        ("stop", 1),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 1),
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("min_tokens", -1),
        ("ignore_eos", "yes"),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", "12"),
        ("bad_words_ids", 1),
        ("bad_words_ids", [1]),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [[1.5]]),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", True),
    ],
)
def test_an_impossible_value_is_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_keep": -1}, "num_keep"),
        ({"pooling": "max"}, "pooling must be 'mean' or 'last', found 'max'"),
        ({"pooling": "mean", "params": SamplingParams(prompt_logprobs=1)}, "make two requests"),
    ],
)
def test_an_impossible_request(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        Request([1], **fields)


def test_min_tokens_beyond_max_tokens() -> None:
    with pytest.raises(RequestError, match=r"min_tokens \(5\) must not exceed max_tokens \(4\)"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_the_message_says_what_is_expected() -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(top_p=1.5)
    assert str(error.value) == "top_p must be a number from 0 to 1, found 1.5"


def test_edges_are_accepted() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=0, min_p=1, typical_p=0, repeat_last_n=-1, seed=-(2**70))
    SamplingParams(logit_bias={0: float("-inf"), 3: -100}, stop_token_ids=[0], max_tokens=1, min_tokens=1)


def test_stop_may_be_one_text() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
