"""Fine-tuning from end to end, on a real model of 260 thousand parameters: what was learnt is what is served."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from puna import LLM  # noqa: E402
from puna.checkpoint import open_checkpoint, save_checkpoint  # noqa: E402
from puna.errors import CapacityError, DataError, PunaError, StoreError, TrainingError  # noqa: E402
from puna.model.shapes import parameter_count  # noqa: E402
from puna.ops.torch_ops import document_batch  # noqa: E402
from puna.store import Store, import_file, resolve  # noqa: E402
from puna.train.estimate import estimate  # noqa: E402
from puna.train.finetune import Prepared, make_module, prepare, run  # noqa: E402
from puna.train.recipe import Recipe, recipe_from  # noqa: E402
from puna.train.runs import Run  # noqa: E402
from puna.train.training_state import newest_state  # noqa: E402

NAMES = ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna")
PLACES = ("park", "sea", "zoo", "hill", "shop")


@pytest.fixture
def store(shared_data: Path, tmp_path: Path) -> Store:
    store = Store(tmp_path / "home", notify=lambda message: None)
    import_file(shared_data / "weights" / "stories260K" / "stories260K.gguf", "stories", store=store)
    return store


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    found = [{"prompt": f"Tell about {n}.", "completion": f" {n} went to the {p}."} for n in NAMES for p in PLACES]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def recipe(rows: Path, **changes: Any) -> Recipe:
    training = {"steps": 30, "length": 128, "evaluate_every": 10, **changes.pop("training", {})}
    data = [{"path": str(rows), "validation": 0.2}]
    return recipe_from({"model": "stories", "output": "bot", "data": data, "training": training, **changes})


def served_loss(store: Store, name: str, prepared: Prepared) -> float:
    """The held-out loss as the served model gives it: by its own engine, from the text of the rows."""
    total, count = 0.0, 0
    with LLM.load(resolve(name, store), ops="reference", kv_type="f32") as llm:
        for example in prepared.data.sources[0].held_out:
            ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(example.prompt)]
            answer = [*llm.tokenizer.encode_continuation(example.text), llm.tokenizer.eos_id]
            logits = torch.from_numpy(llm.logits([*ids, *answer])).double().log_softmax(-1)
            total -= sum(logits[len(ids) - 1 + place, token].item() for place, token in enumerate(answer))
            count += len(answer)
    return total / count


@pytest.mark.parametrize(
    ("changes", "close"),
    [
        ({}, 1e-3),
        ({"save": {"merge": True, "type": "F32"}}, 1e-3),
        ({"save": {"merge": True, "format": "safetensors"}}, 1e-3),
        ({"method": {"dora": True, "rank": 4}, "save": {"merge": True}}, 1e-3),
        ({"method": {"type": "full"}, "training": {"learning_rate": 1e-3}}, 1e-3),
    ],
    ids=["lora", "merged", "safetensors", "dora", "full"],
)
def test_what_is_learnt_is_what_is_served(store: Store, rows: Path, changes: dict[str, Any], close: float) -> None:
    prepared = prepare(recipe(rows, **changes), store)
    outcome = run(prepared)
    assert outcome.before is not None
    assert outcome.after is not None
    assert outcome.after < outcome.before - 1.5
    assert served_loss(store, "stories", prepared) == pytest.approx(outcome.before, abs=1e-3)
    assert served_loss(store, "bot", prepared) == pytest.approx(outcome.after, abs=close)
    manifest = store.find("bot")
    assert (manifest.lineage.parent, manifest.lineage.method) == ("stories:latest", "finetune")
    assert len(manifest.adapters) == (0 if changes else 1)
    assert (manifest.files == store.find("stories").files) == (not changes)
    with LLM.load(resolve("bot", store)) as llm:
        assert llm.generate("Tell about Ben.", temperature=0, max_tokens=8).text.startswith(" Ben went to the ")


@pytest.mark.filterwarnings("ignore:.*were written as F16")
def test_qlora_over_a_quantized_file_and_over_floats(store: Store, rows: Path, tmp_path: Path) -> None:
    save_checkpoint(open_checkpoint(resolve("stories", store).path), tmp_path / "q.gguf", "gguf", "Q4_1")
    import_file(tmp_path / "q.gguf", "quantized", store=store)
    for changes, kind, close in (
        ({"model": "quantized"}, "Q4_1", 1e-3),
        ({"method": {"type": "qlora", "base_type": "Q8_0"}}, "Q8_0", 0.02),  # served over the floats that there were
    ):
        prepared = prepare(recipe(rows, output=kind.lower(), **changes), store)
        module = make_module(prepared)
        assert kind in {weight.kind.name for weight in module._encoded.values()}
        assert prepared.estimate.weights == sum(p.nbytes for p in module.parameters() if not p.requires_grad)
        outcome = run(prepared)
        assert outcome.after < outcome.before - 1.5
        assert served_loss(store, kind.lower(), prepared) == pytest.approx(outcome.after, abs=close)


@pytest.mark.filterwarnings("ignore:.*were written as F16")
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"type": "qlora"},
        {"type": "full"},
        {"type": "full", "frozen": "embed|layers.0"},
        {"type": "lora", "dora": True},
    ],
    ids=["lora", "qlora", "full", "frozen", "dora"],
)
def test_the_run_is_recorded(store: Store, rows: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"method": method, "training": {"learning_rate": 1e-3}}
    if method.get("type") == "full" or method.get("dora"):
        changes["save"] = {"type": "F32", "merge": "dora" in method}
    if method.get("type") == "qlora":
        save_checkpoint(open_checkpoint(resolve("stories", store).path), tmp_path / "q.gguf", "gguf", "Q4_1")
        import_file(tmp_path / "q.gguf", "quantized", store=store)
        changes["model"] = "quantized"
    prepared = prepare(recipe(rows, **changes), store)
    outcome = run(prepared)
    kept = Run.read(prepared.folder)
    assert (kept.state, kept.record.result) == ("finished", "bot:latest")
    assert kept.record.before.numbers["loss"] == outcome.before
    assert kept.record.after.numbers["loss"] == outcome.after
    assert [row["step"] for row in kept.metrics()] == list(range(1, 31))
    validated = [row["validation_loss"] for row in kept.metrics() if "validation_loss" in row]
    assert min(validated) == pytest.approx(outcome.after, abs=1e-6)
    # The answers of the page are those of the served models.
    for name, evaluation in ((prepared.recipe.model, kept.record.before), ("bot", kept.record.after)):
        with LLM.load(resolve(name, store)) as llm:
            for sample, example in zip(evaluation.samples, prepared.data.sources[0].held_out, strict=False):
                assert (sample.prompt, sample.wanted) == (f"<s>{example.prompt}", example.text)
                served = llm.generate(example.prompt, temperature=0, max_tokens=64).text
                assert sample.answer.strip() == served.strip()
        assert len(evaluation.samples) == 2
    assert kept.record.trained_parameters == prepared.estimate.trained_parameters


def test_killed_and_resumed(store: Store, rows: Path) -> None:
    code = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}
import os, signal, torch; from pathlib import Path
from puna.store import Store; from puna.train.finetune import prepare, run; from test_finetune import recipe
torch.set_num_threads(1)
prepared = prepare(recipe(Path({str(rows)!r})), Store(Path({str(store.home)!r})))
run(prepared, lambda report: report.step == 17 and os.kill(os.getpid(), signal.SIGKILL))
"""
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == -signal.SIGKILL
    with pytest.raises(TrainingError, match=r"training\.steps was 30 and is 31"):
        prepare(recipe(rows, training={"steps": 31}), store)
    text = rows.read_text()
    rows.write_text(text + text.splitlines()[0].replace("park", "lake") + "\n")
    with pytest.raises(TrainingError, match=r"rows\.jsonl.* changed since it began"):
        prepare(recipe(rows), store)
    rows.write_text(text)
    begun = prepare(recipe(rows), store)
    assert begun.begun is not None
    steps = []
    outcome = run(begun, lambda report: steps.append(report.step))
    assert steps == list(range(11, 31))
    whole = prepare(recipe(rows, output="whole"), store)
    expected = run(whole)
    assert (outcome.before, outcome.after) == (expected.before, expected.after)
    one, other = (newest_state(prepared.folder / "states") for prepared in (begun, whole))
    assert all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())
    assert [r["loss"] for r in Run.read(begun.folder).metrics()] == [
        r["loss"] for r in Run.read(whole.folder).metrics()
    ]
    with pytest.raises(TrainingError, match="finished already"):
        prepare(recipe(rows), store)
    assert run(prepare(recipe(rows), store, restart=True)).after == expected.after


def test_preparing_writes_nothing(store: Store, rows: Path, tmp_path: Path) -> None:
    def everything() -> set[Path]:
        return {path for path in tmp_path.rglob("*") if path.name != "lock"}

    before = everything()
    prepare(recipe(rows), store)
    assert everything() == before


def test_preferences(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pairs = [
        {"prompt": f"Tell about {n}.", "chosen": f" {n} went to the {p}.", "rejected": f" {n} did not go to the {p}."}
        for n in NAMES
        for p in PLACES
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    changes: dict[str, Any] = {"objective": {"type": "dpo"}, "training": {"learning_rate": 1e-3, "answers": 4}}
    prepared = prepare(recipe(path, **changes), store)
    outcome = run(prepared)
    assert outcome.before == pytest.approx(0.6931, abs=1e-3)
    assert outcome.after < 0.4
    rows = Run.read(prepared.folder).metrics()
    assert rows[-1]["validation_accuracy"] == 1
    with pytest.raises(DataError, match="the objective sft learns from conversations or texts"):
        prepare(recipe(path, output="other"), store)


def test_what_cannot_be_is_refused_before_anything_is_loaded(store: Store, rows: Path, tmp_path: Path) -> None:
    store.copy("stories", "taken")
    with pytest.raises(StoreError, match="a model taken:latest exists already"):
        prepare(recipe(rows, output="taken"), store)
    with pytest.raises(StoreError, match="no model storeis is in the store"):
        prepare(recipe(rows, model="storeis"), store)
    rows.write_text(rows.read_text() + "{\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:31"):
        prepare(recipe(rows), store)
    spoilt = recipe(rows)
    data = (dataclasses.replace(spoilt.data[0], skip_bad=1),)
    assert len(prepare(dataclasses.replace(spoilt, data=data), store).data.bad_rows) == 1
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    chat.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(PunaError, match=r"chat\.jsonl:1: this model has no chat template"):
        prepare(recipe(chat), store)


def test_memory_is_told_and_refused(store: Store, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(recipe(rows, method={"type": "full"}), store)
    assert prepared.estimate.trained_parameters == parameter_count(prepared.checkpoint.config)
    assert prepared.estimate.optimizer == 8 * prepared.estimate.trained_parameters
    plan = dataclasses.replace(prepared.plan, recompute=True)
    assert estimate(prepared.recipe, prepared.checkpoint, plan).activations < prepared.estimate.activations
    monkeypatch.setattr("puna.train.estimate._available", lambda device: 10**8)
    with pytest.raises(CapacityError, match=r"needs about 0\.\d GB of memory, but 0\.1 GB are free; train with LoRA"):
        prepare(recipe(rows, method={"type": "full"}), store)
    assert prepare(recipe(rows, method={"type": "full"}), store, force=True).plan.recompute


@pytest.mark.parametrize("method", ["lora", "full"])
def test_activations_are_about_what_is_kept(store: Store, rows: Path, method: str) -> None:
    """Against the bytes that autograd says it keeps for a sequence that is full."""
    prepared = prepare(recipe(rows, method={"type": method}), store)
    module = make_module(prepared)
    stream = prepared.data.stream(0, prepared.plan.length, "drop", 1)
    packed = next(stream)
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module.train()
        hidden = module.hidden(document_batch(packed.ids, packed.seq_starts))
    measured = sum(kept.values()) / len(packed.ids) * prepared.plan.length
    assert hidden.requires_grad
    assert 0.7 < prepared.estimate.activations / measured < 1.6
