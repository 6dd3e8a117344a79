"""Distillation: the loss against its definition, the teacher's cache, and students made of a model's layers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VARIANTS, random_weights, tiny_checkpoint

torch = pytest.importorskip("torch")

from puna.checkpoint import save_checkpoint  # noqa: E402
from puna.errors import TrainingError  # noqa: E402
from puna.ops.torch_ops import TorchOps, document_batch  # noqa: E402
from puna.train.data.tokens import Packed, Tokens, concatenate  # noqa: E402
from puna.train.module import Full, LlamaModule  # noqa: E402
from puna.train.objectives import knobs_of  # noqa: E402
from puna.train.objectives.distill import Distill, Distillation  # noqa: E402
from puna.train.objectives.frozen import FrozenModel  # noqa: E402
from puna.train.objectives.teacher_cache import TeacherCache  # noqa: E402
from puna.train.student import student_of  # noqa: E402

CONFIG = VARIANTS["gqa"]
TEACHER = random_weights(CONFIG, seed=2, weight_type="Q8_0")


def packs() -> list[Packed]:
    rng = np.random.default_rng(0)
    documents = [Tokens.of(rng.integers(0, 256, n).tolist(), [(2, n)]) for n in (9, 5, 12, 7)]
    return [concatenate(documents[:2]), concatenate(documents[2:])]


def student(dtype: torch.dtype = torch.float32) -> LlamaModule:
    return LlamaModule(TorchOps(dtype), CONFIG, random_weights(CONFIG, seed=1), Full())


def teacher(dtype: torch.dtype = torch.float32) -> FrozenModel:
    return FrozenModel(TorchOps(dtype), CONFIG, TEACHER)


def plain(built: LlamaModule, pack: Packed, knobs: Distill) -> torch.Tensor:
    """The sum over tokens, from whole matrices of logits, by torch's own divergences."""
    full = LlamaModule(built.ops, CONFIG, TEACHER, Full(frozen="layers"))
    batch, at = document_batch(pack.ids, pack.seq_starts), torch.from_numpy(np.flatnonzero(pack.trained)) - 1
    logits, given = built(batch)[at], full(batch)[at].detach()
    t = knobs.temperature
    ours, theirs = torch.log_softmax(logits / t, -1), torch.log_softmax(given / t, -1)
    first, second = (ours, theirs) if knobs.direction == "forward" else (theirs, ours)
    divergence = t * t * torch.nn.functional.kl_div(first, second, reduction="sum", log_target=True)
    entropy = torch.nn.functional.cross_entropy(logits, torch.from_numpy(pack.ids.astype(int))[at + 1], reduction="sum")
    return knobs.weight * divergence + (1 - knobs.weight) * entropy


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.7)])
def test_loss_and_gradients_by_definition(direction: str, temperature: float, weight: float) -> None:
    knobs = Distill("x", direction, temperature, weight)
    built, other = student(torch.float64), student(torch.float64)
    objective = Distillation(knobs, built, teacher(torch.float64))
    total, loss = sum(map(objective.count, packs())), 0.0
    for pack in packs():
        part = objective.loss(built, pack, total)
        part.backward()
        loss += part.item()
    expected = sum(plain(other, pack, knobs) for pack in packs()) / total
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in built.named_parameters():
        torch.testing.assert_close(parameter.grad, other.get_parameter(name).grad, rtol=1e-6, atol=1e-8)


def cached(folder: Path, k: int = 8) -> TeacherCache:
    return TeacherCache(folder, teacher(), "a teacher", k)


def test_a_cache_of_all_logits_changes_nothing(tmp_path: Path) -> None:
    built, pack = student(), packs()[0]
    knobs = Distill("x", temperature=2.0)
    found = [
        Distillation(knobs, built, teacher(), cache).loss(built, pack, 1).item()
        for cache in (None, cached(tmp_path, CONFIG.vocab_size))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_teacher_reads_each_document_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = packs()
    expected = cached(tmp_path).top(first)
    assert expected[0].shape == (int(first.trained.sum()), 8)
    again = cached(tmp_path)
    again.top(second)
    monkeypatch.setattr(again, "_ask", lambda documents: pytest.fail("it was asked again"))
    documents = [*first.documents, *second.documents]
    found = again.top(concatenate(documents[::-1]))
    rows = int(first.documents[0].trained.sum())
    assert torch.equal(found[0][-rows:], expected[0][:rows])
    assert torch.equal(found[1][-rows:], expected[1][:rows])


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    first, second = packs()
    cached(tmp_path).top(first)
    folder = next(tmp_path.iterdir())
    for name in ("ids", "logits", "index"):
        with (folder / name).open("ab") as file:
            file.write(b"half an entry")
    expected = cached(tmp_path / "new").top(second)
    for cache in (cached(tmp_path), cached(tmp_path)):  # written, and read again
        assert torch.equal(cache.top(second)[0], expected[0])
        assert torch.equal(cache.top(second)[1], expected[1])


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    pack = packs()[0]
    cached(tmp_path).top(pack)
    path = next(tmp_path.iterdir()) / "logits"
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(TrainingError, match="damaged; delete"):
        cached(tmp_path).top(pack)


def test_a_teacher_by_path(tmp_path: Path) -> None:
    """It teaches itself nothing: the divergence from what it says is 0."""
    checkpoint = tiny_checkpoint(seed=1)
    save_checkpoint(checkpoint, tmp_path / "teacher", "safetensors")
    for table in ({}, {"cache": str(tmp_path / "cache"), "top_k": 256}):
        built = LlamaModule(TorchOps(), checkpoint.config, checkpoint.tensors, Full())
        objective = knobs_of("distill", {"teacher": str(tmp_path / "teacher")} | table).objective(built)
        assert objective.loss(built, packs()[0], 1).item() == pytest.approx(0, abs=1e-4)
        assert objective.metrics.means()["cross_entropy"] == pytest.approx(math.log(256), abs=2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "needs 'teacher'"),
        ({"teacher": "x", "direction": "sideways"}, "direction of distill must be one of forward, reverse"),
        ({"teacher": "x", "direction": "reverse", "cache": "c"}, "leave the cache out"),
        ({"teacher": "x", "temperature": 0}, "temperature"),
        ({"teacher": "x", "top_k": -1}, "top_k"),
    ],
)
def test_impossible_knobs(table: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        knobs_of("distill", table)


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    other = VARIANTS["gqa"].__class__(**{**vars(CONFIG), "vocab_size": 100})
    with pytest.raises(TrainingError, match="vocabulary of 100 tokens"):
        Distillation(Distill("x"), student(), FrozenModel(TorchOps(), other, random_weights(other)))


def test_a_student_has_the_layers_it_was_given() -> None:
    checkpoint = tiny_checkpoint(VARIANTS["tied"].__class__(**{**vars(VARIANTS["tied"]), "num_hidden_layers": 5}))
    found = student_of(checkpoint)
    assert found.config.num_hidden_layers == 3
    for place, layer in enumerate((0, 2, 4)):
        for rest in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
            weight, source = (
                found.tensors[f"model.layers.{place}.{rest}"],
                checkpoint.tensors[f"model.layers.{layer}.{rest}"],
            )
            assert weight.name == f"model.layers.{place}.{rest}"
            assert weight.data is source.data
    assert len(found.tensors) == 2 + 3 * 9
    LlamaModule(TorchOps(), found.config, found.tensors, Full())(document_batch(np.arange(4), np.array([0, 4])))
    assert set(student_of(checkpoint, [1]).tensors) == {n for n in found.tensors if ".1." not in n and ".2." not in n}


@pytest.mark.parametrize("layers", [[], [2], [0, 0], [-1]])
def test_layers_that_are_not_there(layers: list[int]) -> None:
    with pytest.raises(TrainingError, match="different ones of 0 to 1"):
        student_of(tiny_checkpoint(), layers)
