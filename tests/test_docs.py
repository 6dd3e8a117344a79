"""Every command and every example in the documentation runs, on a store that holds SmolLM2.

Examples that call http://127.0.0.1:11434 find a server there: one of the test's own, on a port of its own.
"""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from puna.store import Store, import_file

ROOT = Path(__file__).resolve().parent.parent
SERVER = "127.0.0.1:11434"
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
    # So that curl's exit code tells of an HTTP error.
    (tmp_path / ".curlrc").write_text("fail\nsilent\nshow-error\n")
    paths = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "CURL_HOME": str(tmp_path)}
    return {**os.environ, **paths, "PUNA_HOME": str(home)}


@pytest.fixture
def with_server(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Starts ``puna serve`` for code that calls SERVER, and gives the code that calls it where it is."""
    running: list[subprocess.Popen[bytes]] = []

    def prepared(code: str) -> str:
        if SERVER not in code:
            return code
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "puna", "serve"]
        ours = {**environment, "PUNA_HOST": address}
        running.append(subprocess.Popen(command, env=ours, cwd=tmp_path, stdin=subprocess.DEVNULL))
        while not _answers(f"http://{address}/readyz"):
            assert running[-1].poll() is None, "the server did not start"
            time.sleep(0.05)
        return code.replace(SERVER, address)

    yield prepared
    for server in running:
        server.terminate()
        server.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


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
def test_commands_run(
    page: Path, environment: dict[str, str], with_server: Callable[[str], str], tmp_path: Path
) -> None:
    for line in with_server(blocks(page, "bash")).splitlines():
        # Fetching needs a network; `make run` does it for real, and tests/store does it against local servers.
        if line.strip() and not line.startswith(("#", "puna pull", "puna serve")):
            run(line, environment, tmp_path)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_examples_run(
    page: Path, environment: dict[str, str], with_server: Callable[[str], str], tmp_path: Path
) -> None:
    run([sys.executable, "-c", with_server(blocks(page, "python"))], environment, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
