"""The axes of a plot, and the frame that they make: ticks, grid and titles as SVG elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from puna.plots.page import text

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 16, 44
FLOOR = 1e-7  # less is drawn on a logarithmic axis as if it were this
_NOTHING = 1e-100  # a smaller number is 0
_ROUNDING = 1e-12  # a smaller range, as a share of its numbers, is none


@dataclass(frozen=True)
class Axis:
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


def opening(x_title: str, y_title: str) -> str:
    """The tag that begins the picture."""
    label = f"{text(y_title)} against {text(x_title)}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'


def frame(x: Axis, y: Axis, x_title: str, y_title: str) -> list[str]:
    """Grid, ticks and titles, to be drawn first."""
    parts = []
    for tick in x.ticks():
        at = x.place(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{y.start}" x2="{at:.1f}" y2="{y.end}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in y.ticks():
        at = y.place(tick)
        parts.append(f'<line class="grid" x1="{x.start}" y1="{at:.1f}" x2="{x.end}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{(x.start + x.end) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{text(x_title)}</text>')
    middle = (y.start + y.end) / 2
    turned = f'x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})"'
    return [*parts, f"<text {turned}>{text(y_title)}</text>"]


def axis_of(values: Sequence[float], start: float, end: float) -> Axis:
    """A linear axis with a margin around ``values``; it does not go below 0 where they do not."""
    low, high = min(values), max(values)
    margin, largest = 0.06 * (high - low), max(abs(low), abs(high))
    if margin < max(_NOTHING, _ROUNDING * largest):
        margin = 0.1 * largest if largest > _NOTHING else 1.0
    return Axis(max(low - margin, 0.0) if low >= 0 else low - margin, high + margin, start, end)


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten: the first at or above ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
