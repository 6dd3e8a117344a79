"""``quantize``: the bytes it writes, what it costs beside llama.cpp's, and every way it refuses or is cut off."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import random_weights, tiny_checkpoint, tiny_config

from puna.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from puna.checkpoint.convert import convert
from puna.cli.llama_cpp import find_program
from puna.cli.main import main
from puna.errors import CheckpointError, PunaError, RequestError
from puna.gguf_file import read_gguf
from puna.model.model import Model
from puna.ops.registry import make_ops
from puna.quantize import QuantizeSettings, quantize
from puna.quantize.calibration import divergence, log_probabilities, read_windows
from puna.quantize.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from puna.tensor import Weight

Q4_0 = QuantizeSettings(mix="Q4_0")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "source.gguf"
    save_checkpoint(tiny_checkpoint(), path, "gguf")
    return path


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "weights" / "stories260K" / "stories260K.gguf"


@pytest.fixture
def text(shared_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "shakespeare.txt"
    path.write_bytes((shared_data / "text" / "tinyshakespeare.txt").read_bytes()[:20_000])
    return path


def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir(exist_ok=True)
    return tmp_path / "out" / "q.gguf"


def test_every_tensor_is_what_its_encoder_gives(source: Path, tmp_path: Path) -> None:
    importance = np.linspace(0, 2, 64, dtype=np.float32)
    imatrix = tmp_path / "i.gguf"
    write_imatrix(imatrix, ImportanceMatrix({"blk.0.attn_q.weight": importance}, ("none",), 2))
    settings = QuantizeSettings(mix="Q4_K_M", imatrix=imatrix, tensor_types=["blk.1.attn_k=Q8_0"])
    result = quantize(source, out(tmp_path), settings)
    before, after = read_gguf(source), read_gguf(out(tmp_path))
    assert list(after.tensors) == list(before.tensors)
    assert after.metadata["general.file_type"] == 15
    assert after.metadata["quantize.imatrix.file"] == "i.gguf"
    assert after.metadata["quantize.imatrix.dataset"] == "none"
    assert result.size == out(tmp_path).stat().st_size
    assert after.tensors["blk.1.attn_k.weight"].type.name == "Q8_0"
    for name, weight in after.tensors.items():
        used = np.maximum(importance / importance.mean(), np.float32(1e-4)) if name == "blk.0.attn_q.weight" else None
        expected = weight.type.encode(before.tensors[name].dequantize(), used)
        np.testing.assert_array_equal(weight.data, expected.reshape(weight.data.shape), err_msg=name)
    assert result.bits_per_weight == pytest.approx(
        8 * sum(w.nbytes for w in after.tensors.values()) / sum(math.prod(w.shape) for w in after.tensors.values())
    )


def test_the_same_bytes_from_any_form_of_a_model(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "in" / "hf")
    quantize(source, out(tmp_path), Q4_0)
    quantize(tmp_path / "in" / "hf", tmp_path / "other.gguf", Q4_0, threads=1)
    one, other = read_gguf(out(tmp_path)), read_gguf(tmp_path / "other.gguf")
    for name, weight in one.tensors.items():
        np.testing.assert_array_equal(weight.data, other.tensors[name].data)


def test_a_run_that_was_cut_off_is_continued_and_gives_the_same_file(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "whole.gguf", Q4_0)
    names: list[str] = []

    def interrupt(name: str, done: int, total: int) -> None:
        names.append(name)
        if len(names) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, out(tmp_path), Q4_0, progress=interrupt)
    assert not out(tmp_path).exists()
    assert quantize(source, out(tmp_path), Q4_0).continued == 7
    assert out(tmp_path).read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert [path.name for path in out(tmp_path).parent.iterdir()] == ["q.gguf"]


def test_another_type_is_not_continued_from(source: Path, tmp_path: Path) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if name == "blk.1.ffn_up.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, out(tmp_path), Q4_0, progress=interrupt)
    assert quantize(source, out(tmp_path), QuantizeSettings(mix="Q5_0")).continued == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_named_and_nothing_is_left(tmp_path: Path, name: str, bad: float) -> None:
    config = tiny_config()
    weights = random_weights(config)
    values = weights[name].dequantize().copy()
    values.reshape(-1)[7] = bad
    weights[name] = Weight.from_array(name, values)
    save_checkpoint(Checkpoint(config, weights), tmp_path / "bad.gguf", "gguf")
    with pytest.raises(CheckpointError, match=r"bad\.gguf: tensor .* cannot become .*: a weight is infinite"):
        quantize(tmp_path / "bad.gguf", out(tmp_path), Q4_0)
    assert not list(out(tmp_path).parent.iterdir())


def test_what_is_quantized_already_is_refused_unless_asked_for(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "q8.gguf", QuantizeSettings(mix="Q8_0"))
    with pytest.raises(CheckpointError, match=r"q8\.gguf is quantized already .* as Q8_0.* --requantize"):
        quantize(tmp_path / "q8.gguf", out(tmp_path), Q4_0)
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize(tmp_path / "q8.gguf", out(tmp_path), QuantizeSettings(fit=10**9, calibrate=Path("absent")))
    assert not list(out(tmp_path).parent.iterdir())
    quantize(tmp_path / "q8.gguf", out(tmp_path), replace(Q4_0, requantize=True))
    again = tmp_path / "again.gguf"
    quantize(tmp_path / "q8.gguf", again, QuantizeSettings(mix="Q8_0"))  # nothing changes, so nothing is lost
    for name, weight in read_gguf(tmp_path / "q8.gguf").tensors.items():
        np.testing.assert_array_equal(weight.data, read_gguf(again).tensors[name].data)


def test_a_destination_is_not_replaced_by_mistake(source: Path, tmp_path: Path) -> None:
    out(tmp_path).write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"q\.gguf exists already.*--force"):
        quantize(source, out(tmp_path), Q4_0)
    assert out(tmp_path).read_bytes() == b"mine"
    quantize(source, out(tmp_path), replace(Q4_0, overwrite=True))
    assert read_gguf(out(tmp_path)).metadata["general.file_type"] == 2
    with pytest.raises(CheckpointError, match="is what is being quantized"):
        quantize(source, source, replace(Q4_0, overwrite=True))
    with pytest.raises(RequestError, match=r"must end in \.gguf"):
        quantize(source, tmp_path / "folder", Q4_0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of --type, --fit and --max-kl"),
        ({"mix": "Q4_0", "max_kl": 1.0}, "exactly one of --type, --fit and --max-kl"),
        ({"fit": 1}, "name one with --calibrate"),
        ({"mix": "Q4_0", "save_imatrix": Path("x")}, "--save-imatrix needs --calibrate"),
        ({"max_kl": 0.0, "calibrate": Path("x")}, "--max-kl must be above 0"),
        ({"mix": "Q4_0", "calibrate": Path("absent")}, "needs the model's tokenizer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(source: Path, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(PunaError, match=message):
        quantize(source, out(tmp_path), QuantizeSettings(**settings))
    assert not list(out(tmp_path).parent.iterdir())


def test_an_importance_matrix_of_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    for name, size, message in (("blk.0.attn_q.weight", 65, "made from another model"), ("x", 64, "knows no tensor")):
        write_imatrix(tmp_path / "i.dat", ImportanceMatrix({name: np.ones(size, np.float32)}, (), 1))
        with pytest.raises(CheckpointError, match=message):
            quantize(source, out(tmp_path), replace(Q4_0, imatrix=tmp_path / "i.dat"))


def test_a_mix_fits_its_size_and_more_room_means_less_divergence(stories: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for size in (250_000, 280_000, 310_000):
        path = tmp_path / f"{size}.gguf"
        result = quantize(stories, path, QuantizeSettings(fit=size, calibrate=text))
        assert path.stat().st_size <= size
        assert path.stat().st_size > 0.9 * size
        found.append(result.divergence)
    assert found == sorted(found, reverse=True)
    with pytest.raises(RequestError, match=r"cannot fit: with the smallest types its tensors take [\d,]+ bytes"):
        quantize(stories, out(tmp_path), QuantizeSettings(fit=100_000, calibrate=text))


def test_a_bound_on_the_divergence_is_kept_by_a_smaller_file(stories: Path, text: Path, tmp_path: Path) -> None:
    loose = quantize(stories, tmp_path / "a.gguf", QuantizeSettings(max_kl=0.02, calibrate=text))
    tight = quantize(stories, tmp_path / "b.gguf", QuantizeSettings(max_kl=0.005, calibrate=text))
    assert 0 < tight.divergence <= 0.005 < loose.divergence <= 0.02
    assert loose.size < tight.size
    checkpoint = open_checkpoint(stories)
    windows = read_windows(checkpoint, text)
    assert measured(tmp_path / "b.gguf", checkpoint, windows[:: len(windows) // 2][:2]) == pytest.approx(
        tight.divergence
    )
    with pytest.raises(RequestError, match="no mix diverges so little"):
        quantize(stories, out(tmp_path), QuantizeSettings(max_kl=1e-9, calibrate=text))


def measured(path: Path, reference: Checkpoint, windows: list[list[int]]) -> float:
    ops, found = make_ops(), open_checkpoint(path)
    models = [Model.bind(ops, checkpoint.config, checkpoint.tensors) for checkpoint in (reference, found)]
    return float(np.mean([divergence(*(log_probabilities(model, w) for model in models)) for w in windows]))


def test_the_command_reports_continues_and_refuses(
    stories: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imatrix = tmp_path / "i.gguf"
    options = ["--calibrate", str(text), "--save-imatrix", str(imatrix), "--keep-head", "Q8_0", "--threads", "1"]
    main(["quantize", str(stories), str(out(tmp_path)), "--type", "q4_k_m", *options])
    told = capsys.readouterr().err
    assert "Note: F16 instead of Q4_K for" in told
    assert f"wrote {out(tmp_path)}: " in told
    assert len(read_imatrix(imatrix).means) == 35
    again = ["--tensor-type", "ffn=F16", "--imatrix", str(imatrix), "--force", "--json"]
    main(["quantize", str(stories), str(out(tmp_path)), "--type", "Q4_0", *again])
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == out(tmp_path).stat().st_size
    assert {t["type"] for t in report["tensors"] if ".ffn_" in t["name"] and "norm" not in t["name"]} == {"F16"}
    with pytest.raises(SystemExit) as left:
        main(["quantize", str(stories), str(out(tmp_path)), "--type", "Q4_0"])
    assert left.value.code == 1
    assert "exists already" in capsys.readouterr().err


def test_no_further_from_the_source_than_llama_quantize_and_nearer_with_importance(
    smollm2_path: Path, shared_data: Path, tmp_path: Path
) -> None:
    """KL on held-out text: at a thousand tokens perplexity's own noise is 1 %, more than what types differ in."""
    try:
        program = find_program("llama-quantize")
    except PunaError as error:
        pytest.skip(str(error))
    source, ours, weighted, theirs = (tmp_path / f"{name}.gguf" for name in ("source", "ours", "weighted", "theirs"))
    convert(smollm2_path, source, weight_type="F16")
    text = tmp_path / "calibration.txt"
    training = (shared_data / "text" / "wikitext2_train_5k.txt").read_text(encoding="utf-8")
    text.write_text(training[:10_000], encoding="utf-8")
    quantize(source, ours, QuantizeSettings(mix="Q4_K_S"))
    quantize(source, weighted, QuantizeSettings(mix="Q4_K_S", calibrate=text))
    subprocess.run([str(program), str(source), str(theirs), "Q4_K_S"], check=True, capture_output=True)
    assert ours.stat().st_size == pytest.approx(theirs.stat().st_size, rel=1e-4)
    reference = open_checkpoint(source)
    windows = read_windows(reference, shared_data / "text" / "wikitext2-valid.txt", 2)
    found = {path: measured(path, reference, windows) for path in (ours, weighted, theirs)}
    assert found[ours] < 1.05 * found[theirs]
    assert found[weighted] < 0.9 * found[ours]
