"""What is known of a run as one HTML page that loads nothing, and of several with their curves overlaid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from puna.plots.curves import Curve, plot_curves, smoothed
from puna.plots.page import page, table, text
from puna.train.runs.metrics import Row, curve
from puna.train.runs.record import DataFacts, Evaluation, RunRecord, Sample
from puna.train.runs.run import Run
from puna.train.runs.summary import comparison, final_numbers, names_of, shown

_NOISY = 20  # a curve of more points is drawn smooth too
_FIRST = (
    "loss",
    "validation_loss",
    "reward",
    "validation_reward",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
)
_NOT_DRAWN = ("tokens", "seconds")
_EXACT = ("learning_rate", "memory_bytes")  # without noise
_UNITS = {"memory_bytes": ("memory, GB", 1e-9)}


def run_page(run: Run) -> str:
    """The page of one run, at any time of it. Raises TrainingError when a file of it is damaged."""
    record, rows = run.record, run.metrics()
    inputs = record.inputs
    parts = [
        f"<p>{text(inputs.objective)} ({text(inputs.method)}) of {text(inputs.model)}: {text(run.state)}"
        + (f". {text(record.error)}" if record.error else "")
        + (f". The result is {text(record.result)}" if record.result else "")
        + ".</p>",
    ]
    if record.before or record.after:
        parts += ["<h2>Before and after</h2>", _before_and_after(record)]
    for title, plot in _plots([(run.name, rows)]):
        parts += [f"<h2>{text(title)}</h2>", plot]
    parts += ["<h2>Numbers</h2>", table([(_title(n), shown(value)) for n, value in final_numbers(run).items()])]
    parts += ["<h2>Data</h2>", _data(inputs.data)]
    if record.before or record.after:
        parts += _samples(record.before, record.after)
    parts += ["<h2>Recipe</h2>", f"<pre>{text(run.recipe)}</pre>", "<h2>Where and with what</h2>", _starts(record)]
    return page(run.name, parts)


def comparison_page(runs: Sequence[Run]) -> str:
    """Several runs. Raises TrainingError when a file of one is damaged."""
    found = comparison(runs)
    head = ("", *found["runs"])
    parts = []
    for title, key in (("Recipes", "recipe"), ("Circumstances", "circumstances"), ("Numbers", "numbers")):
        rows = [(name if key != "numbers" else _title(name), *map(shown, row)) for name, row in found[key].items()]
        parts += [f"<h2>{title}</h2>", table(rows, head) if rows else "<p>No differences.</p>"]
    for title, plot in _plots([(run.name, run.metrics()) for run in runs]):
        parts += [f"<h2>{text(title)}</h2>", plot]
    return page("Training runs compared", parts)


def _plots(runs: Sequence[tuple[str, Sequence[Row]]]) -> list[tuple[str, str]]:
    """Titles and pictures: one for every name; of one run the validation's lies over its training's."""
    names = dict.fromkeys([*_FIRST, *(name for _, rows in runs for name in names_of(rows))])
    overlaid = {f"validation_{name}" for name in names if f"validation_{name}" in names} if len(runs) == 1 else set()
    found = []
    for name in names:
        if name in _NOT_DRAWN or name in overlaid:
            continue
        curves = [c for colour, (label, rows) in enumerate(runs) for c in _curves(rows, name, label, colour)]
        if f"validation_{name}" in overlaid:
            curves = [Curve("training", c.points, c.colour, c.faint) for c in curves]
            curves.append(Curve("held out", curve(runs[0][1], f"validation_{name}"), 1))
        title = _UNITS[name][0] if name in _UNITS else _title(name)
        if picture := plot_curves(curves, "step", title):
            found.append((title[:1].upper() + title[1:], picture))
    return found


def _curves(rows: Sequence[Row], name: str, label: str, colour: int) -> list[Curve]:
    _, factor = _UNITS.get(name, ("", 1.0))
    points = [(step, factor * value) for step, value in curve(rows, name)]
    if len(points) <= _NOISY or name in _EXACT:
        return [Curve(label, points, colour)]
    return [Curve(label, points, colour, faint=True), Curve(label, smoothed(points), colour)]


def _before_and_after(record: RunRecord) -> str:
    before, after = (evaluation.numbers if evaluation else {} for evaluation in (record.before, record.after))
    names = dict.fromkeys([*before, *after])
    rows = [(_title(name), shown(before.get(name)), shown(after.get(name))) for name in names]
    return table(rows, ("held-out rows", "before", "after"))


def _data(data: Sequence[DataFacts]) -> str:
    def trained(facts: DataFacts) -> str:
        if not facts.tokens or facts.trained_tokens is None:
            return "-"
        return f"{facts.trained_tokens:,} ({100 * facts.trained_tokens / facts.tokens:.1f} %)"

    rows = [(d.name, shown(d.rows), shown(d.held_out), shown(d.tokens), trained(d), d.digest) for d in data]
    return table(rows, ("data set", "rows", "held out", "tokens", "with a loss", "digest"))


def _samples(before: Evaluation | None, after: Evaluation | None) -> list[str]:
    first, then = (evaluation.samples if evaluation else () for evaluation in (before, after))
    parts = []
    for old, new in zip_longest(first, then):
        sample: Sample = new or old
        answers = [("before", old.answer if old else "-"), ("after", new.answer if new else "-")]
        wanted = [("wanted", sample.wanted)] if sample.wanted else []
        parts.append(table([("prompt", sample.prompt), *wanted, *answers]))
    return ["<h2>Sample answers</h2>", *parts] if parts else []


def _starts(record: RunRecord) -> str:
    inputs = record.inputs
    rows = [("model", f"{inputs.model} ({inputs.model_digest})"), ("seed", str(inputs.seed)), ("device", inputs.device)]
    if record.parameters and record.trained_parameters is not None:
        share = 100 * record.trained_parameters / record.parameters
        rows.append(("parameters", f"{record.trained_parameters:,} of {record.parameters:,} trained ({share:.2f} %)"))
    for number, start in enumerate(record.starts):
        versions = ", ".join(f"{name} {version}" for name, version in start.versions.items())
        machine = f"{start.platform}, {start.cpu}, {start.cores} cores"
        rows.append(("resumed" if number else "started", f"{start.time}: {versions}; {machine}"))
    return table([*rows, *([("ended", record.ended)] if record.ended else [])])


def _title(name: str) -> str:
    return name.replace("_", " ")
