"""What callers rely on: control tokens, spaces, bytes, ids."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from puna.errors import TokenizerError
from puna.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

ALL = ["llama2", "llama3", "llama3_json", "llama4", "smollm2", "stories"]


@pytest.mark.parametrize("named", ALL, indirect=True)
def test_no_text_becomes_a_control_token(named: Tokenizer) -> None:
    """A user who types <|eot_id|> must not end the turn: neither alone, nor glued, nor all at once."""
    controls = set(named.special_tokens.values())
    for text in [*named.special_tokens, "".join(named.special_tokens), " ".join(named.special_tokens)]:
        ids = named.encode(text)
        assert not controls & set(ids)
        assert named.decode(ids).decode() == text


@pytest.mark.parametrize("named", ALL, indirect=True)
def test_every_control_token_is_parsed_when_asked(named: Tokenizer) -> None:
    for piece, token in named.special_tokens.items():
        assert named.encode(piece, parse_special=True) == [token]
        assert named.token_bytes(token).decode() == named.id_to_token(token) == piece
        assert named.token_to_id(piece) == token
        assert named.is_special(token)
    joined = "".join(named.special_tokens)
    assert named.encode(joined, parse_special=True) == list(named.special_tokens.values())


@pytest.mark.parametrize("named", ALL, indirect=True)
def test_text_around_control_tokens_survives(named: Tokenizer) -> None:
    mark = named.id_to_token(named.eos_id)
    text = f"Hello{mark} wörld {mark}{mark}the end"
    ids = named.encode(text, parse_special=True)
    assert ids.count(named.eos_id) == 3
    if not named.vocabulary.remove_extra_whitespaces:
        assert named.decode(ids).decode() == text
        assert named.decode(ids, skip_special=True).decode() == text.replace(mark, "")


def test_control_tokens_of_the_releases(llama3: Tokenizer, llama3_json: Tokenizer, llama4: Tokenizer) -> None:
    """Ids from Meta's prompt format documents and tokenizer sources."""
    known = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eot_id|>": 128009,
    }
    for tokenizer in (llama3, llama3_json):
        assert {name: tokenizer.token_to_id(name) for name in known} == known
        assert len(tokenizer.special_tokens) == 256
    assert llama3.token_to_id("<|eom_id|>") == 128008
    assert llama3.token_to_id("<|python_tag|>") == 128010
    assert llama3.token_to_id("<|reserved_special_token_245|>") == 128255
    assert llama3.eos_ids == {128001, 128008, 128009}
    known = {
        "<|begin_of_text|>": 200000,
        "<|fim_suffix|>": 200004,
        "<|header_start|>": 200005,
        "<|header_end|>": 200006,
        "<|eom|>": 200007,
        "<|eot|>": 200008,
        "<|python_start|>": 200016,
        "<|python_end|>": 200017,
        "<|finetune_right_pad|>": 200018,
        "<|text_post_train_reserved_special_token_68|>": 200079,
        "<|image_start|>": 200080,
        "<|image|>": 200090,
        "<|patch|>": 200092,
        "<|vision_reserved_special_token_1047|>": 201133,
        "<|reasoning_thinking_end|>": 201143,
    }
    assert {name: llama4.token_to_id(name) for name in known} == known
    assert (llama4.vocab_size, len(llama4.special_tokens)) == (202048, 2048)


def test_space_prefix_follows_every_control_token(llama2: Tokenizer) -> None:
    """SentencePiece puts a space before every text it is given, and Meta encodes each turn on its own after BOS."""
    inst, hello = 518, 15043  # "▁[" and "▁Hello"
    assert llama2.encode("[INST]", add_bos=True)[:2] == [1, inst]
    assert llama2.encode("<s>[INST]", parse_special=True)[:2] == [1, inst]
    assert llama2.encode("Hello</s><s>Hello", parse_special=True) == [hello, 2, 1, hello]
    assert llama2.encode("Hello<s> Hello", parse_special=True) == [hello, 1, 29871, hello]


def test_one_artificial_space_is_taken_off(llama2: Tokenizer) -> None:
    hello, world = 15043, 3186
    assert llama2.decode([hello, world]) == b"Hello world"
    assert llama2.token_bytes(hello) == b" Hello"
    assert llama2.decode([1, hello, world], skip_special=True) == b"Hello world"
    assert llama2.decode([1, hello, world]) == b"<s>Hello world"
    assert llama2.decode([29871, hello]) == b" Hello"
    assert llama2.decode([world, hello]) == b"world Hello"


def test_byte_tokens_and_partial_characters(llama2: Tokenizer, llama3: Tokenizer) -> None:
    ids = llama2.encode("🦙")
    assert [llama2.id_to_token(token) for token in ids] == ["▁", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]
    assert llama2.decode(ids[:3]) == b"\xf0\x9f"
    assert llama2.decode(ids).decode() == "🦙"
    whole = llama3.encode(" 🦙")
    assert len(whole) > 1
    assert b"".join(llama3.token_bytes(token) for token in whole) == " 🦙".encode()
    assert not llama2.is_special(ids[1])


def test_surrogates_become_characters(llama3: Tokenizer) -> None:
    assert llama3.encode("a\ud83e\udd99") == llama3.encode("a🦙")
    assert llama3.encode("a\ud83e b") == llama3.encode("a\ufffd b")


@pytest.mark.parametrize("token", [-1, 32000, 2**40])
def test_ids_outside_the_vocabulary(token: int, llama2: Tokenizer) -> None:
    for call in (llama2.token_bytes, llama2.id_to_token, lambda one: llama2.decode([15043, one])):
        with pytest.raises(TokenizerError, match="outside the vocabulary of 32000"):
            call(token)
    assert llama2.token_to_id("no such piece") is None
    assert not llama2.is_special(token)


def test_bos_must_exist(tokenizer_data: Path) -> None:
    unigram = load_tokenizer(tokenizer_data / "sentencepiece.model")
    with pytest.raises(TokenizerError, match="beginning-of-sequence"):
        unigram.encode("x", add_bos=True)


def test_a_folder_prefers_tokenizer_json(llama2: Tokenizer, tokenizer_data: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_data / "llama2.tokenizer.model").read_bytes())
    assert load_tokenizer(tmp_path).vocab_size == 32000
    document: dict[str, Any] = llama2.to_tokenizer_json()
    document["added_tokens"].append({"id": 32000, "content": "<pad>", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert load_tokenizer(tmp_path).vocab_size == 32001


def test_gguf_defaults_follow_llama_cpp() -> None:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *byte_tokens, "▁", "a", "▁a"],
        "tokenizer.ggml.scores": [0.0] * 259 + [-3.0, -2.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 3,
    }
    tokenizer = tokenizer_from_gguf(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.add_bos) == (1, 2, 0, True)
    assert tokenizer.encode("a a") == [261, 261]
    assert tokenizer_from_gguf(metadata | {"tokenizer.ggml.add_space_prefix": False}).encode("a a") == [260, 261]


def test_chosen_segments_equal_parsed_text(llama2: Tokenizer, llama3: Tokenizer) -> None:
    """A user's text that spells a control token stays text; only the tokens chosen by id are control."""
    for tokenizer in (llama2, llama3):
        mark = tokenizer.id_to_token(tokenizer.eos_id)
        parts = tokenizer.encode_segments([tokenizer.bos_id, "Hello  you", tokenizer.eos_id, f"I typed {mark}"])
        text = f"{tokenizer.id_to_token(tokenizer.bos_id)}Hello  you{mark}"
        typed = tokenizer.encode(f"I typed {mark}")
        assert [token for part in parts for token in part] == tokenizer.encode(text, parse_special=True) + typed
        assert tokenizer.eos_id not in typed


@pytest.mark.parametrize("named", ALL, indirect=True)
def test_a_continuation_adds_exactly_its_text(named: Tokenizer) -> None:
    for text in (" Paris.", "Paris.", "  two", "\nline", "ünd 👍🏽", ""):
        ids = named.encode_continuation(text)
        expected = re.sub(" +", " ", text) if named.vocabulary.remove_extra_whitespaces else text
        assert b"".join(map(named.token_bytes, ids)).decode() == expected


def test_a_continuation_is_what_sentencepiece_makes_of_text_within_text(
    llama2: Tokenizer, tokenizer_data: Path
) -> None:
    """No piece of Llama 2's spans a line break, so what follows one is encoded as a continuation is."""
    sentencepiece = pytest.importorskip("sentencepiece")
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_data / "llama2.tokenizer.model"))
    for text in (" Paris.", "Paris.", "  two", "ünd 👍🏽", "word word"):
        assert llama2.encode_continuation(text) == peer.encode(f"x\n{text}")[len(peer.encode("x\n")) :]
