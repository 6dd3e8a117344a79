"""Log probabilities as the API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from puna.engine import PromptLogprob
from puna.llm import TokenLogprob
from puna.tokenizer import Tokenizer


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Of a chat completion: the exact bytes of every token beside its text."""
    content = [
        {
            **_entry(tokenizer, token.token_id, token.logprob),
            "top_logprobs": [_entry(tokenizer, *candidate) for candidate in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[PromptLogprob], tokens: Sequence[TokenLogprob], wanted: int, offset: int
) -> dict[str, Any]:
    """Of a completion, after an echoed ``prompt``: each token and the ``wanted`` most probable ones of its place.

    ``offset`` is where in the text the first token begins, in characters; what lies before the text counts to its
    start. The first token of a prompt has no log probability.
    """
    texts, logprobs, tops, offsets = [], [], [], []
    answer = [PromptLogprob(token.token_id, token.logprob, token.top) for token in tokens]
    for token, logprob, candidates in [*prompt, *answer]:
        text = token_text(tokenizer, token)
        texts.append(text)
        offsets.append(max(offset, 0))
        offset += len(text)
        logprobs.append(logprob)
        top = {token_text(tokenizer, i): value for i, value in candidates[:wanted]}
        tops.append(None if logprob is None else {**top, text: logprob})
    return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": texts, "top_logprobs": tops}


def prompt_logprobs(tokenizer: Tokenizer, tokens: Sequence[PromptLogprob]) -> list[dict[str, Any] | None]:
    """Of a prompt, as vLLM shows it: for each token its own entry and those of the most probable ones, by id.

    ``rank`` is known of the most probable ones only.
    """
    shown: list[dict[str, Any] | None] = []
    for token, logprob, candidates in tokens:
        if logprob is None:
            shown.append(None)
            continue
        places: dict[int, tuple[float, int | None]] = {
            i: (value, rank) for rank, (i, value) in enumerate(candidates, 1)
        }
        places.setdefault(token, (logprob, None))
        shown.append(
            {
                str(i): {"logprob": value, "rank": rank, "decoded_token": token_text(tokenizer, i)}
                for i, (value, rank) in places.items()
            }
        )
    return shown


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's own text; bytes that are no whole characters show as U+FFFD."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}
