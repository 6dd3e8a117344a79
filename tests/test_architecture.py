"""The layers of docs/architecture.md, read from the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import puna

PACKAGE = Path(puna.__file__).parent
LAYERS = [
    {"errors", "plots"},
    {"config"},
    {"catalog"},
    {"tensor"},
    {"gguf_file"},
    {"tokenizer"},
    {"checkpoint", "ops"},
    {"model"},
    {"engine", "chat", "store"},
    {"llm"},
    {"quantize", "evaluate", "train"},
    {"server"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
HEAVY = (
    "torch",
    "transformers",
    "httpx",
    "rich",
    "typer",
    "prompt_toolkit",
    "llguidance",
    "jinja2",
    "fastapi",
    "uvicorn",
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> list[str]:
    """Every module that a file imports, lazily or not."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layers"
            found.append(node.module or "")
            if node.module == "puna":
                found += [f"puna.{alias.name}" for alias in node.names]
    return found


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "puna" and len(parts) > 1 and parts[1] in LEVEL else None


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room in ("__init__", "__main__"):
        return  # the lazy front door
    assert room in LEVEL, f"{room} has no layer: add it to docs/architecture.md and to this test"
    for module in imports_of(path):
        target = room_of(module)
        if target is not None and target != room:
            assert LEVEL[target] < LEVEL[room], f"{path.name} ({room}) must not import {module}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_stays_out(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    if inside.match("ops/torch_*.py") or (inside.parts[0] == "train" and "data" not in inside.parts):
        return
    assert not [m for m in imports_of(path) if m.split(".")[0] == "torch"]


def test_the_model_sees_only_the_protocol_of_ops() -> None:
    for path in (PACKAGE / "model").glob("*.py"):
        for module in imports_of(path):
            assert not module.startswith("puna.ops") or module == "puna.ops.protocol", f"{path.name} imports {module}"


@pytest.mark.parametrize("module", ["puna.llm", "puna.cli.main", "puna.server.app", "puna.train.runs"])
def test_importing_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_importing_puna_is_light() -> None:
    code = f"import sys, puna; sys.exit(any(m in sys.modules for m in {HEAVY!r}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_scripts_use_needs_no_second_import() -> None:
    code = """
import puna
config = puna.catalog.get("llama-3.1-8b").config
assert puna.model.shapes.parameter_count(config) == 8_030_261_248
assert callable(puna.tokenizer.load_tokenizer) and callable(puna.LLM.load) and puna.SamplingParams(seed=1)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
