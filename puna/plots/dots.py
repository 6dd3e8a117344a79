"""Plots of dots with names, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from puna.plots.axes import BOTTOM, FLOOR, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, axis_of, frame, opening
from puna.plots.page import text


@dataclass(frozen=True)
class Point:
    """A dot, with its name beside it where it has one; ``marked`` is the one that the page is about."""

    x: float
    y: float
    label: str = ""
    marked: bool = False


def plot(
    points: Sequence[Point], x_title: str, y_title: str, *, logarithmic: bool = False, line: Sequence[Point] = ()
) -> str:
    """Dots, and a line through ``line``. The y axis begins at 0, or covers whole decades where it is logarithmic."""
    everything = [*points, *line]
    x = axis_of([point.x for point in everything], LEFT, WIDTH - RIGHT)
    y = _y_axis([point.y for point in everything], logarithmic)
    parts = [
        opening(x_title, y_title),
        *frame(x, y, x_title, y_title),
    ]
    if line:
        path = " ".join(f"{x.place(point.x):.1f},{y.place(point.y):.1f}" for point in line)
        parts.append(f'<polyline class="line" points="{path}"/>')
    for point in sorted(points, key=lambda point: point.marked):
        at_x, at_y = x.place(point.x), y.place(point.y)
        parts.append(f'<circle class="{"marked" if point.marked else "dot"}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4"/>')
        if point.label:
            anchor, beside = ("end", at_x - 8) if at_x > WIDTH * 0.7 else ("start", at_x + 8)
            parts.append(f'<text x="{beside:.1f}" y="{at_y - 6:.1f}" text-anchor="{anchor}">{text(point.label)}</text>')
    return "\n".join([*parts, "</svg>"])


def _y_axis(values: Sequence[float], logarithmic: bool) -> Axis:
    if not logarithmic:
        return Axis(0.0, 1.1 * max(values) if max(values) > FLOOR else 1.0, HEIGHT - BOTTOM, TOP)
    powers = [math.log10(max(value, FLOOR)) for value in values]
    low_power = math.floor(min(powers))
    high_power = max(math.ceil(max(powers)), low_power + 1)
    return Axis(10.0**low_power, 10.0**high_power, HEIGHT - BOTTOM, TOP, logarithmic=True)
