"""``puna doctor``: is everything here that Puna needs, and does it compute the right numbers?"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import click
import psutil

import puna
from puna.cli.options import json_option
from puna.cli.progress import human_bytes
from puna.errors import PunaError


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``remedy`` is empty when all is well. ``measured`` is for scripts."""

    what: str
    found: str
    remedy: str = ""
    measured: dict[str, Any] = field(default_factory=dict)


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check the installation: the machine, the native extension, the store. Exits with 1 when something needs care."""
    checks: list[Callable[[], Finding]] = [
        _puna,
        _python,
        _processor,
        _memory,
        _native,
        _limits,
        _libraries,
        _store,
        _default_model,
    ]
    findings = [check() for check in checks]
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(f"{'!' if finding.remedy else '✓'} {finding.what:16} {finding.found}")
            if finding.remedy:
                click.echo(f"  {'':16} → {finding.remedy}")
    if any(finding.remedy for finding in findings):
        sys.exit(1)


def _puna() -> Finding:
    return Finding("puna", puna.__version__)


def _python() -> Finding:
    return Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _processor() -> Finding:
    from puna.ops.threads import default_threads

    return Finding("processor", f"{psutil.cpu_count()} logical CPUs; Puna uses {default_threads()} threads")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding("memory", f"{human_bytes(memory.available)} free of {human_bytes(memory.total)}")


def _native() -> Finding:
    """Built, and its matrix product agrees with the reference."""
    import numpy as np

    from puna.ops.reference import ReferenceOps
    from puna.tensor import Weight

    try:
        from puna.ops.native_ops import NativeOps

        native = NativeOps()
    except ImportError as error:
        found = f"do not load ({error})" if find_spec("puna._native") else "not built"
        return Finding("native ops", found, "install a C++ compiler, then reinstall puna")
    random = np.random.default_rng(0)
    weight = Weight.from_array("check", random.standard_normal((48, 64), np.float32), "Q8_0")
    x = random.standard_normal((3, 64), np.float32)
    difference = native.linear(x, native.weight(weight)) - ReferenceOps().linear(x, weight.dequantize())
    if np.abs(difference).max() > 0.5:
        return Finding(
            "native ops", f"{native.isa}: wrong results", "reinstall puna; if it stays, run with --ops reference"
        )
    return Finding("native ops", f"{native.isa}, {native.threads} threads, results agree with the reference")


def _limits() -> Finding:
    """What the kernels could reach at best; docs/performance.md says how models are held against it."""
    try:
        from puna.ops.limits import measure_limits
    except ImportError:
        return Finding("limits", "not measured without the native ops")
    limits = measure_limits()
    found = (
        f"memory {limits.read_gb_per_s:.1f} GB/s, int8 {limits.int8_gop_per_s:.0f} Gop/s, "
        f"float32 {limits.float32_gop_per_s:.0f} Gop/s"
    )
    return Finding("limits", found, measured=asdict(limits))


def _libraries() -> Finding:
    names = ("numpy", "tokenizers", "jinja2", "llguidance", "httpx")
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    remedy = f"pip install {' '.join(missing)}" if missing else ""
    return Finding("libraries", ", ".join(found), remedy)


def _store() -> Finding:
    from puna.store import Store

    store = Store()
    try:
        models = store.models()
    except PunaError as error:
        return Finding("store", str(store.home), str(error))
    place = store.home
    while not place.exists():
        place = place.parent
    free = human_bytes(shutil.disk_usage(place).free)
    return Finding(
        "store", f"{store.home}: {len(models)} models, {human_bytes(sum(m.size for m in models))}; {free} free"
    )


def _default_model() -> Finding:
    from puna.store import resolve

    try:
        resolve("smollm2")
    except PunaError:
        return Finding("default model", "smollm2 is not here yet (`puna pull smollm2` fetches it, 98 MB)")
    return Finding("default model", "smollm2 is ready")
