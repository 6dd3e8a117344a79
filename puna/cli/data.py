"""``puna data``: look at training data before a model is trained on it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from puna.cli.options import json_option, row_options
from puna.cli.preview import example_preview, print_example, printable
from puna.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from puna.train.data.dataset import Dataset, Scan

_SHOWN = 20  # bad rows, and groups of duplicates
_BAR = 40


@click.group()
def data() -> None:
    """Look at training data."""


@data.command()
@click.argument("file")
@click.option("--model", help="Render the rows for this model: tokens, template, loss mask.")
@row_options
@click.option("--length", type=click.IntRange(2), help="Count the documents that are longer, in tokens.")
@click.option("--preview", type=click.IntRange(0), default=1, show_default=True, help="Examples to show.")
@json_option
def check(
    file: str,
    model: str | None,
    form: str | None,
    columns: dict[str, str],
    train_on: Any,
    length: int | None,
    skip_bad: int,
    preview: int,
    as_json: bool,
) -> None:
    """Check the rows of FILE: what is wrong and where, how long they are, which are the same, what is learnt.

    FILE is .jsonl, .json, .csv, .txt (each also with .gz), .parquet, .arrow, or a folder of Hugging Face's datasets.
    """
    from puna.train.data.dataset import open_dataset
    from puna.train.data.for_model import renderer_for

    if length is not None and model is None:
        raise click.UsageError("--length counts tokens, so it needs --model")
    renderer = None if model is None else renderer_for(model, train_on=train_on)
    dataset = open_dataset(file, form, columns)
    scan = dataset.scan(renderer)
    report = _report(dataset, scan, length)
    if renderer is not None:
        report["preview"] = [example_preview(renderer, dataset, int(number)) for number in scan.good[:preview]]
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report)
    if scan.bad_count > skip_bad:
        raise DataError(
            f"{scan.bad_count} of {len(dataset)} rows of {dataset.name} cannot be used; mend them, or leave them out "
            f"with --skip-bad {scan.bad_count}"
        )
    if not len(scan.good):
        raise DataError(f"{dataset.name} holds no row to train on")


def _report(dataset: Dataset, scan: Scan, length: int | None) -> dict[str, Any]:
    groups = scan.duplicates()
    report: dict[str, Any] = {
        "file": dataset.name,
        "format": dataset.format.name,
        "kind": dataset.format.kind,
        "rows": len(dataset),
        "usable": len(scan.good),
        "bad": scan.bad_count,
        "digest": scan.digest,
        "errors": [row.message for row in scan.bad],
        "duplicates": sum(len(group) - 1 for group in groups),
        "duplicate_rows": [[dataset.where(int(number)) for number in group] for group in groups[:_SHOWN]],
    }
    if scan.lengths is not None and scan.trained is not None:
        report["documents"] = len(scan.lengths)
        report["tokens"] = int(scan.lengths.sum())
        report["trained_tokens"] = int(scan.trained.sum())
        report["untrained_documents"] = int((scan.trained == 0).sum())
        if len(scan.lengths):
            report["length"] = _percentiles(scan.lengths)
            report["histogram"] = _histogram(scan.lengths)
        if length is not None:
            report["longer"] = {"than": length, "documents": int((scan.lengths > length).sum())}
    return report


def _percentiles(lengths: NDArray[np.int32]) -> dict[str, int]:
    import numpy as np

    p50, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf")
    return {"p50": int(p50), "p95": int(p95), "max": int(lengths.max())}


def _histogram(lengths: NDArray[np.int32]) -> list[dict[str, int]]:
    """Documents by length, in steps that double."""
    import numpy as np

    steps = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    first, last = int(steps.min()), int(steps.max())
    return [{"up_to": 2**step, "documents": int((steps == step).sum())} for step in range(first, last + 1)]


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)

    def show(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style), soft_wrap=True)

    show(f"{report['file']}: {report['usable']:,} of {report['rows']:,} rows can be used (format {report['format']})")
    for error in report["errors"][:_SHOWN]:
        show(f"  {error}", "red")
    if report["bad"] > _SHOWN:
        show(f"  … and {report['bad'] - _SHOWN:,} more; --json lists them", "red")
    if report["duplicates"]:
        show(f"rows that say what an earlier one says: {report['duplicates']:,}", "yellow")
        for group in report["duplicate_rows"][:5]:
            show(f"  {', '.join(group[:6])}{', …' if len(group) > 6 else ''}", "yellow")
    if "tokens" in report:
        _print_lengths(report, show)
    for example in report.get("preview", []):
        print_example(console, example)


def _print_lengths(report: dict[str, Any], show: Any) -> None:
    share = 100 * report["trained_tokens"] / max(report["tokens"], 1)
    show(f"{report['tokens']:,} tokens in {report['documents']:,} documents; {share:.0f}% of them are learnt")
    if report["untrained_documents"]:
        show(f"{report['untrained_documents']:,} documents have nothing to learn", "yellow")
    if "length" in report:
        length = report["length"]
        show(f"length: half up to {length['p50']:,}, 95% up to {length['p95']:,}, the longest {length['max']:,} tokens")
        most = max(step["documents"] for step in report["histogram"])
        for step in report["histogram"]:
            bar = "█" * -(-_BAR * step["documents"] // most)
            show(f"  up to {step['up_to']:>7,}  {step['documents']:>9,}  {bar}")
    if "longer" in report:
        show(f"{report['longer']['documents']:,} documents are longer than {report['longer']['than']:,} tokens")
