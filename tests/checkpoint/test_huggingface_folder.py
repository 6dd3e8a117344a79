"""Hugging Face folders: what transformers writes opens here, what we write opens there, and broken folders say why."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VARIANTS, random_weights, tiny_checkpoint, tiny_config

from puna.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from puna.checkpoint.safetensors import INDEX_NAME, write_safetensors
from puna.errors import CheckpointError, ConfigError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
st_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder, for tests that break it."""
    save_checkpoint(tiny_checkpoint(), tmp_path / "m", "safetensors")
    return tmp_path / "m"


def edit_json(path: Path, **changes: object) -> None:
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(raw | changes))


def edit_tensors(folder: Path, edit: Any) -> None:
    tensors = st_torch.load_file(folder / "model.safetensors")
    edit(tensors)
    st_torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_sharded(folder: Path) -> dict:
    (folder / "model.safetensors").unlink()
    write_safetensors(folder, random_weights(tiny_config()), max_shard_bytes=100_000)
    return json.loads((folder / INDEX_NAME).read_text())


def assert_is_tiny(checkpoint: Checkpoint) -> None:
    weights = random_weights(tiny_config())
    assert set(checkpoint.tensors) == set(weights)
    for name, weight in weights.items():
        assert checkpoint.tensors[name].name == name
        np.testing.assert_array_equal(checkpoint.tensors[name].dequantize(), weight.dequantize())


# --- with transformers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_opens_what_transformers_saves(tmp_path: Path, name: str) -> None:
    config = VARIANTS[name]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf()))
    model.save_pretrained(tmp_path, max_shard_size="100KB" if name == "gqa" else "5GB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config
    expected = dict(model.named_parameters())
    assert set(checkpoint.tensors) == set(expected)
    for key, parameter in expected.items():
        np.testing.assert_array_equal(checkpoint.tensors[key].dequantize(), parameter.detach().numpy())


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_loads_what_we_save(tmp_path: Path, name: str) -> None:
    checkpoint = tiny_checkpoint(VARIANTS[name])
    save_checkpoint(checkpoint, tmp_path / "m", "safetensors")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())  # nothing missing, unexpected or mismatched
    for key, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), checkpoint.tensors[key].dequantize())
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(("kind", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), (None, torch.float32)])
def test_transformers_sees_the_type(tmp_path: Path, kind: str | None, dtype: object) -> None:
    save_checkpoint(tiny_checkpoint(), tmp_path / "m", "safetensors", kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert model.dtype == dtype


@pytest.mark.parametrize(
    ("file", "texts"),
    [
        ("llama2.tokenizer.model", ["Hello world", " two  spaces", "naïve 日本 🦙\n\tx", "<s>not a token</s>"]),
        ("llama3.1.tokenizer.json", ["Hello world", " two  spaces", "naïve 日本 🦙\n\tx", "it's 12345 o'clock"]),
    ],
)
def test_autotokenizer_agrees_with_ours(tmp_path: Path, shared_data: Path, file: str, texts: list[str]) -> None:
    source = tmp_path / "source"
    save_checkpoint(tiny_checkpoint(), source, "safetensors")
    tokenizers = shared_data / "tokenizers"
    shutil.copy(tokenizers / file, source / file.split(".", 1)[1].removeprefix("1."))
    if file.endswith("json"):
        for extra in tokenizers.glob("llama3.1.tokenizer_config.json"):
            shutil.copy(extra, source / "tokenizer_config.json")
    checkpoint = open_checkpoint(source)
    ours = checkpoint.tokenizer
    assert ours is not None
    save_checkpoint(checkpoint, tmp_path / "m", "safetensors")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    again = open_checkpoint(tmp_path / "m").tokenizer
    assert again is not None
    for text in texts:
        ids = ours.encode(text, parse_special=True)
        assert again.encode(text, parse_special=True) == ids
        assert theirs.encode(text, add_special_tokens=False) == ids


# --- the files of a folder --------------------------------------------------------------------------------------------


def test_real_folder(shared_data: Path) -> None:
    source = shared_data / "weights" / "stories260K" / "hf"
    checkpoint = open_checkpoint(source)
    assert checkpoint.config.num_hidden_layers == 5
    assert checkpoint.config.tie_word_embeddings
    expected = st_torch.load_file(source / "model.safetensors")
    for name, weight in checkpoint.tensors.items():
        np.testing.assert_array_equal(weight.dequantize(), expected[name].float().numpy())
    assert checkpoint.tokenizer is not None
    assert bytes(checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("Once upon a time"))) == b"Once upon a time"


def test_lone_file_beside_its_config(folder: Path) -> None:
    file = (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert_is_tiny(open_checkpoint(file))
    assert_is_tiny(open_checkpoint(folder))


def test_shards_and_one_shard_of_them(folder: Path) -> None:
    index = make_sharded(folder)
    assert_is_tiny(open_checkpoint(folder))
    assert_is_tiny(open_checkpoint(folder / next(iter(index["weight_map"].values()))))


def test_generation_config_widens_the_end_tokens(folder: Path) -> None:
    for given, expected in (([128001, 2, 128009], (2, 128001, 128009)), (7, (2, 7)), (None, (2,))):
        edit_json(folder / "generation_config.json", eos_token_id=given)
        assert open_checkpoint(folder).config.eos_token_ids == expected
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(folder).config.eos_token_ids == (2,)
    edit_json(folder / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(CheckpointError, match="eos_token_id"):
        open_checkpoint(folder)


def test_several_end_tokens_survive(tmp_path: Path) -> None:
    save_checkpoint(tiny_checkpoint(tiny_config(eos_token_ids=(2, 5, 9))), tmp_path / "m", "safetensors")
    assert open_checkpoint(tmp_path / "m").config.eos_token_ids == (2, 5, 9)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "m")
    assert generation.eos_token_id == [2, 5, 9]


def test_chat_template_from_wherever_it_is(folder: Path) -> None:
    assert open_checkpoint(folder).chat_template is None
    config = folder / "tokenizer_config.json"
    edit_json(config, chat_template="{{ plain }}")
    assert open_checkpoint(folder).chat_template == "{{ plain }}"
    edit_json(config, chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}])
    assert open_checkpoint(folder).chat_template == "D"
    edit_json(config, chat_template=[{"name": "only", "template": "O"}])
    assert open_checkpoint(folder).chat_template == "O"
    edit_json(folder / "chat_template.json", chat_template="J")
    assert open_checkpoint(folder).chat_template == "J"
    (folder / "chat_template.jinja").write_bytes("{{ ü }}\r\n".encode())
    assert open_checkpoint(folder).chat_template == "{{ ü }}\r\n"


@pytest.mark.parametrize("template", [3, [3], [{"template": "x"}], [{"name": "default", "template": 3}], {"a": "b"}])
def test_chat_template_of_the_wrong_kind(folder: Path, template: object) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(CheckpointError, match="chat_template"):
        open_checkpoint(folder)


def test_chat_template_is_written_byte_for_byte(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    checkpoint.chat_template = "{% for m in messages %}\r\n{{ m }}ü\n{% endfor %}"
    save_checkpoint(checkpoint, tmp_path / "m", "safetensors")
    assert open_checkpoint(tmp_path / "m").chat_template == checkpoint.chat_template


def test_checkpoints_of_the_bare_model_lack_the_prefix(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    model = transformers.LlamaModel(transformers.LlamaConfig(**config.to_hf()))
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(checkpoint.tensors[f"model.{name}"].dequantize(), parameter.detach().numpy())


def test_old_rotary_buffers_are_ignored(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert_is_tiny(open_checkpoint(folder))


def test_tied_head_stored_twice(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    save_checkpoint(tiny_checkpoint(config), tmp_path / "m", "safetensors")
    edit_tensors(tmp_path / "m", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert set(open_checkpoint(tmp_path / "m").tensors) == set(random_weights(config))
    edit_tensors(tmp_path / "m", lambda t: t["lm_head.weight"][200, 3].add_(1))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        open_checkpoint(tmp_path / "m")


# --- folders that are wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "..\\secret.safetensors",
        "C:x.safetensors",
        "a/b.safetensors",
    ],
)
def test_index_entries_stay_in_the_folder(folder: Path, name: str) -> None:
    index = make_sharded(folder)
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "secret.safetensors")
    index["weight_map"]["model.norm.weight"] = name
    edit_json(folder / INDEX_NAME, **index)
    with pytest.raises(CheckpointError, match="expected a file of this folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}, {"a": None}, {"a": "model.bin"}, "x"])
def test_index_of_the_wrong_kind(folder: Path, weight_map: object) -> None:
    make_sharded(folder)
    edit_json(folder / INDEX_NAME, weight_map=weight_map)
    with pytest.raises(CheckpointError, match=r"weight_map|expected a file"):
        open_checkpoint(folder)


def test_missing_shard_and_misplaced_tensor(folder: Path) -> None:
    index = make_sharded(folder)
    first, *_, last = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = first
    edit_json(folder / INDEX_NAME, **index)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing, though"):
        open_checkpoint(folder)
    (folder / last).unlink()
    with pytest.raises(CheckpointError, match=f"{last} is missing, though"):
        open_checkpoint(folder)


def test_missing_files_say_what_to_do(folder: Path) -> None:
    file = (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(file)
    with pytest.raises(CheckpointError, match=r"no weights here; expected model\.safetensors"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model.*get the model's safetensors"):
        open_checkpoint(folder)


def test_weights_without_a_config_say_so(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(folder)


def test_a_stray_config_does_not_hide_metas_files(tmp_path: Path) -> None:
    save_checkpoint(tiny_checkpoint(tiny_config(max_position_embeddings=4096)), tmp_path / "m", "meta")
    (tmp_path / "m" / "config.json").write_text("{}")
    assert_is_tiny(open_checkpoint(tmp_path / "m"))


@pytest.mark.parametrize(
    ("quantization", "named"),
    [({"quant_method": "quip", "bits": 4}, "method 'quip'"), ({"bits": 4}, "method None"), ("gptq", "an object")],
)
def test_folders_of_unknown_quantization_are_refused(folder: Path, quantization: object, named: str) -> None:
    edit_json(folder / "config.json", quantization_config=quantization)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"layers\.1\.mlp\.up_proj\.weight of shape \(96, 64\) is",
        ),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}), r"norm\.weight has shape \(65,\), .* \(64,\)"),
        (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}), "q_norm"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), r"q_proj\.bias"),
    ],
)
def test_tensors_that_contradict_the_config(folder: Path, edit: Any, message: str) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_config_that_claims_a_billion_layers_costs_nothing(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=2**31 - 1)
    with pytest.raises(CheckpointError, match="2147483647 layers"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model_type": "mamba"}', b"{}"])
def test_config_that_is_none(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises((CheckpointError, ConfigError)):
        open_checkpoint(folder)


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not Q4_K"):
        save_checkpoint(tiny_checkpoint(), tmp_path / "m", "safetensors", "Q4_K")
    assert list(tmp_path.iterdir()) == []
