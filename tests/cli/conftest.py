"""The command line in-process, on a store of its own that holds SmolLM2."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lora_files import write_peft
from tiny_models import random_adapter

from puna.checkpoint import open_checkpoint
from puna.cli.main import main


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PUNA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def puna(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command and give its exit code and what it printed."""

    def run(*arguments: str, stdin: str = "") -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = 0
        try:
            main(list(arguments))
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def stored(puna: Callable[..., Result], smollm2_path: Path) -> Callable[..., Result]:
    """The same, with SmolLM2 in the store as ``smollm2``."""
    assert puna("import", str(smollm2_path), "--name", "smollm2").code == 0
    return puna


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "weights" / "stories260K" / "stories260K.gguf"


@pytest.fixture
def adapter(stories: Path, tmp_path: Path) -> Path:
    return write_peft(tmp_path / "tales", random_adapter(open_checkpoint(stories).config, 4, size=0.02))
