"""The tokens of a text within a longer one."""

from __future__ import annotations

from collections.abc import Callable


def spelling(encode: Callable[[str], list[int]], token_bytes: Callable[[int], bytes], text: str) -> list[int] | None:
    """The tokens that spell exactly this text, as the tokenizer writes it; None where it writes it only with others.

    SentencePiece may put a space before a text; after a line break it does not.
    """
    wanted = text.encode()
    for prefix in ("", "\n"):
        ids = encode(prefix + text)
        start, length = len(ids), 0
        while start and length < len(wanted):
            start -= 1
            length += len(token_bytes(ids[start]))
        if b"".join(map(token_bytes, ids[start:])) == wanted:
            return ids[start:]
    return None
