"""Plots of curves over one axis, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from puna.plots.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, axis_of, frame, opening
from puna.plots.page import text

COLOURS = 8  # of puna.plots.page; the ninth curve begins again with the first
_LARGEST = 1e100  # more is drawn as if it were this
_MOST_POINTS = 2 * WIDTH  # more cannot be told apart

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Finite ``points`` from left to right. ``faint`` ones lie behind another of the same ``colour``."""

    label: str
    points: Points
    colour: int = 0
    faint: bool = False


def plot_curves(curves: Sequence[Curve], x_title: str, y_title: str) -> str:
    """The picture, and below it the names of the curves where there are several. Empty where nothing can be drawn."""
    drawn = [Curve(c.label, _thinned(c.points), c.colour % COLOURS, c.faint) for c in curves if c.points]
    if not drawn:
        return ""
    x = axis_of([at for curve in drawn for at, _ in curve.points], LEFT, WIDTH - RIGHT)
    y = axis_of([value for curve in drawn for _, value in curve.points], HEIGHT - BOTTOM, TOP)
    parts = [opening(x_title, y_title), *frame(x, y, x_title, y_title), *(_curve(curve, x, y) for curve in drawn)]
    named = {curve.label: curve.colour for curve in drawn}
    names = " ".join(f'<span class="c{colour}">■ {text(label)}</span>' for label, colour in named.items())
    return "\n".join([*parts, "</svg>", *([f'<p class="names">{names}</p>'] if len(named) > 1 else [])])


def smoothed(points: Points, weight: float = 0.9) -> list[tuple[float, float]]:
    """The running mean with weights that fall by ``weight`` a point, as if there had been nothing before the first."""
    mean, total, found = 0.0, 0.0, []
    for at, value in points:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        found.append((at, mean / total))
    return found


def _curve(curve: Curve, x: Axis, y: Axis) -> str:
    look = f"curve c{curve.colour}" + (" faint" if curve.faint else "")
    places = [(x.place(at), y.place(value)) for at, value in curve.points]
    if len(places) == 1:
        return f'<circle class="{look}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>'
    path = " ".join(f"{at:.1f},{value:.1f}" for at, value in places)
    return f'<polyline class="{look}" points="{path}"><title>{text(curve.label)}</title></polyline>'


def _thinned(points: Points) -> list[tuple[float, float]]:
    """The least and the greatest of every stretch, so that no spike is lost."""
    clipped = [(at, max(-_LARGEST, min(_LARGEST, value))) for at, value in points]
    if len(clipped) <= _MOST_POINTS:
        return clipped
    return [point for stretch in _stretches(clipped) for point in stretch]


def _stretches(points: Points) -> Iterator[list[tuple[float, float]]]:
    size = -(-len(points) // (_MOST_POINTS // 2))
    for first in range(0, len(points), size):
        stretch = points[first : first + size]
        yield sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
