"""What a model does with a text: the inputs of its linears, and its predictions.

A text is cut into windows of 512 tokens, or the model's context where that is less, each a sequence of its own that
begins with BOS where the model's do, as llama.cpp does it; what is left at the end is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint import Checkpoint
from puna.checkpoint.names import gguf_name
from puna.errors import RequestError, TokenizerError
from puna.llm import scoring
from puna.model.model import Model
from puna.ops.protocol import Batch, Ops
from puna.ops.recording import RecordingOps
from puna.quantize.imatrix import ImportanceMatrix

WINDOW = 512
MAX_WINDOWS = 128

Progress = Callable[[str, int, int], None]
Windows = list[list[int]]


def read_windows(checkpoint: Checkpoint, path: Path, limit: int = MAX_WINDOWS) -> Windows:
    """The first ``limit`` windows of a text file.

    Raises RequestError when it can't be read or holds less than one window, TokenizerError without a tokenizer.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise TokenizerError("calibration needs the model's tokenizer, which is not stored with its weights")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the calibration text {path}: {error}") from None
    size = min(WINDOW, checkpoint.config.max_position_embeddings)
    text = text[: 16 * size * limit]  # more than any tokenizer needs for so many tokens of prose
    ids = tokenizer.encode(text, add_bos=tokenizer.add_bos)
    windows = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)][:limit]
    if not windows:
        raise RequestError(f"the calibration text {path} has {len(ids)} tokens; at least {size} are needed")
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        windows = [[tokenizer.bos_id, *window[1:]] for window in windows]
    return windows


def measure_importance(
    checkpoint: Checkpoint, ops: Ops, windows: Windows, dataset: str, progress: Progress | None = None
) -> ImportanceMatrix:
    """The mean of the squared inputs of each linear in the layers; the head's is not measured, as llama.cpp does it.

    The model is held in memory in the form it is computed in.
    """
    sums: dict[str, NDArray[np.float64]] = {}

    def observe(names: Sequence[str], x: NDArray[np.float32]) -> None:
        squares = np.einsum("ij,ij->j", x, x, dtype=np.float64)
        for name in names:
            sums[name] = sums[name] + squares if name in sums else squares

    recording = RecordingOps(ops, observe)
    model = Model.bind(recording, checkpoint.config, checkpoint.tensors)
    for number, window in enumerate(windows):
        if progress:
            progress("calibrating", number, len(windows))
        model.hidden(one_sequence(window), recording.new_kv(checkpoint.config, 1, len(window)))
    tokens = sum(map(len, windows))
    means = {gguf_name(name): (total / tokens).astype(np.float32) for name, total in sums.items()}
    return ImportanceMatrix(means, (dataset,), len(windows), len(windows[0]))


def log_probabilities(model: Model, window: Sequence[int]) -> NDArray[np.float32]:
    """float32[T, V]: natural logarithms of what the model expects after each token of a window."""
    logits = scoring.logits(model, window)
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits


def divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The mean over tokens of KL(reference ‖ other), in nats, of log probabilities [T, V] (Kullback & Leibler 1951)."""
    return float((np.exp(reference) * (reference - other)).sum(axis=-1, dtype=np.float64).mean())


def one_sequence(window: Sequence[int]) -> Batch:
    """A window from its beginning, in a cache of one block that holds it all."""
    positions = np.arange(len(window), dtype=np.int32)
    return Batch(
        tokens=np.array(window, np.int32),
        positions=positions,
        seq_starts=np.array([0, len(window)], np.int32),
        slots=positions,
        block_tables=np.zeros((1, 1), np.int32),
        context_lens=np.array([len(window)], np.int32),
        logit_rows=positions[-1:],
    )
