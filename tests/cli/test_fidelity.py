"""``puna compare``, and the reports that quantize, convert, import and show make, keep and know."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_checkpoint

from puna.checkpoint import save_checkpoint

Run = Callable[..., Any]


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "weights" / "stories260K" / "stories260K.gguf"


def test_quantize_reports_by_itself(puna: Run, stories: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "q8.gguf", tmp_path / "q8.html"
    done = puna("quantize", str(stories), str(out), "--type", "Q8_0", "--json", "--html", str(page))
    report = json.loads((tmp_path / "q8.gguf.report.json").read_text())
    assert done.json["report"] == report
    assert 0 < report["kl"]["mean"] < 0.01
    assert (report["derived"]["name"], report["token_ids"], report["template"]) == ("q8.gguf", [], [])
    ElementTree.fromstring(page.read_text().removeprefix("<!DOCTYPE html>"))
    assert "against" in done.err
    assert "q8.gguf.report.json has the rest" in done.err


@pytest.mark.parametrize("method", ["INT8", "NF4"])
def test_folders_are_measured_too(puna: Run, stories: Path, tmp_path: Path, method: str) -> None:
    """Their size is that on disk, also where they are computed with in more bits."""
    out = tmp_path / "folder"
    assert puna("quantize", str(stories), str(out), "--type", method).code == 0
    report = json.loads((tmp_path / "folder.report.json").read_text())
    assert report["derived"]["bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert 0 < report["kl"]["mean"] < 0.5
    assert puna("show", str(out), "--json").json["report"] == report
    refused = puna("quantize", str(stories), str(tmp_path / "other"), "--type", method, "--max-drift", "1e-9")
    assert (refused.code, "too far from" in refused.err) == (1, True)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "folder.report.json"}


def test_no_report(puna: Run, stories: Path, tmp_path: Path) -> None:
    """And that of the file that was there before goes."""
    out, beside = tmp_path / "q8.gguf", tmp_path / "q8.gguf.report.json"
    assert puna("quantize", str(stories), str(out), "--type", "Q8_0").code == 0
    assert beside.exists()
    assert puna("quantize", str(stories), str(out), "--type", "Q8_0", "--no-report", "--force").code == 0
    assert not beside.exists()


def test_options_of_a_report_need_one(puna: Run, stories: Path, tmp_path: Path) -> None:
    for command in (("quantize", "q8.gguf", "--type", "Q8_0", "--no-report"), ("convert", "f16.gguf")):
        done = puna(command[0], str(stories), str(tmp_path / command[1]), *command[2:], "--max-drift", "1")
        assert (done.code, "add --report" in done.err) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_drift_is_refused_unless_forced(puna: Run, stories: Path, tmp_path: Path) -> None:
    arguments = ("quantize", str(stories), str(tmp_path / "q4.gguf"), "--type", "Q4_0", "--max-drift", "0.001")
    refused = puna(*arguments)
    assert refused.code == 1
    assert "q4.gguf is too far from" in refused.err
    assert "nats, more than 0.001. It was not kept; --force accepts it" in refused.err
    assert [path.name for path in tmp_path.iterdir()] == []
    forced = puna(*arguments, "--force")
    assert forced.code == 0
    assert "Warning: accepted although its predictions diverge" in forced.err
    assert (tmp_path / "q4.gguf").exists()
    # An older file of that name survives a refusal too.
    before = (tmp_path / "q4.gguf").read_bytes()
    assert puna(*arguments).code == 1
    assert (tmp_path / "q4.gguf").read_bytes() == before


def test_a_source_that_cannot_be_run_is_still_quantized(puna: Run, tmp_path: Path) -> None:
    save_checkpoint(tiny_checkpoint(), tmp_path / "bare", "safetensors")
    done = puna("quantize", str(tmp_path / "bare"), str(tmp_path / "q8.gguf"), "--type", "Q8_0")
    assert done.code == 0
    assert "no report of what" in done.err
    assert "it has no tokenizer" in done.err


@pytest.mark.parametrize(("name", "format_name"), [("folder", "safetensors"), ("file.gguf", "gguf"), ("m", "meta")])
def test_convert_reports_when_asked(puna: Run, stories: Path, tmp_path: Path, name: str, format_name: str) -> None:
    out = tmp_path / name
    beside = tmp_path / f"{name}.report.json"
    convert = ("convert", str(stories), str(out), "--format", format_name, "--type", "F16")
    assert puna(*convert).code == 0
    assert not beside.exists()
    refused = puna(*convert, "--report", "--max-drift", "0", "--force")
    assert (refused.code, "accepted although" in refused.err) == (0, True)
    again = puna(*convert, "--report", "--force")
    assert again.code == 0, again.err
    assert json.loads(beside.read_text())["kl"]["mean"] < 0.001
    assert {path.name for path in tmp_path.iterdir()} == {name, beside.name}


def test_convert_keeps_nothing_that_drifts(puna: Run, stories: Path, tmp_path: Path) -> None:
    for name in ("file.gguf", "folder"):
        refused = puna(
            "convert", str(stories), str(tmp_path / name), "--type", "F16", "--report", "--max-drift", "1e-9"
        )
        assert refused.code == 1, refused.err
        assert list(tmp_path.iterdir()) == []


def test_a_report_travels_into_the_store(puna: Run, stories: Path, tmp_path: Path) -> None:
    out = tmp_path / "q8.gguf"
    assert puna("quantize", str(stories), str(out), "--type", "Q8_0").code == 0
    assert puna("import", str(out), "--name", "small").code == 0
    facts = puna("show", "small", "--json").json
    assert facts["report"] == json.loads((tmp_path / "q8.gguf.report.json").read_text())
    shown = puna("show", "small").out
    assert f"mean {facts['report']['kl']['mean']:.5f}" in shown
    assert "q8.gguf beside its source" in shown
    assert puna("show", str(stories), "--json").json["report"] is None


def test_compare(puna: Run, stories: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    table = puna("compare", str(stories), str(stories), "--windows", "1", "--html", str(page))
    assert table.code == 0
    assert "mean 0.00000" in table.out
    assert "the same in 12 texts" in table.out
    ElementTree.fromstring(page.read_text().removeprefix("<!DOCTYPE html>"))
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a little girl who liked to play outside in the park. " * 3)
    facts = puna("compare", str(stories), str(stories), "--text", str(text), "--json").json
    assert facts["text"]["name"] == "story.txt"
    assert facts["top1_agreement"] == 1


def test_models_of_other_vocabularies(puna: Run, stories: Path, smollm2_path: Path) -> None:
    done = puna("compare", str(stories), str(smollm2_path))
    assert done.code == 1
    assert "predict different tokens and can't be compared" in done.err


def test_a_template_of_the_store_is_not_expected_in_a_file(puna: Run, stories: Path, tmp_path: Path) -> None:
    """And reports of a stored source know it by its content, as comparisons with it do."""
    assert puna("import", str(stories), "--name", "plain").code == 0
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text('FROM plain\nTEMPLATE """{% for m in messages %}<{{ m.content }}>{% endfor %}"""\n')
    assert puna("create", "dressed", "-f", str(modelfile)).code == 0
    done = puna("quantize", "dressed", str(tmp_path / "q8.gguf"), "--type", "Q8_0", "--json")
    assert (done.code, done.json["report"]["template"]) == (0, [])
    compared = puna("compare", "dressed", str(tmp_path / "q8.gguf"), "--windows", "1", "--json").json
    assert len(compared["template"]) == 3
    assert compared["source_identity"] == done.json["report"]["source_identity"]
