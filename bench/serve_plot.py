"""A bar chart of serving measurements as SVG: throughput and time to the first token, by number of clients."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

COLOURS = ["#c2410c", "#475569", "#0d9488", "#7c3aed"]
WIDTH, HEIGHT, LEFT, TOP, GAP = 860, 330, 50, 50, 40
PANELS = [("tokens_per_second", "tokens/s, prompt and answer together (more is better)", 1.0)]
PANELS += [("ttft_p95", "first token, 95th percentile, ms (less is better)", 1e3)]


def plot(measured: Sequence[dict[str, Any]]) -> str:
    """The SVG document of what ``bench.serve`` measured; medians where there are several rounds."""
    servers = list(dict.fromkeys(row["server"] for row in measured))
    clients = sorted({row["clients"] for row in measured})
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    ]
    for i, server in enumerate(servers):
        parts.append(f'<rect x="{LEFT + 130 * i}" y="10" width="12" height="12" fill="{COLOURS[i]}"/>')
        parts.append(f'<text x="{LEFT + 130 * i + 18}" y="20">{escape(server)}</text>')
    width = (WIDTH - LEFT - GAP) / len(PANELS)
    for panel, (key, title, scale) in enumerate(PANELS):
        x0 = LEFT + panel * (width + GAP / 2)
        values = {
            (server, count): scale
            * statistics.median(row[key] for row in measured if (row["server"], row["clients"]) == (server, count))
            for server in servers
            for count in clients
        }
        parts.append(f'<text x="{x0:.0f}" y="{TOP - 6}">{escape(title)}</text>')
        parts += _bars(values, servers, clients, x0, width - GAP)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bars(
    values: dict[tuple[str, int], float], servers: list[str], clients: list[int], x0: float, width: float
) -> list[str]:
    base, most = HEIGHT - 30, max(values.values())
    group = width / len(clients)
    bar = group * 0.8 / len(servers)
    parts = [f'<path d="M{x0:.0f} {base}h{width:.0f}" stroke="#0f172a"/>']
    for c, count in enumerate(clients):
        for s, server in enumerate(servers):
            height = values[server, count] / most * (base - TOP - 20)
            x = x0 + c * group + group * 0.1 + s * bar
            parts.append(
                f'<rect x="{x:.1f}" y="{base - height:.1f}" width="{bar * 0.92:.1f}" height="{height:.1f}" '
                f'fill="{COLOURS[s]}"/>'
            )
            parts.append(
                f'<text x="{x + bar / 2:.1f}" y="{base - height - 4:.1f}" text-anchor="middle" font-size="10">'
                f"{values[server, count]:.0f}</text>"
            )
        parts.append(
            f'<text x="{x0 + (c + 0.5) * group:.1f}" y="{base + 16}" text-anchor="middle">{count} '
            f"client{'s' if count > 1 else ''}</text>"
        )
    return parts
