"""What a training is said to take, against what it takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import VARIANTS, random_weights

torch = pytest.importorskip("torch")

from puna.ops.torch_ops import TorchOps  # noqa: E402
from puna.train.module import Full, LlamaModule, LoRA  # noqa: E402
from puna.train.optimizers import OPTIMIZERS, make_optimizer, state_bytes  # noqa: E402

# A process of its own, for the highest resident set is a process's. It tells it beside the estimate after the second
# step, which is the first with moments, and saves nothing.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from puna.store import Store
from puna.train.finetune import prepare, run
from puna.train.recipe import recipe_from
torch.set_num_threads(1)
prepared = prepare(recipe_from(json.loads(sys.argv[1])), Store(Path(sys.argv[2])))
def on_step(report):
    if report.step == 2:
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        print(prepared.estimate.total, int(status["VmHWM"].split()[0]) * 1024)
        sys.exit()
run(prepared, on_step)
"""


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("method", [Full(), LoRA(rank=4, alpha=8)], ids=["full", "lora"])
def test_the_state_of_an_optimizer_is_counted_to_the_byte(kind: str, method: Full | LoRA) -> None:
    module = LlamaModule(TorchOps(), VARIANTS["gqa"], random_weights(VARIANTS["gqa"], seed=1), method)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(kind, trained)
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    expected = sum(tensor.nbytes for tensor in optimizer.state().values())
    assert sum(state_bytes(kind, p.shape, p.itemsize) for p in trained.values()) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the highest resident set is read from /proc")
@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"optimizer": "adamw8bit"}},
        {"objective": {"type": "dpo"}, "training": {"answers": 1}},
    ],
    ids=["adamw8bit", "dpo"],
)
def test_memory_is_about_what_is_told(smollm2_path: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Every weight of SmolLM2: never more, by more than a twentieth, and not much less."""
    pair = {"prompt": "Where is Tom?", "chosen": " He went to the park.", "rejected": " I do not know."}
    row = pair if "objective" in changes else {"text": "Tom went to the park."}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    recipe = {
        "model": str(smollm2_path),
        "output": "bot",
        "data": [{"path": str(tmp_path / "rows.jsonl"), "validation": 0}],
        "method": {"type": "full"},
        **changes,
        "training": {"steps": 2, "length": 64, "batch": 1, "save_every": 9, **changes["training"]},
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(recipe), str(tmp_path / "home")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stderr
    told, taken = map(int, ended.stdout.split())
    assert 0.7 < taken / told < 1.05
