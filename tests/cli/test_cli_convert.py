"""``puna convert --adapter``: an adapter goes from one format to the other and stays the same change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import write_peft_tensors
from tiny_models import random_adapter

from puna.checkpoint import open_checkpoint
from puna.checkpoint.lora import read_adapter, read_mergeable_adapter

Run = Callable[..., Any]


def check_same(found: Path, expected: Path, model: Path) -> None:
    """GGUF has the scale in float32."""
    a, b = (read_adapter(path, open_checkpoint(model).config).changes for path in (found, expected))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].a, b[name].a)
        np.testing.assert_array_equal(a[name].b, b[name].b)
        assert a[name].scale == pytest.approx(b[name].scale, rel=1e-7)


def test_to_gguf_and_back(puna: Run, stories: Path, adapter: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "tales.gguf", tmp_path / "again"
    assert puna("convert", str(stories), str(there), "--adapter", str(adapter)).err == f"wrote {there}\n"
    assert puna("convert", str(stories), str(back), "--adapter", str(there)).code == 0
    assert (back / "adapter_config.json").exists()
    for path in (there, back):
        check_same(path, adapter, stories)


def test_one_that_the_store_has(puna: Run, stories: Path, adapter: Path, tmp_path: Path) -> None:
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(f"FROM {stories}\nADAPTER {adapter}\n")
    assert puna("create", "teller", "-f", str(modelfile)).code == 0
    assert puna("convert", "teller", str(tmp_path / "lora.gguf"), "--adapter", "tales").code == 0
    check_same(tmp_path / "lora.gguf", adapter, stories)
    refused = puna("convert", "teller", str(tmp_path / "2.gguf"), "--adapter", "songs")
    assert (refused.code, "songs does not exist" in refused.err) == (1, True)


def test_what_is_there_is_replaced_only_when_asked(puna: Run, stories: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("lora.gguf", "lora"):
        arguments = ("convert", str(stories), str(tmp_path / name), "--adapter", str(adapter))
        assert puna(*arguments).code == 0
        refused = puna(*arguments)
        assert (refused.code, "exists already" in refused.err) == (1, True)
        assert puna(*arguments, "--force").code == 0
    onto_itself = puna("convert", str(stories), str(adapter), "--adapter", str(adapter), "--force")
    assert (onto_itself.code, "holds what is being converted" in onto_itself.err) == (1, True)
    assert {path.name for path in tmp_path.iterdir()} == {"tales", "lora.gguf", "lora"}


def test_dora_is_a_folder(puna: Run, stories: Path, tmp_path: Path) -> None:
    config = open_checkpoint(stories).config
    (name, change), *_ = random_adapter(config, 4, size=0.02).changes.items()
    module = f"base_model.model.{name.removesuffix('.weight')}"
    tensors = {
        f"{module}.lora_A.weight": change.a,
        f"{module}.lora_B.weight": change.b,
        f"{module}.lora_magnitude_vector": np.linspace(1, 2, len(change.b), dtype=np.float32),
    }
    folder = write_peft_tensors(tmp_path / "a", tensors, r=4, lora_alpha=4 * change.scale, use_dora=True)
    assert puna("convert", str(stories), str(tmp_path / "b"), "--adapter", str(folder)).code == 0
    found, expected = (read_mergeable_adapter(path, config).magnitudes for path in (tmp_path / "b", folder))
    assert list(found) == list(expected) == [name]
    np.testing.assert_array_equal(found[name], expected[name])
    refused = puna("convert", str(stories), str(tmp_path / "b.gguf"), "--adapter", str(folder))
    assert (refused.code, "GGUF holds no DoRA" in refused.err) == (1, True)
    assert not (tmp_path / "b.gguf").exists()


def test_options_that_change_numbers_are_refused(puna: Run, stories: Path, adapter: Path, tmp_path: Path) -> None:
    for option in (("--type", "F16"), ("--format", "gguf"), ("--report",), ("--html", "x.html"), ("--max-drift", "1")):
        refused = puna("convert", str(stories), str(tmp_path / "x.gguf"), "--adapter", str(adapter), *option)
        assert (refused.code, "--adapter goes with no" in refused.err) == (2, True)
