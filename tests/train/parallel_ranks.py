"""What tests/train/test_parallel.py has each of two ranks do: ``parallel_ranks.py SCENARIO FOLDER``."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from test_trainer import CONFIG, LORA, RandomDocuments, trainer  # noqa: E402
from tiny_models import tiny_checkpoint  # noqa: E402

from puna.checkpoint.safetensors import write_safetensors  # noqa: E402
from puna.errors import TrainingError  # noqa: E402
from puna.train.data.answers import Answers  # noqa: E402
from puna.train.data.tokens import Packed  # noqa: E402
from puna.train.module import Full, LoRA  # noqa: E402
from puna.train.objectives.labelled import KTO  # noqa: E402
from puna.train.objectives.pairs import DPO  # noqa: E402
from puna.train.objectives.reward import Reward, save_reward_model  # noqa: E402
from puna.train.parallel import Ranks, asked_by_first, launched  # noqa: E402
from puna.train.trainer import NextToken, StepReport, evaluate  # noqa: E402


class RandomAnswers(RandomDocuments):
    """The same as answers, the first of them good and the second bad."""

    def __next__(self) -> Answers:
        pack = super().__next__()
        return Answers(Packed(pack.ids, pack.trained, pack.seq_starts), np.array([True, False]))


# Five micro-batches to a step and three to validate on: two ranks never have as many.
SHARED: dict[str, Any] = {"steps": 6, "save_every": 4, "accumulate": 5, "validate": 3, "evaluate_every": 3}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"method": Full()},
    "frozen": {"method": Full(frozen="embed|layers.0.mlp"), "recompute": True},
    "lora": {"method": LORA, "kind": "F32"},
    "dora": {"method": dataclasses.replace(LORA, dora=True), "kind": "F32"},
    "qlora": {"method": LORA, "recompute": True},
    "dpo": {"method": LORA, "objective": DPO().objective, "stream": RandomAnswers},
    "kto": {"method": LORA, "objective": KTO().objective, "stream": RandomAnswers},
    "reward": {"method": LORA, "objective": Reward().objective, "stream": RandomAnswers, "kind": "F32"},
    "8bit": {"method": Full(), "optimizer": "adamw8bit"},
    "one": {"method": LoRA(rank=3, targets=("q_proj",)), "accumulate": 1, "validate": 1},
}


def run(folder: Path, name: str, ranks: Ranks, stop_at: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """Train, to ``stop_at`` if there is one, and give the reports that this rank saw."""
    found: list[dict[str, Any]] = []

    def on_step(report: StepReport) -> bool:
        found.append(dataclasses.asdict(report))
        return report.step == stop_at

    trainer(folder, ranks=ranks, **SHARED | RUNS[name] | changes).run(on_step)
    return found


def export(folder: Path, name: str, place: Path, ranks: Ranks) -> None:
    """The newest state of a run as one file of the whole model."""
    again = trainer(folder, ranks=ranks, **SHARED | RUNS[name])
    again.run()
    with asked_by_first(again.module.merged(), ranks) as tensors:
        if ranks.first:
            place.mkdir()
            write_safetensors(place, tensors)


def export_reward(folder: Path, place: Path, ranks: Ranks) -> None:
    """The newest state of the run of a reward model, as its folder."""
    again = trainer(folder, ranks=ranks, **SHARED | RUNS["reward"])
    again.run()
    save_reward_model(again.module, tiny_checkpoint(CONFIG), place, ranks)


def everything(folder: Path, ranks: Ranks) -> dict[str, Any]:
    found: dict[str, Any] = {name: run(folder / name, name, ranks) for name in RUNS}
    for name in ("full", "qlora", "8bit"):
        export(folder / name, name, folder / f"{name}-exported", ranks)
        found[f"{name}-from-one"] = run(folder / f"{name}-from-one", name, ranks)
        run(folder / f"{name}-for-one", name, ranks, stop_at=4)
    export_reward(folder / "reward", folder / "reward-exported", ranks)
    found["qlora-killed"] = run(folder / "qlora-killed", "qlora", ranks)
    broken = trainer(folder / "broken", ranks=ranks, **SHARED | RUNS["full"])
    found["before"] = evaluate(broken.module, broken.objective, broken.validation, ranks)
    with torch.no_grad():
        for parameter in broken.module.parameters():
            parameter.mul_(torch.nan)
    try:
        broken.run()
    except TrainingError as error:
        (folder / f"error-of-{ranks.rank}.txt").write_text(str(error))
    return found


def killed(folder: Path, ranks: Ranks) -> None:
    """The last rank dies in step 6, of nothing that the other could know."""
    doomed = trainer(folder / "qlora-killed", ranks=ranks, **SHARED | RUNS["qlora"])
    if not ranks.first:
        doomed.objective = Deadly(19)  # three times in a step, and twice in the validation after step 3
    doomed.run()


class Deadly(NextToken):
    """Kills its process when the loss has been asked for so many times."""

    def __init__(self, left: int) -> None:
        self.left = left

    def loss(self, *arguments: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(*arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[2])
    with launched() as these:
        if sys.argv[1] == "killed":
            killed(place, these)
        elif results := everything(place, these):
            (place / f"results-of-{these.rank}.json").write_text(json.dumps(results))
