"""Plots and pages are well-formed, whatever is drawn."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.plots.curves import Curve, plot_curves, smoothed
from puna.plots.dots import Point, plot
from puna.plots.page import page, table

HOSTILE = '<script>alert("x")</script>&\'"]]>'


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))


@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(0, 1e9)), min_size=1, max_size=8), st.booleans())
def test_every_plot_is_well_formed(values: list[tuple[float, float]], logarithmic: bool) -> None:
    points = [Point(x, y, "<&>") for x, y in values]
    picture = ElementTree.fromstring(plot(points, "a<b", "c&d", logarithmic=logarithmic, line=points))
    for dot in picture.iter("circle"):
        assert -1 <= float(dot.get("cx", "nan")) <= 641
        assert -1 <= float(dot.get("cy", "nan")) <= 301
    assert len(list(picture.iter("line"))) < 60


VALUES = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.lists(VALUES, max_size=6), max_size=3), st.integers(0, 1 << 50))
def test_every_curve_is_inside(values: list[list[float]], first: int) -> None:
    curves = [Curve(HOSTILE + str(i), list(enumerate(v, start=first)), i) for i, v in enumerate(values)]
    picture = parsed(f"<div>{plot_curves(curves, 'a<b', 'c&d')}</div>")
    drawn = [line.get("points", "") for line in picture.iter("polyline")]
    drawn += [f"{dot.get('cx')},{dot.get('cy')}" for dot in picture.iter("circle")]
    assert sum(len(line.split()) for line in drawn) == sum(map(len, values))
    for pair in " ".join(drawn).split():
        x, y = map(float, pair.split(","))
        assert 0 <= x <= 640
        assert 0 <= y <= 300
    assert len(list(picture.iter("line"))) < 60
    assert not list(picture.iter("script"))


def test_where_a_curve_lies() -> None:
    (line,) = parsed(plot_curves([Curve("loss", [(0, 4.0), (50, 2.0), (100, 3.0)])], "step", "loss")).iter("polyline")
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in line.get("points", "").split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 > y2 > y0  # down is more in SVG
    assert y1 - y2 == pytest.approx((y1 - y0) / 2, abs=0.1)


def test_long_curves_keep_their_spikes() -> None:
    values = [1.0] * 100_000
    values[70_001], values[30_003] = 50.0, -50.0
    (line,) = parsed(plot_curves([Curve("loss", list(enumerate(values)))], "step", "loss")).iter("polyline")
    heights = [float(pair.split(",")[1]) for pair in line.get("points", "").split()]
    assert len(heights) <= 1300
    middle = heights[0]
    assert (max(heights) - middle) == pytest.approx(middle - min(heights), rel=0.05)
    assert max(heights) - middle > 50


def test_names_only_where_there_are_several() -> None:
    one = Curve("a", [(0, 1), (1, 2)])
    assert "names" not in plot_curves([one], "x", "y")
    picture = plot_curves([one, Curve("b", [(0, 1)], 9)], "x", "y")
    assert '<span class="c0">■ a</span> <span class="c1">■ b</span>' in picture
    assert plot_curves([Curve("a", [])], "x", "y") == ""


def test_smoothing() -> None:
    """Weights ½, ¼ …: (½·8) / ½, (½·4 + ¼·8) / ¾."""
    assert smoothed([(1, 8.0), (2, 4.0)], 0.5) == [(1, 8.0), (2, pytest.approx(4 / 0.75))]
    assert [value for _, value in smoothed([(n, 3.0) for n in range(99)])] == pytest.approx([3.0] * 99)


@given(st.text(st.characters()))
def test_any_text_is_shown(value: str) -> None:
    (cell,) = parsed(page("a", [table([[value]])])).iter("td")
    assert len(cell.text or "") == len(value.replace("\r\n", "\n"))
    assert set(cell.text or "") <= {*value, "\n", "\ufffd"}


def test_a_page_escapes_text_and_loads_nothing() -> None:
    text = page(HOSTILE, [table([[HOSTILE, "b"]], ["c", HOSTILE])])
    found = parsed(text)
    assert not list(found.iter("script"))
    assert found.findtext("body/h1") == found.findtext("head/title") == HOSTILE
    assert [cell.text for cell in found.iter("td")] == [HOSTILE, "b"]
    assert [cell.text for cell in found.iter("th")] == ["c", HOSTILE]
    assert "http" not in text
    assert "src=" not in text
    assert "prefers-color-scheme: dark" in text
