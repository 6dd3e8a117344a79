"""Every command and every example in the documentation runs, on a store that holds SmolLM2.

What speaks to a server, which pages show at the port 11434, speaks to one that serves that store at a free port.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from puna.store import Store, import_file

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))


@pytest.fixture
def environment(smollm2_path: Path, tmp_path: Path) -> dict[str, str]:
    home = tmp_path / "home"
    import_file(smollm2_path, "smollm2", store=Store(home))
    program = tmp_path / "bin" / "puna"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m puna "$@"\n')
    program.chmod(0o755)
    paths = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **paths, "PUNA_HOME": str(home)}


@pytest.fixture
def at_server(environment: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """Commands and examples as a page has them, made to speak to the server that is there for the test."""
    page: Path = request.node.callspec.params["page"]
    if ":11434" not in page.read_text(encoding="utf-8"):
        yield lambda code: code
        return
    command = [sys.executable, "-m", "puna", "serve", "--port", "0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = server.stdout.readline().rstrip().rpartition(":")[2]
        yield lambda code: code.replace(":11434", f":{port}")
        server.terminate()


def run(code: list[str] | str, environment: dict[str, str], folder: Path) -> None:
    result = subprocess.run(
        code,
        shell=isinstance(code, str),
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{code}\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=lambda p: p.name)
def test_commands_run(page: Path, environment: dict[str, str], at_server: Callable[[str], str], tmp_path: Path) -> None:
    for line in blocks(page, "bash").splitlines():
        # Fetching needs a network; `make run` does it for real, and tests/store does it against local servers.
        if line.strip() and not line.startswith(("#", "puna pull", "puna serve")):
            run(at_server(line), environment, tmp_path)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_examples_run(page: Path, environment: dict[str, str], at_server: Callable[[str], str], tmp_path: Path) -> None:
    run([sys.executable, "-c", at_server(blocks(page, "python"))], environment, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
