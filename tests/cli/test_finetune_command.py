"""``puna finetune`` and ``puna train`` on the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")


@pytest.fixture
def ready(puna: Callable[..., Any], shared_data: Path, tmp_path: Path) -> Callable[..., Any]:
    """``puna``, with the model ``stories`` and the file ``rows.jsonl``."""
    model = shared_data / "weights" / "stories260K" / "stories260K.gguf"
    assert puna("import", str(model), "--name", "stories").code == 0
    found = [{"prompt": f"Tell about {n}.", "completion": " A \x1b[31mred cat."} for n in ("Tom", "Lily")] * 20
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return puna


def test_from_rows_to_an_answer(ready: Callable[..., Any], tmp_path: Path) -> None:
    rows = str(tmp_path / "rows.jsonl")
    options = ["finetune", "stories", rows, "--out", "bot", "--steps", "25", "--threads", "1", "--validation", "0"]
    dry = ready(*options, "--dry-run")
    assert (dry.code, dry.out) == (0, "")
    assert "A �[31mred cat.</s>" in dry.err
    assert "\x1b" not in dry.err
    assert "25 steps" in dry.err
    assert not (tmp_path / "home" / "runs").exists()
    planned = ready(*options, "--dry-run", "--json").json
    assert planned["plan"]["steps"] == 25
    assert planned["data"]["rows"] == 40
    done = ready(*options, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["result"]["model"] == "bot:latest"
    assert done.json["plan"] == planned["plan"]
    told = ready("run", "bot", "Tell about Tom.", "--temperature", "0", "--num-predict", "12", "--json").json
    assert "red cat." in told["response"]
    again = ready(*options)
    assert again.code == 1
    assert "finished already" in again.err
    assert ready(*options[:-2], "--restart").code == 0


def test_what_is_told_of_other_objectives(ready: Callable[..., Any], tmp_path: Path) -> None:
    pairs = [{"prompt": f"Tell about {n}.", "chosen": " A cat.", "rejected": " A dog."} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    options = ("--objective", "reward", "--steps", "1", "--validation", "0.5", "--threads", "1")
    judge = ready("finetune", "stories", str(tmp_path / "pairs.jsonl"), "--out", "judge", *options)
    assert judge.code == 0, judge.err
    assert "held-out loss: 0.6931 before" in judge.err
    assert f"the reward model lies in {tmp_path / 'home' / 'runs' / 'judge' / 'reward-model'}" in judge.err
    asks = [{"prompt": f"Tell about {n}.", "completion": " A cat."} for n in range(12)]
    (tmp_path / "asks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asks))
    recipe = tmp_path / "sampled.toml"
    recipe.write_text(
        'model = "stories"\noutput = "sampled"\n[objective]\ntype = "grpo"\nreward = "exact"\nmax_tokens = 4\n'
        'prompts = 1\n[training]\nsteps = 1\n[[data]]\npath = "asks.jsonl"\nvalidation = 0.5\n'
    )
    sampled = ready("train", str(recipe), "--threads", "1")
    assert sampled.code == 0, sampled.err
    assert "with what is expected underlined" in sampled.err
    assert "held-out reward: 0.0000 before, 0.0000 after" in sampled.err
    assert "reward 0.0000, held-out 0.0000" in sampled.err
    assert "reward 0 → 0" in ready("runs").out
    planned = ("finetune", "stories", str(tmp_path / "asks.jsonl"), "--out", "x", "--dry-run", "--json")
    grpo = ready(*planned, "--objective", "grpo", "--reward", "number").json["recipe"]
    assert 'type = "grpo"\nreward = "number"' in grpo
    distil = ready(*planned, "--objective", "distill", "--teacher", "stories").json["recipe"]
    assert 'type = "distill"\nteacher = "stories"' in distil


def test_a_recipe_is_the_same_command(ready: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "stories"\noutput = "bot"\n[training]\nsteps = 2\n[[data]]\npath = "rows.jsonl"\n')
    done = ready("train", str(recipe), "--threads", "1")
    assert done.code == 0
    assert "step 2/2  loss " in done.err
    assert "measuring" not in done.err  # of two rows, many times, none was held out
    assert "bot is ready. Try: puna run bot" in done.err
    by_command = ready(
        "finetune", "stories", str(tmp_path / "rows.jsonl"), "--out", "two", "--steps", "2", "--dry-run", "--json"
    ).json
    assert (
        by_command["recipe"].replace('"two"', '"bot"').replace('train_on = "assistant"\n', "")
        == (tmp_path / "home" / "runs" / "bot" / "recipe.toml").read_text()
    )
    recipe.write_text(recipe.read_text().replace("steps", "setps"))
    bad = ready("train", str(recipe))
    assert (bad.code, bad.err) == (1, "Error: the recipe has no field training.setps; did you mean training.steps?\n")


def test_misuse(ready: Callable[..., Any], tmp_path: Path) -> None:
    rows = str(tmp_path / "rows.jsonl")
    assert ready("finetune", "stories", rows).code == 2
    both = ready("finetune", "stories", rows, "--out", "b", "--steps", "2", "--epochs", "1")
    assert (both.code, "training.epochs and training.steps" in both.err) == (1, True)
    wrong = ready("finetune", "stories", rows, "--out", "b", "--objective", "ppo")
    assert (wrong.code, "objective.type is 'ppo'" in wrong.err) == (1, True)
