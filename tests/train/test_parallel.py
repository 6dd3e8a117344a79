"""Two processes train what one trains: the same losses, states for each other, and one exported file."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from parallel_ranks import RUNS, export, export_reward, run  # noqa: E402
from test_trainer import RandomDocuments, trainer  # noqa: E402

from puna.checkpoint import open_checkpoint  # noqa: E402
from puna.checkpoint.safetensors import read_safetensors  # noqa: E402
from puna.errors import TrainingError  # noqa: E402
from puna.store import Store  # noqa: E402
from puna.train.finetune import prepare  # noqa: E402
from puna.train.finetune import run as train  # noqa: E402
from puna.train.parallel import ALONE, Ranks, add_sums, asked_by_first, launched  # noqa: E402
from puna.train.recipe import read_recipe  # noqa: E402
from puna.train.training_state import best_state, newest_state  # noqa: E402

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "parallel_ranks.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SECONDS = 300  # a hang, on a machine however busy
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone() -> dict[str, list[dict[str, Any]]]:
    return {}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the results of all that two ranks do, in two launches."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("full", "qlora", "8bit"):
        run(folder / f"{name}-from-one", name, ALONE, stop_at=4)
    ended = subprocess.run([*TORCHRUN, SCRIPT, "killed", folder], env=ENVIRONMENT, timeout=SECONDS, capture_output=True)
    assert ended.returncode != 0
    assert b"SIGKILL" in ended.stderr
    assert sorted(path.name for path in (folder / "qlora-killed").iterdir()) == ["step-4"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "everything", folder],
            env={**ENVIRONMENT, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            error = process.communicate(timeout=SECONDS)[1]
            assert process.returncode == 0, error
    finally:
        for process in processes:
            process.kill()
    return folder, json.loads((folder / "results-of-0.json").read_text())


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Within what float32 makes of another order of sums, which the steps of Adam multiply."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            if name != "seconds":
                same = value if value is None else pytest.approx(value, rel=2e-5, abs=2e-6)
                assert one[name] == same, (name, other["step"])


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_what_one_trains(ranks: tuple[Path, dict[str, Any]], tmp_path: Path, name: str) -> None:
    """Of every micro-batch, with its dropout; frozen and quantized weights are sharded too."""
    assert_same(ranks[1][name], run(tmp_path, name, ALONE))


@pytest.mark.parametrize("name", ["full", "qlora", "8bit"])
def test_two_ranks_go_on_from_one(ranks: tuple[Path, dict[str, Any]], name: str) -> None:
    assert_same(ranks[1][f"{name}-from-one"], ranks[1][name][4:])


@pytest.mark.parametrize("name", ["full", "qlora", "8bit"])
def test_one_goes_on_from_two_ranks(ranks: tuple[Path, dict[str, Any]], name: str) -> None:
    assert_same(run(ranks[0] / f"{name}-for-one", name, ALONE), ranks[1][name][4:])


def test_killed_ranks_resume_bit_for_bit(ranks: tuple[Path, dict[str, Any]]) -> None:
    untimed = [[{**report, "seconds": 0} for report in ranks[1][name]] for name in ("qlora", "qlora-killed")]
    assert untimed[1] == untimed[0][4:]


@pytest.mark.parametrize("name", ["full", "qlora"])
def test_the_export_is_that_of_one(ranks: tuple[Path, dict[str, Any]], tmp_path: Path, name: str) -> None:
    """To the byte, from the same state; and what ranks gathered is not what they began with."""
    folder = ranks[0]
    export(folder / name, name, tmp_path / "alone", ALONE)
    files = [place / "model.safetensors" for place in (folder / f"{name}-exported", tmp_path / "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()
    exported, begun = read_safetensors(files[0]), trainer(tmp_path / "new", **RUNS[name]).module.merged()
    trained = [key for key in exported if name == "full" or "_proj" in key]
    assert not [key for key in trained if np.array_equal(exported[key].dequantize(), begun[key].dequantize())]


def test_a_reward_model_is_exported_as_by_one(ranks: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """To the byte, from the same state, and with a score that was trained."""
    export_reward(ranks[0] / "reward", tmp_path / "alone", ALONE)
    files = [place / "model.safetensors" for place in (ranks[0] / "reward-exported", tmp_path / "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_safetensors(files[0])["score.weight"].dequantize().any()


def test_sharded_states_are_kept_as_others(ranks: tuple[Path, dict[str, Any]]) -> None:
    """The newest and the best, a file of each rank; each holds its rows, and together they are all of them."""
    folder, results = ranks
    newest, best = newest_state(folder / "full"), best_state(folder / "full")
    assert newest is not None
    assert best is not None
    assert newest.step == best.step == 6
    assert best.cost == results["full"][-1]["validation_loss"]
    assert {path.name for path in (folder / "full").iterdir()} == {"step-4", "step-6"}
    parts = sorted((folder / "full" / "step-6").glob("*.safetensors"))
    embedding = "model.embed_tokens.weight"
    rows = [read_safetensors(part)[embedding].dequantize() for part in parts]
    assert [len(one) for one in rows] == [128, 128]
    np.testing.assert_array_equal(newest.tensors[embedding].numpy(), np.concatenate(rows))
    narrow = newest_state(folder / "8bit")
    assert narrow is not None
    assert narrow.tensors[f"{embedding}:mean"].dtype == torch.uint8
    assert narrow.tensors[f"{embedding}:mean_scale"].shape == (256, 1)


def test_not_a_number_stops_all_ranks(ranks: tuple[Path, dict[str, Any]]) -> None:
    folder = ranks[0]
    for rank in range(2):
        assert "step 1 gave a loss of nan" in (folder / f"error-of-{rank}.txt").read_text()
    with np.load(folder / "broken" / "failed-step-1.npz", allow_pickle=False) as saved:
        np.testing.assert_array_equal(
            saved["4.ids"], [next(stream) for stream in [RandomDocuments()] for _ in range(5)][4].ids
        )


def test_only_the_first_reports(ranks: tuple[Path, dict[str, Any]]) -> None:
    other = json.loads((ranks[0] / "results-of-1.json").read_text())
    assert {name: reports for name, reports in other.items() if reports} == {"before": ranks[1]["before"]}


def test_shares() -> None:
    """Every micro-batch counts on one rank, and ranks make as many passes."""
    for number in range(1, 8):
        for count in (1, 2, 3):
            passes = [list(Ranks(rank, count).passes(range(number))) for rank in range(count)]
            assert sorted(n for one in passes for n, _, counts in one if counts) == list(range(number))
            assert all(micro_batch == n for one in passes for n, micro_batch, counts in one if counts)
            assert len(set(map(len, passes))) == 1


def test_sums_of_other_names() -> None:
    assert add_sums({"a": (1.0, 2), "b": (3.0, 1)}, {"b": (1.0, 1), "c": (5.0, 5)}) == {
        "a": (1.0, 2),
        "b": (4.0, 2),
        "c": (5.0, 5),
    }


def test_puna_train_under_torchrun(shared_data: Path, tmp_path: Path) -> None:
    """Every weight of a real model, which the first process gathers: losses and file are those of one process."""
    model = shared_data / "weights" / "stories260K" / "stories260K.gguf"
    rows = [{"prompt": f"Tell about {name}.", "completion": f" {name} went away."} for name in ("Tom", "Mia") * 10]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "{model}"\noutput = "bot"\n[[data]]\npath = "{tmp_path / "rows.jsonl"}"\nvalidation = 0.2\n'
        '[method]\ntype = "full"\n[training]\nsteps = 4\nlength = 64\nbatch = 3\nevaluate_every = 2\n'
        '[save]\ntype = "F32"\n'
    )
    one = train(prepare(read_recipe(recipe), Store(tmp_path / "one")))
    environment = {**ENVIRONMENT, "PUNA_HOME": str(tmp_path / "two"), "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, "-m", "puna", "train", str(recipe), "--json"]
    ended = subprocess.run(command, env=environment, timeout=SECONDS, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    two = json.loads(ended.stdout)["result"]
    assert two["held_out_loss_before"] == pytest.approx(one.before, rel=1e-5)
    assert two["held_out_loss_after"] == pytest.approx(one.after, rel=1e-4)
    assert two["held_out_loss_after"] < two["held_out_loss_before"]
    before, alone, together = (open_checkpoint(Path(path)).tensors for path in (model, one.path, two["path"]))
    assert list(alone) == list(together)
    for name, weight in alone.items():
        # A gradient that is almost 0 has any sign, and Adam's first steps are as long for it as for others.
        difference = together[name].dequantize() - weight.dequantize()
        assert np.linalg.norm(difference) < 0.02 * np.linalg.norm(weight.dequantize() - before[name].dequantize())


def test_nothing_launched_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched() as found:
        assert (found.rank, found.count, found.first) == (0, 1, True)


def test_more_ranks_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(TrainingError, match="3 processes were started for 2 CUDA devices"), launched():
        pass
    with pytest.raises(TrainingError, match="all were given cuda:1"), launched("cuda:1"):
        pass


def test_reading_on_the_first_rank_takes_all() -> None:
    """Asking whether a name is there, or for one that is not, must gather nothing: no other rank would know."""
    told: list[str] = []

    class Alone(Ranks):
        def tell(self, value: Any) -> Any:
            told.append(value)
            return value

    with asked_by_first({"a": 1}, Alone(0, 2)) as asked:
        assert "a" in asked
        assert asked.get("b") is None
        assert dict(asked) == {"a": 1}
    assert told == ["a", ""]
