"""``puna quantize SOURCE NAME``: a quantized model straight into the store."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puna.gguf_file import read_gguf
from puna.quantize import QuantizeSettings, quantize
from puna.store import Store

Run = Callable[..., Any]


@pytest.fixture
def stories(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shared_data / "weights" / "stories260K" / "stories260K.gguf"


def test_a_stored_model_keeps_what_it_has(puna: Run, stories: Path, tmp_path: Path) -> None:
    Path("Modelfile").write_text(f"FROM {stories}\nSYSTEM Tell stories.\nPARAMETER temperature 0\n")
    assert puna("create", "teller").code == 0
    done = puna("quantize", "teller", "teller:q4", "--type", "Q4_K_M", "--html", "page.html", "--json")
    assert (done.code, "puna show teller:q4 has the rest" in done.err) == (0, True)
    quantize(stories, tmp_path / "expected.gguf", QuantizeSettings(mix="Q4_K_M"))
    manifest = Store().find("teller:q4")
    assert read_gguf(Store().path_of(manifest)).path.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert (manifest.system, dict(manifest.parameters)) == ("Tell stories.", {"temperature": 0.0})
    assert manifest.lineage is not None
    assert (manifest.lineage.parent, manifest.lineage.method) == ("teller:latest", "quantize")
    facts = puna("show", "teller:q4", "--json").json
    assert facts["report"] == done.json["report"] == manifest.report
    assert (facts["report"]["derived"]["name"], done.json["path"]) == ("teller:q4", facts["file"]["path"])
    assert sorted(os.listdir()) == ["Modelfile", "expected.gguf", "home", "page.html"]
    assert Store().verify() == []
    assert list((tmp_path / "home" / "partial").iterdir()) == []


def test_from_a_file_and_a_folder(puna: Run, stories: Path) -> None:
    for source, name in ((stories, "small"), (stories.parent / "hf", "other")):
        assert puna("quantize", str(source), name, "--type", "Q8_0", "--no-report").code == 0
        manifest = Store().find(name)
        assert (manifest.source, manifest.report, manifest.lineage) == (str(source), None, None)
    assert puna("run", "small", "Once", "--raw", "--num-predict", "3").code == 0


def test_a_name_that_is_taken_and_a_model_that_drifts(puna: Run, stories: Path) -> None:
    arguments = ("quantize", str(stories), "small", "--type", "Q4_0")
    refused = puna(*arguments, "--max-drift", "0.001")
    assert (refused.code, "small is too far from" in refused.err) == (1, True)
    assert Store().models() == []
    assert puna(*arguments).code == 0
    again = puna(*arguments)
    assert (again.code, "small:latest exists already" in again.err) == (1, True)
    assert puna("quantize", str(stories), "small", "--type", "Q8_0", "--force", "--no-report").code == 0
    assert "Q8_0" in puna("show", "small").out
    assert Store().verify() == []


def test_what_is_no_name(puna: Run, stories: Path) -> None:
    for destination, message in (("a/b", r"must end in .gguf"), ("so und so", "not a model name")):
        refused = puna("quantize", str(stories), destination, "--type", "Q4_0")
        assert (refused.code, message in refused.err) == (1, True), refused.err
    assert Store().models() == []
