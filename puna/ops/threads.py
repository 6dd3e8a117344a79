"""How many threads to compute with."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """The physical cores of this process's CPU affinity, within its control groups' quota."""
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
        cores = len({_core(cpu) for cpu in cpus})
    else:
        import psutil

        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, cores if quota is None else min(cores, round(quota)))


def _core(cpu: int) -> str:
    """A name that logical CPUs on one core share; the CPU's own number where the kernel doesn't say."""
    try:
        return (TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _cgroup_quota() -> float | None:
    """CPUs' worth of time that the control groups allow: the least of this process's group and those around it."""
    limits = [limit for group in _cpu_groups() if (limit := _group_limit(group)) is not None]
    return min(limits, default=None)


def _cpu_groups() -> list[Path]:
    """The folders, under CGROUP, of the groups that may limit this process's CPU time (versions 2 and 1).

    Inside a container the path in /proc/self/cgroup may be the host's, and the group itself be mounted as the root: so
    the root is one of them in every case, and folders that don't exist limit nothing.
    """
    paths = {CGROUP: "", CGROUP / "cpu": ""}
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, which mixed systems mount beside version 1
            paths[CGROUP] = paths[CGROUP / "unified"] = path
        elif "cpu" in controllers.split(","):
            paths[CGROUP / "cpu"] = paths[CGROUP / controllers] = path
    groups = []
    for root, path in paths.items():
        parts = [part for part in path.split("/") if part not in ("", "..")]
        groups += [root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return groups


def _group_limit(group: Path) -> float | None:
    """CPUs' worth of time that one group allows; None where it sets no limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such group; "max"
        return None
