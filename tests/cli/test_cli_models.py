"""Commands that manage models: import, list, show, cp, rm, convert, and the errors users meet."""

import json
from pathlib import Path

from puna.checkpoint import open_checkpoint


def test_an_imported_model_is_listed_and_shown(stored) -> None:
    rows = stored("list", "--json").json
    assert [(row["name"], row["size"]) for row in rows] == [("smollm2:latest", 98_362_432)]
    assert "98 MB" in stored("list").out

    facts = stored("show", "smollm2", "--json").json
    assert facts["model"]["parameters"] == 134_515_008  # as published
    assert facts["model"]["context length"] == 8192
    assert facts["model"]["types"] == "Q4_1 × 210, F32 × 61, Q8_0 × 1"
    assert "<|im_start|>" in stored("show", "smollm2", "--template").out
    assert "134,515,008" in stored("show", "smollm2").out


def test_copy_then_remove_keeps_the_file_for_the_other_name(stored, home: Path) -> None:
    assert stored("cp", "smollm2", "mine:v1").code == 0
    assert "0 B freed" in stored("rm", "smollm2").out
    assert [row["name"] for row in stored("list", "--json").json] == ["mine:v1"]
    assert stored("rm", "mine:v1").code == 0
    assert not list((home / "blobs").glob("sha256-*"))
    assert "puna pull smollm2" in stored("list").err


def test_a_packed_model_says_the_same_and_is_counted(stored, home: Path) -> None:
    question = ("run", "smollm2", "What is 2+2?", "--temperature", "0", "--num-predict", "4")
    assert stored("list", "--json").json[0]["packed"] is None
    assert "None" not in stored("show", "smollm2").out
    before = stored(*question)
    assert "packed smollm2: " in stored("pack", "smollm2").out
    (file,) = (home / "packed").iterdir()
    assert stored("list", "--json").json[0]["packed"] == file.stat().st_size
    assert stored("show", "smollm2", "--json").json["file"]["packed"] == file.stat().st_size
    assert (stored(*question).out, stored(*question).err) == (before.out, before.err)
    file.write_bytes(b"rubbish")
    warned = stored(*question)
    assert (warned.code, warned.out) == (0, before.out)
    assert warned.err.startswith(f"Warning: the packed file {file} is not used: ")
    assert len(warned.err.splitlines()) == 1
    assert stored(*question, "--no-packed").err == before.err
    chosen = home / "chosen.packed"
    assert f"packed smollm2: {chosen}, " in stored("pack", "smollm2", "--out", str(chosen)).out
    assert stored(*question, "--packed", str(chosen)) == before
    assert "contradict" in stored(*question, "--packed", str(chosen), "--no-packed").err
    assert stored("rm", "smollm2").code == 0
    assert not file.exists()


def test_convert_to_safetensors_and_meta_and_back(stored, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "weights" / "stories260K" / "stories260K.gguf"
    assert stored("convert", str(source), str(tmp_path / "hf")).code == 0
    assert stored("convert", str(tmp_path / "hf"), str(tmp_path / "meta"), "--format", "meta").code == 0
    assert stored("convert", str(tmp_path / "meta"), str(tmp_path / "back.gguf"), "--type", "F32").code == 0
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "back.gguf")
    for name, weight in before.tensors.items():
        assert (weight.dequantize() == after.tensors[name].dequantize()).all(), name

    again = stored("convert", str(source), str(tmp_path / "hf"))
    assert again.code == 1
    assert "exists already" in again.err


def test_the_catalog_is_listed(puna) -> None:
    rows = {row["name"]: row for row in puna("list", "--available", "--json").json}
    assert rows["llama-3.1-8b"]["parameters"] == 8_030_261_248
    assert rows["llama-3.1-8b"]["gated"]
    assert "llama-2-70b" in puna("list", "--available").out


def test_doctor_finds_nothing_wrong(stored) -> None:
    findings = {row["what"]: row for row in stored("doctor", "--json").json}
    assert findings["default model"]["found"] == "smollm2 is ready"
    assert "agree with the reference" in findings["native ops"]["found"]
    assert stored("doctor").code == 0


def errors_are_one_sentence(result) -> None:
    assert result.code == 1
    assert result.err.startswith("Error: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err


def test_mistakes_get_one_sentence(stored, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00")
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in (
        ["run", "no-such-model", "hi"],
        ["run", "smolm2", "hi"],
        ["run", str(broken), "hi"],
        ["run", str(tmp_path / "absent.gguf"), "hi"],
        ["show", str(empty)],
        ["import", str(broken)],
        ["rm", "no-such-model"],
        ["run", "smollm2", "hi", "--format", "nonsense.json"],
        ["run", "smollm2", "hi", "--format", '{"type": "no such type"}'],
        ["run", "smollm2", "word " * 9000],
        ["convert", "smollm2", str(tmp_path / "x.gguf"), "--type", "Q9_9"],
    ):
        errors_are_one_sentence(stored(*arguments))
    assert "smollm2" in stored("run", "smolm2", "hi").err  # the near match
    assert not (tmp_path / "x.gguf").exists()


def test_no_memory_is_told_in_one_sentence(puna, monkeypatch) -> None:
    def exhausted(self) -> None:
        raise MemoryError

    monkeypatch.setattr("puna.store.Store.models", exhausted)
    errors_are_one_sentence(puna("list"))


def test_misuse_exits_with_2(puna) -> None:
    assert puna("run").code == 2
    assert puna("nonsense").code == 2
    assert "no terminal to chat on" in puna("run", "smollm2").err
    assert "0.1.0" in puna("--version").out
    assert "convert" in puna("--help").out
    assert json.loads(puna("list", "--json").out) == []


def test_create_from_a_modelfile(stored, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Modelfile cannot be read" in stored("create", "mario").err
    (tmp_path / "Modelfile").write_text("FROM smollm2\nSYSTEM You are Mario.\nPARAMETER stop a\n", encoding="utf-8")
    result = stored("create", "mario")
    assert (result.code, result.out) == (0, "")
    assert "writing manifest\nmario:latest is ready" in result.err
    shown = stored("show", "mario", "--modelfile").out
    assert shown.startswith("FROM /")
    assert "\nSYSTEM You are Mario.\nPARAMETER stop a\n" in shown
    (tmp_path / "copy").write_text(shown, encoding="utf-8")
    assert stored("create", "luigi", "--file", "copy").code == 0
    assert stored("show", "luigi", "--system").out == "You are Mario.\n"
    refused = stored("create", "mario", "--quantize", "q4_0")
    assert (refused.code, "only supported for F16 and F32 models" in refused.err) == (1, True)
    (tmp_path / "Modelfile").write_text("FROM smollm2\nSTSTEM x\n", encoding="utf-8")
    assert "line 2: unknown instruction 'STSTEM'; did you mean SYSTEM?" in stored("create", "mario").err
