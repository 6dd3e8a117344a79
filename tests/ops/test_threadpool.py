"""The thread pool, seen through the ops that run on it."""

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from puna.ops import threads
from puna.tensor import Weight

pytest.importorskip("puna._native", reason="the native extension is not built")

from puna.ops.native_ops import NativeOps

X = np.random.default_rng(0).standard_normal((40, 256), np.float32)
WEIGHT = Weight.from_array("w", np.random.default_rng(1).standard_normal((700, 256)).astype(np.float32), "Q8_0")


def product(ops: NativeOps) -> np.ndarray:
    return ops.linear(X, ops.weight(WEIGHT))


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return product(NativeOps(1))


def test_many_loops_with_more_threads_than_cores(expected: np.ndarray) -> None:
    ops = NativeOps(9)
    w = ops.weight(WEIGHT)
    for _ in range(300):
        np.testing.assert_array_equal(ops.linear(X, w), expected)


def test_calls_from_several_threads_take_turns(expected: np.ndarray) -> None:
    ops = NativeOps(3)
    w = ops.weight(WEIGHT)
    ops.linear(X, w)
    wrong = []

    def work() -> None:
        for _ in range(50):
            if not np.array_equal(ops.linear(X, w), expected):
                wrong.append(threading.get_ident())

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_threads_end_with_the_ops() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        ops = NativeOps(5)
        product(ops)
        del ops
    assert len(os.listdir("/proc/self/task")) <= before + 4  # the system may still list the last ones


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_still_computes(expected: np.ndarray) -> None:
    ops = NativeOps(3)
    w = ops.weight(WEIGHT)
    ops.linear(X, w)
    child = os.fork()
    if child == 0:
        right = np.array_equal(ops.linear(X, w), expected)
        del ops
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(ops.linear(X, w), expected)


def test_python_runs_while_the_kernels_do() -> None:
    """The GIL is released: this thread counts while another is inside one long call."""
    ops = NativeOps(1)
    w = ops.weight(Weight.from_array("w", np.ones((2048, 2048), np.float32), "F32"))
    x = np.ones((256, 2048), np.float32)
    ops.linear(x[:1], w)
    worker = threading.Thread(target=ops.linear, args=(x, w))
    count = 0
    worker.start()
    while worker.is_alive():
        count += 1
    assert count > 1000


@pytest.mark.parametrize("count", [0, -1, 100000])
def test_impossible_numbers_of_threads(count: int) -> None:
    if count == 0:
        assert NativeOps(0).threads == threads.default_threads()
    else:
        with pytest.raises(ValueError, match="threads"):
            NativeOps(count)


def period(group: str, microseconds: str) -> dict[str, str]:
    return {f"{group}/cpu.cfs_period_us": microseconds}


def machine(path: Path, siblings: list[str], files: dict[str, str]) -> None:
    for cpu, value in enumerate(siblings):
        file = path / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(value)
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
@pytest.mark.parametrize(
    ("affinity", "siblings", "files", "expected"),
    [
        ({0, 1, 2, 3}, ["0,2", "1,3", "0,2", "1,3"], {}, 2),  # two cores of two threads
        ({0, 2}, ["0,2", "1,3", "0,2", "1,3"], {}, 1),
        ({0, 1, 2, 3}, [], {}, 4),  # the kernel doesn't say
        ({0, 1, 2, 3}, [], {"cpu.max": "250000 100000\n"}, 2),
        ({0, 1, 2, 3}, [], {"cpu.max": "10000 100000\n"}, 1),
        ({0, 1, 2, 3}, [], {"cpu.max": "max 100000\n"}, 4),
        ({0, 1, 2, 3}, [], {"cpu.max": "nonsense"}, 4),
        ({0, 1, 2, 3}, [], {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({0, 1, 2, 3}, [], {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({0, 1, 2, 3}, [], {"cpu.max": "0 0"}, 4),
        # A group within limited groups: version 2, then version 1 under both of its names, then both versions.
        ({0, 1, 2, 3}, [], {"self": "0::/a/b\n", "a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ({0, 1, 2, 3}, [], {"self": "0::/a/b\n", "a/b/cpu.max": "100000 100000\n", "a/cpu.max": "300000 100000\n"}, 1),
        (
            {0, 1, 2, 3},
            [],
            {"self": "7:cpu:/a:b\n", "cpu/a:b/cpu.cfs_quota_us": "20000", **period("cpu/a:b", "10000")},
            2,
        ),
        (
            {0, 1, 2, 3},
            [],
            {
                "self": "3:cpuset:/x\n2:cpu,cpuacct:/a\n",
                "cpu,cpuacct/a/cpu.cfs_quota_us": "2",
                **period("cpu,cpuacct/a", "1"),
            },
            2,
        ),
        ({0, 1, 2, 3}, [], {"self": "1:cpu:/\n0::/a\n", "unified/a/cpu.max": "300000 100000\n"}, 3),
        # A container: the host's path, which isn't there, and the group itself as the root; a path above the namespace.
        ({0, 1, 2, 3}, [], {"self": "0::/docker/0123\n", "cpu.max": "200000 100000\n"}, 2),
        ({0, 1, 2, 3}, [], {"self": "0::/../a\n", "a/cpu.max": "200000 100000\n"}, 2),
    ],
)
def test_default_threads(
    affinity: set[int],
    siblings: list[str],
    files: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(tmp_path, siblings, files)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr(threads, "MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(threads, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity)
    assert threads.default_threads() == expected
