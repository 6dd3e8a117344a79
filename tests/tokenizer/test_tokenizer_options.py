"""Options that the released models don't use, against new SentencePiece models and the tokenizers library."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import TokenizerError
from puna.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf, tokenizer_to_gguf
from puna.tokenizer.encoder import library_for, plain_encoder
from puna.tokenizer.patterns import GPT2_SPLITS
from puna.tokenizer.vocabulary import BYTE_TO_CHAR, Vocabulary

TEXTS = [
    "",
    " ",
    "   ",
    "the cat",
    " the  cat ",
    "▁the▁▁cat▁",
    "a<sep>b <sep> c<sep>",
    "<sep>the",
    "<sep>",
    "the x y",
    "日本 語 unknown ☃☃ runs ☃",
    "<s>the</s> <unk> <0x41>",
    "12 345\n\n\ttabs",
    "aaaa aaaaaaa abababab the the",
]


def train(folder: Path, **options: Any) -> Any:
    """A tiny SentencePiece BPE model; returns the sentencepiece processor, leaves tokenizer.model in the folder."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = ["the", "cat", "sat", "on", "mat", "aaaa", "abab", "12", "345", "ing", "then", "there", "  two"]
    generator = random.Random(0)
    lines = [" ".join(generator.choices(words, k=12)) for _ in range(300)]
    model = io.BytesIO()
    defaults = {"vocab_size": 60, "model_type": "bpe", "normalization_rule_name": "identity", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, hard_vocab_limit=False, **(defaults | options)
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remove_extra_whitespaces": False},
        {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
        {"byte_fallback": True, "vocab_size": 310, "remove_extra_whitespaces": False, "split_digits": True},
        {"user_defined_symbols": ["<sep>", "▁x▁"], "remove_extra_whitespaces": False},
        {"user_defined_symbols": ["<sep>", "▁x▁"], "remove_extra_whitespaces": True},
        {"split_by_whitespace": False, "remove_extra_whitespaces": False},  # pieces that span words
        {"pad_id": 3, "bos_id": -1, "normalization_rule_name": "nmt_nfkc"},
    ],
    ids=str,
)
def test_sentencepiece_options(options: dict[str, Any], tmp_path: Path) -> None:
    peer = train(tmp_path, **options)
    ours = load_tokenizer(tmp_path)
    for name in ("bos_id", "eos_id", "pad_id", "unk_id"):
        expected = getattr(peer, name)()
        assert getattr(ours, name) == (None if expected < 0 else expected)
    generator = random.Random(1)
    texts = TEXTS + ["".join(generator.choices("the cat▁ ab<sep>x12☃\n", k=20)) for _ in range(500)]
    for text in texts:
        ids = peer.encode(text)
        assert ours.encode(text) == ids, text
        if ours.unk_id not in ids:  # SentencePiece writes the unknown token as " ⁇ ", we as the vocabulary spells it
            assert ours.decode(ids).decode() == peer.decode(ids)


def test_words_merge_one_by_one_only_where_no_piece_spans_them(tmp_path: Path) -> None:
    train(tmp_path, split_by_whitespace=False, remove_extra_whitespaces=False)
    spanning = load_tokenizer(tmp_path).vocabulary
    assert any("▁" in piece.lstrip("▁") for piece in spanning.pieces)
    assert library_for(spanning).pre_tokenizer is None
    train(tmp_path)
    assert library_for(load_tokenizer(tmp_path).vocabulary).pre_tokenizer is not None


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_rules_of_tokenizer_json(scheme: str, llama2: Tokenizer, tmp_path: Path) -> None:
    """transformers with legacy=False writes a Metaspace; the library reading the same file is the reference."""
    tokenizers = pytest.importorskip("tokenizers")
    document = llama2.to_tokenizer_json()
    document["normalizer"] = None
    document["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    peer = tokenizers.Tokenizer.from_str(json.dumps(document))
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    ours = load_tokenizer(tmp_path)
    for text in (*TEXTS, "<s>[INST] hi [/INST]", "a</s><s>b </s> c", "<s> x"):
        expected = peer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, parse_special=True) == expected, text
        assert ours.encode(text, add_bos=True, parse_special=True) == peer.encode(text).ids
    rewritten = json.loads(json.dumps(ours.to_tokenizer_json()))
    peer = tokenizers.Tokenizer.from_str(json.dumps(rewritten))
    for text in TEXTS:
        assert peer.encode(text, add_special_tokens=False).ids == ours.encode(text, parse_special=True)


def test_added_tokens_of_tokenizer_config(llama2: Tokenizer, tokenizer_data: Path, tmp_path: Path) -> None:
    """A tokenizer.model with tokens added by fine-tuning: one control token, one that is always found in text."""
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_data / "llama2.tokenizer.model").read_bytes())
    config = {
        "add_bos_token": False,
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<pad>",
        "added_tokens_decoder": {
            "2": {"content": "</s>", "special": True},
            "32000": {"content": "<|im_end|>", "special": True},
            "32001": {"content": "<pad>", "special": True},
            "32002": {"content": "<tool>", "special": False},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.eos_id, ours.pad_id, ours.add_bos) == (32003, 32000, 32001, False)
    assert ours.eos_ids == {2, 32000}
    assert ours.encode("a<tool>")[-1] == 32002
    assert 32000 not in ours.encode("a<|im_end|>")
    assert ours.encode("a<|im_end|>", parse_special=True)[-1] == 32000
    again = tokenizer_from_gguf(tokenizer_to_gguf(ours))
    assert again.encode("a<tool> b<|im_end|>", parse_special=True) == ours.encode(
        "a<tool> b<|im_end|>", parse_special=True
    )


def test_forms_that_cannot_hold_a_vocabulary(smollm2: Tokenizer, llama2: Tokenizer, tmp_path: Path) -> None:
    """Refused, not written wrongly."""
    assert smollm2.to_tokenizer_model() is None  # its control tokens come first, and it cuts differently
    document = llama2.to_tokenizer_json()
    document["normalizer"] = None
    document["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert load_tokenizer(tmp_path).to_tokenizer_model() is None  # SentencePiece has no such space rule
    document = smollm2.to_tokenizer_json()
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\d"
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match="GGUF has no name"):
        tokenizer_to_gguf(load_tokenizer(tmp_path))


def test_unigram_is_only_read_and_written_as_sentencepiece(tokenizer_data: Path, tmp_path: Path) -> None:
    unigram = load_tokenizer(tokenizer_data / "sentencepiece.model")
    for write in (unigram.to_tokenizer_json, lambda: tokenizer_to_gguf(unigram)):
        with pytest.raises(TokenizerError, match="unigram"):
            write()
    model = unigram.to_tokenizer_model()
    assert model is not None
    (tmp_path / "tokenizer.model").write_bytes(model)
    again = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == unigram.encode(text)


MERGED = ["aaaaaaaa", "abcabcbcaab", "", "zzz", "a é", "ab" * 700, "caab bc\n\n cab", "🙂ab🙂", "\x00b"]


@pytest.mark.parametrize("whole_words", [False, True])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_native_merging_is_the_librarys(whole_words: bool, data: st.DataObject) -> None:
    """Hugging Face's tokenizers is the reference: random vocabularies, merges in any order, some given twice."""
    letters = ["a", "b", "c", BYTE_TO_CHAR[32]]
    pieces, merges = list(letters), []
    for _ in range(data.draw(st.integers(0, 12))):
        left, right = data.draw(st.sampled_from(pieces)), data.draw(st.sampled_from(pieces))
        merges.append((left, right))
        if left + right not in pieces:
            pieces.append(left + right)
    merges += data.draw(st.lists(st.sampled_from(merges), max_size=2)) if merges else []
    types = [int(data.draw(st.sampled_from([1, 1, 1, 4])) if i >= 4 else 1) for i in range(len(pieces))]
    vocabulary = Vocabulary("bpe", pieces, types, [], merges, GPT2_SPLITS, ignore_merges=whole_words)
    encode, library = plain_encoder(vocabulary), library_for(vocabulary)
    for text in [*MERGED, data.draw(st.text("abc \n\u00e9", max_size=60))]:
        assert encode(text) == library.encode(text, add_special_tokens=False).ids
