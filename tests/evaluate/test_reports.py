"""Reports as they are stored, read again, drawn and gathered; nothing in them is trusted."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_checkpoint

from puna.checkpoint import save_checkpoint
from puna.errors import StoreError
from puna.evaluate.html import pareto, report_page
from puna.evaluate.limits import LIMITS, drift, largest_divergence
from puna.evaluate.report import Divergence, ModelFacts, Report, TextFacts
from puna.evaluate.sides import tensor_types
from puna.evaluate.store import forget_report, load_report, report_beside, save_report, siblings
from puna.evaluate.text import report_lines
from puna.store import Store, import_file, resolve

FINITE = st.floats(-1e300, 1e300)


def report_of(name: str = "small.gguf", size: int = 500, kl: float = 0.1, bits: float = 4.5) -> Report:
    return Report(
        created="2026-01-02T03:04:05Z",
        source_identity="abc",
        source=ModelFacts("big.gguf", {"F16": 3}, 2000, 16.0, 10.0, 20.0),
        derived=ModelFacts(name, {"Q4_0": 2, "F32": 1}, size, bits, 10.5, 50.0),
        text=TextFacts("a text", "0" * 64, 1, 512, 255),
        token_ids=[],
        template=[],
        kl=Divergence(kl, kl / 2, 5 * kl, 9 * kl, [kl * step / 10 for step in range(21)]),
        top1_agreement=0.9,
        layer_errors=[0.01, 0.03, 0.02],
    )


def test_a_report_survives_storage() -> None:
    report = report_of()
    assert Report.from_json(json.loads(json.dumps(report.as_json())), "here") == report


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.data(), JSON)
def test_a_damaged_report_is_refused(data: st.DataObject, value: Any) -> None:
    """Any field replaced by anything: a StoreError, or a report that can be shown."""
    raw = json.loads(json.dumps(report_of().as_json()))
    place = raw
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    try:
        report = Report.from_json(raw, "here")
    except StoreError:
        return
    json.dumps(report.as_json(), allow_nan=False)
    assert list(report_lines(report))
    assert report_page(report, [report_of()])


@pytest.mark.parametrize("raw", [None, [], {}, {"schema": 1}, "text"])
def test_something_else_is_no_report(raw: Any) -> None:
    with pytest.raises(StoreError, match="the report in here is damaged"):
        Report.from_json(raw, "here")


def test_a_later_schema_is_told_apart() -> None:
    with pytest.raises(StoreError, match="schema 2, not 1"):
        Report.from_json({**report_of().as_json(), "schema": 2}, "here")


def test_limits_grow_as_bits_fall() -> None:
    limits = [limit for _, limit in LIMITS]
    assert limits == sorted(limits)
    assert largest_divergence(16) == limits[0]
    assert largest_divergence(0.5) == limits[-1]
    assert drift(report_of(kl=0.5, bits=8.5)) == ["its predictions diverge by 0.5000 nats, more than 0.3"]
    assert drift(report_of(kl=0.5, bits=4.5)) == []


def test_the_table_says_what_was_found() -> None:
    text = "\n".join(report_lines(report_of()))
    for expected in ("mean 0.10000", "max 0.90000", "+5.00 %", "90.0 % of tokens", "× 0.250", "0.0300 after layer 2"):
        assert expected in text
    assert "DIFFERENT\n  texts differ" in "\n".join(report_lines(replace(report_of(), token_ids=["texts differ"])))


HOSTILE = '<script>alert("x")</script>&\'"]]>'


def page_of(report: Report, *others: Report) -> ElementTree.Element:
    """The page, parsed as XML: it is well-formed."""
    return ElementTree.fromstring(report_page(report, others).removeprefix("<!DOCTYPE html>"))


def test_the_page_escapes_names() -> None:
    report = report_of(HOSTILE)
    report = replace(
        report,
        created=HOSTILE,
        source=replace(report.source, name=HOSTILE, types={HOSTILE: 1}),
        text=replace(report.text, name=HOSTILE),
        token_ids=[HOSTILE],
        template=[HOSTILE],
    )
    page = page_of(report, report_of(HOSTILE + "2", 600))
    assert not list(page.iter("script"))
    assert page.findtext("body/h1") == f"{HOSTILE} beside {HOSTILE}"
    assert any(HOSTILE in (cell.text or "") for cell in page.iter("td"))


def test_the_page_loads_nothing() -> None:
    text = report_page(report_of(), [report_of("other.gguf", 700, 0.01)])
    assert "http" not in text
    assert "src=" not in text
    assert "href" not in text


def test_plots_on_the_page() -> None:
    """Divergence over the tokens and layers always, sizes where there are other models."""
    assert len(list(page_of(report_of()).iter("svg"))) == 2
    assert len(list(page_of(replace(report_of(), layer_errors=[])).iter("svg"))) == 1
    page = page_of(report_of(), report_of("mid.gguf", 800, 0.01), report_of("bad.gguf", 900, 0.5))
    sizes = list(page.iter("svg"))[2]
    dots = {dot.get("class"): dot for dot in sizes.iter("circle")}
    assert len(list(sizes.iter("circle"))) == 3
    marked, mid = (float(dots["marked"].get(axis, "")) for axis in ("cx", "cy"))
    assert {"small.gguf", "mid.gguf", "bad.gguf"} <= {text.text for text in sizes.iter("text")}
    line = next(sizes.iter("polyline")).get("points", "").split()
    assert len(line) == 2  # bad.gguf is larger and worse than another
    assert line[0] == f"{marked},{mid}"


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 9)), min_size=1, max_size=12))
def test_nothing_beats_the_front(points: list[tuple[int, float]]) -> None:
    reports = [report_of(f"{number}", size, kl) for number, (size, kl) in enumerate(points)]
    front = pareto(reports)
    for report in reports:
        beaten = any(o.derived.bytes <= report.derived.bytes and o.kl.mean <= report.kl.mean for o in front)
        assert beaten or report in front
    for a, b in pairwise(front):
        assert a.derived.bytes < b.derived.bytes
        assert a.kl.mean > b.kl.mean


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_checkpoint(tiny_checkpoint(), tmp_path / "tiny.gguf", "gguf")
    return tmp_path / "tiny.gguf"


def fitting(name: str = "tiny.gguf", kl: float = 0.1) -> Report:
    """A report whose derived model looks like the tiny one."""
    checkpoint = tiny_checkpoint()
    report = report_of(name, sum(weight.nbytes for weight in checkpoint.tensors.values()), kl)
    return replace(report, derived=replace(report.derived, types=tensor_types(checkpoint)))


def test_a_report_lies_beside_its_model(model: Path) -> None:
    checkpoint = tiny_checkpoint()
    assert load_report(resolve(model), checkpoint) is None
    assert save_report(fitting(), model) == report_beside(model) == model.with_name("tiny.gguf.report.json")
    assert load_report(resolve(model), checkpoint) == fitting()
    forget_report(model)
    forget_report(model)
    assert load_report(resolve(model), checkpoint) is None


def test_a_report_of_other_weights_is_passed_over(model: Path) -> None:
    save_report(report_of(), model)
    assert load_report(resolve(model), tiny_checkpoint()) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', "\xff"])
def test_a_damaged_report_does_not_hide_the_model(model: Path, text: str) -> None:
    report_beside(model).write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match=r"tiny\.gguf\.report\.json"):
        assert load_report(resolve(model), tiny_checkpoint()) is None


def test_a_stored_model_keeps_its_report(model: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    import_file(model, "tiny", store=store, report=fitting().as_json())
    assert load_report(resolve("tiny", store), tiny_checkpoint()) == fitting()
    store.copy("tiny", "copy")
    assert store.find("copy").report == fitting().as_json()
    import_file(model, "tiny", store=store, replace=True)  # the same weights again: what is known of them stays
    assert store.find("tiny").report == fitting().as_json()


def test_models_of_one_source_find_each_other(model: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    import_file(model, "stored", store=store, report=fitting("stored", 0.2).as_json())
    ours = fitting("ours.gguf")
    for name, report in {
        "ours.gguf": ours,
        "other.gguf": report_of("other.gguf"),
        "of-another-source.gguf": replace(report_of("a.gguf"), source_identity="def"),
        "on-another-text.gguf": replace(report_of("b.gguf"), text=replace(ours.text, digest="1" * 64)),
    }.items():
        save_report(report, tmp_path / name)
    report_beside(tmp_path / "damaged.gguf").write_text("{")
    assert {report.derived.name for report in siblings(ours, tmp_path, store)} == {"stored", "other.gguf"}
