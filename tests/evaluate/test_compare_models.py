"""Comparisons of stories260K with changed copies of itself, whose differences are known beforehand."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import tiny_checkpoint

from puna.chat.template import ChatTemplate
from puna.checkpoint import Checkpoint
from puna.errors import CheckpointError, RequestError, TokenizerError
from puna.evaluate import Report, compare
from puna.evaluate.limits import drift
from puna.evaluate.probe import Probe
from puna.evaluate.samples import sample_text
from puna.evaluate.sides import Side
from puna.llm import LLM
from puna.ops.protocol import Ops
from puna.ops.registry import make_ops
from puna.store import resolve
from puna.tensor import Weight
from puna.tokenizer import Tokenizer

WINDOWS = 2


@pytest.fixture(scope="module")
def path(shared_data: Path) -> Path:
    return shared_data / "weights" / "stories260K" / "stories260K.gguf"


@pytest.fixture(scope="module")
def source(path: Path) -> Side:
    return Side.open("stories", resolve(path))


@pytest.fixture(scope="module")
def ops() -> Ops:
    return make_ops(None, 1)


def changed(side: Side, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Side:
    """The same model with one tensor changed."""
    tensors: Mapping[str, Weight] = dict(side.checkpoint.tensors)
    weight = Weight.from_array(name, change(tensors[name].dequantize()).astype(np.float32))
    return replace(side, name="changed", checkpoint=replace(side.checkpoint, tensors={**tensors, name: weight}))


def own_logits(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Logits of the scored half of each window, and the tokens that follow, by the public way to them."""
    with LLM.load(path, threads=1) as llm:
        ids = llm.encode(sample_text())
        for number in range(WINDOWS):
            window = [llm.tokenizer.bos_id, *ids[512 * number + 1 : 512 * (number + 1)]]
            yield llm.logits(window)[256:511].astype(np.float64), np.array(window[257:])


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def test_a_model_beside_itself(source: Side, ops: Ops) -> None:
    report = compare(source, source, ops, windows=WINDOWS)
    assert (report.kl.mean, report.kl.max, report.top1_agreement) == (0, 0, 1)
    assert report.layer_errors == [0.0] * 5
    assert (report.token_ids, report.template) == ([], [])
    assert report.source.perplexity == report.derived.perplexity
    assert report.source.decode_tokens_per_second > 0
    assert (report.text.windows, report.text.window_tokens, report.text.scored_tokens) == (2, 512, 510)
    assert drift(report) == []


def test_a_known_perturbation(source: Side, path: Path, ops: Ops) -> None:
    """The last norm times 1.5 makes all logits 1.5 times as large: every figure follows from the source's logits."""
    report = compare(source, changed(source, "model.norm.weight", lambda w: 1.5 * w), ops, windows=WINDOWS)
    kl, nll, sharpened = [], [], []
    for logits, targets in own_logits(path):
        p, q = softmax(logits), softmax(1.5 * logits)
        rows = np.arange(len(targets))
        kl.append((p * np.log(p / q)).sum(axis=1))
        nll.append(-np.log(p[rows, targets]))
        sharpened.append(-np.log(q[rows, targets]))
    expected = np.concatenate(kl)
    assert report.kl.mean == pytest.approx(expected.mean(), rel=1e-4)
    assert report.kl.median == pytest.approx(np.median(expected), rel=1e-4)
    assert report.kl.p99 == pytest.approx(np.percentile(expected, 99), rel=1e-4)
    assert report.kl.max == pytest.approx(expected.max(), rel=1e-4)
    assert report.source.perplexity == pytest.approx(np.exp(np.concatenate(nll).mean()), rel=1e-4)
    assert report.derived.perplexity == pytest.approx(np.exp(np.concatenate(sharpened).mean()), rel=1e-4)
    assert report.top1_agreement == 1
    assert report.layer_errors == pytest.approx([0, 0, 0, 0, 0.5], abs=1e-5)


def test_the_layer_that_differs_is_found(source: Side, ops: Ops) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    errors = compare(source, changed(source, name, lambda w: 0 * w), ops, windows=1).layer_errors
    assert list(errors[:2]) == [0, 0]
    assert min(errors[2:]) > 0.1


def test_quantized_weights_weigh_less(source: Side, ops: Ops) -> None:
    """Sizes and encodings are those of the tensors; the loss is small but there."""
    tensors = {
        name: Weight.from_array(name, w.dequantize(), "Q8_0" if len(w.shape) == 2 and w.shape[1] % 32 == 0 else "F32")
        for name, w in source.checkpoint.tensors.items()
    }
    derived = replace(source, checkpoint=replace(source.checkpoint, tensors=tensors))
    report = compare(source, derived, ops, windows=1)
    assert report.derived.bytes == sum(weight.nbytes for weight in tensors.values())
    assert report.source.bits_per_weight == 32
    assert report.derived.bits_per_weight == pytest.approx(8 * report.derived.bytes / 260_032)
    assert dict(report.derived.types)["Q8_0"] > 20
    assert 0 < report.kl.mean < 0.01


def test_other_tokens_and_prompts_are_drift(source: Side, shared_data: Path, ops: Ops) -> None:
    vocabulary = replace(source.tokenizer.vocabulary, add_bos=not source.tokenizer.add_bos)
    other = replace(source, tokenizer=Tokenizer(vocabulary))
    report = compare(source, other, ops, windows=1)
    assert "add_bos of the tokenizers differ" in report.token_ids
    assert any("reads texts as other tokens" in reason for reason in drift(report))

    templates = [
        "{% for m in messages %}[{{ m.content }}]{% endfor %}",
        "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}",
    ]
    ours, theirs = (replace(source, checkpoint=replace(source.checkpoint, chat_template=t)) for t in templates)
    report = compare(ours, theirs, ops, windows=1)
    rendered = ChatTemplate(templates[0]).render([{"role": "system", "content": "Answer in  one word. "}])
    at = len(rendered) - 2  # where the one writes the trailing space, and the other closes the bracket
    assert report.template == [
        f"conversation 2 differs from character {at} on: ' ][Größe?\\n][Klein. ][ And now?]' in the source, "
        "'][Größe?][Klein.][And now?]' here"
    ]
    assert any("makes other prompts" in reason for reason in drift(report))


def test_the_limit_on_divergence(source: Side, ops: Ops) -> None:
    """A wrong tensor is told from the loss of a type; a limit of one's own replaces the type's."""
    wrong = changed(source, "model.layers.1.self_attn.o_proj.weight", lambda w: w[::-1])
    report = compare(source, wrong, ops, windows=1)
    assert any("diverge by" in reason for reason in drift(report))
    assert drift(report, max_divergence=100) == []


def test_one_model_is_in_memory_at_a_time(source: Side, ops: Ops) -> None:
    probe = Probe("stories", source.checkpoint, ops)
    probe.run(list(range(10, 80)), 35)
    probe.decode_speed([1, 2, 3])
    gone = weakref.ref(probe)
    del probe
    assert gone() is None


def test_what_cannot_be_compared(source: Side, ops: Ops, tmp_path: Path) -> None:
    vocabulary = source.tokenizer.vocabulary
    pieces = (*vocabulary.pieces[:300], "other", *vocabulary.pieces[301:])
    other = replace(source, name="other", tokenizer=SimpleNamespace(vocabulary=replace(vocabulary, pieces=pieces)))
    with pytest.raises(RequestError, match=r"stories and other predict different tokens .*token 300 is .* and 'other'"):
        compare(source, other, ops)
    wider = replace(source.checkpoint, config=replace(source.checkpoint.config, vocab_size=520))
    with pytest.raises(RequestError, match=r"vocabularies have 512 \(512 of them in its tokenizer\) and 520"):
        compare(source, replace(source, checkpoint=wider), ops)
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    with pytest.raises(RequestError, match=r"short.txt has \d+ tokens; at least 64 are needed"):
        compare(source, source, ops, text)
    with pytest.raises(RequestError, match="cannot read the text"):
        compare(source, source, ops, tmp_path / "absent.txt")
    broken = changed(source, "model.norm.weight", lambda w: w * np.nan)
    with pytest.raises(CheckpointError, match="the weights of changed are broken"):
        compare(source, broken, ops, windows=1)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    from puna.checkpoint import save_checkpoint

    checkpoint: Checkpoint = tiny_checkpoint()
    save_checkpoint(checkpoint, tmp_path / "bare", "safetensors")
    with pytest.raises(TokenizerError, match="bare has no tokenizer"):
        Side.open("bare", resolve(tmp_path / "bare"))


def test_a_text_shorter_than_a_window(source: Side, ops: Ops, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a little girl who liked to play outside in the park. " * 3)
    seen: list[tuple[str, int, int]] = []
    report: Report = compare(source, source, ops, text, progress=lambda *step: seen.append(step))
    assert report.text.windows == 1
    assert 64 <= report.text.window_tokens < 512
    assert report.text.scored_tokens == report.text.window_tokens - 1 - report.text.window_tokens // 2
    assert seen[0] == ("running stories", 0, 2)
    assert seen[-1] == ("running stories", 2, 2)
