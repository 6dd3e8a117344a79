"""Merging adapters: PEFT's numbers, the types that come of it, its memory, and what ``puna merge`` says of it."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import write_lora_gguf, write_peft, write_peft_tensors
from tiny_models import random_adapter, random_weights, tiny_checkpoint, tiny_config

from puna.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from puna.checkpoint.lora import read_adapter, read_mergeable_adapter
from puna.checkpoint.lora_writer import merge
from puna.errors import CheckpointError, RequestError
from puna.gguf_file import read_gguf
from puna.quantize import QuantizeSettings, Source, merge_adapter, quantize
from puna.tensor import Adapter, Weight

CONFIG = tiny_config()
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_checkpoint(tiny_checkpoint(), tmp_path / "base", "safetensors")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
        {"use_dora": True},
        {"use_dora": True, "target_modules": ["k_proj", "down_proj"], "use_rslora": True},
    ],
    ids=["plain", "patterns", "dora", "dora of some"],
)
@pytest.mark.parametrize("name", ["merged.gguf", "merged"])
def test_weights_are_those_of_peft(base: Path, tmp_path: Path, options: dict[str, Any], name: str) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    fields = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**fields))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_magnitude" in key:
                parameter.mul_(1 + torch.rand_like(parameter))
            elif ".lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    source = Source.open(base)
    merge_adapter(source, read_mergeable_adapter(tmp_path / "adapter", CONFIG), tmp_path / name, "F32")
    found = open_checkpoint(tmp_path / name)
    changed = 0
    for key, expected in model.merge_and_unload().state_dict().items():
        weight = found.tensors[key].dequantize()
        np.testing.assert_allclose(weight, expected.numpy(), rtol=1e-5, atol=1e-6, err_msg=key)
        changed += not np.array_equal(weight, source.checkpoint.tensors[key].dequantize())
    assert changed == (4 if "target_modules" in options else 14)


def test_the_same_from_a_gguf_adapter(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(CONFIG, 4, size=0.02)
    write_lora_gguf(tmp_path / "a.gguf", adapter, CONFIG, alpha=4 * next(iter(adapter.changes.values())).scale)
    for number, path in enumerate((tmp_path / "a.gguf", write_peft(tmp_path / "a", adapter))):
        merge_adapter(Source.open(base), read_adapter(path, CONFIG), tmp_path / f"{number}.gguf")
    one, other = (read_gguf(tmp_path / f"{number}.gguf") for number in (0, 1))
    for name, weight in one.tensors.items():
        np.testing.assert_allclose(weight.dequantize(), other.tensors[name].dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "becomes"), [("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"), ("Q8_0", "F16")])
def test_types_without_a_type(tmp_path: Path, kind: str, becomes: str) -> None:
    """What the adapter leaves alone stays byte for byte."""
    weights = random_weights(CONFIG, weight_type=kind)
    save_checkpoint(Checkpoint(CONFIG, weights), tmp_path / "base.gguf", "gguf")
    adapter = random_adapter(CONFIG, 2, targets=("up_proj",), size=0.02)
    merge_adapter(Source.open(tmp_path / "base.gguf"), adapter, tmp_path / "out.gguf")
    merged = open_checkpoint(tmp_path / "out.gguf").tensors
    change = adapter.changes[UP]
    expected = weights[UP].dequantize() + change.scale * change.b @ change.a
    assert merged[UP].type.name == becomes
    np.testing.assert_allclose(merged[UP].dequantize(), expected, rtol=2**-8, atol=1e-6)
    for name in set(weights) - set(adapter.changes):
        np.testing.assert_array_equal(merged[name].data, weights[name].data, err_msg=name)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_requantized_is_what_quantizing_the_sums_gives(tmp_path: Path, kind: str) -> None:
    """Not of numbers that were rounded to the base's type in between."""
    base = Checkpoint(CONFIG, random_weights(CONFIG, weight_type=kind))
    save_checkpoint(base, tmp_path / "base.gguf", "gguf")
    adapter = random_adapter(CONFIG, 4, size=0.02)
    save_checkpoint(merge(base, adapter), tmp_path / "sums.gguf", "gguf", "F32")
    merge_adapter(Source.open(tmp_path / "base.gguf"), adapter, tmp_path / "merged.gguf", "Q4_K_M")
    quantize(tmp_path / "sums.gguf", tmp_path / "expected.gguf", QuantizeSettings(mix="Q4_K_M"))
    one, other = (read_gguf(tmp_path / f"{name}.gguf").tensors for name in ("merged", "expected"))
    for name, weight in other.items():
        assert one[name].type == weight.type
        np.testing.assert_array_equal(one[name].data, weight.data, err_msg=name)


def test_onto_a_quantized_folder(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(CONFIG, 4, size=0.02)
    merge_adapter(Source.open(base), adapter, tmp_path / "out", "INT8")
    change = adapter.changes[UP]
    expected = tiny_checkpoint().tensors[UP].dequantize() + change.scale * change.b @ change.a
    found = open_checkpoint(tmp_path / "out").tensors[UP].dequantize()
    assert (np.abs(found - expected) <= 0.008 * np.abs(expected).max(axis=1, keepdims=True)).all()


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=24, hidden_size=256, intermediate_size=512, head_dim=64)
    save_checkpoint(tiny_checkpoint(config), tmp_path / "base.gguf", "gguf")
    largest, model = 512 * 256 * 4, (tmp_path / "base.gguf").stat().st_size
    source, adapter = Source.open(tmp_path / "base.gguf"), random_adapter(config, 2)
    for name in ("out.gguf", "out"):
        tracemalloc.start()
        merge_adapter(source, adapter, tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * largest < model / 10, name


def test_a_run_with_another_adapter_is_not_continued(base: Path, tmp_path: Path) -> None:

    def interrupt(name: str, done: int, total: int) -> None:
        if name.startswith("blk.1"):
            raise KeyboardInterrupt

    source, out = Source.open(base), tmp_path / "out.gguf"
    first, second = (random_adapter(CONFIG, 4, seed=seed) for seed in (1, 2))
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(source, first, out, "Q8_0", progress=interrupt)
    merge_adapter(source, second, out, "Q8_0")
    merge_adapter(source, second, tmp_path / "expected.gguf", "Q8_0")
    assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()


# --- bad input --------------------------------------------------------------------------------------------------------


def dora(folder: Path, **tensors: np.ndarray) -> Path:
    module = "base_model.model." + UP.removesuffix(".weight")
    arrays = {
        f"{module}.lora_A.weight": np.ones((3, 64), np.float32),
        f"{module}.lora_B.weight": np.ones((96, 3), np.float32),
    }
    given = {f"{module}.{name}": array for name, array in tensors.items()}
    return write_peft_tensors(folder, arrays | given, use_dora=True)


def test_dora_is_not_for_use_beside_a_model(tmp_path: Path) -> None:
    path = dora(tmp_path / "a", lora_magnitude_vector=np.ones(96, np.float32))
    with pytest.raises(CheckpointError, match=r"uses DoRA, .* `puna merge MODEL ADAPTER DESTINATION`"):
        read_adapter(path, CONFIG)
    adapter = read_mergeable_adapter(path, CONFIG)
    assert adapter.digest != Adapter(adapter.changes).digest
    rows = merge(tiny_checkpoint(), adapter).tensors[UP].dequantize()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "lacks lora_magnitude_vector, which DoRA has"),
        ({"lora_magnitude_vector": np.ones(64, np.float32)}, r"has shape \(64,\), expected \(96,\)"),
        ({"lora_magnitude_vector": np.full(96, np.nan, np.float32)}, "not finite"),
    ],
)
def test_damaged_dora(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_mergeable_adapter(dora(tmp_path / "a", **tensors), CONFIG)


@pytest.mark.parametrize(
    ("name", "type_name", "calibrate", "error", "message"),
    [
        ("out.gguf", "Q9_9", None, RequestError, "unknown quantization type 'Q9_9'"),
        ("out", "Q4_0", None, RequestError, r"must end in \.gguf"),
        ("out.gguf", "F16", Path("text"), RequestError, "leave out --calibrate"),
        ("base", None, None, CheckpointError, "exists already"),
    ],
)
def test_what_cannot_be(
    base: Path, tmp_path: Path, name: str, type_name: str, calibrate: Path, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        merge_adapter(Source.open(base), random_adapter(CONFIG, 2), tmp_path / name, type_name, calibrate=calibrate)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_sums_that_are_no_numbers_are_named_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    weights = random_weights(CONFIG)
    values = weights[UP].dequantize().copy()
    values[3, 4] = np.inf
    save_checkpoint(Checkpoint(CONFIG, weights | {UP: Weight.from_array(UP, values)}), tmp_path / "base.gguf", "gguf")
    with pytest.raises(CheckpointError, match=f"{UP} with the adapter's change holds numbers that are not finite"):
        merge_adapter(Source.open(tmp_path / "base.gguf"), random_adapter(CONFIG, 2), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_the_base_is_never_overwritten(base: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="holds what is being converted"):
        merge_adapter(Source.open(base), random_adapter(CONFIG, 2), base, overwrite=True)
    assert (base / "model.safetensors").read_bytes() == before
