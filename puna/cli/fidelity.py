"""What commands that derive a model from another one share: its report, made, shown and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puna.cli.options import threads_option
from puna.errors import RequestError

if TYPE_CHECKING:
    from puna.evaluate import Report
    from puna.evaluate.review import Review
    from puna.store import ResolvedModel
    from puna.tensor import Adapter

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
Progress = Callable[[str, int, int], None]


html_option: Decorator = click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the report as a page too."
)


@dataclass(frozen=True)
class Deriving:
    """What ``deriving_options`` were given."""

    report: bool
    max_drift: float | None
    html: Path | None
    force: bool
    threads: int | None

    @contextmanager
    def watched(
        self, source: str, destination: Path, adapter: Adapter | None = None, name: str | None = None
    ) -> Iterator[tuple[Progress, Review | None]]:
        """Bars on the terminal that the progress moves, and the review of what will lie at ``destination``.

        ``source`` is the model that it is compared with, with an ``adapter`` beside it, both called ``name``. The
        review is None where no report is wanted, and, with a note, where the source can't be run here. Raises
        RequestError for options that need a report.
        """
        from rich.console import Console
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        with Bars(console=console, disable=not console.is_terminal) as bars:
            task = bars.add_task("reading", total=None)

            def progress(what: str, done: int, total: int) -> None:
                bars.update(task, description=what, completed=done, total=total)

            yield progress, self._review(source, destination, adapter, name or source, progress)

    def keep(self, review: Review | None, destination: Path) -> Report | None:
        """Write the report beside the model that is there now, and say on standard error what it found.

        Without one, that of an earlier model there goes.
        """
        from puna.evaluate.store import forget_report, save_report

        if review is None or review.report is None:
            forget_report(destination)
            return None
        place = save_report(review.report, destination)
        return self.tell(review, place.name, place.parent)

    def tell(self, review: Review | None, place: str, folder: Path) -> Report | None:
        """Say on standard error what the report found, which ``place`` has, and write the page where one is wanted."""
        if review is None or review.report is None:
            return None
        report = review.report
        for reason in review.drift:
            click.echo(f"Warning: accepted although {reason}", err=True)
        change = 100 * (report.derived.perplexity / report.source.perplexity - 1)
        click.echo(
            f"against {report.source.name}: KL {report.kl.mean:.5f}, perplexity {change:+.1f} %, same most probable "
            f"token {100 * report.top1_agreement:.1f} % of the time; {place} has the rest",
            err=True,
        )
        if self.html is not None:
            write_page(report, self.html, folder)
        return report

    def _review(
        self, source: str, destination: Path, adapter: Adapter | None, name: str, progress: Progress
    ) -> Review | None:
        if not self.report:
            if self.html is not None or self.max_drift is not None:
                raise RequestError("--html and --max-drift are for the report; add --report")
            return None
        from puna.evaluate.review import Review, obstacle
        from puna.evaluate.sides import Side
        from puna.ops.registry import make_ops
        from puna.store import resolve

        found = _files_only(resolve(source))
        ops = make_ops(None, self.threads)
        reason = obstacle(found, ops)
        if reason is not None:
            click.echo(f"Note: no report of what {source} loses: {reason}", err=True)
            return None
        side = Side.open(name, found, adapter)
        return Review(side, destination.name, ops, accept=self.force, max_divergence=self.max_drift, progress=progress)


def deriving_options(*, report: bool) -> Decorator:
    """Adds ``--force``, ``--threads``, ``--report`` (by default ``report``) and its own, together as ``deriving``."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def command(*arguments: Any, **options: Any) -> Any:
            mine = {field.name: options.pop(field.name) for field in fields(Deriving)}
            return function(*arguments, deriving=Deriving(**mine), **options)

        decorated: Callable[..., Any] = command
        for option in (
            threads_option,
            html_option,
            click.option(
                "--max-drift",
                type=click.FloatRange(0),
                metavar="NATS",
                help="Refuse a result whose mean KL to SOURCE is above this (default: by its bits per weight).",
            ),
            click.option(
                "--report/--no-report",
                default=report,
                show_default=True,
                help="Measure the result against SOURCE before keeping it (docs/fidelity.md).",
            ),
            click.option(
                "--force",
                is_flag=True,
                help="Replace the destination if it exists; keep the result whatever its report says.",
            ),
        ):
            decorated = option(decorated)
        return decorated

    return add


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
