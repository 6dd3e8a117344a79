"""The same ids as the reference implementations on arbitrary text."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.tokenizer import Tokenizer, load_tokenizer, tokenizer_to_gguf

# Whitespace of every kind, digits, ▁ itself, case folding oddities, combining marks, emoji sequences, NUL.
AWKWARD = (
    " ▁\t\n\r\0\x85\xa0\u2028\u3000\u200b\ufeff0159½²'sSſLLßẞİıé\u0301\u0308字한かꙮ👍🏽\u200d👩🇩🇪☃\ufe0f=-_/*aabTthe"
)
SNIPPETS = [
    " the",
    "ing",
    "Hello",
    "    ",
    "\n\n",
    "▁▁▁",
    "aaaaa",
    "ababab",
    "<s>",
    "</s>",
    "<0x0A>",
    "<|eot_id|>",
    "<unk>",
]
TEXT = st.lists(
    st.one_of(st.sampled_from(AWKWARD), st.sampled_from(SNIPPETS), st.characters(exclude_categories=["Cs", "Cn"])),
    max_size=40,
).map("".join)
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@lru_cache
def sentencepiece_peer(model: bytes) -> Any:
    return pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)


@lru_cache
def tiktoken_peer(path: Path, pattern: str) -> Any:
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    return tiktoken.Encoding("peer", pat_str=pattern, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={})


def hugging_face_peer(tokenizer: Tokenizer, folder: Path) -> Any:
    """What transformers makes of the files that we write."""
    transformers = pytest.importorskip("transformers")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.to_tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer.to_tokenizer_config()))
    return transformers.AutoTokenizer.from_pretrained(str(folder))


@fuzz
@given(text=TEXT)
def test_llama2_is_sentencepiece(text: str, llama2: Tokenizer, tokenizer_data: Path) -> None:
    peer = sentencepiece_peer((tokenizer_data / "llama2.tokenizer.model").read_bytes())
    ids = peer.encode(text)
    assert llama2.encode(text) == ids
    assert llama2.decode(ids).decode() == peer.decode(ids)


@fuzz
@given(text=TEXT)
def test_whitespace_removal_is_sentencepiece(text: str, stories: Tokenizer, shared_data: Path) -> None:
    """stories260K's model has remove_extra_whitespaces set, and a vocabulary so small that most text falls to bytes."""
    path = shared_data / "weights" / "stories260K" / "hf" / "tokenizer.model"
    assert stories.encode(text) == sentencepiece_peer(path.read_bytes()).encode(text)


@pytest.mark.parametrize("named", ["llama2", "stories"], indirect=True)
def test_sentencepiece_reads_what_we_write(named: Tokenizer) -> None:
    written = named.to_tokenizer_model()
    assert written is not None
    peer = sentencepiece_peer(written)
    assert (peer.bos_id(), peer.eos_id(), peer.unk_id()) == (named.bos_id, named.eos_id, named.unk_id)

    @fuzz
    @given(text=TEXT)
    def same_ids(text: str) -> None:
        assert peer.encode(text) == named.encode(text)

    same_ids()


@fuzz
@given(text=TEXT)
def test_llama3_is_tiktoken(text: str, llama3: Tokenizer, tokenizer_data: Path) -> None:
    # The pattern is spelled out here, as Meta's models/llama3/tokenizer.py has it.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    peer = tiktoken_peer(tokenizer_data / "llama3.tokenizer.model", pattern)
    assert llama3.encode(text) == peer.encode_ordinary(text)


@fuzz
@given(text=TEXT)
def test_llama4_is_tiktoken(text: str, llama4: Tokenizer, tokenizer_data: Path) -> None:
    pattern = json.loads((tokenizer_data / "vectors-llama4.json").read_text("utf-8"))["pattern"]
    peer = tiktoken_peer(tokenizer_data / "llama4.tokenizer.model", pattern)
    assert llama4.encode(text) == peer.encode_ordinary(text)


def test_unigram_is_sentencepiece(tokenizer_data: Path, shared_data: Path) -> None:
    path = tokenizer_data / "sentencepiece.model"
    peer, ours = sentencepiece_peer(path.read_bytes()), load_tokenizer(path)
    texts = [
        "",
        " ",
        "  two  spaces ",
        "Ünïcödé",
        "ﬁne ２",
        "tabs\tand\nlines",
        "<pad></s>",
        "b <unk>",
        "unknown 🦙🦙 runs",
    ]
    for text in texts:
        assert ours.encode(text) == peer.encode(text), text


@pytest.mark.parametrize("named", ["llama2", "stories", "smollm2", "llama3_json"], indirect=True)
def test_transformers_reads_what_we_write(named: Tokenizer, tmp_path: Path) -> None:
    peer = hugging_face_peer(named, tmp_path)
    assert len(peer) == named.vocab_size
    assert (peer.bos_token_id, peer.eos_token_id) == (named.bos_id, named.eos_id)

    @fuzz
    @given(text=TEXT.filter(lambda text: not any(word in text for word in named.special_tokens)))
    def same_ids(text: str) -> None:
        assert peer.encode(text, add_special_tokens=False) == named.encode(text)
        assert peer.encode(text) == named.encode(text, add_bos=named.add_bos)

    if named.vocabulary.remove_extra_whitespaces:
        assert peer.encode("  Once   upon ", add_special_tokens=False) == named.encode("  Once   upon ")
    else:
        same_ids()
    special = max(named.special_tokens, key=len)
    text = f"Once {special}upon a{special} time"
    assert peer.encode(text, add_special_tokens=False) == named.encode(text, parse_special=True)


@pytest.mark.parametrize("named", ["llama2", "stories", "llama3", "llama4", "smollm2"], indirect=True)
def test_llama_cpp_reads_what_we_write(named: Tokenizer, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in tokenizer_to_gguf(named).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    peer = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    assert peer.n_vocab() == named.vocab_size
    assert (peer.token_bos(), peer.token_eos()) == (named.bos_id, named.eos_id)
    model = peer._model.model
    vocab = llama_cpp.llama_model_get_vocab(model)
    assert bool(llama_cpp.llama_vocab_get_add_bos(vocab)) == named.add_bos
    ends = {token for token in range(named.vocab_size) if llama_cpp.llama_vocab_is_eog(vocab, token)}
    assert named.eos_ids <= ends  # llama.cpp also stops at some file separators, which these models never emit in chat
    texts = ["Hello  world\n\n 123456 it's HE'LL", " Once upon a time", "▁x", "été 字 👍🏽 ½", "</s><|eot_id|>"]
    if named.vocabulary.remove_extra_whitespaces:  # llama.cpp doesn't know that rule for SentencePiece BPE
        texts = ["Once upon a time", "été 字 👍🏽 ½"]
    for text in texts:
        for parse in (False, True):
            assert peer.tokenize(text.encode(), add_bos=False, special=parse) == named.encode(text, parse_special=parse)


@pytest.mark.parametrize("named", ["llama2", "llama3", "llama4"], indirect=True)
@fuzz
@given(text=st.text())
def test_text_survives(named: Tokenizer, text: str) -> None:
    ids = named.encode(text)
    lossless = text if named.vocabulary.kind == "bpe" else text.replace("▁", " ")
    assert named.decode(ids) == lossless.encode()
    artificial = b" " if named.vocabulary.kind == "spm" and text else b""
    assert b"".join(map(named.token_bytes, ids)) == artificial + lossless.encode()


def test_decode_accepts_any_order_of_numpy_ids(llama3: Tokenizer) -> None:
    ids = np.array(llama3.encode("Grüße 🦙"), np.int32)
    assert llama3.decode(ids) == "Grüße 🦙".encode()
    assert llama3.decode(ids[-1:]) in "🦙".encode()
