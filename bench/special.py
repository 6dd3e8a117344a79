"""What is not a speed beside llama.cpp's: start-up and its memory, a stolen core, Python's share of a step."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from compileall import compile_dir
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import puna
from bench.models import costs, model_path
from puna.cli.compare import Work, run_puna
from puna.cli.llama_cpp import find_program
from puna.errors import PunaError

START_CONTEXT = 512
STEPS_AT_ONCE = 10


@dataclass(frozen=True)
class Finding:
    """A number and its bar: at least ``bar``, or at most it where ``at_most``."""

    title: str
    value: float
    bar: float
    at_most: bool
    details: dict[str, float]

    @property
    def met(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def start(folder: Path, threads: int, rounds: int) -> list[Finding]:
    """From the command to the first token and out again, the files in the page cache; and the most memory it took.

    Puna starts from the weights, and from a packed file, as every start behind ``puna pack`` does.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        return _start(model_path("llama-1b.Q4_0", folder), Path(scratch) / "packed", threads, rounds)


def _start(path: Path, packed: Path, threads: int, rounds: int) -> list[Finding]:
    compile_dir(Path(puna.__file__).parent, quiet=2)  # as installing does; a checkout may have it forbidden
    _read_through(path)
    subprocess.run(
        [sys.executable, "-m", "puna", "pack", str(path), "--out", str(packed)], check=True, capture_output=True
    )
    _read_through(packed)
    common = ["-m", str(path), "-p", "Hello", "-n", "1", "-t", str(threads), "-c", str(START_CONTEXT), "--temp", "0"]
    peer = [str(find_program("llama-completion")), *common, "-no-cnv", "--no-warmup"]
    run = [sys.executable, "-m", "puna", "run", str(path), "Hello", "--raw", "--num-predict", "1", "--temperature", "0"]
    run += ["--context-length", str(START_CONTEXT), "--threads", str(threads)]
    commands = {
        "puna": [*run, "--no-packed"],
        "puna, packed": [*run, "--packed", str(packed)],
        "llama.cpp, repack on": [*peer, "--repack"],
        "llama.cpp, repack off": [*peer, "--no-repack"],
    }
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            runs[name].append(_seconds_and_rss(command))
    seconds = {name: statistics.median(time for time, _ in each) for name, each in runs.items()}
    memory = {name: statistics.median(rss for _, rss in each) for name, each in runs.items()}
    fastest = min(value for name, value in seconds.items() if name.startswith("llama.cpp"))
    model = costs(path)
    allowed = 1.1 * model.file_bytes + model.kv_bytes_per_token * START_CONTEXT
    return [
        Finding("start: llama.cpp's seconds ÷ puna's", fastest / seconds["puna"], 1.3, False, seconds),
        Finding("start, packed: llama.cpp's ÷ puna's", fastest / seconds["puna, packed"], 1.3, False, seconds),
        Finding("start: puna's peak RSS ÷ (1.1 × file + KV)", memory["puna"] / allowed, 1.0, True, memory),
    ]


def stolen_core(folder: Path, threads: int, rounds: int) -> list[Finding]:
    """Decode speed while another process computes on one of the cores, as a share of the quiet speed."""
    if not hasattr(os, "sched_getaffinity"):
        raise PunaError("a competing process cannot be tied to one core on this system")
    findings = []
    for name in ("smollm2.Q8_0", "llama-1b.Q4_0"):
        work = Work(model_path(name, folder), 0, 64, 0, 1, threads)
        quiet, loaded = [], []
        for _ in range(rounds):
            quiet.append(run_puna(work)["decode_tokens_per_second"])
            with _competitor():
                loaded.append(run_puna(work)["decode_tokens_per_second"])
        details = {"quiet": statistics.median(quiet), "one core loaded": statistics.median(loaded)}
        share = details["one core loaded"] / details["quiet"]
        findings.append(Finding(f"{name} decode with one core loaded ÷ quiet", share, 0.45, False, details))
    return findings


def python_overhead(folder: Path, threads: int, rounds: int) -> list[Finding]:
    """The share of a SmolLM2 decode step that is spent outside native calls."""
    from puna.engine import Request, SamplingParams
    from puna.llm import LLM

    findings = []
    llm: Any = LLM.load(model_path("smollm2.Q8_0", folder), context_length=8192, threads=threads)
    for sequences in (1, 32):
        params = SamplingParams(temperature=0)
        streams = [
            llm.engine.submit(Request([number + 1], params, cache_salt=f"{sequences} {number}"))
            for number in range(sequences)
        ]
        _seconds(llm.engine.step, 20)
        timed = _Timed(llm.model.ops._native)
        llm.model.ops._native = timed
        chunks = [timed.split(llm.engine.step, STEPS_AT_ONCE) for _ in range(10 * rounds)]
        llm.model.ops._native = timed.native
        for stream in streams:
            llm.engine.cancel(stream.id)
        step = statistics.median(whole for whole, _ in chunks) / STEPS_AT_ONCE
        outside = statistics.median(outside for _, outside in chunks) / STEPS_AT_ONCE
        details = {"milliseconds a step": 1e3 * step, "of it outside": 1e3 * outside}
        findings.append(Finding(f"Python's share of a step of {sequences}", outside / step, 0.03, True, details))
    return findings


SPECIAL: dict[str, Callable[[Path, int, int], list[Finding]]] = {
    "start": start,
    "stolen-core": stolen_core,
    "python": python_overhead,
}


class _Timed:
    """Stands in for the native object and adds up the time spent in its methods."""

    def __init__(self, native: Any) -> None:
        self.native = native
        self._inside = 0.0
        self._calls = 0
        self._own_cost = 0.0
        plain = _seconds(_nothing, 100_000)
        self._own_cost = (self.split(self._wrapped(_nothing), 100_000)[1] - plain) / 100_000

    def split(self, step: Callable[[], Any], count: int) -> tuple[float, float]:
        """Seconds of so many steps, and those of them outside the native object; less what the timing itself takes."""
        self._inside, self._calls = 0.0, 0
        whole = _seconds(step, count)
        own = self._calls * self._own_cost
        return whole - own, whole - own - self._inside

    def __getattr__(self, name: str) -> Any:
        method = self._wrapped(getattr(self.native, name))
        setattr(self, name, method)
        return method

    def _wrapped(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = method(*arguments, **named)
            self._inside += time.perf_counter() - started
            self._calls += 1
            return result

        return call


def _nothing() -> None:
    pass


def _seconds(step: Callable[[], Any], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - started


def _read_through(path: Path) -> None:
    data = np.memmap(path, np.uint8, "r")
    data[::4096].max()


def _seconds_and_rss(command: list[str]) -> tuple[float, int]:
    """Wall time of a command, and its peak resident memory in bytes. Raises PunaError."""
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise PunaError(f"{' '.join(command)} failed: {errors.read().decode(errors='replace').strip()[-300:]}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def _competitor() -> Iterator[None]:
    """A process that computes on one core."""
    core = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()
