"""A report as a table on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from puna.evaluate.report import ModelFacts, Report
from puna.evaluate.samples import CONVERSATIONS, TEXTS

_LABEL, _COLUMN = 20, 26


def report_lines(report: Report) -> Iterator[str]:
    """The table, line by line."""
    source, derived, text, kl = report.source, report.derived, report.text, report.kl
    yield f"{derived.name} beside its source {source.name}"
    yield f"on {text.name}: {text.windows} × {text.window_tokens} tokens, {text.scored_tokens} of them predicted"
    yield ""
    yield _row("", "source", "derived", "change")
    for label, ours, theirs, change in model_rows(source, derived):
        yield _row(label, ours, theirs, change)
    yield ""
    yield _row("KL divergence", f"mean {kl.mean:.5f}", f"median {kl.median:.5f}")
    yield _row("", f"99 % below {kl.p99:.5f}", f"max {kl.max:.5f}")
    yield _row("same most probable", f"{100 * report.top1_agreement:.1f} % of tokens")
    if report.layer_errors:
        worst = max(range(len(report.layer_errors)), key=report.layer_errors.__getitem__)
        last = f"{report.layer_errors[-1]:.4f} after the last"
        yield _row("error of states", f"{report.layer_errors[0]:.4f} after layer 1", last)
        if 0 < worst < len(report.layer_errors) - 1:
            yield _row("", f"{report.layer_errors[worst]:.4f} after layer {worst + 1}, the most")
    yield _row("token ids", f"the same in {len(TEXTS)} texts" if not report.token_ids else "DIFFERENT")
    yield from (f"  {sentence}" for sentence in report.token_ids)
    yield _row("prompts", f"the same in {len(CONVERSATIONS)} conversations" if not report.template else "DIFFERENT")
    yield from (f"  {sentence}" for sentence in report.template)


def model_rows(source: ModelFacts, derived: ModelFacts) -> Iterator[tuple[str, str, str, str]]:
    """What both models have a value of: its name, the source's, the derived one's, and their relation."""
    yield "computed as", encodings(source), encodings(derived), ""
    yield "size of weights", megabytes(source.bytes), megabytes(derived.bytes), f"× {derived.bytes / source.bytes:.3f}"
    yield "bits per weight", f"{source.bits_per_weight:.2f}", f"{derived.bits_per_weight:.2f}", ""
    change = f"{100 * (derived.perplexity / source.perplexity - 1):+.2f} %"
    yield "perplexity", f"{source.perplexity:.4f}", f"{derived.perplexity:.4f}", change
    speeds = [model.decode_tokens_per_second for model in (source, derived)]
    yield "decode, tokens/s", f"{speeds[0]:.1f}", f"{speeds[1]:.1f}", f"× {speeds[1] / speeds[0]:.2f}"


def encodings(model: ModelFacts) -> str:
    """The most frequent encodings of a model's tensors."""
    names = list(model.types)
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def megabytes(count: int) -> str:
    """Decimal megabytes."""
    return f"{count / 1e6:,.1f} MB"


def _row(label: str, *values: str) -> str:
    return (f"{label:{_LABEL}}" + "".join(f"{value:{_COLUMN}}" for value in values)).rstrip()
