"""What a run was trained on: versions and the machine."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import puna
from puna.train.runs.record import Start

_PACKAGES = ("numpy", "torch", "tokenizers")


def now() -> str:
    """UTC in ISO 8601, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def this_start() -> Start:
    """The program as it runs now. Nothing in it names the user or the machine."""
    versions = {"puna": puna.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Start(now(), versions, f"{platform.system()} {platform.machine()}", _cpu(), os.cpu_count() or 1)


def _cpu() -> str:
    """The processor's name as it calls itself, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
