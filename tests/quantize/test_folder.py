"""Quantized folders that we write: what they hold, how they are read here and by the libraries of their layouts."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_checkpoint, tiny_config

from puna.checkpoint import open_checkpoint, save_checkpoint
from puna.checkpoint.safetensors import map_safetensors
from puna.cli.show import model_facts
from puna.errors import CheckpointError, RequestError
from puna.llm.memory import estimate_memory
from puna.model.shapes import parameter_count
from puna.ops.reference import ReferenceOps
from puna.quantize.calibrated import calibrated
from puna.quantize.folder import quantize_folder, quantize_to_folder
from puna.quantize.folder_settings import FolderSettings
from puna.quantize.rtn import round_to_nearest
from puna.store import ResolvedModel
from puna.tensor import Weight

WINDOWS = [np.random.default_rng(i).integers(0, 256, 48).tolist() for i in range(4)]
DOWN = "model.layers.1.mlp.down_proj.weight"

SETTINGS = {
    "int8": FolderSettings("int8"),
    "int4": FolderSettings("int4", 32),
    "int4-symmetric": FolderSettings("int4", 32, symmetric=True),
    "int4-rows": FolderSettings("int4", -1, symmetric=True),
    "int4-as-gptq": FolderSettings("int4", 64, layout="gptq"),
    "int4-as-awq": FolderSettings("int4", 32, layout="awq"),
    "nf4": FolderSettings("nf4"),
    "fp8": FolderSettings("fp8"),
    "gptq": FolderSettings("gptq", 32, layout="gptq"),
    "gptq-reordered": FolderSettings("gptq", 32, static_groups=False, zero_points="v2"),
    "gptq-v2": FolderSettings("gptq", 32, act_order=False, true_sequential=False, zero_points="v2"),
    "awq": FolderSettings("awq", 32, layout="awq"),
    "w8a8": FolderSettings("w8a8"),
}
# The largest error for the largest number of a row of normal numbers, in percent.
TOLERANCE = {"int8": 0.8, "nf4": 20.0, "fp8": 4.0}


def written(path: Path, name: str) -> Path:
    windows = WINDOWS if SETTINGS[name].method in ("gptq", "awq", "w8a8") else None
    quantize_folder(tiny_checkpoint(), path / "m", SETTINGS[name], windows)
    return path / "m"


@pytest.mark.parametrize("name", SETTINGS)
def test_opens_here(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(written(tmp_path, name))
    original = tiny_checkpoint()
    assert checkpoint.config == original.config
    assert set(checkpoint.tensors) == set(original.tensors)
    if name in TOLERANCE:
        expected = original.tensors[DOWN].dequantize()
        error = np.abs(checkpoint.tensors[DOWN].dequantize() - expected)
        assert (error <= np.abs(expected).max(axis=1, keepdims=True) * TOLERANCE[name] / 100).all()


@pytest.mark.parametrize("name", ["int4", "int4-symmetric", "int4-rows", "int4-as-gptq", "int4-as-awq"])
def test_plain_rounding_is_read_as_it_was_made(tmp_path: Path, name: str) -> None:
    settings = SETTINGS[name]
    values = tiny_checkpoint().tensors[DOWN].dequantize()
    expected = round_to_nearest(values, 4, settings.group_size, settings.symmetric)
    weight = open_checkpoint(written(tmp_path, name)).tensors[DOWN]
    assert weight.type.name == ("Q4_0" if settings.symmetric else "Q4_1")
    if settings.symmetric:
        np.testing.assert_array_equal(weight.dequantize(), expected.dequantize())
    else:
        allowed = 15 * expected.scales[:, expected.groups] * 2.0**-11
        assert (np.abs(weight.dequantize() - expected.dequantize()) <= allowed).all()


@pytest.mark.parametrize("name", ["gptq", "gptq-reordered", "gptq-v2", "awq"])
def test_calibrated_folders_hold_what_was_found(tmp_path: Path, name: str) -> None:
    checkpoint, matrices, _ = calibrated(tiny_checkpoint(), SETTINGS[name], WINDOWS)
    opened = open_checkpoint(written(tmp_path, name))
    for key, weight in checkpoint.tensors.items():
        expected = matrices[key].as_weight(key) if key in matrices else weight
        np.testing.assert_allclose(opened.tensors[key].dequantize(), expected.dequantize(), rtol=2.0**-11, atol=1e-7)


def test_the_forms_of_the_layout_gptq(tmp_path: Path) -> None:
    """Zero points as the format has them, and groups in another order only where the configuration says so."""
    for name, version, reordered, offset in (("gptq", "gptq", False, 1), ("gptq-reordered", "gptq_v2", True, 0)):
        path = written(tmp_path / name, name)
        raw = json.loads((path / "config.json").read_text())["quantization_config"]
        assert (raw["checkpoint_format"], raw["desc_act"]) == (version, reordered)
        _, matrices, _ = calibrated(tiny_checkpoint(), SETTINGS[name], WINDOWS)
        stored = map_safetensors(path / "model.safetensors")
        module = DOWN.removesuffix(".weight")
        expected = matrices[DOWN]
        words = stored[f"{module}.qzeros"].array().view(np.uint32)
        zeros = (words[..., None] >> np.arange(0, 32, 4, np.uint32) & 15).reshape(len(words), -1)
        np.testing.assert_array_equal((zeros + offset) % 16, expected.zeros.T)
        np.testing.assert_array_equal(stored[f"{module}.g_idx"].array(), expected.groups)
        assert (np.diff(expected.groups) < 0).any() == reordered
    assert open_checkpoint(path).tensors[DOWN].type.name == "Q8_0"  # a block of 32 columns has several groups


@pytest.mark.parametrize("name", SETTINGS)
def test_types_and_sizes_are_known_without_converting(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, name)
    made = {key: Weight.from_array(key, w.dequantize()).shape for key, w in open_checkpoint(path).tensors.items()}
    types = {key: weight.type for key, weight in open_checkpoint(path).tensors.items() if weight.data.size}

    def refuse(*_: object) -> None:
        raise AssertionError("a matrix was converted")

    monkeypatch.setattr("puna.tensor.groupwise.Grouped.as_weight", refuse)
    monkeypatch.setattr("puna.checkpoint.hf_quantized.layout.encode_rows", refuse)
    checkpoint = open_checkpoint(path)
    assert {key: weight.shape for key, weight in checkpoint.tensors.items()} == made
    assert {key: weight.type for key, weight in checkpoint.tensors.items()} == types
    expected = sum(kind.row_bytes(made[key][-1]) * int(np.prod(made[key][:-1])) for key, kind in types.items())
    assert estimate_memory(ReferenceOps(), ResolvedModel(path, None, path), 1).weights == expected
    with pytest.raises(AssertionError, match="converted"):
        _ = checkpoint.tensors[DOWN].data


def test_show_says_what_is_stored(tmp_path: Path) -> None:
    facts = model_facts(str(written(tmp_path, "gptq")))
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert facts["model"]["quantization"] == "GPTQ, 4 bits in groups of 32"
    assert facts["file"]["size"] == size
    assert facts["model"]["bits per weight"] == round(8 * size / facts["model"]["parameters"], 2)
    for name, title in (
        ("awq", "AWQ, 4 bits in groups of 32"),
        ("int8", "compressed-tensors pack-quantized, 8 bits"),
        ("int4", "compressed-tensors pack-quantized, 4 bits in groups of 32"),
        ("fp8", "compressed-tensors float-quantized, 8 bits"),
        ("nf4", "bitsandbytes 4 bits"),
    ):
        assert model_facts(str(written(tmp_path / name, name)))["model"]["quantization"] == title


def test_native_ops_run_it(tmp_path: Path) -> None:
    native_ops = pytest.importorskip("puna.ops.native_ops", reason="the native extension is not built")
    from puna.model.model import Model
    from puna.quantize.calibration import divergence, log_probabilities

    checkpoint = open_checkpoint(written(tmp_path, "gptq"))
    reference, native = (
        log_probabilities(Model.bind(ops, checkpoint.config, checkpoint.tensors), WINDOWS[0])
        for ops in (ReferenceOps(), native_ops.NativeOps(1))
    )
    assert divergence(reference, native) < 1e-3


# --- the libraries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4-symmetric", "int4-rows", "fp8"])
def test_transformers_opens_it_with_compressed_tensors(tmp_path: Path, name: str) -> None:
    pytest.importorskip("compressed_tensors")
    assert_same_logits(written(tmp_path, name))


def test_transformers_computes_w8a8_with_compressed_tensors(tmp_path: Path) -> None:
    """It rounds the inputs too, so predictions differ a little."""
    pytest.importorskip("compressed_tensors")
    assert_same_logits(written(tmp_path, "w8a8"), 5e-3)


def test_transformers_opens_it_with_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole_blocks = tiny_checkpoint(tiny_config(intermediate_size=128))  # all that its kernel for CPUs takes
    quantize_folder(whole_blocks, tmp_path / "m", SETTINGS["nf4"])
    assert_same_logits(tmp_path / "m", 1e-3)  # it computes in bfloat16


def test_compressed_tensors_unpacks_zero_points(tmp_path: Path) -> None:
    """By itself: its version 0.20 and transformers expect the zero points unpacked, whoever wrote them."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    torch_file = pytest.importorskip("safetensors.torch")
    stored = torch_file.load_file(written(tmp_path, "int4") / "model.safetensors")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationConfig.model_validate(raw).config_groups["group_0"]
    module = DOWN.removesuffix("weight")
    parts = {key.removeprefix(module): value for key, value in stored.items() if key.startswith(module)}
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.decompress(parts, scheme)["weight"].float().numpy()
    expected = round_to_nearest(tiny_checkpoint().tensors[DOWN].dequantize(), 4, 32, False).dequantize()
    np.testing.assert_allclose(theirs, expected, rtol=2.0**-10)  # it multiplies in float16


def assert_same_logits(path: Path, limit: float = 1e-4) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from puna.model.model import Model
    from puna.quantize.calibration import divergence, log_probabilities

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for module in (theirs.model.embed_tokens, theirs.model.norm, theirs.lm_head):
        module.float()
    with torch.no_grad():
        logits = theirs(torch.tensor([WINDOWS[0]])).logits[0].double()
    checkpoint = open_checkpoint(path)
    ours = log_probabilities(Model.bind(ReferenceOps(), checkpoint.config, checkpoint.tensors), WINDOWS[0])
    assert divergence(torch.log_softmax(logits, -1).numpy(), ours) < limit


def test_the_command(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from puna.cli.quantize import quantize

    save_checkpoint(tiny_checkpoint(), tmp_path / "source", "safetensors")
    arguments = [str(tmp_path / "source"), str(tmp_path / "m"), "--type", "INT4", "--group-size", "32", "--symmetric"]
    runner = CliRunner()
    assert runner.invoke(quantize, arguments, catch_exceptions=False).exit_code == 0
    assert open_checkpoint(tmp_path / "m").tensors[DOWN].type.name == "Q4_0"
    with pytest.raises(CheckpointError, match="exists already"):
        runner.invoke(quantize, arguments, catch_exceptions=False)
    assert "only --calibrate goes with it" in runner.invoke(quantize, [*arguments, "--fit", "1GB"]).output
    runner.invoke(quantize, [*arguments, "--layout", "gptq", "--force"], catch_exceptions=False)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["sym"], config["group_size"]) == ("gptq", True, 32)


# --- cut off and continued --------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A calibration text of WINDOWS, for models without a tokenizer."""
    monkeypatch.setattr("puna.quantize.folder.read_windows", lambda *_: WINDOWS)
    save_checkpoint(tiny_checkpoint(tiny_config(num_hidden_layers=3)), tmp_path / "source", "safetensors")
    return tmp_path / "text"


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("name", ["gptq", "gptq-reordered", "awq", "w8a8"])
def test_a_run_that_was_cut_off_is_continued_and_gives_the_same_folder(text: Path, tmp_path: Path, name: str) -> None:
    settings, out = SETTINGS[name], tmp_path / "out" / "m"

    def interrupt(what: str, done: int, total: int) -> None:
        if (done, total) == (2, 3):
            raise KeyboardInterrupt

    source = tmp_path / "source"
    quantize_to_folder(source, tmp_path / "whole", settings, text)
    with pytest.raises(KeyboardInterrupt):
        quantize_to_folder(source, out, settings, text, progress=interrupt)
    assert [path.name for path in out.parent.iterdir()] == [".m.layers"]
    made = quantize_to_folder(source, out, settings, text)
    assert made.continued == 2
    assert contents(out) == contents(tmp_path / "whole")
    assert [path.name for path in out.parent.iterdir()] == ["m"]


@pytest.mark.skipif(sys.platform == "win32", reason="fork and kill -9 are of POSIX systems")
def test_kill_9_at_a_layer(text: Path, tmp_path: Path) -> None:
    """In the middle of a layer, of a write, of a rename, of tidying up."""
    settings, source = SETTINGS["gptq"], tmp_path / "source"
    quantize_to_folder(source, tmp_path / "whole", settings, text)
    for number, event in enumerate(("os.mkdir", "os.rename", "open", "shutil.rmtree")):
        out = tmp_path / f"out{number}" / "m"
        child = os.fork()
        if child == 0:
            seen = 0

            def audit(found: str, arguments: tuple[object, ...], wanted: str = event, place: Path = out) -> None:
                nonlocal seen
                if found == wanted and str(place.parent) in str(arguments[0]):
                    seen += 1
                    if seen == 3:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(audit)
            try:
                quantize_to_folder(source, out, settings, text)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL)
        assert not out.exists() or contents(out) == contents(tmp_path / "whole")
        quantize_to_folder(source, out, settings, text, overwrite=True)
        assert contents(out) == contents(tmp_path / "whole")
        assert not list(out.parent.glob(".m.layers"))


@pytest.mark.parametrize(
    "other", [FolderSettings("gptq", 32, symmetric=True), FolderSettings("gptq", 64, layout="gptq")]
)
def test_other_settings_are_not_continued_from(text: Path, tmp_path: Path, other: FolderSettings) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_to_folder(tmp_path / "source", tmp_path / "m", SETTINGS["gptq"], text, progress=interrupt)
    assert quantize_to_folder(tmp_path / "source", tmp_path / "m", other, text).continued == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "m"}


def test_an_error_leaves_nothing(text: Path, tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise CheckpointError("drifted")

    with pytest.raises(CheckpointError, match="drifted"):
        quantize_to_folder(tmp_path / "source", tmp_path / "m", SETTINGS["awq"], text, check=refuse)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_what_is_told(text: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    made = quantize_to_folder(
        tmp_path / "source", tmp_path / "m", SETTINGS["gptq"], text, progress=lambda *said: heard.append(said)
    )
    assert [done for what, done, total in heard if total == 3] == [0, 1, 2]
    assert all(re.fullmatch(r"gptq, \d+\.\d s a layer", what) for what, done, total in heard[1:3])
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    facts = made.as_json()
    assert (facts["bytes"], facts["quantization"]) == (size, "GPTQ, 4 bits in groups of 32")
    assert facts["bits_per_weight"] == round(8 * size / parameter_count(tiny_config(num_hidden_layers=3)), 4)
    assert (facts["layers_continued"], facts["seconds"] > 0) == (0, True)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (FolderSettings("int5"), RequestError, "unknown method 'int5'; known: int8"),
        (FolderSettings("int4", layout="exl2"), RequestError, "unknown layout 'exl2'"),
        (FolderSettings("int8", symmetric=True), RequestError, "int8 is rounded without a calibration text"),
        (FolderSettings("fp8", layout="gptq"), RequestError, "fp8 has a layout of its own"),
        (FolderSettings("int4", 0), RequestError, "group size is 0"),
        (FolderSettings("int4", 32, act_order=False), RequestError, "are of GPTQ, not of int4"),
        (FolderSettings("int4", 32, zero_points="v2"), RequestError, "compressed-tensors has one form of zero points"),
        (FolderSettings("int4", 32, layout="gptq", zero_points="v3"), RequestError, "unknown zero points 'v3'"),
        (
            FolderSettings("gptq", 32, static_groups=False, layout="awq"),
            RequestError,
            "layout awq keeps groups in order",
        ),
        (FolderSettings("gptq", 32), RequestError, "gptq needs a calibration text"),
        (FolderSettings("w8a8"), RequestError, "w8a8 needs a calibration text"),
        (FolderSettings("awq", 32, symmetric=True), RequestError, "AWQ weights have zero points"),
        (
            FolderSettings("int4", 64),
            CheckpointError,
            "down_proj.weight: rows of 96 numbers are not whole groups of 64",
        ),
    ],
)
def test_refuses_what_cannot_be(tmp_path: Path, settings: FolderSettings, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_folder(tiny_checkpoint(), tmp_path / "m", settings, WINDOWS if settings.symmetric else None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["int8", "int4", "nf4", "fp8"])
def test_refuses_damaged_weights_and_leaves_nothing(tmp_path: Path, method: str) -> None:
    checkpoint = tiny_checkpoint()
    values = checkpoint.tensors[DOWN].dequantize().copy()
    values[3, 7] = np.nan
    broken = replace(checkpoint, tensors={**checkpoint.tensors, DOWN: Weight.from_array(DOWN, values)})
    with pytest.raises(CheckpointError, match=f"{DOWN}.*not"):
        quantize_folder(broken, tmp_path / "m", FolderSettings(method, 32))
    assert not list(tmp_path.iterdir())


def test_quantizes_quantized_weights_only_when_told(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tiny_config(), weight_type="Q8_0")
    with pytest.raises(CheckpointError, match=r"quantized already \(Q8_0\).*--requantize"):
        quantize_folder(checkpoint, tmp_path / "m", FolderSettings("int8"))
    quantize_folder(checkpoint, tmp_path / "m", FolderSettings("int8", requantize=True))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
