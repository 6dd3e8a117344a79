"""What commands that derive a model from another one share: its report, made, shown and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puna.errors import RequestError

if TYPE_CHECKING:
    from puna.evaluate import Report
    from puna.evaluate.review import Review
    from puna.store import ResolvedModel

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
Progress = Callable[[str, int, int], None]


def report_options(*, default: bool) -> Decorator:
    """Adds ``--report`` and what goes with it."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        function = click.option(
            "--max-drift",
            type=click.FloatRange(0),
            metavar="NATS",
            help="Refuse a result whose mean KL to SOURCE is above this (default: by its bits per weight).",
        )(function)
        return click.option(
            "--report/--no-report",
            default=default,
            show_default=True,
            help="Measure the result against SOURCE before keeping it (docs/fidelity.md).",
        )(function)

    return add


html_option: Decorator = click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the report as a page too."
)


def make_review(
    source: str,
    destination: Path,
    *,
    report: bool,
    html: Path | None,
    force: bool,
    max_drift: float | None,
    threads: int | None,
    progress: Progress,
) -> Review | None:
    """The review of what will lie at ``destination``.

    None where no report is wanted, and, with a note, where the source can't be run here. Raises RequestError for
    options that need a report.
    """
    if not report:
        if html is not None or max_drift is not None:
            raise RequestError("--html and --max-drift are for the report; add --report")
        return None
    from puna.evaluate.review import Review, obstacle
    from puna.evaluate.sides import Side
    from puna.ops.registry import make_ops
    from puna.store import resolve

    found = _files_only(resolve(source))
    ops = make_ops(None, threads)
    reason = obstacle(found, ops)
    if reason is not None:
        click.echo(f"Note: no report of what {source} loses: {reason}", err=True)
        return None
    name, side = destination.name, Side.open(source, found)
    return Review(side, name, ops, accept=force, max_divergence=max_drift, progress=progress)


def keep_report(review: Review | None, destination: Path, html: Path | None) -> Report | None:
    """Write the report beside the model that is there now, and say on standard error what it found.

    Without one, that of an earlier model there goes.
    """
    from puna.evaluate.store import forget_report, save_report

    if review is None or review.report is None:
        forget_report(destination)
        return None
    report = review.report
    place = save_report(report, destination)
    for reason in review.drift:
        click.echo(f"Warning: accepted although {reason}", err=True)
    change = 100 * (report.derived.perplexity / report.source.perplexity - 1)
    click.echo(
        f"against {report.source.name}: KL {report.kl.mean:.5f}, perplexity {change:+.1f} %, same most probable token "
        f"{100 * report.top1_agreement:.1f} % of the time; {place.name} has the rest",
        err=True,
    )
    if html is not None:
        write_page(report, html, place.parent)
    return report


def write_page(report: Report, page: Path, folder: Path) -> None:
    """Write the report as HTML, with what the store and ``folder`` know of other models of the same source."""
    from puna.checkpoint.atomic import atomic_path
    from puna.evaluate.html import report_page
    from puna.evaluate.store import siblings

    with atomic_path(page.expanduser()) as fresh:
        fresh.write_text(report_page(report, siblings(report, folder)), encoding="utf-8")


def _files_only(found: ResolvedModel) -> ResolvedModel:
    """Without the template that the store may know better: a derived file takes over what is in the files."""
    manifest = found.manifest and replace(found.manifest, template=None)
    return replace(found, manifest=manifest)
