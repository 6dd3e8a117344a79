"""One tiny model of each generation through every format, every pair of formats, and back: the same model comes out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import random_weights, tiny_checkpoint, tiny_config

from puna.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from puna.checkpoint.checkpoint import FORMATS
from puna.checkpoint.convert import convert
from puna.config import ModelConfig, RopeScaling
from puna.errors import ConfigError
from puna.tokenizer import load_tokenizer

LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8192)
GENERATIONS: dict[str, ModelConfig] = {
    "llama-1": tiny_config(num_key_value_heads=4, rms_norm_eps=1e-6, max_position_embeddings=2048),
    "llama-2": tiny_config(max_position_embeddings=4096),
    "code-llama": tiny_config(rope_theta=1000000.0, max_position_embeddings=16384),
    "llama-3": tiny_config(rope_theta=500000.0, max_position_embeddings=8192),
    "llama-3.1": tiny_config(rope_theta=500000.0, rope_scaling=LLAMA3, max_position_embeddings=131072),
    "llama-3.2": tiny_config(
        rope_theta=500000.0,
        rope_scaling=replace(LLAMA3, factor=32.0),
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "several ends": tiny_config(eos_token_ids=(2, 7, 9), pad_token_id=0, max_position_embeddings=4096),
    "explicit head_dim": tiny_config(head_dim=32),
    "biases": tiny_config(attention_bias=True, mlp_bias=True),
    "linear": tiny_config(rope_scaling=RopeScaling("linear", factor=4.0)),
    "yarn": tiny_config(rope_scaling=RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32)),
}
META_CANNOT = ("biases", "linear", "yarn")
PAIRS = [(first, second) for first in FORMATS for second in FORMATS]


def without_token_ids(config: ModelConfig) -> ModelConfig:
    """What Meta's format keeps: it has no place for token ids, which follow from the vocabulary size."""
    return replace(config, bos_token_id=None, eos_token_ids=(), pad_token_id=None)


def assert_same_model(found: Checkpoint, expected: Checkpoint, through_meta: bool = False) -> None:
    if through_meta:
        assert without_token_ids(found.config) == without_token_ids(expected.config)
    else:
        assert found.config == expected.config
    assert set(found.tensors) == set(expected.tensors)
    for name, weight in expected.tensors.items():
        other = found.tensors[name]
        assert (other.name, other.shape, other.type) == (name, weight.shape, weight.type)
        np.testing.assert_array_equal(other.data, weight.data, err_msg=name)


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_there_and_back(tmp_path: Path, generation: str, first: str, second: str) -> None:
    model = tiny_checkpoint(GENERATIONS[generation], weight_type="BF16")
    if generation in META_CANNOT and "meta" in (first, second):
        with pytest.raises(ConfigError, match="cannot be written to Meta's format"):
            save_checkpoint(model, tmp_path / "x", "meta")
        return
    save_checkpoint(model, tmp_path / "a", first)
    convert(tmp_path / "a", tmp_path / "b", second)
    convert(tmp_path / "b", tmp_path / "c", first)
    for place, formats in (("a", {first}), ("b", {first, second}), ("c", {first, second})):
        assert_same_model(open_checkpoint(tmp_path / place), model, "meta" in formats)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_every_float_type_survives(tmp_path: Path, name: str, kind: str) -> None:
    model = tiny_checkpoint(weight_type=kind)
    save_checkpoint(model, tmp_path / "m", name)
    assert_same_model(open_checkpoint(tmp_path / "m"), model, name == "meta")


@pytest.mark.parametrize("name", FORMATS)
def test_weight_type_gives_equal_weights_in_every_format(tmp_path: Path, name: str) -> None:
    save_checkpoint(tiny_checkpoint(), tmp_path / "m", name, "BF16")
    assert_same_model(open_checkpoint(tmp_path / "m"), tiny_checkpoint(weight_type="BF16"), name == "meta")


@pytest.mark.parametrize("name", FORMATS)
def test_reading_copies_nothing_that_it_need_not(tmp_path: Path, name: str) -> None:
    save_checkpoint(tiny_checkpoint(), tmp_path / "m", name)
    tensors = open_checkpoint(tmp_path / "m").tensors
    for key in tensors:
        if "q_proj" not in key and "k_proj" not in key:
            assert not tensors[key].data.flags.owndata
            assert not tensors[key].data.flags.writeable


@pytest.mark.parametrize("file", ["weights/stories260K/tok512.model", "tokenizers/tiktoken_small.model"])
def test_the_tokenizer_travels_along(tmp_path: Path, shared_data: Path, file: str) -> None:
    source = shared_data / file
    tokenizer = load_tokenizer(source)
    config = tiny_config(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, head_dim=8)
    model = Checkpoint(config, random_weights(config, weight_type="BF16"), read_tokenizer=lambda: tokenizer)
    save_checkpoint(model, tmp_path / "meta", "meta")
    shutil.copy(source, tmp_path / "meta" / "tokenizer.model")
    convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "x.gguf")
    convert(tmp_path / "x.gguf", tmp_path / "meta2", "meta")
    convert(tmp_path / "meta2", tmp_path / "hf2")
    texts = ["Hello world", "  it's 1234567 naïve 日本 🦙\n\n\tx", "<s><|eot_id|>", "a" * 50]
    for place in ("meta", "hf", "x.gguf", "meta2", "hf2"):
        found = open_checkpoint(tmp_path / place).tokenizer
        assert found is not None
        for text in texts:
            assert found.encode(text) == tokenizer.encode(text), place
            assert found.encode(text, parse_special=True) == tokenizer.encode(text, parse_special=True), place
        assert found.special_tokens == tokenizer.special_tokens


def test_chat_template_travels_between_the_formats_that_have_one(tmp_path: Path) -> None:
    model = tiny_checkpoint()
    model.chat_template = "{{ bos_token }}{% for m in messages %}\n{{ m['content'] }}ü{% endfor %}"
    save_checkpoint(model, tmp_path / "a.gguf", "gguf")
    convert(tmp_path / "a.gguf", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c.gguf")
    assert open_checkpoint(tmp_path / "b").chat_template == model.chat_template
    assert open_checkpoint(tmp_path / "c.gguf").chat_template == model.chat_template


@pytest.mark.parametrize("name", ["gguf", "safetensors", "meta"])
def test_real_model_through_every_format(tmp_path: Path, shared_data: Path, name: str) -> None:
    source = shared_data / "weights" / "stories260K" / "hf"
    expected = open_checkpoint(source)
    convert(source, tmp_path / "there", name)
    convert(tmp_path / "there", tmp_path / "back")
    found = open_checkpoint(tmp_path / "back")
    assert_same_model(found, expected, name == "meta")
    assert found.tokenizer is not None
    assert expected.tokenizer is not None
    text = "Once upon a time, there was a little girl."
    assert found.tokenizer.encode(text) == expected.tokenizer.encode(text)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float32"
