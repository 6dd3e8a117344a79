"""Conversion from any format to any other: inferred targets, progress, and never a half-written or lost model."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tiny_models import random_weights, tiny_checkpoint, tiny_config

from puna.checkpoint import open_checkpoint, save_checkpoint
from puna.checkpoint.convert import convert
from puna.errors import CheckpointError
from puna.tensor import Weight


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_checkpoint(tiny_checkpoint(), tmp_path / "source", "safetensors")
    return tmp_path / "source"


def assert_holds(path: Path, expected: Mapping[str, Weight]) -> None:
    tensors = open_checkpoint(path).tensors
    assert set(tensors) == set(expected)
    for name, weight in expected.items():
        np.testing.assert_array_equal(tensors[name].dequantize(), weight.dequantize())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_destination_tells_the_format(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"
    convert(tmp_path / "a.gguf", tmp_path / "b")
    assert (tmp_path / "b" / "model.safetensors").exists()
    convert(tmp_path / "b", tmp_path / "c", "meta")
    assert (tmp_path / "c" / "consolidated.00.pth").exists()
    convert(tmp_path / "c", tmp_path / "d.gguf")
    assert_holds(tmp_path / "d.gguf", random_weights(tiny_config()))
    with pytest.raises(CheckpointError, match="unknown checkpoint format 'onnx'; known: gguf, safetensors, meta"):
        convert(source, tmp_path / "e", "onnx")


def test_weight_type_reaches_the_writer(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "q.gguf", weight_type="Q8_0")
    name = "model.layers.0.mlp.up_proj.weight"
    quantized = open_checkpoint(tmp_path / "q.gguf").tensors[name]
    assert quantized.type.name == "Q8_0"
    convert(tmp_path / "q.gguf", tmp_path / "plain")
    plain = open_checkpoint(tmp_path / "plain").tensors[name]
    assert plain.type.name == "F16"
    np.testing.assert_array_equal(plain.dequantize(), quantized.dequantize().astype(np.float16))


@pytest.mark.parametrize("format_name", ["gguf", "safetensors", "meta"])
def test_progress_names_each_tensor_once(tmp_path: Path, source: Path, format_name: str) -> None:
    calls: list[tuple[str, int, int]] = []
    convert(source, tmp_path / "out", format_name, progress=lambda *call: calls.append(call))
    total = len(random_weights(tiny_config()))
    assert {name for name, _, _ in calls} == set(random_weights(tiny_config()))
    assert [done for _, done, _ in calls] == list(range(total))
    assert {count for _, _, count in calls} == {total}


@pytest.mark.parametrize("format_name", ["gguf", "safetensors", "meta"])
def test_overwrites_only_when_told(tmp_path: Path, source: Path, format_name: str) -> None:
    target = tmp_path / "target"
    save_checkpoint(tiny_checkpoint(seed=1), target, format_name)
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, target, format_name)
    assert_holds(target, random_weights(tiny_config(), seed=1))
    convert(source, target, format_name, overwrite=True)
    assert_holds(target, random_weights(tiny_config()))
    assert names(tmp_path) == {"source", "target"}


@pytest.mark.parametrize("format_name", ["gguf", "safetensors", "meta"])
def test_a_failure_keeps_the_old_and_leaves_nothing_new(tmp_path: Path, source: Path, format_name: str) -> None:
    def fail(name: str, done: int, total: int) -> None:
        if done == total - 2:
            raise KeyboardInterrupt

    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, format_name, progress=fail)
    assert names(tmp_path) == {"source"}
    save_checkpoint(tiny_checkpoint(seed=1), target, format_name)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, format_name, progress=fail, overwrite=True)
    assert names(tmp_path) == {"source", "target"}
    assert_holds(target, random_weights(tiny_config(), seed=1))


def test_an_empty_folder_is_a_fine_destination(tmp_path: Path, source: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    assert_holds(tmp_path / "empty", random_weights(tiny_config()))


def test_never_overwrites_the_source_or_what_holds_it(tmp_path: Path, source: Path) -> None:
    for target in (source, tmp_path, source / ".." / "source"):
        with pytest.raises(CheckpointError, match="holds what is being converted"):
            convert(source, target, overwrite=True)
    with pytest.raises(CheckpointError, match="holds what is being converted"):
        convert(source / "model.safetensors", source, overwrite=True)
    assert_holds(source, random_weights(tiny_config()))


def test_never_removes_a_folder_that_is_no_model(tmp_path: Path, source: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="of no model"):
        convert(source, tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "keep me"


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path / "out")
