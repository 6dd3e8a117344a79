"""A report as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import PurePath

from puna.evaluate.plots import Point, plot
from puna.evaluate.report import Report
from puna.evaluate.samples import CONVERSATIONS, TEXTS
from puna.evaluate.text import model_rows

_STYLE = """
:root { color-scheme: light dark; --line: #2563eb; --grid: #8884; --marked: #dc2626; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
svg { width: 100%; height: auto; }
svg text { font-size: 11px; fill: currentColor; }
.grid { stroke: var(--grid); } .line { fill: none; stroke: var(--line); stroke-width: 2; }
.dot { fill: var(--line); } .marked { fill: var(--marked); }
"""


def report_page(report: Report, others: Sequence[Report] = ()) -> str:
    """The page. ``others`` are reports of the same source on the same text, for the plot of size against divergence."""
    names = f"{escape(report.derived.name)} beside {escape(report.source.name)}"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>',
        f"<title>{names}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{names}</h1>",
        f"<p>{escape(report.text.name)}: {report.text.windows} windows of {report.text.window_tokens} tokens, "
        f"{report.text.scored_tokens} tokens predicted. Measured {escape(report.created)}.</p>",
        _models(report),
        "<h2>Predictions</h2>",
        _predictions(report),
        "<h2>Divergence over the tokens</h2>",
        _quantiles(report),
    ]
    if report.layer_errors:
        parts += ["<h2>Error of the hidden state after each layer</h2>", _layers(report)]
    if others:
        parts += ["<h2>Size against divergence</h2>", _sizes([report, *others])]
    return "\n".join([*parts, "</body>\n</html>\n"])


def pareto(reports: Sequence[Report]) -> list[Report]:
    """Those than which no other is both as small and as near to the source, by size (Pareto 1906)."""
    front: list[Report] = []
    for report in sorted(reports, key=lambda report: (report.derived.bytes, report.kl.mean)):
        if not front or report.kl.mean < front[-1].kl.mean:
            front.append(report)
    return front


def _models(report: Report) -> str:
    rows = [("", "source", "derived", "change"), *model_rows(report.source, report.derived)]
    return _table(rows)


def _predictions(report: Report) -> str:
    kl = report.kl
    rows = [
        ("KL divergence, mean", f"{kl.mean:.6f} nats"),
        ("median", f"{kl.median:.6f}"),
        ("99 % of tokens below", f"{kl.p99:.6f}"),
        ("largest", f"{kl.max:.6f}"),
        ("same most probable token", f"{100 * report.top1_agreement:.2f} %"),
        ("token ids", "; ".join(report.token_ids) or f"the same in {len(TEXTS)} texts"),
        ("prompts", "; ".join(report.template) or f"the same in {len(CONVERSATIONS)} conversations"),
    ]
    return _table(rows)


def _quantiles(report: Report) -> str:
    values = report.kl.quantiles
    points = [Point(100 * number / (len(values) - 1), value) for number, value in enumerate(values)]
    return plot((), "% of tokens below", "KL divergence, nats", logarithmic=True, line=points)


def _layers(report: Report) -> str:
    points = [Point(number, error) for number, error in enumerate(report.layer_errors, start=1)]
    return plot(points, "layer", "relative error", line=points)


def _sizes(reports: Sequence[Report]) -> str:
    def point(report: Report, label: str = "", *, marked: bool = False) -> Point:
        return Point(report.derived.bytes / 1e6, report.kl.mean, label, marked)

    points = [point(report, PurePath(report.derived.name).name, marked=report is reports[0]) for report in reports]
    line = [point(report) for report in pareto(reports)]
    return plot(points, "size of weights, MB", "mean KL divergence, nats", logarithmic=True, line=line)


def _table(rows: Sequence[Sequence[str]]) -> str:
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n{body}\n</table>"
