"""Small plots as SVG elements, for a page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 16, 44
FLOOR = 1e-7  # less is drawn as if it were this, or 0


@dataclass(frozen=True)
class Point:
    """A dot, with its name beside it where it has one; ``marked`` is the one that the page is about."""

    x: float
    y: float
    label: str = ""
    marked: bool = False


@dataclass(frozen=True)
class _Axis:
    """From values to places between ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high, at = (self._scaled(number) for number in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1)]
        step = _round_step((self.high - self.low) / 5)
        return [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, FLOOR)) if self.logarithmic else value


def plot(
    points: Sequence[Point], x_title: str, y_title: str, *, logarithmic: bool = False, line: Sequence[Point] = ()
) -> str:
    """Dots, and a line through ``line``. The y axis begins at 0, or covers whole decades where it is logarithmic."""
    everything = [*points, *line]
    x = _axis_of([point.x for point in everything], LEFT, WIDTH - RIGHT)
    y = _y_axis([point.y for point in everything], logarithmic)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_title)} against {escape(x_title)}">',
        *_frame(x, y, x_title, y_title),
    ]
    if line:
        path = " ".join(f"{x.place(point.x):.1f},{y.place(point.y):.1f}" for point in line)
        parts.append(f'<polyline class="line" points="{path}"/>')
    for point in sorted(points, key=lambda point: point.marked):
        at_x, at_y = x.place(point.x), y.place(point.y)
        parts.append(f'<circle class="{"marked" if point.marked else "dot"}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4"/>')
        if point.label:
            anchor, beside = ("end", at_x - 8) if at_x > WIDTH * 0.7 else ("start", at_x + 8)
            parts.append(
                f'<text x="{beside:.1f}" y="{at_y - 6:.1f}" text-anchor="{anchor}">{escape(point.label)}</text>'
            )
    return "\n".join([*parts, "</svg>"])


def _frame(x: _Axis, y: _Axis, x_title: str, y_title: str) -> list[str]:
    parts = []
    for tick in x.ticks():
        at = x.place(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{y.start}" x2="{at:.1f}" y2="{y.end}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in y.ticks():
        at = y.place(tick)
        parts.append(f'<line class="grid" x1="{x.start}" y1="{at:.1f}" x2="{x.end}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{(x.start + x.end) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>')
    middle = (y.start + y.end) / 2
    turned = f'x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})"'
    return [*parts, f"<text {turned}>{escape(y_title)}</text>"]


def _axis_of(values: Sequence[float], start: float, end: float) -> _Axis:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return _Axis(max(low - margin, 0.0) if low >= 0 else low - margin, high + margin, start, end)


def _y_axis(values: Sequence[float], logarithmic: bool) -> _Axis:
    if not logarithmic:
        return _Axis(0.0, 1.1 * max(values) if max(values) > FLOOR else 1.0, HEIGHT - BOTTOM, TOP)
    powers = [math.log10(max(value, FLOOR)) for value in values]
    low_power = math.floor(min(powers))
    high_power = max(math.ceil(max(powers)), low_power + 1)
    return _Axis(10.0**low_power, 10.0**high_power, HEIGHT - BOTTOM, TOP, logarithmic=True)


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten: the first at or above ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
