"""Floors, the limits they rest on, and the plot."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from bench.floors import floor
from bench.models import Costs, costs
from bench.roofline import Point, roofline
from bench.rows import ROWS, Row
from bench.synthetic_models import synthetic_model
from puna.ops.limits import Limits, measure_limits

LIMITS = Limits("avx512", 2, read_gb_per_s=10.0, int8_gop_per_s=1000.0, float32_gop_per_s=100.0)
MODEL = Costs(10**9, 10**9, 10**8, 1000, 10**9, quantized=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_limits_are_positive_and_of_the_threads(threads: int) -> None:
    limits = measure_limits(threads, "portable")
    assert (limits.threads, limits.isa) == (threads, "portable")
    assert min(limits.read_gb_per_s, limits.int8_gop_per_s, limits.float32_gop_per_s) > 0


def test_floors_by_hand() -> None:
    assert floor(Row("", "", "decode", 0), MODEL, LIMITS).tokens_per_second == pytest.approx(10)
    deep = floor(Row("", "", "decode", 0, depth=10**6), MODEL, LIMITS)  # as many bytes of cache as of weights
    assert deep.tokens_per_second == pytest.approx(5)
    assert floor(Row("", "", "prefill", 100), MODEL, LIMITS).tokens_per_second == pytest.approx(500, rel=0.01)
    floats = replace(MODEL, quantized=False, bfloat16=True)  # a bfloat16 instruction multiplies twice as many numbers
    prefills = [
        floor(Row("", "", "prefill", 10**4), floats, replace(LIMITS, isa=isa)) for isa in ("avx512", "avx512bf16")
    ]
    assert prefills[1].tokens_per_second == pytest.approx(2 * prefills[0].tokens_per_second)


def test_costs_of_a_model(tmp_path: Path) -> None:
    found = costs(synthetic_model("tiny", "F16", tmp_path))
    assert found.body_parameters == 8 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
    assert found.head_parameters == 512 * 256
    assert found.kv_bytes_per_token == 8 * 2 * 2 * 64 * 2
    assert not found.quantized


def test_plot_is_svg_with_a_mark_for_each_point() -> None:
    text = roofline([Point("a & b", "puna", 4.0, 30.0), Point("a & b", "llama.cpp", 4.0, 10.0)], LIMITS)
    titles = [e.text for e in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["puna: a & b, 30 Gop/s", "llama.cpp: a & b, 10 Gop/s"]


def test_titles_are_unique() -> None:
    assert len({row.title for row in ROWS}) == len(ROWS)
