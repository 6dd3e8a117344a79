"""The kernels on an emulated ARM, without Python: kernel_check.cpp against numpy, and against this machine's bits.

They are cross compiled and run under qemu (Debian: apt install g++-aarch64-linux-gnu qemu-user). The build stays in
build/. This machine's own kernels are tested through the extension, in tests/ops.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from kernel_reference import FLOATS, TYPES, as_bfloat16, block_of, decoded, dense, quantized, random_weight

from puna.ops.protocol import SamplingRow
from puna.ops.reference_sampling import sample_rows
from puna.tensor import QUANT_TYPES, Weight

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("neon", "portable")
LINEAR, DECODE_ROWS, RMS_NORM, ROPE, SWIGLU, ATTEND, SAMPLE, LOW_RANK, ROPE_ANGLES = range(9)  # as kOperations
ARM = [
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",  # so that the emulator needs no libraries of ARM
]


@dataclass
class Case:
    """Input as kernel_check reads it; expected results, and how far each may be off (absolutely; 0: not at all).

    ``product``: the arrays of a linear one, for other kernels to multiply.
    """

    input: bytes
    expected: np.ndarray
    tolerance: np.ndarray | float
    product: tuple[np.ndarray, Weight] | None = None


def ints(*numbers: int) -> bytes:
    return np.array(numbers, np.int32).tobytes()


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def linear_case(name: str, rows: int, x: np.ndarray, codes: tuple[int, ...] = ()) -> Case:
    x = as_bfloat16(x) if name == "BF16" else x  # some instruction sets round so
    weight = random_weight(name, rows, x.shape[1], codes=codes)
    inputs, w = x.astype(np.float64) if name in FLOATS else quantized(x), decoded(weight)
    shape = (weight.type.gguf_id, *weight.shape, len(x))
    tolerance = 2e-6 * (np.abs(inputs) @ np.abs(w).T + 1e-30)
    data = ints(LINEAR, *shape) + weight.data.tobytes() + x.tobytes()
    return Case(data, inputs @ w.T, tolerance, (x, weight))


@cache
def linear_cases(name: str) -> list[Case]:
    block = block_of(name)
    shapes = {1: [(5, 7), (48, 576)], 32: [(1, 32), (37, 96)], 256: [(1, 256), (37, 768)]}
    inputs = [
        (rows, normal(tokens, tokens, columns)) for rows, columns in shapes[block] for tokens in (*range(1, 14), 70)
    ]
    cases = [linear_case(name, rows, x) for rows, x in inputs]
    signs = np.where(normal(0, 13, 512) < 0, np.float32(-1), np.float32(1))
    extremes = [(0x00,), (0xFF,), (0x80,), (0x7F,), (0x00, 0xFF), (0x0F, 0xF0), (0x80, 0x7F)]
    return cases + [linear_case(name, 20, x, codes) for codes in extremes for x in (np.ones_like(signs), -signs)]


@cache
def bad_activations() -> list[Case]:
    """One infinite or NaN activation makes its own row NaN."""
    cases = []
    for bad in (np.nan, np.inf, -np.inf):
        x = normal(0, 5, 128)
        case = linear_case("Q4_0", 20, x)
        clean = x.copy()
        x[3, 77] = bad
        case.input = case.input[: -clean.nbytes] + x.tobytes()
        case.expected[3] = np.nan
        cases.append(case)
    return cases


@cache
def decode_cases() -> list[Case]:
    """Any bytes at all, so that scales are every kind of half; the codec's bits."""
    cases = []
    for kind in (QUANT_TYPES[name] for name in TYPES):
        data = np.random.default_rng(0).integers(0, 256, (200, kind.row_bytes(kind.block_size)), np.uint8)
        with np.errstate(all="ignore"):
            cases.append(
                Case(ints(DECODE_ROWS, kind.gguf_id, 200, kind.block_size) + data.tobytes(), kind.decode(data), 0)
            )
    return cases


@cache
def elementwise_cases() -> list[Case]:
    cases = []
    for columns in (1, 3, 4, 7, 31, 64, 2051):
        x, weight, eps = 3 * normal(columns, 4, columns), normal(1, columns), np.float32(1e-5)
        wide = x.astype(np.float64)
        norm = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * weight
        data = ints(RMS_NORM, *x.shape) + eps.tobytes() + x.tobytes() + weight.tobytes()
        cases.append(Case(data, norm, 2e-6 * np.abs(norm) + 1e-9))
        gate, up = 8 * wide.astype(np.float32), normal(2, 4, columns)
        wide = gate.astype(np.float64)
        activated = wide / (1 + np.exp(-wide)) * up
        data = ints(SWIGLU, *gate.shape) + gate.tobytes() + up.tobytes()
        cases.append(Case(data, activated, 1e-6 * np.abs(activated) + 1e-30))
    for heads, head_dim in ((1, 2), (3, 6), (2, 10), (9, 64)):
        x, angles = normal(heads, 5, heads * head_dim), 3 * normal(3, 5, head_dim // 2)
        cosines, sines = np.cos(angles), np.sin(angles)
        first, second = np.split(x.astype(np.float64).reshape(5, heads, head_dim), 2, axis=-1)
        turned = (first + 1j * second) * (cosines + 1j * sines.astype(np.float64))[:, None]
        data = ints(ROPE, 5, heads, head_dim) + x.tobytes() + cosines.tobytes() + sines.tobytes()
        cases.append(Case(data, np.concatenate([turned.real, turned.imag], axis=-1), 2e-6))
    positions = np.array([0, 1, 2, 3, 131071, 2**24 + 1, 2**31 - 1], np.int32)
    for half in (1, 5, 32):
        frequencies, scale = np.geomspace(1, 1e-4, half, dtype=np.float32), np.float32(1.25)
        angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.longdouble)
        data = ints(ROPE_ANGLES, len(positions), half) + scale.tobytes() + positions.tobytes() + frequencies.tobytes()
        cases.append(Case(data, np.stack([np.cos(angles), np.sin(angles)]).astype(np.float64) * scale, 2e-7))
    return cases


@cache
def attention_cases(kv_type: str) -> list[Case]:
    cases = []
    for heads, kv_heads, head_dim, tokens, block_size in ((3, 1, 32, 70, 16), (4, 4, 64, 23, 5), (8, 2, 96, 300, 32)):
        q, k, v = (normal(seed, tokens, n * head_dim) for seed, n in enumerate((heads, kv_heads, kv_heads)))
        shape = (QUANT_TYPES[kv_type].gguf_id, block_size, heads, kv_heads, head_dim, tokens)
        data = ints(ATTEND, *shape) + q.tobytes() + k.tobytes() + v.tobytes()
        cases.append(Case(data, dense(q, k, v, heads, kv_heads, kv_type), 1e-5))
    return cases


@cache
def sample_cases() -> list[Case]:
    cases = []
    for i, (temperature, top_k, top_p) in enumerate([(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 40, 0.9), (1.5, 0, 0.5)] * 4):
        logits, uniform = 3 * normal(i, 1, 3001), (i + 0.5) / 16
        sampled = sample_rows(logits, [SamplingRow(temperature, top_k, top_p, uniform=uniform)])[0]
        data = ints(SAMPLE, logits.size, top_k) + np.float32([temperature, top_p, uniform]).tobytes() + logits.tobytes()
        cases.append(Case(data, np.array([sampled.token, sampled.logprob]), np.array([0, 1e-5])))
    return cases


@cache
def low_rank_cases() -> list[Case]:
    cases = []
    for rows, columns, tokens, rank in ((5, 7, 1, 1), (48, 576, 9, 16), (300, 33, 70, 6)):
        down, up = normal(1, rank, columns), normal(2, rank, rows)
        x, out, scale = normal(3, tokens, columns), normal(4, tokens, rows), np.float32(0.5)
        expected, size = out.astype(np.float64), np.abs(out)
        expected[::2] += scale * (x[::2].astype(np.float64) @ down.T) @ up
        size[::2] += scale * (np.abs(x[::2]) @ np.abs(down.T)) @ np.abs(up)
        arrays = b"".join(array.tobytes() for array in (scale, down, up, x, out))
        cases.append(Case(ints(LOW_RANK, rows, columns, tokens, rank) + arrays, expected, 1e-6 * size))
    return cases


SUITES = {
    **{f"linear-{name}": partial(linear_cases, name) for name in TYPES},
    "linear-bad-activations": bad_activations,
    "decode": decode_cases,
    "elementwise": elementwise_cases,
    **{f"attention-{kv_type}": partial(attention_cases, kv_type) for kv_type in ("F32", "F16", "BF16", "Q8_0")},
    "sample": sample_cases,
    "low-rank": low_rank_cases,
}


def find_tool(name: str) -> str | None:
    """Beside this Python (the cmake of PyPI), or on the path."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


@cache
def built() -> tuple[list[str], str]:
    """The command that runs kernel_check; or an empty one and what is missing."""
    missing = [name for name in ("cmake", "make", "aarch64-linux-gnu-g++", "qemu-aarch64") if find_tool(name) is None]
    if missing:
        return [], f"{', '.join(missing)} not found"
    folder, cmake = ROOT / "build" / "kernel_check-aarch64", str(find_tool("cmake"))
    options = ["-DPUNA_KERNEL_CHECK=ON", "-DPUNA_WERROR=ON", *ARM]
    run_tool(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Unix Makefiles", *options)
    run_tool(cmake, "--build", str(folder), "-j", str(os.cpu_count() or 1))
    return [str(find_tool("qemu-aarch64")), str(folder / "kernel_check")], ""


def run_tool(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def run_suite(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[np.ndarray]]:
    """(instruction set, suite) -> one array of results a case; skips where that cannot run."""

    def run(isa: str, suite: str) -> list[np.ndarray]:
        command, missing = built()
        if missing:
            pytest.skip(missing)
        assert isa in run_tool(*command).split()
        folder = tmp_path_factory.mktemp("kernel_check")
        cases = SUITES[suite]()
        (folder / "cases").write_bytes(b"".join(case.input for case in cases))
        run_tool(*command, isa, str(folder / "cases"), str(folder / "results"))
        results = np.fromfile(folder / "results", np.float32)
        assert results.size == sum(case.expected.size for case in cases)
        return np.split(results, np.cumsum([case.expected.size for case in cases])[:-1])

    return run


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_without_python(run_suite: Callable[[str, str], list[np.ndarray]], isa: str, suite: str) -> None:
    for case, result in zip(SUITES[suite](), run_suite(isa, suite), strict=True):
        expected, tolerance = case.expected.ravel(), np.broadcast_to(case.tolerance, case.expected.shape).ravel()
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(result[~finite], expected[~finite])
        assert (np.abs(result[finite] - expected[finite]) <= tolerance[finite]).all()


@pytest.mark.parametrize("name", TYPES)
def test_arm_gives_the_bits_of_x86(run_suite: Callable[[str, str], list[np.ndarray]], name: str) -> None:
    """The same integers, and floats in the same order with fused multiply-adds."""
    native = pytest.importorskip("puna._native", reason="the native extension is not built")
    if "avx2" not in native.instruction_sets():
        pytest.skip("this machine has no AVX2")
    from puna.ops.native_ops import NativeOps

    ops = NativeOps(2, "avx2")
    for case, arm in zip(linear_cases(name), run_suite("neon", f"linear-{name}"), strict=True):
        assert case.product is not None
        x, weight = case.product
        np.testing.assert_array_equal(arm, ops.linear(x, ops.weight(weight)).ravel())
