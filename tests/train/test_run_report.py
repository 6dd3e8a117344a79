"""Runs in numbers, side by side, and as pages."""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_run_folder import AFTER, BEFORE, INPUTS, RECIPE

from puna.errors import TrainingError
from puna.train.runs import Evaluation, Run, RunFolder, Sample
from puna.train.runs.differences import differing, recipe_values
from puna.train.runs.library import find_run, list_runs, remove_run
from puna.train.runs.report import comparison_page, run_page
from puna.train.runs.summary import comparison, final_numbers, overview, shown

HOSTILE = '<script>alert("x")</script>&\'"]]>\x1b'


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PUNA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def trained(losses: Sequence[float], recipe: str = RECIPE, name: str = "bot", **changes: str) -> Run:
    with RunFolder.start(recipe, replace(INPUTS, name=name, **changes)) as run:
        run.note(before=BEFORE, parameters=1000, trained_parameters=15)
        for step, loss in enumerate(losses, start=1):
            row: Mapping[str, float | None] = {"step": step, "loss": loss, "tokens": 100, "seconds": 0.5}
            run.log({**row, "validation_loss": loss + 0.25 if step % 2 == 0 else None})
        run.finish("bot", AFTER)
    return Run.read(run.folder)


def parsed(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))


def cells(page: str) -> list[list[str]]:
    return [[cell.text or "" for cell in row] for row in parsed(page).iter("tr")]


def test_the_last_numbers() -> None:
    assert final_numbers(trained([3.0, 1.0, 2.0, 1.5])) == {
        "steps": 4,
        "loss": 1.5,
        "total_tokens": 400,
        "total_seconds": 2.0,
        "validation_loss": 1.75,
        "best_validation_loss": 1.25,
        "loss_before": 2.5,
        "exact_match_before": 0.0,
        "loss_after": 1.5,
        "exact_match_after": 0.75,
    }
    assert final_numbers(trained([math.nan]))["steps"] == 1
    assert "loss" not in final_numbers(trained([math.nan]))


def test_recipes_key_by_key() -> None:
    values = recipe_values('a = 1\n[b]\nc = [1, 2]\n[[d]]\ne = true\n[[d]]\ne = "x"\n', "here")
    assert values == {"a": 1, "b.c": [1, 2], "d[0].e": True, "d[1].e": "x"}
    assert differing([values, values]) == {}
    other = recipe_values('a = 1.0\nf = 1\n[b]\nc = [1, 3]\n[[d]]\ne = 1\n[[d]]\ne = "x"\n', "here")
    assert differing([values, other]) == {"b.c": [[1, 2], [1, 3]], "d[0].e": [True, 1], "f": [None, 1]}


def test_side_by_side() -> None:
    a = trained([3.0, 2.0])
    b = trained([3.0, 1.0, 0.5], RECIPE.replace("rank = 8", "rank = 16"), model_digest="e" * 64)
    found = comparison([a, b])
    assert found["runs"] == [a.name, b.name]
    assert found["recipe"] == {"lora.rank": [8, 16]}
    assert found["circumstances"] == {"model_digest": ["a" * 64, "e" * 64]}
    assert found["numbers"]["loss"] == [2.0, 0.5]
    assert found["numbers"]["steps"] == [2, 3]


def test_the_page_of_a_run() -> None:
    run = trained([3.0 - step / 10 for step in range(30)])
    page = run_page(run)
    rows = cells(page)
    assert ["loss", "2.5", "1.5"] in rows
    assert ["exact match", "0", "0.75"] in rows
    assert ["prompt", "Hi"] in rows
    assert ["wanted", "Hello."] in rows
    assert ["before", "Hi hi"] in rows
    assert ["rows.jsonl", "100", "10", "-", "-", "b" * 32] in rows
    assert ["parameters", "15 of 1,000 trained (1.50 %)"] in rows
    assert RECIPE in [element.text for element in parsed(page).iter("pre")]
    loss = next(parsed(page).iter("svg"))
    noisy, smooth, held_out = (len(line.get("points", "").split()) for line in loss.iter("polyline"))
    assert (noisy, smooth, held_out) == (30, 30, 15)
    for outside in ("http", "src=", "href", "<script"):
        assert outside not in page
    assert (run.folder / "report.html").read_text(encoding="utf-8") == page


def test_a_page_at_the_beginning_and_of_a_failure() -> None:
    run = RunFolder.start(RECIPE, INPUTS)
    assert not list(parsed(run_page(Run.read(run.folder))).iter("svg"))
    run.log({"step": 1, "loss": 3.0})
    assert len(list(parsed(run_page(Run.read(run.folder))).iter("svg"))) == 1
    run.fail("step 2 gave a loss of nan")
    assert "failed. step 2 gave a loss of nan." in (run.folder / "report.html").read_text(encoding="utf-8")


def test_no_text_escapes() -> None:
    data = (replace(INPUTS.data[0], name=HOSTILE),)
    inputs = replace(INPUTS, name="bot", model=HOSTILE, objective=HOSTILE, method=HOSTILE, device=HOSTILE, data=data)
    evaluation = Evaluation({HOSTILE: 1.0}, (Sample(HOSTILE, HOSTILE, HOSTILE),))
    with RunFolder.start(f"# {HOSTILE[:-1]}\na = '''{HOSTILE[:5]}'''", inputs) as run:
        run.note(before=evaluation)
        run.log({"step": 1, HOSTILE: 1.0})
        run.finish(HOSTILE, evaluation)
    found = Run.read(run.folder)
    for page in (run_page(found), comparison_page([found, trained([1.0])])):
        assert not list(parsed(page).iter("script"))
        assert "\x1b" not in page
    assert "\x1b" not in shown(HOSTILE)


def test_memory_has_a_unit_and_no_noise() -> None:
    with RunFolder.start(RECIPE, INPUTS) as run:
        for step in range(30):
            run.log({"step": step, "memory_bytes": 1.9e9})
    page = parsed(run_page(Run.read(run.folder)))
    assert next(element.text for element in page.iter("h2")) == "Memory, GB"
    (line,) = page.iter("polyline")
    assert len({pair.split(",")[1] for pair in line.get("points", "").split()}) == 1
    assert {"1.8", "1.9", "2"} <= {text.text for text in page.iter("text")}


def test_the_page_of_several() -> None:
    a, b = trained([3.0, 2.0]), trained([3.0, 1.0, 0.5], RECIPE.replace("rank = 8", "rank = 16"))
    page = comparison_page([a, b])
    assert ["lora.rank", "8", "16"] in cells(page)
    assert ["loss", "2", "0.5"] in cells(page)
    titles = [element.text for element in parsed(page).iter("h2")]
    assert titles == ["Recipes", "Circumstances", "Numbers", "Loss", "Validation loss"]
    loss, validation = parsed(page).iter("svg")
    assert [len(line.get("points", "").split()) for line in loss.iter("polyline")] == [2, 3]
    assert len(list(validation.iter("circle"))) == 2


def test_listed_and_found(home: Path) -> None:
    assert list_runs() == []
    a, b = trained([3.0]), trained([2.0], name="other")
    again = trained([3.0])
    assert find_run("bot") == again  # the newest
    remove_run(again)
    assert {run.folder for run in list_runs()} == {a.folder, b.folder}
    line = overview(a)
    assert (line["loss_before"], line["loss_after"], line["steps"], line["planned_steps"]) == (2.5, 1.5, 1, 3)
    assert find_run(a.name) == find_run(str(a.folder)) == find_run("bot") == a
    with pytest.raises(TrainingError, match="no training run 'bott'; did you mean bot"):
        find_run("bott")
    for nothing in ("", "zzzzzz", ".."):
        with pytest.raises(TrainingError, match="no training run"):
            find_run(nothing)
    (b.folder / "run.json").write_text("{")
    told: list[str] = []
    assert list_runs(notify=told.append) == [a]
    assert str(b.folder / "run.json") in told[0]


def test_removed(home: Path) -> None:
    a, b = trained([3.0]), trained([2.0], name="other")
    (b.folder / "my-adapter").mkdir()
    for run in (a, b):
        (run.folder / "states" / "step-1").mkdir(parents=True)
        remove_run(run)
    assert list_runs() == []
    assert list((home / "runs").iterdir()) == [b.folder]
    assert [path.name for path in b.folder.iterdir()] == ["my-adapter"]


def test_what_is_being_trained_stays() -> None:
    with RunFolder.start(RECIPE, INPUTS) as run:
        with pytest.raises(TrainingError, match="being trained in now"):
            remove_run(Run.read(run.folder))
        assert Run.read(run.folder).state == "running"
