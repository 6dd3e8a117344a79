"""Models of random weights: llama.cpp's rule of types, published shapes, and that they open and run."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bench.synthetic_models import MIXES, SHAPES, random_blocks, synthetic_model, tensor_type
from puna.checkpoint import open_checkpoint
from puna.checkpoint.names import gguf_name, hf_names
from puna.llm import LLM
from puna.tensor import quant_type


def types_of(shape: str, mix: str) -> dict[str, str]:
    names = [gguf_name(name) for name in hf_names(SHAPES[shape])]
    return {name: tensor_type(name, mix, SHAPES[shape]).name for name in names}


@pytest.mark.parametrize(("shape", "parameters"), [("llama-1b", 1_235_814_400), ("llama-8b", 8_030_261_248)])
def test_as_many_parameters_as_the_published_model(shape: str, parameters: int) -> None:
    assert sum(np.prod(s, dtype=np.int64) for s in hf_names(SHAPES[shape]).values()) == parameters


def test_q4_k_m_is_the_mix_of_the_published_file() -> None:
    """The counts and layers of Llama-3.2-1B-Instruct-Q4_K_M.gguf and Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf."""
    small = types_of("llama-1b", "Q4_K_M")
    assert Counter(small.values()) == {"Q4_K": 96, "F32": 33, "Q6_K": 17}
    assert [i for i in range(16) if small[f"blk.{i}.ffn_down.weight"] == "Q6_K"] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert small["token_embd.weight"] == "Q6_K"
    large = types_of("llama-8b", "Q4_K_M")
    assert Counter(large.values()) == {"Q4_K": 193, "F32": 65, "Q6_K": 33}
    assert (large["token_embd.weight"], large["output.weight"]) == ("Q4_K", "Q6_K")


def test_q4_0_keeps_its_output_in_q6_k_and_q8_0_does_not() -> None:
    assert Counter(types_of("llama-1b", "Q4_0").values()) == {"Q4_0": 112, "F32": 33, "Q6_K": 1}
    assert Counter(types_of("llama-1b", "Q8_0").values()) == {"Q8_0": 113, "F32": 33}


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16", "BF16"])
def test_weights_have_the_spread_of_a_model(kind: str) -> None:
    blocks = random_blocks(quant_type(kind), np.random.default_rng(0))
    values = quant_type(kind).decode(blocks)
    assert 0.015 < values.std() < 0.03
    assert abs(values.mean()) < 0.002


@pytest.mark.parametrize("mix", MIXES)
def test_tiny_model_opens_and_generates(mix: str, tmp_path: Path) -> None:
    path = synthetic_model("tiny", mix, tmp_path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.rope_scaling == SHAPES["tiny"].rope_scaling
    found = {gguf_name(name): weight.type.name for name, weight in checkpoint.tensors.items()}
    assert found == types_of("tiny", mix)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no infinities on the way
        llm = LLM.load(path)
        assert len(llm.generate("ab", temperature=0, max_tokens=4, stop=[]).token_ids) == 4
        assert np.isfinite(llm.logits([0, 1, 2])).all()


def test_written_once(tmp_path: Path) -> None:
    path = synthetic_model("tiny", "Q4_0", tmp_path)
    before = path.stat().st_mtime_ns
    assert synthetic_model("tiny", "Q4_0", tmp_path) == path
    assert path.stat().st_mtime_ns == before
