"""Meta's tokenizer.model from Llama 3 on: a line ``base64-of-token rank`` for each token; its rank is id and priority.

Control tokens and the cutting pattern are not in the file; they follow from the release, known by its number of ranks.
Source: meta-llama/llama-models, ``models/llama3/tokenizer.py`` and ``models/llama4/tokenizer.py`` (names and order).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable

from puna.errors import TokenizerError
from puna.tokenizer.patterns import LLAMA3_SPLITS, LLAMA4_SPLITS
from puna.tokenizer.vocabulary import CHAR_TO_BYTE, TokenType, Vocabulary, byte_level, derive_merges

_LLAMA4_RANKS = 200_000


def _numbered(name: str, first: int, last: int) -> list[str]:
    return [f"<|{name}reserved_special_token_{i}|>" for i in range(first, last + 1)]


def _llama3_special_tokens() -> list[str]:
    """256 tokens from id 128000, as Llama 3.1 names them (3.0 calls some of them reserved)."""
    return [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *_numbered("", 0, 1),
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|image|>",
        *_numbered("", 2, 245),
    ]


def _llama4_special_tokens() -> list[str]:
    """2048 tokens from id 200000."""
    text = ["<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>"]
    text += [*_numbered("text_post_train_", 0, 5), "<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"]
    text += _numbered("text_post_train_", 8, 68)
    vision = ["<|image_start|>", "<|image_end|>", *_numbered("vision_", 0, 1), "<|tile_x_separator|>"]
    vision += ["<|tile_y_separator|>", *_numbered("vision_", 2, 5), "<|image|>", *_numbered("vision_", 6, 6)]
    vision += ["<|patch|>", *_numbered("vision_", 7, 1047)]
    reasoning = [*_numbered("reasoning_", 0, 7), "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"]
    basic = ["<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    named = basic + text + vision + reasoning
    return named + _numbered("", 0, 2048 - len(named) - 1)


def looks_like_ranks(data: bytes) -> bool:
    """Whether the bytes may be tiktoken ranks: base64, a space, digits."""
    token, _, rank = data[:4096].split(b"\n", 1)[0].strip().partition(b" ")
    return rank.isdigit() and _base64(token) is not None


def read_ranks(data: bytes) -> Vocabulary:
    """Parse tiktoken ranks: 200,000 of them are Llama 4's, any other number is treated as Llama 3's.

    Raises TokenizerError.
    """
    tokens: list[bytes] = []
    for number, line in enumerate(data.splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        token = _base64(parts[0])
        if len(parts) != 2 or not token or not parts[1].isdigit():
            raise TokenizerError(f"tokenizer.model line {number} is not a base64 token and its rank")
        if parts[1] != b"%d" % len(tokens):
            raise TokenizerError(f"tokenizer.model line {number}: expected rank {len(tokens)}, found {parts[1][:20]!r}")
        tokens.append(token)
    if len({token for token in tokens if len(token) == 1}) != 256:
        raise TokenizerError("tokenizer.model lacks some of the 256 single bytes")
    pieces = [byte_level(token) for token in tokens]
    is_llama4 = len(pieces) == _LLAMA4_RANKS
    special = _llama4_special_tokens() if is_llama4 else _llama3_special_tokens()
    count = len(pieces)
    pad = "<|finetune_right_pad|>" if is_llama4 else "<|finetune_right_pad_id|>"
    return Vocabulary(
        kind="bpe",
        pieces=pieces + special,
        types=[int(TokenType.NORMAL)] * count + [int(TokenType.CONTROL)] * len(special),
        scores=[],
        merges=derive_merges(pieces),
        splits=LLAMA4_SPLITS if is_llama4 else LLAMA3_SPLITS,
        ignore_merges=True,
        bos_id=count,
        eos_id=count + 1,
        pad_id=count + special.index(pad),
        add_bos=True,
    )


def write_ranks(vocabulary: Vocabulary) -> bytes | None:
    """The ranks file of a vocabulary; None where reading it back would not give the same ids.

    The ordinary tokens must come first, be merged in the order of their ids, and be followed by the release's control
    tokens. A control token may be called reserved where Meta's list has a name: 3.0, 3.1 and 3.2 differ in that.
    """
    count = vocabulary.types.count(TokenType.NORMAL)
    pieces, control = vocabulary.pieces[:count], vocabulary.pieces[count:]
    kinds = [int(TokenType.NORMAL)] * count + [int(TokenType.CONTROL)] * len(control)
    is_llama4 = count == _LLAMA4_RANKS
    special = _llama4_special_tokens() if is_llama4 else _llama3_special_tokens()
    if vocabulary.types != kinds or not vocabulary.ignore_merges or len(control) > len(special):
        return None
    if any(name != meta and "reserved" not in name for name, meta in zip(control, special, strict=False)):
        return None
    if vocabulary.splits != (LLAMA4_SPLITS if is_llama4 else LLAMA3_SPLITS):
        return None
    if not set().union(*pieces) <= CHAR_TO_BYTE.keys() or not _merged_by_rank(pieces, vocabulary.merges):
        return None
    lines = (
        base64.b64encode(bytes(CHAR_TO_BYTE[char] for char in piece)) + b" %d\n" % rank
        for rank, piece in enumerate(pieces)
    )
    return b"".join(lines)


def _merged_by_rank(pieces: list[str], merges: Iterable[tuple[str, str]]) -> bool:
    """Whether the merges are all that the ranks imply, in the order of the formed token's rank."""
    rank = {piece: i for i, piece in enumerate(pieces)}
    order = [rank.get(left + right, -1) for left, right in merges]
    return order == sorted(order) and set(merges) == set(derive_merges(pieces))


def _base64(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
