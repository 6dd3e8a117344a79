"""The folder of a training run: begun once, gone on with only as it was, and never taken for what it is not."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import PunaError, TrainingError
from puna.train.runs import DataFacts, Evaluation, Run, RunFolder, RunInputs, RunRecord, Sample, runs_home
from puna.train.runs.environment import this_start

RECIPE = '# fast\nmodel = "smollm2"\nlearning_rate = 1e-4\n[lora]\nrank = 8\n'
INPUTS = RunInputs(
    name="support-bot",
    model="smollm2",
    model_digest="a" * 64,
    objective="sft",
    method="lora",
    seed=7,
    steps=3,
    data=(DataFacts("rows.jsonl", "b" * 32, rows=100, held_out=10),),
)
BEFORE = Evaluation({"loss": 2.5, "exact_match": 0.0}, (Sample("Hi", "Hi hi", "Hello."),))
AFTER = Evaluation({"loss": 1.5, "exact_match": 0.75}, (Sample("Hi", "Hello.", "Hello."),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def start(folder: Path) -> RunFolder:
    return RunFolder.start(RECIPE, INPUTS, folder)


def test_a_whole_run(folder: Path) -> None:
    with start(folder) as run:
        assert run.states == folder / "states"
        assert Run.read(folder).state == "running"
        run.note(parameters=1000, trained_parameters=10, before=BEFORE)
        counted = replace(INPUTS.data[0], tokens=5000, trained_tokens=700)
        run.note(data=[counted])
        run.log({"step": 1, "loss": 2.25, "validation_loss": None})
        run.finish("support-bot", AFTER)
    found = Run.read(folder)
    assert (found.state, found.name, found.recipe) == ("finished", "run", RECIPE)
    record = found.record
    assert (record.before, record.after, record.result) == (BEFORE, AFTER, "support-bot")
    assert record.inputs == replace(INPUTS, data=(counted,))
    assert (record.parameters, record.trained_parameters) == (1000, 10)
    assert record.ended is not None
    assert record.starts[0].versions["python"] == ".".join(map(str, sys.version_info[:3]))
    (row,) = found.metrics()
    assert {name: value for name, value in row.items() if name != "time"} == {"step": 1, "loss": 2.25}


def test_the_usual_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PUNA_HOME", str(tmp_path))
    inputs = replace(INPUTS, name="../my bot:v2")
    runs = [RunFolder.start(RECIPE, inputs) for _ in range(2)]
    assert runs_home() == tmp_path / "runs"
    assert {run.folder.parent for run in runs} == {runs_home()}
    assert runs[0].name != runs[1].name
    for run in runs:
        assert run.name.startswith("my-bot-v2-20")


def test_a_folder_in_use_is_refused(folder: Path, tmp_path: Path) -> None:
    start(folder).close()
    with pytest.raises(TrainingError, match="holds a training run already"):
        start(folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    for path in (tmp_path / "thesis", tmp_path / "thesis" / "thesis.tex"):
        with pytest.raises(TrainingError, match="holds no training run; choose another folder"):
            start(path)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    start(tmp_path / "empty").close()


def test_a_recipe_that_is_not_toml_begins_nothing(folder: Path) -> None:
    with pytest.raises(TrainingError, match="the recipe is not a recipe in TOML"):
        RunFolder.start("rank = ", INPUTS, folder)
    assert not folder.exists()


def test_one_process_at_a_time(folder: Path) -> None:
    run = start(folder)
    with pytest.raises(TrainingError, match="another process trains in"):
        RunFolder.resume(RECIPE, INPUTS, folder)
    run.close()
    RunFolder.resume(RECIPE, INPUTS, folder).close()


def test_a_killed_run_is_interrupted_and_goes_on(folder: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_run_folder import BEFORE, start
run = start(Path({str(folder)!r}))
run.note(before=BEFORE)
for step in (1, 2, 3, 4):
    run.log({{"step": step, "loss": float(step)}})
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert Run.read(folder).state == "interrupted"
    with RunFolder.resume(RECIPE.replace("# fast\n", ""), INPUTS, folder) as run:
        assert run.record.before == BEFORE
        assert len(run.record.starts) == 2
        assert len(Run.read(folder).metrics()) == 4  # before the first new step nothing is thrown away
        for step in (3, 4, 5):
            run.log({"step": step, "loss": 10.0 * step})
    rows = Run.read(folder).metrics()
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 2), (3, 30), (4, 40), (5, 50)]


@pytest.mark.parametrize(
    ("recipe", "inputs", "difference"),
    [
        (RECIPE.replace("1e-4", "2e-4"), INPUTS, r"learning_rate was 0\.0001 and is 0\.0002"),
        (RECIPE.replace("rank = 8", "alpha = 8"), INPUTS, r"lora\.rank was 8 and is not set"),
        (RECIPE, replace(INPUTS, model_digest="c" * 64), r"the model smollm2 changed .* aaaaaaaaaaaaaaaa, now cccccc"),
        (
            RECIPE,
            replace(INPUTS, data=(DataFacts("rows.jsonl", "d" * 32, 100),)),
            r"data set 1 \(rows\.jsonl\) changed",
        ),
        (RECIPE, replace(INPUTS, data=INPUTS.data * 2), r"data set 2 \(rows\.jsonl\) changed .*digest None, now bbb"),
    ],
)
def test_only_the_same_run_goes_on(folder: Path, recipe: str, inputs: RunInputs, difference: str) -> None:
    start(folder).close()
    before = (folder / "run.json").read_bytes()
    with pytest.raises(TrainingError, match=difference):
        RunFolder.resume(recipe, inputs, folder)
    assert (folder / "run.json").read_bytes() == before
    RunFolder.resume(RECIPE, INPUTS, folder).close()  # the refusal holds no lock


def test_an_error_fails_the_run_with_its_sentence(folder: Path) -> None:
    with pytest.raises(TrainingError), start(folder):
        raise TrainingError("step 3 gave a loss of nan, so training stopped")
    found = Run.read(folder)
    assert (found.state, found.record.error) == ("failed", "step 3 gave a loss of nan, so training stopped")
    with pytest.raises(ZeroDivisionError), RunFolder.resume(RECIPE, INPUTS, folder):
        raise ZeroDivisionError("by 0")
    assert Run.read(folder).record.error == "ZeroDivisionError: by 0"
    with pytest.raises(KeyboardInterrupt), RunFolder.resume(RECIPE, INPUTS, folder):
        raise KeyboardInterrupt
    assert Run.read(folder).state == "interrupted"


def test_a_finished_run_is_done(folder: Path) -> None:
    with start(folder) as run:
        run.finish("support-bot", AFTER)
    with pytest.raises(TrainingError, match="has finished already"):
        RunFolder.resume(RECIPE, INPUTS, folder)


def test_resuming_nothing(folder: Path) -> None:
    with pytest.raises(TrainingError, match="holds no training run"):
        RunFolder.resume(RECIPE, INPUTS, folder)
    assert not folder.exists()


def test_steps_go_up(folder: Path) -> None:
    with start(folder) as run:
        run.log({"step": 2, "loss": 1.0})
        for step in (2, 1, -1, 3.0):
            with pytest.raises(ValueError, match="cannot follow step 2"):
                run.log({"step": step})


NUMBERS = st.dictionaries(st.text(max_size=5), st.floats() | st.integers(-(1 << 53), 1 << 53), max_size=4)


def same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and not math.isfinite(a) and math.isnan(b))


@settings(deadline=None)
@given(NUMBERS)
def test_a_record_survives_storage(numbers: dict[str, float]) -> None:
    record = RunRecord(INPUTS, (this_start(),), before=Evaluation(numbers), after=AFTER)
    text = json.dumps(record.as_json(), allow_nan=False)
    read = RunRecord.from_json(json.loads(text), "here")
    assert read.before is not None
    assert read.before.numbers.keys() == numbers.keys()
    assert all(same(value, read.before.numbers[name]) for name, value in numbers.items())
    assert replace(read, before=record.before) == record


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.data(), JSON)
def test_a_damaged_record_is_refused(data: st.DataObject, value: Any) -> None:
    """Any part replaced by anything: a TrainingError, or a record that can be stored again."""
    raw = json.loads(json.dumps(RunRecord(INPUTS, (this_start(),), before=BEFORE, after=AFTER).as_json()))
    place: Any = raw
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    try:
        record = RunRecord.from_json(raw, "here")
    except TrainingError:
        return
    assert RunRecord.from_json(json.loads(json.dumps(record.as_json(), allow_nan=False)), "here")


def test_text_that_utf8_does_not_have_loses_no_run(folder: Path) -> None:
    with start(folder) as run:
        run.finish("bot", Evaluation({}, (Sample("\ud800", "é"),)))
    assert Run.read(folder).record.after == Evaluation({}, (Sample("?", "é"),))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 2}', "\xff", "[" * 100_000])
def test_a_damaged_file_is_named(folder: Path, text: str) -> None:
    start(folder).close()
    (folder / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(TrainingError, match=r"run\.json"):
        Run.read(folder)


@pytest.mark.parametrize("name", ["recipe.toml", "metrics.jsonl"])
def test_other_damage_is_named(folder: Path, name: str) -> None:
    start(folder).close()
    (folder / name).write_bytes(b"\xff\n")
    with pytest.raises(PunaError, match=name):
        _ = (Run.read(folder).recipe_values(), Run.read(folder).metrics())
