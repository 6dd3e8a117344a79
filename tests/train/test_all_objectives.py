"""By recipe, the objectives that need more than rows or make another thing: a teacher, a score, sampled answers."""
# ruff: noqa: F811 (fixtures)

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from test_finetune import NAMES, PLACES, recipe, rows, served_loss, store  # noqa: E402, F401

from puna import LLM  # noqa: E402
from puna.chat.go_template import chat_template  # noqa: E402
from puna.chat.messages import Message  # noqa: E402
from puna.checkpoint import open_checkpoint  # noqa: E402
from puna.errors import DataError, StoreError, TrainingError  # noqa: E402
from puna.store import ModelName, Store, resolve  # noqa: E402
from puna.train.assemble import TEACHER  # noqa: E402
from puna.train.data.examples import Continuation, Conversation  # noqa: E402
from puna.train.data.render import Renderer  # noqa: E402
from puna.train.finetune import prepare, run  # noqa: E402
from puna.train.parallel import Ranks  # noqa: E402
from puna.train.rollouts import prompt_of  # noqa: E402
from puna.train.runs import Run  # noqa: E402
from puna.train.runs.summary import overview  # noqa: E402
from puna.train.trainer import StepReport  # noqa: E402


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


GRPO = {"type": "grpo", "reward": "regex", "pattern": "^He ", "group": 8, "prompts": 2, "max_tokens": 4, "beta": 0.001}
SAMPLED: dict[str, Any] = {
    "objective": GRPO,
    "training": {"steps": 8, "learning_rate": 0.01, "save_every": 2, "evaluate_every": 2},
}


def served_reward(store: Store, name: str, prompts: Sequence[str]) -> float:
    with LLM.load(resolve(name, store)) as llm:
        answers = [llm.generate(prompt, temperature=0, max_tokens=4).text for prompt in prompts]
    return sum(answer.lstrip().startswith("He ") for answer in answers) / len(answers)


def test_answers_that_are_rewarded_become_likelier(store: Store, rows: Path) -> None:
    prepared = prepare(recipe(rows, **SAMPLED), store)
    prompts = [example.prompt for example in prepared.data.sources[0].held_out]
    outcome = run(prepared)
    assert outcome.measure == "reward"
    assert 0 < outcome.before < outcome.after == 1
    assert outcome.before == served_reward(store, "stories", prompts)
    assert outcome.after == served_reward(store, "bot", prompts)
    record = Run.read(prepared.folder).record
    assert record.after.samples[0].prompt.endswith(prompts[0])
    assert record.after.samples[0].answer.startswith("He ")
    metrics = Run.read(prepared.folder).metrics()
    measured = {row["step"]: row["validation_reward"] for row in metrics if "validation_reward" in row}
    assert (len(metrics), list(measured)) == (8, [2, 4, 6, 8])
    assert outcome.after == max(measured.values())
    line = overview(Run.read(prepared.folder))
    assert (line["reward_before"], line["reward_after"], line["loss_before"]) == (outcome.before, outcome.after, None)

    class Stopped(Exception):
        pass

    def stop(report: StepReport) -> None:
        if report.step == 7:
            raise Stopped

    with pytest.raises(Stopped):
        run(prepare(recipe(rows, output="cut", **SAMPLED), store), stop)
    goes_on = prepare(recipe(rows, output="cut", **SAMPLED), store)
    steps: list[int] = []
    assert run(goes_on, lambda report: steps.append(report.step)).after == outcome.after
    assert steps == [7, 8]
    whole, cut = (
        [(row["loss"], row["reward"]) for row in Run.read(made.folder).metrics()] for made in (prepared, goes_on)
    )
    assert cut == whole


def test_prompts_without_room_are_refused_before_loading(store: Store, rows: Path, tmp_path: Path) -> None:
    objective = {**GRPO, "max_tokens": 125}
    with pytest.raises(DataError, match=r"the shortest prompt with 125 tokens of answer takes 1\d\d, more than 128"):
        prepare(recipe(rows, objective=objective), store)
    with pytest.raises(DataError, match="the objective grpo learns from conversations, or prompts with their compl"):
        prepare(recipe(write_pairs(tmp_path / "pairs.jsonl"), objective=GRPO), store)


def test_several_processes_are_refused_before_loading(store: Store, rows: Path) -> None:
    with pytest.raises(TrainingError, match="grpo samples answers by an engine that one process has, but 2 were"):
        prepare(recipe(rows, objective=GRPO), store, ranks=Ranks(0, 2))


def test_the_prompt_is_all_before_the_last_answer(store: Store) -> None:
    tokenizer = open_checkpoint(resolve("stories", store).path).tokenizer
    assert tokenizer is not None
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    renderer = Renderer(tokenizer, chat_template(source, tokenizer))
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    found = prompt_of(renderer, Conversation(tuple(Message(role, text) for role, text in turns), (1, 3)))
    text = tokenizer.decode(found.ids).decode()
    assert (text.endswith("[user]three</s>[assistant]"), "two" in text, found.expected) == (True, True, "four")
    raw = prompt_of(renderer, Continuation(" yes", "Is it?"))
    assert (tokenizer.decode(raw.ids).decode().endswith("Is it?"), raw.expected) == (True, " yes")
