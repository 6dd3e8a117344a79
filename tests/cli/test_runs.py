"""``puna runs``: list, show, compare, rm."""

from pathlib import Path

import pytest

from puna.train.runs import DataFacts, Evaluation, RunFolder, RunInputs


@pytest.fixture
def two_runs(home: Path) -> list[str]:
    names = []
    for rank in (8, 16):
        data = (DataFacts("rows.jsonl", "b" * 32, rows=1000, held_out=10),)
        inputs = RunInputs("bot", "smollm2", "a" * 64, "sft", "lora", seed=1, steps=2, data=data)
        with RunFolder.start(f"learning_rate = 1e-4\n[lora]\nrank = {rank}\n", inputs) as run:
            run.note(before=Evaluation({"loss": 2.5}))
            for step in (1, 2):
                run.log({"step": step, "loss": 3 - step * rank / 16})
            run.finish("bot", Evaluation({"loss": 24 / rank}))
        names.append(run.name)
    return names


def test_nothing_yet(puna) -> None:
    result = puna("runs")
    assert (result.code, result.out) == (0, "")
    assert "No training runs yet" in result.err
    assert puna("runs", "--json").json == []


def test_list(puna, two_runs: list[str]) -> None:
    result = puna("runs")
    assert result.out.startswith("NAME ")
    for name, loss in zip(two_runs, ("3", "1.5"), strict=True):
        (line,) = (line for line in result.out.splitlines() if line.startswith(name + " "))
        assert f"finished  smollm2  sft, lora  2/2    loss 2.5 → {loss}" in line
    assert {row["name"]: row["loss_after"] for row in puna("runs", "--json").json} == dict(
        zip(two_runs, (3, 1.5), strict=True)
    )


def test_show(puna, two_runs: list[str], tmp_path: Path) -> None:
    result = puna("runs", "show", two_runs[1], "--html", str(tmp_path / "run.html"))
    assert result.code == 0
    shown = dict(line.split("  ", 1) for line in result.out.splitlines())
    assert {name: value.strip() for name, value in shown.items()}.items() >= {
        "name": two_runs[1],
        "status": "finished",
        "loss before": "2.5",
        "loss after": "1.5",
        "data rows.jsonl": "1,000 rows, 10 held out",
    }.items()
    assert "<svg" in (tmp_path / "run.html").read_text(encoding="utf-8")
    found = puna("runs", "show", two_runs[0], "--json").json
    assert (found["numbers"]["loss_after"], found["state"], found["inputs"]["seed"]) == (3, "finished", 1)


def test_compare(puna, two_runs: list[str], tmp_path: Path) -> None:
    result = puna("runs", "compare", *two_runs, "--html", str(tmp_path / "both.html"))
    lines = [line.split() for line in result.out.splitlines()]
    assert ["lora.rank", "8", "16"] in lines
    assert ["loss_after", "3", "1.5"] in lines
    assert ["circumstances:", "the", "same"] in lines
    assert all(name in (tmp_path / "both.html").read_text(encoding="utf-8") for name in two_runs)
    assert puna("runs", "compare", *two_runs, "--json").json["recipe"] == {"lora.rank": [8, 16]}
    assert puna("runs", "compare", two_runs[0]).code == 2


def test_rm(puna, two_runs: list[str]) -> None:
    missing = puna("runs", "rm", two_runs[0], "missing")
    assert (missing.code, missing.err) == (1, "Error: no training run 'missing'; `puna runs` lists them\n")
    assert len(puna("runs", "--json").json) == 2
    assert puna("runs", "rm", two_runs[0], two_runs[0]).out.startswith("removed ")
    assert len(puna("runs", "rm", two_runs[1], "--json").json["removed"]) == 1
    assert puna("runs", "--json").json == []


def test_an_option_in_the_wrong_place(puna, two_runs: list[str]) -> None:
    result = puna("runs", "--json", "show", two_runs[0])
    assert result.code == 2
    assert "put --json behind show" in result.err
