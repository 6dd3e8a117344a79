"""A report as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import PurePath

from puna.evaluate.report import Report
from puna.evaluate.samples import CONVERSATIONS, TEXTS
from puna.evaluate.text import model_rows
from puna.plots.dots import Point, plot
from puna.plots.page import page, table


def report_page(report: Report, others: Sequence[Report] = ()) -> str:
    """The page. ``others`` are reports of the same source on the same text, for the plot of size against divergence."""
    parts = [
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
    return page(f"{report.derived.name} beside {report.source.name}", parts)


def pareto(reports: Sequence[Report]) -> list[Report]:
    """Those than which no other is both as small and as near to the source, by size (Pareto 1906)."""
    front: list[Report] = []
    for report in sorted(reports, key=lambda report: (report.derived.bytes, report.kl.mean)):
        if not front or report.kl.mean < front[-1].kl.mean:
            front.append(report)
    return front


def _models(report: Report) -> str:
    rows = [("", "source", "derived", "change"), *model_rows(report.source, report.derived)]
    return table(rows)


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
    return table(rows)


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
