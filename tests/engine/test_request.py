"""Values that cannot be meant are refused, by name: in a request itself, and by the engine that is to run it."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import assert_all_free, expected_greedy, greedy, make_engine, tokens_of

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


class TestByTheEngine:
    @pytest.mark.parametrize(
        ("prompt", "params", "reason"),
        [
            ([], {}, "prompt is empty"),
            (["a"], {}, "list of token ids"),
            ([1.5], {}, "list of token ids"),
            ([2**40], {}, "list of token ids"),
            ([1, 50], {}, "the prompt has token id 50, but the model's ids go from 0 to 49"),
            ([-1], {}, "token id -1"),
            ([1] * 64, {}, "the prompt has 64 tokens, but the context of 64"),
            ([1], {"logit_bias": {50: 1.0}}, "logit_bias has token id 50"),
            ([1], {"stop_token_ids": (50,)}, "stop_token_ids has token id 50"),
            ([1], {"top_logprobs": 51}, "top_logprobs must not exceed"),
            ([1], {"prompt_logprobs": 51}, "prompt_logprobs must not exceed"),
            ([1] * 65, {"prompt_logprobs": 0, "max_tokens": 0}, "context of 64 must hold it; shorten"),
            ([1], {"allowed_token_ids": [50]}, "allowed_token_ids has token id 50"),
            ([1], {"bad_words_ids": [[1, 50]]}, "bad_words_ids has token id 50"),
        ],
    )
    def test_requests(self, prompt: Any, params: dict[str, Any], reason: str) -> None:
        engine = make_engine()
        with pytest.raises(RequestError, match=reason):
            engine.submit(Request(prompt, SamplingParams(**params)))
        assert_all_free(engine)

    def test_num_keep_must_leave_room(self) -> None:
        engine = make_engine()
        with pytest.raises(RequestError, match="num_keep must leave two of the context's 64 tokens, found 63"):
            engine.submit(Request([1], shift=True, num_keep=63))
        assert_all_free(engine)

    def test_the_longest_prompt_is_accepted(self) -> None:
        events = list(make_engine().submit(Request([1] * 63, greedy())))
        assert tokens_of(events) == expected_greedy([1] * 63, 1)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"num_blocks": 0}, "num_blocks must be at least 1"),
            ({"block_size": 0}, "block_size"),
            ({"max_sequences": 65, "max_batch_tokens": 64}, "must not exceed max_batch_tokens"),
            ({"num_blocks": None, "kv_memory_bytes": 63}, "kv_memory_bytes must be at least 64, one block of 4 tokens"),
        ],
    )
    def test_engines(self, options: dict[str, Any], reason: str) -> None:
        with pytest.raises(RequestError, match=reason):
            make_engine(**options)
