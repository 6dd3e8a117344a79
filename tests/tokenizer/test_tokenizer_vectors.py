"""Exact ids, both ways, on the reference vectors, from every file form."""

import json
from pathlib import Path
from typing import Any

import pytest

from puna.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf, tokenizer_to_gguf


def vectors(folder: Path, generation: int) -> list[dict[str, Any]]:
    cases = json.loads((folder / f"vectors-llama{generation}.json").read_text("utf-8"))["cases"]
    assert len(cases) >= 80
    return cases


def check_vectors(tokenizer: Tokenizer, cases: list[dict[str, Any]]) -> None:
    for case in cases:
        text, ids = case["text"], case["ids"]
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids).decode() == case.get("decoded", text)


@pytest.mark.parametrize(
    ("named", "generation"), [("llama2", 2), ("llama3", 3), ("llama3_json", 3), ("llama4", 4)], indirect=["named"]
)
def test_model_and_json_files(named: Tokenizer, generation: int, tokenizer_data: Path) -> None:
    check_vectors(named, vectors(tokenizer_data, generation))


@pytest.mark.parametrize(("kind", "generation"), [("spm", 2), ("bpe", 3)])
def test_gguf_files(kind: str, generation: int, gguf_tokenizers: dict[str, Tokenizer], tokenizer_data: Path) -> None:
    check_vectors(gguf_tokenizers[kind], vectors(tokenizer_data, generation))


@pytest.mark.parametrize("kind", ["spm", "bpe"])
def test_llama_cpp_vectors(kind: str, gguf_tokenizers: dict[str, Tokenizer], tokenizer_data: Path) -> None:
    """llama.cpp's own texts and ids, which it makes without BOS and without parsing control tokens."""
    stem = f"ggml-vocab-llama-{kind}.gguf"
    texts = (tokenizer_data / f"{stem}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (tokenizer_data / f"{stem}.out").read_text().split("\n")
    assert len(texts) == len(lines) >= 40
    tokenizer = gguf_tokenizers[kind]
    for text, line in zip(texts, lines, strict=True):
        ids = [int(word) for word in line.split()]
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text.encode()


@pytest.mark.parametrize(("named", "generation"), [("llama2", 2), ("llama3", 3), ("llama4", 4)], indirect=["named"])
def test_through_gguf_metadata(named: Tokenizer, generation: int, tokenizer_data: Path) -> None:
    again = tokenizer_from_gguf(tokenizer_to_gguf(named))
    check_vectors(again, vectors(tokenizer_data, generation))
    assert again.vocabulary.pieces == named.vocabulary.pieces
    assert again.vocabulary.types == named.vocabulary.types
    assert again.special_tokens == named.special_tokens
    for name in ("bos_id", "eos_id", "eos_ids", "pad_id", "unk_id", "add_bos"):
        assert getattr(again, name) == getattr(named, name)


@pytest.mark.parametrize(("named", "generation"), [("llama2", 2), ("llama3_json", 3)], indirect=["named"])
def test_through_meta_and_hugging_face_files(
    named: Tokenizer, generation: int, tokenizer_data: Path, tmp_path: Path
) -> None:
    """model -> tokenizer.json -> model -> the original bytes' meaning."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(named.to_tokenizer_json()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named.to_tokenizer_config()))
    from_json = load_tokenizer(tmp_path)
    check_vectors(from_json, vectors(tokenizer_data, generation))
    assert from_json.special_tokens == named.special_tokens
    assert (from_json.bos_id, from_json.eos_id, from_json.add_bos) == (named.bos_id, named.eos_id, named.add_bos)
    model = from_json.to_tokenizer_model()
    assert model is not None
    (tmp_path / "tokenizer.model").write_bytes(model)
    check_vectors(load_tokenizer(tmp_path / "tokenizer.model"), vectors(tokenizer_data, generation))


def test_tiktoken_ranks_are_written_back_byte_for_byte(llama3: Tokenizer, tokenizer_data: Path) -> None:
    written = llama3.to_tokenizer_model()
    assert written is not None
    assert written.split() == (tokenizer_data / "llama3.tokenizer.model").read_bytes().split()


def test_small_vocabularies_load(tokenizer_data: Path) -> None:
    small = load_tokenizer(tokenizer_data / "tiktoken_small.model")
    assert (small.vocab_size, small.bos_id) == (2256, 2000)
    assert small.decode(small.encode("Hello, wörld! 🦙")).decode() == "Hello, wörld! 🦙"
    unigram = load_tokenizer(tokenizer_data / "sentencepiece.model")
    assert (unigram.vocab_size, unigram.bos_id, unigram.eos_id, unigram.pad_id, unigram.unk_id) == (
        32000,
        None,
        1,
        0,
        2,
    )


def test_smollm2_ids_from_llama_cpp(smollm2: Tokenizer) -> None:
    """The expectation is llama.cpp's tokenization of the same file."""
    assert smollm2.encode("<|im_start|>user hi 123", parse_special=True) == [1, 4093, 15876, 216, 33, 34, 35]
    assert smollm2.encode("<|im_start|>") == [44, 108, 306, 79, 3738, 108, 46]
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id, smollm2.add_bos) == (49152, 1, 2, False)
