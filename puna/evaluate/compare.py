"""``compare``: run two models on the same text and say how far they are apart."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path

import numpy as np

from puna.errors import RequestError
from puna.evaluate.probe import Probe
from puna.evaluate.report import Divergence, ModelFacts, Report, TextFacts
from puna.evaluate.samples import sample_text
from puna.evaluate.sides import (
    Side,
    check_comparable,
    template_differences,
    tensor_types,
    token_differences,
)
from puna.evaluate.statistics import LayerErrors, Predictions, compare_logits, perplexity, quantiles
from puna.evaluate.tape import Tape
from puna.ops.protocol import Ops
from puna.tokenizer import Tokenizer

WINDOW = 512
MIN_TOKENS = 64
DECODE_PROMPT = 32
CHARACTERS = 16  # more than a token of prose has in any vocabulary

Progress = Callable[[str, int, int], None]
Windows = list[list[int]]


def compare(
    source: Side, derived: Side, ops: Ops, text: Path | None = None, windows: int = 8, progress: Progress | None = None
) -> Report:
    """Measure ``derived`` against ``source`` on a text file, or on a text of Puna's own.

    The text is cut into at most ``windows`` windows of 512 tokens, each a sequence of its own; the second half of each
    is scored, as llama.cpp does it. One model is in memory at a time, and one window of predictions. ``progress`` gets
    what is done, how much of it came before, and how much there is.
    Raises RequestError when the vocabularies differ or the text is too short, CheckpointError for weights that compute
    no numbers.
    """
    tell = progress or (lambda *_: None)
    check_comparable(source, derived)
    name, content = _read(text, CHARACTERS * WINDOW * windows)
    context = min(side.checkpoint.config.max_position_embeddings for side in (source, derived))
    cut = cut_windows(source.tokenizer, content, min(WINDOW, context), windows, name)
    first = len(cut[0]) // 2
    predictions, layers = [], LayerErrors()
    same_shape = _state_shape(source) == _state_shape(derived) is not None
    speeds, total = [], 2 * len(cut)
    with Tape() as tape:
        probe = Probe(source.name, source.checkpoint, ops, source.adapter)
        for number, window in enumerate(cut):
            tell(f"running {source.name}", number, total)
            trace = probe.run(window, first)
            tape.write(trace.logits)
            for state in trace.states if same_shape else ():
                tape.write(state)
        speeds.append(probe.decode_speed(cut[0][:DECODE_PROMPT]))
        del probe, trace
        tape.rewind()
        probe = Probe(derived.name, derived.checkpoint, ops, derived.adapter)
        for number, window in enumerate(cut):
            tell(f"running {derived.name}", len(cut) + number, total)
            trace = probe.run(window, first)
            predictions.append(compare_logits(tape.read(), trace.logits, np.array(window[first + 1 :], np.int64)))
            for layer, state in enumerate(trace.states if same_shape else ()):
                layers.add(layer, tape.read(), state)
        speeds.append(probe.decode_speed(cut[0][:DECODE_PROMPT]))
    tell(f"running {derived.name}", total, total)
    joined = Predictions.join(predictions)
    return Report(
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        source_identity=source.identity,
        source=_facts(source, perplexity(joined.source_nll), speeds[0]),
        derived=_facts(derived, perplexity(joined.derived_nll), speeds[1]),
        text=TextFacts(name, sha256(content.encode()).hexdigest(), len(cut), len(cut[0]), len(joined.kl)),
        token_ids=token_differences(source, derived),
        template=template_differences(source, derived),
        kl=Divergence(
            float(joined.kl.mean()),
            float(np.median(joined.kl)),
            float(np.quantile(joined.kl, 0.99)),
            float(joined.kl.max()),
            quantiles(joined.kl),
        ),
        top1_agreement=float(joined.same_top.mean()),
        layer_errors=layers.relative(),
    )


def cut_windows(tokenizer: Tokenizer, text: str, size: int, limit: int, name: str) -> Windows:
    """The first ``limit`` windows of ``size`` tokens, or a single shorter one; BOS begins each where the model's do.

    Raises RequestError for a text of fewer than 64 tokens.
    """
    ids = tokenizer.encode(text, add_bos=tokenizer.add_bos)
    least = min(MIN_TOKENS, size)
    if len(ids) < least:
        raise RequestError(f"{name} has {len(ids)} tokens; at least {least} are needed to compare models")
    size = min(size, len(ids))
    windows = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)][:limit]
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        windows = [[tokenizer.bos_id, *window[1:]] for window in windows]
    return windows


def _read(text: Path | None, length: int) -> tuple[str, str]:
    """A text's name and its first ``length`` characters."""
    if text is None:
        return "Puna's sample text", sample_text()[:length]
    try:
        with text.expanduser().open(encoding="utf-8") as file:
            return text.name, file.read(length)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the text {text}: {error}") from None


def _facts(side: Side, measured_perplexity: float, speed: float) -> ModelFacts:
    return ModelFacts(
        name=side.name,
        types=tensor_types(side.checkpoint),
        bytes=side.bytes,
        bits_per_weight=side.bits_per_weight,
        perplexity=measured_perplexity,
        decode_tokens_per_second=speed,
    )


def _state_shape(side: Side) -> tuple[int, int] | None:
    """None where states are not shown: with an adapter beside the model."""
    if side.adapter is not None and not side.adapter.magnitudes:
        return None
    return side.checkpoint.config.num_hidden_layers, side.checkpoint.config.hidden_size
