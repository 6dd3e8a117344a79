"""``puna merge``: what it compares with, what it refuses, and that the result is the model with its adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lora_files import write_peft_tensors
from tiny_models import random_adapter

from puna.checkpoint import open_checkpoint

Run = Callable[..., Any]


def test_the_report_compares_with_base_and_adapter(puna: Run, stories: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.gguf"
    done = puna("merge", str(stories), str(adapter), str(out))
    assert (done.code, f"against {stories} with tales: KL 0.00" in done.err) == (0, True)
    report = json.loads((tmp_path / "merged.gguf.report.json").read_text())
    bare = puna("compare", str(stories), str(out), "--windows", "1", "--json").json
    assert report["kl"]["mean"] < 0.002 < 0.01 < bare["kl"]["mean"]
    assert report["source_identity"] != bare["source_identity"]
    assert report["layer_errors"] == []
    assert "wrote" in puna("merge", str(stories), str(adapter), str(out), "--force", "--no-report").err
    assert {path.name for path in tmp_path.iterdir()} == {"tales", "merged.gguf"}


def test_it_says_what_base_and_adapter_say(puna: Run, stories: Path, adapter: Path, tmp_path: Path) -> None:
    assert puna("merge", str(stories), str(adapter), str(tmp_path / "merged")).code == 0
    answers = [
        puna("run", *arguments, "Once upon a time", "--temperature", "0", "--num-predict", "12", "--raw").out
        for arguments in ((str(stories), "--adapter", str(adapter)), (str(tmp_path / "merged"),), (str(stories),))
    ]
    assert answers[0] == answers[1] != answers[2]
    assert answers[0].strip()


def test_an_adapter_that_the_store_has(puna: Run, stories: Path, adapter: Path, tmp_path: Path) -> None:
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(f"FROM {stories}\nADAPTER {adapter}\n")
    assert puna("create", "teller", "-f", str(modelfile)).code == 0
    for number, given in enumerate(("tales", str(adapter))):
        done = puna("merge", "teller", given, str(tmp_path / f"{number}.gguf"), "--no-report")
        assert done.code == 0, done.err
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()
    refused = puna("merge", "teller", "songs", str(tmp_path / "2.gguf"))
    assert (refused.code, "songs does not exist" in refused.err) == (1, True)


def test_a_merge_that_drifts_is_not_kept(puna: Run, stories: Path, adapter: Path, tmp_path: Path) -> None:
    arguments = ("merge", str(stories), str(adapter), str(tmp_path / "q4.gguf"), "--type", "Q4_0")
    refused = puna(*arguments, "--max-drift", "0.001")
    assert (refused.code, "q4.gguf is too far from" in refused.err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["tales"]
    assert puna(*arguments).code == 0
    assert open_checkpoint(tmp_path / "q4.gguf").tensors["model.layers.0.mlp.up_proj.weight"].type.name == "Q4_0"


def test_dora_is_compared_with_its_sums(puna: Run, stories: Path, tmp_path: Path) -> None:
    config = open_checkpoint(stories).config
    name = "model.layers.2.self_attn.o_proj"
    change = random_adapter(config, 4, size=0.05).changes[f"{name}.weight"]
    tensors = {
        f"base_model.model.{name}.lora_A.weight": change.a,
        f"base_model.model.{name}.lora_B.weight": change.b,
        f"base_model.model.{name}.lora_magnitude_vector": np.full(len(change.b), 2, np.float32),
    }
    folder = write_peft_tensors(tmp_path / "a", tensors, r=4, lora_alpha=4 * change.scale, use_dora=True)
    assert puna("merge", str(stories), str(folder), str(tmp_path / "out")).code == 0
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["kl"]["mean"] < 0.002
    assert len(report["layer_errors"]) == config.num_hidden_layers
    refused = puna("run", str(stories), "Once", "--adapter", str(folder))
    assert (refused.code, "`puna merge" in refused.err) == (1, True)


def test_an_adapter_of_another_model(puna: Run, smollm2_path: Path, adapter: Path, tmp_path: Path) -> None:
    refused = puna("merge", str(smollm2_path), str(adapter), str(tmp_path / "out.gguf"))
    assert (refused.code, "was made for another model" in refused.err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["tales"]
