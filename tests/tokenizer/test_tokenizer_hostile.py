"""Malformed and malicious files: one clear TokenizerError, never a crash, a hang or a huge allocation."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import TokenizerError
from puna.tokenizer import load_tokenizer, tokenizer_from_gguf
from puna.tokenizer.sentencepiece import read_model
from puna.tokenizer.tiktoken import read_ranks
from puna.tokenizer.vocabulary import BYTE_TO_CHAR, dense_pieces

BYTES = list(BYTE_TO_CHAR.values())
RANKS = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


def gguf_bpe(**changes: Any) -> dict[str, Any]:
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*BYTES, "ab", "<end>"],
        "token_type": [1] * 257 + [3],
        "merges": ["a b"],
        "eos_token_id": 257,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def gguf_spm(**changes: Any) -> dict[str, Any]:
    values = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", "▁", "a", "▁a"],
        "token_type": [2, 3, 3, 1, 1, 1],
        "scores": [0.0, 0.0, 0.0, -2.0, -3.0, -1.0],
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def test_the_sound_versions_work() -> None:
    assert tokenizer_from_gguf(gguf_bpe()).encode("abc<end>", parse_special=True) == [256, BYTES.index("c"), 257]
    assert tokenizer_from_gguf(gguf_spm()).encode("a a☃") == [5, 5, 0]
    arrays = {
        "scores": np.array([0, 0, 0, -2, -3, -1], np.float32),
        "token_type": np.array([2, 3, 3, 1, 1, 1], np.int32),
    }
    assert tokenizer_from_gguf(gguf_spm(**arrays)).encode("a a☃") == [5, 5, 0]
    assert read_ranks(RANKS).bos_id == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "model is 'bert'"),
        ({"model": None}, "model is None"),
        ({"model": ["llama"]}, "tokenizer.ggml.model"),
        ({"pre": "qwen2"}, "pre is 'qwen2'.*known: gpt-2"),
        ({"pre": None}, "pre is None"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": []}, "empty"),
        ({"tokens": "abc"}, "tokens is missing or not an array"),
        ({"tokens": [1, 2]}, "array of strings"),
        ({"tokens": [*BYTES, "ab", "ab"]}, "'ab' twice"),
        ({"tokens": [*BYTES, "ab", "\ud800"]}, "not valid Unicode"),
        ({"token_type": [1]}, "1 token types"),
        ({"token_type": [1] * 257 + [9]}, "token type outside"),
        ({"token_type": [1] * 257 + [6]}, "byte token '<end>'"),
        ({"merges": None}, "merges is missing"),
        ({"merges": [7]}, "array of strings"),
        ({"eos_token_id": 258}, "eos_id is 258"),
        ({"eos_token_id": "257"}, "expected a token id"),
        ({"eos_token_id": True}, "expected a token id"),
        ({"add_bos_token": 1}, "expected true or false"),
    ],
)
def test_byte_level_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer_from_gguf(gguf_bpe(**changes))


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("ab", "'ab' is not a pair"),
        ("a  ", "inconsistent"),
        (" b", "not a pair"),
        ("a zz", "inconsistent.*zz"),
        ("a c", "inconsistent.*ac"),
    ],
)
def test_byte_level_merges(pre: str, merge: str, message: str) -> None:
    """Llama 3's are read when a word first needs them; whatever that word finds wrong, the next one does too."""
    changed = gguf_bpe(pre=pre, merges=[merge])
    if pre == "gpt-2":
        with pytest.raises(TokenizerError, match=message):
            tokenizer_from_gguf(changed)
        return
    tokenizer = tokenizer_from_gguf(changed)
    assert tokenizer.encode("ab") == [256]  # a token as it is
    for _ in range(2):
        with pytest.raises(TokenizerError, match=message):
            tokenizer.encode("ba")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores is missing"),
        ({"scores": [0.0]}, "1 entries for 6 tokens"),
        ({"scores": [float("nan")] * 6}, "not a number"),
        ({"token_type": "abc"}, "token_type is missing or not an array"),
        ({"bos_token_id": 6}, "bos_id is 6"),
    ],
)
def test_sentencepiece_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer_from_gguf(gguf_spm(**changes))


def test_minus_one_means_none() -> None:
    tokenizer = tokenizer_from_gguf(gguf_spm(bos_token_id=0xFFFF_FFFF, padding_token_id=-1))
    assert tokenizer.bos_id is None
    assert tokenizer.pad_id is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\x0a", "does not end"),
        (b"\x0a\xff\xff\xff\xff\x0f", "truncated"),
        (b"\x0a" + b"\xff" * 9 + b"\x01", "truncated"),
        (b"\x0a" + b"\xff" * 30, "does not end"),
        (b"\x0b\x00", "wire type 3"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "not UTF-8"),
        (b"\x0a\x05\x12\x03abc", "score of 3 bytes"),
        (b"\x0a\x03\x0a\x01a\x12\x02\x18\x04", "model_type 4"),
        (b"\x0a\x03\x0a\x01a\x0a\x03\x0a\x01a\x12\x02\x18\x02", "'a' twice"),
        (b"\x0a\x05\x0a\x01a\x18\x09\x12\x02\x18\x02", "token type"),
        (b"\x0a\x03\x0a\x01a", "unknown token"),
        (b"\x0a\x03\x0a\x01a\x12\x05\x18\x02\xc0\x01\x01", "spaces after words"),
        (b"\x0a\x08\x0a\x01a\x15" + struct.pack("<f", float("nan")) + b"\x12\x02\x18\x02", "not a number"),
    ],
)
def test_sentencepiece_models(data: bytes, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        read_model(data)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_sentencepiece_model(data: st.DataObject, shared_data: Path) -> None:
    """Cut or overwritten anywhere, a model either loads and encodes, or is refused."""
    model = bytearray((shared_data / "weights/stories260K/hf/tokenizer.model").read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    model = model[: data.draw(st.integers(0, len(model)))] if data.draw(st.booleans()) else model
    try:
        vocabulary = read_model(bytes(model))
    except TokenizerError:
        return
    assert vocabulary.pieces


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (RANKS.replace(b" 7\n", b" 8\n", 1), "line 8: expected rank 7"),
        (RANKS.replace(b" 7\n", b" 99999999999999999999\n", 1), "expected rank 7"),
        (RANKS.replace(b" 7\n", b"\n", 1), "line 8 is not"),
        (RANKS + b"@@@ 256\n", "line 257 is not"),
        (RANKS + b" 256\n", "line 257 is not"),
        (RANKS + b"YQ== 256\n", "'a' twice"),
        (RANKS[: len(RANKS) // 2].rsplit(b"\n", 1)[0], "single bytes"),
        (b"", "single bytes"),
    ],
)
def test_tiktoken_ranks(data: bytes, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        read_ranks(data)


def hugging_face() -> dict[str, Any]:
    return {
        "added_tokens": [{"id": 257, "content": "<end>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": None,
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate([*BYTES, "ab"])}, "merges": [["a", "b"]]},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("model"), "expected a table for model"),
        (lambda d: d["model"].update(type="WordPiece"), "'WordPiece' is not supported"),
        (lambda d: d["model"].update(dropout=0.1), "dropout"),
        (lambda d: d["model"].update(vocab=["a"]), "model.vocab"),
        (lambda d: d["model"]["vocab"].update(zz="3"), "integer id"),
        (lambda d: d["model"]["vocab"].update(zz=-1), "has id -1"),
        (lambda d: d["model"]["vocab"].update(zz=10**12), "has id 1000000000000"),
        (lambda d: d["model"]["vocab"].update(zz=3), "share the id 3"),
        (lambda d: d["model"].update(merges=[["a"]]), "not a pair"),
        (lambda d: d["model"].update(merges=["a b c"]), "not a pair"),
        (lambda d: d["model"].update(merges=[["a", "nope"]]), "inconsistent.*nope"),
        (lambda d: d["model"].update(merges={"a": "b"}), "model.merges"),
        (lambda d: d["added_tokens"].append({"id": 300, "content": "<end>"}), "has the ids 257 and 300"),
        (lambda d: d["added_tokens"].append({"id": 10**12, "content": "xyz"}), "has id 1000000000000"),
        (lambda d: d["added_tokens"].append({"content": "x"}), "needs a text and an id"),
        (lambda d: d["added_tokens"].append("x"), "expected a table"),
        (lambda d: d.update(pre_tokenizer=None), "pre-tokenizer None is not supported"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer.*Whitespace"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
        (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer.*NFC"),
        (lambda d: d.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "split": True}), "Metaspace"),
    ],
)
def test_tokenizer_json(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    document = hugging_face()
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert load_tokenizer(tmp_path).encode("ab<end>", parse_special=True) == [256, 257]
    change(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in str(error.value)


def write_with_pattern(folder: Path, split: str) -> None:
    document = hugging_face()
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.mark.parametrize("split", ["(", "(?<=", "[z-a]"])
def test_a_pattern_that_does_not_compile(split: str, tmp_path: Path) -> None:
    write_with_pattern(tmp_path, split)
    with pytest.raises(TokenizerError, match="inconsistent"):
        load_tokenizer(tmp_path)


def test_a_pattern_that_backtracks_without_end(tmp_path: Path) -> None:
    """The library panics then, with an exception that `except Exception` would not catch."""
    write_with_pattern(tmp_path, "(x+x+)+y")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("xxxy")) == b"xxxy"
    with pytest.raises(TokenizerError, match="can't cut this text of 60 characters"):
        tokenizer.encode("x" * 60)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.json", b"{", "not valid JSON"),
        ("tokenizer.json", b"\xff\xfe", "not valid JSON"),
        ("tokenizer.json", b"[" * 100_000, "not valid JSON"),
        ("tokenizer.json", b"[]", "JSON object"),
        ("tokenizer.model", b"PK\x03\x04 a zip file", "neither a SentencePiece model nor"),
        ("tokenizer.model", b"", "neither a SentencePiece model nor"),
    ],
)
def test_wrong_files(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room
    with pytest.raises(TokenizerError, match="far more than any tokenizer"):
        load_tokenizer(path)


def test_holes_in_the_ids_become_unused_tokens() -> None:
    pieces, types = dense_pieces({"a": 0, "b": 3}, "file")
    assert pieces == ["a", "[unused id 1]", "[unused id 2]", "b"]
    assert types == [1, 5, 5, 1]
