"""Puna beside llama.cpp on one GGUF file: runs in turn, medians, the better of llama.cpp's settings, ratios."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from puna.cli.llama_cpp import SETTINGS, Setting, batched_decode_speed, decode_speed, find_program, prefill_speed
from puna.errors import PunaError, RequestError

PHASES = ("prefill", "decode")
CONTENDER = 0.85  # of the best speed in the first round
Speeds = dict[str, float]  # phase -> tokens/s


@dataclass(frozen=True)
class Work:
    """What is measured: a prompt from an empty context, and ``gen_tokens`` of each of ``parallel`` sequences after
    ``depth`` tokens. A count of 0 leaves that phase out."""

    model: Path
    prompt_tokens: int
    gen_tokens: int
    depth: int
    parallel: int
    threads: int


@dataclass(frozen=True)
class Comparison:
    """Median tokens/s of each phase: Puna's, and llama.cpp's in each setting. ``puna_facts``: of the last run."""

    work: Work
    runs: int
    puna: Speeds
    llama_cpp: dict[Setting, Speeds]
    puna_facts: dict[str, Any]

    def best(self, phase: str) -> float:
        """llama.cpp's better speed."""
        return max(speeds[phase] for speeds in self.llama_cpp.values())

    def ratio(self, phase: str) -> float:
        return self.puna[phase] / self.best(phase)

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **asdict(self.work),
            "model": str(self.work.model),
            "runs": self.runs,
            "puna": self.puna,
            "llama.cpp": {str(setting): speeds for setting, speeds in self.llama_cpp.items()},
            "ratio": {phase: self.ratio(phase) for phase in self.puna},
            "puna_peak_rss_bytes": self.puna_facts["peak_rss_bytes"],
        }


def compare_with_llama_cpp(
    work: Work, runs: int, environment: Mapping[str, str] | None = None, programs: Path | None = None
) -> Comparison:
    """Every program in turn, ``runs`` times, each in a process of its own, so that a drift of the machine hits all.

    After the first round, settings of llama.cpp that were far behind its best are left out.
    ``environment`` is added to Puna's (PUNA_ISA); ``programs`` is a folder with a certain build of llama.cpp.
    Raises PunaError, RequestError.
    """
    if not work.model.is_file() or work.model.suffix != ".gguf":
        raise RequestError(
            f"--compare needs a GGUF file, which llama.cpp can open too; {work.model} is none: "
            "convert it (puna convert MODEL FILE.gguf)"
        )
    name = "llama-batched-bench" if work.parallel > 1 else "llama-bench"
    needed = {"llama-bench"} if work.prompt_tokens else set()
    needed |= {name} if work.gen_tokens else set()
    found = {program: (programs / program if programs else find_program(program)) for program in sorted(needed)}
    puna_runs: list[Speeds] = []
    peer_runs: dict[Setting, list[Speeds]] = {setting: [] for setting in SETTINGS}
    facts: dict[str, Any] = {}
    for _ in range(runs):
        facts = run_puna(work, environment)
        puna_runs.append({phase: facts[f"{phase}_tokens_per_second"] for phase in _phases(work)})
        for setting in _contenders(peer_runs):
            peer_runs[setting].append(_llama_cpp_speeds(work, found, setting))
    return Comparison(
        work, runs, _medians(puna_runs), {setting: _medians(each) for setting, each in peer_runs.items()}, facts
    )


def run_puna(work: Work, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON of one ``puna bench`` in a process of its own. Raises PunaError."""
    command = [sys.executable, "-m", "puna", "bench", str(work.model), "--json", "--runs", "1"]
    for option in ("prompt_tokens", "gen_tokens", "depth", "parallel", "threads"):
        command += [f"--{option.replace('_', '-')}", str(getattr(work, option))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise PunaError(f"puna bench failed: {done.stderr.strip()[-500:]}")
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def _llama_cpp_speeds(work: Work, programs: Mapping[str, Path], setting: Setting) -> Speeds:
    speeds = {}
    if work.prompt_tokens:
        speeds["prefill"] = prefill_speed(
            programs["llama-bench"], work.model, work.prompt_tokens, work.threads, setting
        )
    if work.gen_tokens and work.parallel > 1:
        program = programs["llama-batched-bench"]
        speeds["decode"] = batched_decode_speed(
            program, work.model, work.gen_tokens, work.depth, work.parallel, work.threads, setting
        )
    elif work.gen_tokens:
        program = programs["llama-bench"]
        speeds["decode"] = decode_speed(program, work.model, work.gen_tokens, work.depth, work.threads, setting)
    return speeds


def _contenders(runs: Mapping[Setting, list[Speeds]]) -> list[Setting]:
    """The settings that may yet turn out to be the best one."""
    speeds = {setting: _medians(each) for setting, each in runs.items() if each}
    best = {
        phase: max(each[phase] for each in speeds.values())
        for phase in PHASES
        if speeds and phase in next(iter(speeds.values()))
    }
    return [s for s in runs if s not in speeds or any(speeds[s][phase] > CONTENDER * best[phase] for phase in best)]


def _phases(work: Work) -> list[str]:
    return [phase for phase, tokens in zip(PHASES, (work.prompt_tokens, work.gen_tokens), strict=True) if tokens]


def _medians(runs: list[Speeds]) -> Speeds:
    return {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}


def print_comparison(comparison: Comparison) -> None:
    work = comparison.work
    click.echo(f"{work.model.name}: {work.threads} threads, median of {comparison.runs} runs in turn, tokens/s")
    heads = {"prefill": f"prefill {work.prompt_tokens}", "decode": f"decode {work.gen_tokens}"}
    if work.depth:
        heads["decode"] += f" at {work.depth}"
    if work.parallel > 1:
        heads["decode"] += f" × {work.parallel}"
    phases = list(comparison.puna)
    click.echo(f"{'':46}" + "".join(f"{heads[phase]:>22}" for phase in phases))
    rows = {"puna": comparison.puna} | {f"llama.cpp, {setting}": each for setting, each in comparison.llama_cpp.items()}
    for name, speeds in rows.items():
        click.echo(f"{name:46}" + "".join(f"{speeds[phase]:22.1f}" for phase in phases))
    click.echo(f"{'puna ÷ the better llama.cpp':46}" + "".join(f"{comparison.ratio(phase):22.2f}" for phase in phases))
