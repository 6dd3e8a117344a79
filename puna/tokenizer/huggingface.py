"""Hugging Face's tokenizer.json and tokenizer_config.json, read into a Vocabulary and written from one.

Source: the serialization of the ``tokenizers`` library. Only what the Llama family uses is read; the rest raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from puna.errors import TokenizerError
from puna.tokenizer.patterns import GPT2_SPLITS
from puna.tokenizer.vocabulary import SPACE, SpacePrefix, TokenType, Vocabulary, dense_pieces

_BYTE_PIECES = {f"<0x{byte:02X}>" for byte in range(256)}


def from_tokenizer_json(document: Any, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a parsed tokenizer.json; ``config`` is the parsed tokenizer_config.json, or empty.

    Raises TokenizerError when a part is missing, malformed or of a kind that no Llama model uses.
    """
    model = _table(_table(document, "the file").get("model"), "model")
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"tokenizer.json: model type {model.get('type')!r} is not supported; expected 'BPE'")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise TokenizerError(f"tokenizer.json: model.{key} is {model[key]!r}, which is not supported")
    ids = dict(_table(model.get("vocab"), "model.vocab"))
    added = _added_tokens(document.get("added_tokens") or [])
    for token, (content, _) in added.items():
        if ids.setdefault(content, token) != token:
            raise TokenizerError(f"tokenizer.json: {content!r} has the ids {ids[content]} and {token}")
    if not all(type(token) is int for token in ids.values()):
        raise TokenizerError("tokenizer.json: model.vocab must give an integer id to each token")
    pieces, types = dense_pieces(ids, "tokenizer.json")
    for token, (_, special) in added.items():
        types[token] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    merges = [_pair(merge) for merge in _list(model.get("merges"), "model.merges")]

    prefix = _space_prefix(document.get("normalizer"), document.get("pre_tokenizer"))
    unknown = model.get("unk_token")
    if prefix is None:
        vocabulary = Vocabulary(
            kind="bpe",
            pieces=pieces,
            types=types,
            scores=[],
            merges=merges,
            splits=_splits(document.get("pre_tokenizer")),
            ignore_merges=bool(model.get("ignore_merges")),
        )
    else:
        if unknown in ids:
            types[ids[unknown]] = int(TokenType.UNKNOWN)
        if model.get("byte_fallback"):
            for piece in _BYTE_PIECES & ids.keys():
                types[ids[piece]] = int(TokenType.BYTE)
        vocabulary = Vocabulary(
            kind="spm",
            pieces=pieces,
            types=types,
            scores=_scores(pieces, merges),
            merges=merges,
            space_prefix=prefix,
            remove_extra_whitespaces=_removes_whitespace(document.get("normalizer")),
        )
    bos = _first_of_template(document.get("post_processor"))
    vocabulary = replace(vocabulary, bos_id=ids.get(bos or ""), unk_id=ids.get(unknown or ""), add_bos=bos in ids)
    return with_config(vocabulary, config)


def with_config(vocabulary: Vocabulary, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary with what tokenizer_config.json adds: tokens, and the names of the special ones."""
    added = _added_tokens(config.get("added_tokens_decoder") or {})
    known = dict(zip(vocabulary.pieces, range(len(vocabulary.pieces)), strict=True))
    extra = {content: token for token, (content, _) in added.items() if content not in known}
    if extra:
        pieces, types = dense_pieces(known | extra, "tokenizer_config.json")
        types[: len(known)] = vocabulary.types
        for token in extra.values():
            types[token] = int(TokenType.CONTROL if added[token][1] else TokenType.USER_DEFINED)
        padding = [0.0] * (len(pieces) - len(known)) if vocabulary.scores else []
        vocabulary = replace(vocabulary, pieces=pieces, types=types, scores=vocabulary.scores + padding)
        known = {piece: i for i, piece in enumerate(pieces)}
    changes: dict[str, Any] = {}
    for name in ("bos", "eos", "unk", "pad"):
        content = config.get(f"{name}_token")
        if isinstance(content, dict):
            content = content.get("content")
        if isinstance(content, str) and content in known:
            changes[f"{name}_id"] = known[content]
    if isinstance(config.get("add_bos_token"), bool):
        changes["add_bos"] = config["add_bos_token"]
    return replace(vocabulary, **changes)


def to_tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The contents of a tokenizer.json that gives the same ids. Raises TokenizerError for a unigram vocabulary."""
    if vocabulary.kind == "unigram":
        raise TokenizerError("a SentencePiece unigram vocabulary can't be written as tokenizer.json")
    is_spm = vocabulary.kind == "spm"
    unknown = vocabulary.ids_of(TokenType.UNKNOWN)
    added = vocabulary.ids_of(TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": vocabulary.types[token] != TokenType.USER_DEFINED,
            }
            for content, token in added.items()
        ],
        "normalizer": _normalizer(vocabulary) if is_spm else None,
        "pre_tokenizer": _pre_tokenizer(vocabulary),
        "post_processor": _template(vocabulary),
        "decoder": _decoder(vocabulary),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(iter(unknown), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": is_spm,
            "byte_fallback": vocabulary.byte_fallback,
            "ignore_merges": vocabulary.ignore_merges,
            "vocab": {piece: i for i, piece in enumerate(vocabulary.pieces)},
            "merges": [list(pair) for pair in vocabulary.merges],
        },
    }


def to_tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """The contents of tokenizer_config.json, without a chat template."""
    names = ("bos", "eos", "unk", "pad")
    tokens = {f"{name}_token": getattr(vocabulary, f"{name}_id") for name in names}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "add_bos_token": vocabulary.add_bos,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **{name: vocabulary.pieces[token] for name, token in tokens.items() if token is not None},
    }


def _added_tokens(entries: Any) -> dict[int, tuple[str, bool]]:
    """id -> (text, whether it is a control token), from tokenizer.json's list or tokenizer_config.json's table."""
    if isinstance(entries, dict):
        entries = [{**_table(entry, "added_tokens_decoder"), "id": token} for token, entry in entries.items()]
    added: dict[int, tuple[str, bool]] = {}
    for entry in _list(entries, "added_tokens"):
        entry = _table(entry, "added_tokens")
        content = entry.get("content")
        try:
            token = int(entry.get("id", ""))
        except (TypeError, ValueError):
            token = -1
        if not isinstance(content, str) or token < 0:
            raise TokenizerError(f"the added token {str(entry)[:100]} needs a text and an id")
        added[token] = (content, bool(entry.get("special")))
    return added


def _pair(merge: Any) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts):
        return parts[0], parts[1]
    raise TokenizerError(f"tokenizer.json: the merge {str(merge)[:100]!r} is not a pair of tokens")


def _scores(pieces: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """Scores that order pieces as the merges do: 0 for the first piece formed, then -1, -2, …; unmerged pieces last."""
    order = dict.fromkeys(left + right for left, right in merges)
    scores = {piece: -float(i) for i, piece in enumerate(order)}
    return [scores.get(piece, -float(len(scores))) for piece in pieces]


def _parts(value: Any, key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list of steps."""
    if value is None:
        return []
    value = _table(value, key)
    if value.get("type") == "Sequence":
        return [_table(part, key) for part in _list(value.get("normalizers", value.get("pretokenizers")), key)]
    return [value]


_REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND_SPACE = {"type": "Prepend", "prepend": SPACE}
_STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
_JOIN_SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


def _space_prefix(normalizer: Any, pre_tokenizer: Any) -> SpacePrefix | None:
    """SentencePiece's space rule as this file spells it; None when the file is not of SentencePiece's kind."""
    steps = _parts(normalizer, "normalizer")
    for step in steps:
        if step not in (_REPLACE_SPACES, _PREPEND_SPACE, _STRIP, _JOIN_SPACES):
            raise TokenizerError(f"tokenizer.json: the normalizer {str(step)[:200]} is not supported")
    if _REPLACE_SPACES in steps and not pre_tokenizer:
        return "segment" if _PREPEND_SPACE in steps else "never"
    cuts = _parts(pre_tokenizer, "pre_tokenizer")
    if not steps and len(cuts) == 1 and cuts[0].get("type") == "Metaspace":
        if cuts[0].get("split", True) or cuts[0].get("replacement") != SPACE:
            raise TokenizerError("tokenizer.json: a Metaspace pre-tokenizer that splits words is not supported")
        schemes: dict[str, SpacePrefix] = {"always": "metaspace", "first": "first", "never": "never"}
        scheme = cuts[0].get("prepend_scheme", "always")
        if scheme not in schemes:
            raise TokenizerError(f"tokenizer.json: prepend_scheme is {scheme!r}; expected always, first or never")
        return schemes[scheme]
    if steps:
        raise TokenizerError("tokenizer.json: this normalizer together with a pre-tokenizer is not supported")
    return None


def _removes_whitespace(normalizer: Any) -> bool:
    return _STRIP in _parts(normalizer, "normalizer")


def _splits(pre_tokenizer: Any) -> tuple[str, ...]:
    """The cutting patterns of a byte-level pre-tokenizer."""
    splits: list[str] = []
    steps = _parts(pre_tokenizer, "pre_tokenizer")
    for step in steps:
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == "ByteLevel" and step is steps[-1] and not step.get("add_prefix_space"):
            return (*splits, *(GPT2_SPLITS if step.get("use_regex", True) else ()))
        if kind == "Digits":
            splits.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
            # "Removed" with invert keeps the matches, which is the same where the pattern matches every character.
            if (step.get("behavior"), bool(step.get("invert"))) not in (("Isolated", False), ("Removed", True)):
                break
            splits.append(pattern["Regex"])
        else:
            break
    raise TokenizerError(
        f"tokenizer.json: the pre-tokenizer {str(pre_tokenizer)[:200]} is not supported; "
        "expected Split patterns or Digits, then ByteLevel without a prefix space"
    )


def _first_of_template(post_processor: Any) -> str | None:
    """The token that a post-processor puts before the text, or None."""
    if not isinstance(post_processor, dict):
        return None
    for step in post_processor.get("processors") or [post_processor]:
        if isinstance(step, dict) and step.get("type") == "TemplateProcessing":
            single = step.get("single")
            first = single[0] if isinstance(single, list) and single else None
            token = first.get("SpecialToken") if isinstance(first, dict) else None
            name = token.get("id") if isinstance(token, dict) else None
            return name if isinstance(name, str) else None
    return None


def _normalizer(vocabulary: Vocabulary) -> dict[str, Any] | None:
    if vocabulary.space_prefix in ("metaspace", "first"):
        return None
    steps = [_STRIP, _JOIN_SPACES] if vocabulary.remove_extra_whitespaces else []
    steps += [_PREPEND_SPACE] if vocabulary.space_prefix == "segment" else []
    return {"type": "Sequence", "normalizers": [*steps, _REPLACE_SPACES]}


def _pre_tokenizer(vocabulary: Vocabulary) -> dict[str, Any] | None:
    if vocabulary.kind == "spm":
        if vocabulary.space_prefix not in ("metaspace", "first"):
            return None
        scheme = "always" if vocabulary.space_prefix == "metaspace" else "first"
        return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    cuts: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in vocabulary.splits
    ]
    cuts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    return {"type": "Sequence", "pretokenizers": cuts}


def _template(vocabulary: Vocabulary) -> dict[str, Any] | None:
    if not vocabulary.add_bos or vocabulary.bos_id is None:
        return None
    bos = vocabulary.pieces[vocabulary.bos_id]

    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": bos, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}},
    }


def _decoder(vocabulary: Vocabulary) -> dict[str, Any]:
    if vocabulary.kind == "bpe":
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.space_prefix != "never":
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _table(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TokenizerError(f"tokenizer.json: expected a table for {key}, found {type(value).__name__}")
    return value


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise TokenizerError(f"tokenizer.json: expected a list for {key}, found {type(value).__name__}")
    return value
