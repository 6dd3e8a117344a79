"""Training of a model with an adapter: on from its weights, or refused with what to do instead."""
# ruff: noqa: F811 (fixtures)

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from lora_files import write_peft  # noqa: E402
from test_finetune import NAMES, PLACES, recipe, rows, served_loss, store  # noqa: E402, F401

from puna.checkpoint import open_checkpoint  # noqa: E402
from puna.checkpoint.lora import read_adapter  # noqa: E402
from puna.errors import TrainingError  # noqa: E402
from puna.llm.create import create  # noqa: E402
from puna.store import Store, resolve  # noqa: E402
from puna.tensor import Adapter, LowRank  # noqa: E402
from puna.train.finetune import make_module, prepare, run  # noqa: E402
from puna.train.runs import Run  # noqa: E402

METHOD = {"rank": 4, "targets": ["q_proj", "down_proj"]}


@pytest.fixture
def first(store: Store, rows: Path) -> float:
    """Trains ``first``, an adapter of rank 4 on two kinds of matrices, and gives its held-out loss."""
    after = run(prepare(recipe(rows, output="first", method=METHOD, training={"learning_rate": 3e-3}), store)).after
    assert after is not None
    return after


def with_adapter(store: Store, name: str, adapter: Adapter, folder: Path) -> None:
    create(store, name, from_="stories", adapters=[write_peft(folder, adapter)])


def test_it_goes_on_where_the_adapter_was(store: Store, rows: Path, first: float) -> None:
    """With its rank and targets; the result is one adapter of the model beneath, which serves what it learnt."""
    prepared = prepare(recipe(rows, model="first", output="second"), store)
    assert prepared.recipe.method.rank == 4
    assert prepared.recipe.method.targets == ("q_proj", "down_proj")
    outcome = run(prepared)
    assert outcome.before == pytest.approx(first, abs=1e-5)
    assert outcome.after < first - 0.01
    assert served_loss(store, "second", prepared) == pytest.approx(outcome.after, abs=1e-3)
    manifest = store.find("second")
    assert (len(manifest.adapters), manifest.files) == (1, store.find("stories").files)
    assert Run.read(prepared.folder).recipe_values()["method.rank"] == 4
    merged = prepare(recipe(rows, model="first", output="third", save={"merge": True, "type": "F32"}), store)
    assert run(merged).after == pytest.approx(outcome.after, abs=1e-5)
    assert store.find("third").adapters == ()
    assert served_loss(store, "third", merged) == pytest.approx(outcome.after, abs=1e-3)


def test_what_it_is_compared_with_is_the_adapter_it_began_with(
    store: Store,
    first: float,
    tmp_path: Path,
) -> None:
    """The reference of preferences: before the first step it is the policy, so the loss is log 2, and it stays."""
    pairs = [{"prompt": f"Tell about {n}.", "chosen": f" {p}.", "rejected": " no."} for n in NAMES for p in PLACES]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    objective, training = {"type": "dpo"}, {"steps": 8, "learning_rate": 3e-3, "answers": 4}
    outcome = run(prepare(recipe(path, model="first", objective=objective, training=training), store))
    assert outcome.before == pytest.approx(0.6931472, abs=1e-5)
    assert outcome.after < 0.5


def test_a_run_goes_on_only_from_the_adapter_it_began_with(store: Store, rows: Path, first: float) -> None:
    def stop(report: Any) -> None:
        if report.step == 17:
            raise KeyboardInterrupt

    changes: dict[str, Any] = {"model": "first", "output": "second"}
    with pytest.raises(KeyboardInterrupt):
        run(prepare(recipe(rows, **changes), store), stop)
    resumed = run(prepare(recipe(rows, **changes), store)).after
    changes["output"] = "whole"
    assert run(prepare(recipe(rows, **changes), store)).after == resumed
    changes["output"] = "third"
    with pytest.raises(KeyboardInterrupt):
        run(prepare(recipe(rows, **changes), store), stop)
    other = dataclasses.replace(store.find("second"), name="first")
    store.remove("first")
    store.add(lambda: other)
    with pytest.raises(TrainingError, match="the model first changed since it began"):
        prepare(recipe(rows, **changes), store)


def test_scales_and_alphas_change_nothing_of_what_it_begins_with(
    store: Store,
    rows: Path,
    first: float,
    tmp_path: Path,
) -> None:
    """A recipe's alpha is LoRA's from now on; a scale of 0 or below, which LoRA has not, goes into B."""
    found = resolve("first", store)
    adapter = read_adapter(found.adapters["adapter"], open_checkpoint(found.path).config)
    flipped = {name: LowRank(change.a, -change.b, -change.scale) for name, change in adapter.changes.items()}
    with_adapter(store, "flipped", Adapter(flipped), tmp_path / "flipped")
    for model, method in (("flipped", {}), ("first", {"alpha": 3.0}), ("first", {"rank_stabilised": True})):
        prepared = prepare(recipe(rows, model=model, output="next", method=method), store)
        began = make_module(prepared).adapter()
        for name, change in adapter.changes.items():
            expected = torch.from_numpy(change.scale * change.b @ change.a)
            own = began.changes[name]
            torch.testing.assert_close(torch.from_numpy(own.scale * own.b @ own.a), expected)
            assert own.scale > 0


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"type": "full"}, "method.type is full"),
        ({"rank": 8}, "method.rank is 8, and its rank is 4"),
        ({"targets": ["q_proj"]}, "method.targets are q_proj, and it changes q_proj, down_proj"),
    ],
)
def test_what_differs_is_refused_with_the_remedy(
    store: Store,
    rows: Path,
    first: float,
    method: dict[str, Any],
    reason: str,
) -> None:
    with pytest.raises(TrainingError, match=f"{reason}.*puna merge first adapter merged.gguf"):
        prepare(recipe(rows, model="first", output="next", method=method), store)


def test_adapters_that_no_recipe_has(store: Store, rows: Path, tmp_path: Path) -> None:
    config = open_checkpoint(resolve("stories", store).path).config
    module = make_module(prepare(recipe(rows, method=METHOD), store))
    changes = module.adapter().changes
    half = {name: change for name, change in changes.items() if "layers.0." in name}
    with_adapter(store, "half", Adapter(half), tmp_path / "half")
    with pytest.raises(TrainingError, match="of some layers, and a recipe those of all"):
        prepare(recipe(rows, model="half"), store)
    mixed = {
        name: LowRank(change.a[:2], change.b[:, :2], change.scale) if "q_proj" in name else change
        for name, change in changes.items()
    }
    with_adapter(store, "mixed", Adapter(mixed), tmp_path / "mixed")
    with pytest.raises(TrainingError, match="several ranks, 2, 4"):
        prepare(recipe(rows, model="mixed"), store)
    assert read_adapter(tmp_path / "mixed", config).rank == 4
    create(store, "two", from_="stories", adapters=[tmp_path / "half", tmp_path / "mixed"])
    with pytest.raises(TrainingError, match="two has several adapters, half, mixed"):
        prepare(recipe(rows, model="two"), store)
