"""``puna run --explain-prompt``: the exact prompt, its ids, and where each came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from puna.llm import LLM


def explain(llm: LLM, messages: Sequence[dict[str, Any]], *, raw_text: str | None, as_json: bool) -> None:
    """Print the rendered text and one line a token."""
    if raw_text is None and llm.has_template:
        prompt = llm.prompt(messages)
        text = prompt.text
        pieces = [(piece.id, piece.origin) for piece in prompt.pieces]
    else:
        text = messages[-1]["content"] if raw_text is None else raw_text
        ids = llm.tokenizer.encode(text, add_bos=llm.tokenizer.add_bos)
        starts_with_bos = llm.tokenizer.add_bos
        pieces = [(i, "BOS" if starts_with_bos and place == 0 else "prompt") for place, i in enumerate(ids)]
    shown = [(i, llm.tokenizer.token_bytes(i).decode("utf-8", "replace"), origin) for i, origin in pieces]
    if as_json:
        tokens = [{"id": i, "text": token, "origin": origin} for i, token, origin in shown]
        click.echo(json.dumps({"text": text, "tokens": tokens}, ensure_ascii=False))
        return
    click.echo(text)
    click.echo(f"\n{'ID':>7}  {'TOKEN':24}  ORIGIN")
    for i, token, origin in shown:
        click.echo(f"{i:>7}  {token!r:24}  {origin}")
