"""The objectives that need more than rows, by recipe, or make something else: a teacher, a reward model."""
# ruff: noqa: F811 (fixtures)

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from test_finetune import NAMES, PLACES, _one_thread, recipe, rows, served_loss, store  # noqa: E402, F401

from puna.checkpoint import open_checkpoint  # noqa: E402
from puna.errors import StoreError, TrainingError  # noqa: E402
from puna.store import ModelName, Store, resolve  # noqa: E402
from puna.train.assemble import TEACHER  # noqa: E402
from puna.train.finetune import prepare, run  # noqa: E402
from puna.train.runs import Run  # noqa: E402


def write_pairs(path: Path) -> Path:
    pairs = [
        {"prompt": f"Tell about {n}.", "chosen": f" {n} went to the {p}.", "rejected": f" {n} did not go to the {p}."}
        for n in NAMES
        for p in PLACES
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path


def test_a_student_of_fewer_layers_learns_from_its_teacher(store: Store, rows: Path) -> None:
    objective = {"type": "distill", "teacher": "stories", "top_k": 32}
    method = {"type": "full", "layers": [0, 1, 4]}
    changes: dict[str, Any] = {"objective": objective, "method": method, "training": {"learning_rate": 2e-3}}
    prepared = prepare(recipe(rows, **changes), store)
    stories = open_checkpoint(resolve("stories", store).path)
    assert prepared.estimate.other_models == sum(weight.nbytes for weight in stories.tensors.values())
    outcome = run(prepared)
    assert outcome.after < outcome.before - 0.5
    made = open_checkpoint(resolve("bot", store).path)
    assert (stories.config.num_hidden_layers, made.config.num_hidden_layers) == (5, 3)
    assert store.find("bot").adapters == ()
    # What the teacher would say, not the rows: its divergence from the student fell, by the engine that serves both.
    before, after = Run.read(prepared.folder).metrics()[0], Run.read(prepared.folder).metrics()[-1]
    assert after["validation_divergence"] == pytest.approx(outcome.after, rel=0.05)
    assert after["divergence"] < before["divergence"]
    assert served_loss(store, "bot", prepared) == pytest.approx(after["validation_cross_entropy"], abs=1e-3)
    (cached,) = (prepared.folder / TEACHER).iterdir()
    assert cached.name.endswith("-top32")


@pytest.mark.parametrize("knobs", [{"top_k": 0}, {"direction": "reverse"}])
def test_a_teacher_that_reads_along_keeps_nothing(store: Store, rows: Path, knobs: dict[str, Any]) -> None:
    objective = {"type": "distill", "teacher": "stories", **knobs}
    prepared = prepare(recipe(rows, objective=objective, training={"steps": 2}), store)
    assert run(prepared).before == pytest.approx(0, abs=1e-6)  # a model does not diverge from itself
    assert not (prepared.folder / TEACHER).exists()


def test_teachers_that_cannot_be_are_refused_before_loading(store: Store, rows: Path) -> None:
    def distil(teacher: str, **knobs: Any) -> None:
        prepare(recipe(rows, output="student", objective={"type": "distill", "teacher": teacher, **knobs}), store)

    with pytest.raises(StoreError, match="no model storeis is in the store"):
        distil("storeis")
    with pytest.raises(TrainingError, match="top_k of distill must be at most the vocabulary's 512"):
        distil("stories", top_k=513)
    run(prepare(recipe(rows, training={"steps": 1}), store))
    with pytest.raises(TrainingError, match="the teacher bot is a model with an adapter"):
        distil("bot")
    with pytest.raises(TrainingError, match=r"the layers of a student must be different ones of 0 to 4, found \[5\]"):
        prepare(recipe(rows, output="small", method={"type": "full", "layers": [5]}), store)


def test_a_reward_model_prefers_and_is_kept_in_its_folder(store: Store, tmp_path: Path) -> None:
    training = {"learning_rate": 1e-3, "answers": 4}
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    prepared = prepare(recipe(pairs, output="judge", objective={"type": "reward"}, training=training), store)
    outcome = run(prepared)
    assert (outcome.manifest, outcome.path) == (None, prepared.folder / "reward-model")
    assert store.read(ModelName.parse("judge")) is None
    record = Run.read(prepared.folder).record
    assert (record.status, record.result) == ("finished", str(outcome.path))
    assert record.before.numbers["loss"] == pytest.approx(math.log(2))
    assert (record.before.numbers["accuracy"], record.after.numbers["accuracy"]) == (0.5, 1)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(outcome.path).float().eval()
    right = 0
    for example in prepared.data.sources[0].held_out:
        both = [prepared.data.sources[0].renderer.render_answer(s).ids for s in (example.chosen, example.rejected)]
        with torch.no_grad():
            chosen, rejected = (model(torch.from_numpy(ids[None].astype("int64"))).logits.item() for ids in both)
        right += chosen > rejected
    assert right == prepared.data.held_out_rows > 0
