"""A roofline plot (Williams, Waterman and Patterson 2009) as SVG: what was reached, under what the machine allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from puna.ops.limits import Limits

WIDTH, HEIGHT = 820, 460
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 34, 48


@dataclass(frozen=True)
class Point:
    """One program doing one row: operations a byte that must be moved, and billions of operations a second."""

    title: str
    program: str
    intensity: float
    gop_per_s: float


COLOURS = {"puna": "#c2410c", "llama.cpp": "#475569"}


def roofline(points: Sequence[Point], limits: Limits) -> str:
    """The SVG document. Both axes are logarithmic and reach to whole powers of ten."""
    x_low, x_high = _decades([point.intensity for point in points])
    y_low, y_high = _decades([*(point.gop_per_s for point in points), limits.int8_gop_per_s])

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(value) - x_low) / (x_high - x_low)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log10(value) - y_low) / (y_high - y_low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<clipPath id="plot"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>',
    ]
    for power in range(x_low, x_high + 1):
        at = x(10.0**power)
        parts.append(f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{10.0**power:g}</text>')
    for power in range(y_low, y_high + 1):
        at = y(10.0**power)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for name, peak in (("int8", limits.int8_gop_per_s), ("float32", limits.float32_gop_per_s)):
        low, high = 10.0**x_low, 10.0**x_high
        ridge = min(max(peak / limits.read_gb_per_s, low), high)
        path = f"M{x(low):.1f} {y(low * limits.read_gb_per_s):.1f}L{x(ridge):.1f} {y(peak):.1f}H{x(high):.1f}"
        parts.append(f'<path d="{path}" clip-path="url(#plot)" fill="none" stroke="#0f172a" stroke-width="1.5"/>')
        label = f"{name} {peak:.0f} Gop/s"
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y(peak) - 5:.1f}" text-anchor="end">{label}</text>')
    for point in points:
        title = f"{point.program}: {point.title}, {point.gop_per_s:.0f} Gop/s"
        parts.append(
            f'<circle cx="{x(point.intensity):.1f}" cy="{y(point.gop_per_s):.1f}" r="4" fill-opacity="0.8" '
            f'fill="{COLOURS[point.program]}"><title>{escape(title)}</title></circle>'
        )
    for number, (program, colour) in enumerate(COLOURS.items()):
        at = LEFT + 90 * number
        parts.append(f'<circle cx="{at + 6}" cy="{TOP - 14}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{at + 16}" y="{TOP - 10}">{program}</text>')
    axes = f"operations per byte that must be read ({limits.read_gb_per_s:.1f} GB/s, {limits.threads} threads)"
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{axes}</text>')
    parts.append(f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">Gop/s</text>')
    return "\n".join([*parts, "</svg>\n"])


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)
