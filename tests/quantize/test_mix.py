"""Which tensor gets which type: what llama-quantize chose (llama_cpp_types.json), and what users override."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_checkpoint, tiny_config

from puna.checkpoint.gguf import gguf_contents
from puna.config import ModelConfig
from puna.errors import RequestError
from puna.quantize.mix import MIXES, Overrides, file_type, fitting_type, layer_and_role, mix_name, plan_mix
from puna.tensor import quant_type

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("llama_cpp_types.json").read_text())


def planned(
    mix: str, config: ModelConfig, overrides: Overrides | None = None, importance: bool = False
) -> dict[str, str]:
    _, tensors = gguf_contents(tiny_checkpoint(config))
    plans = plan_mix(mix, config, tensors.shapes, overrides or Overrides(), has_importance=importance)
    return {plan.name: plan.type.name for plan in plans}


@pytest.mark.parametrize("shape", GOLDEN["shapes"])
def test_every_tensor_gets_the_type_that_llama_cpp_gives_it(shape: str) -> None:
    config = tiny_config(vocab_size=32, **GOLDEN["shapes"][shape])
    for mix, expected in GOLDEN["types"][shape].items():
        found: dict[str, list[str]] = {}
        for name, kind in planned(mix.removesuffix("+"), config, importance=mix.endswith("+")).items():
            if name.endswith("norm.weight"):
                assert kind == "F32"
            else:
                found.setdefault(layer_and_role(name)[1], []).append(kind)
        runs = {name: re.findall(r"(\w+) (\d+)", text) for name, text in expected.items()}
        assert found == {name: [k for k, n in pairs for _ in range(int(n))] for name, pairs in runs.items()}, mix
    assert {mix.removesuffix("+") for mix in GOLDEN["types"][shape]} == set(MIXES)


def test_file_types_are_llama_cpps() -> None:
    # enum llama_ftype of llama.h
    numbers = {"Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15}
    numbers |= {"Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30}
    assert {mix: file_type(mix) for mix in numbers} == numbers


def test_overrides_win_the_first_match_counts_and_the_head_is_the_embedding_where_tied() -> None:
    overrides = Overrides.parse("F16", ["blk\\.1\\.ffn_=Q8_0", "ffn_down=q5_1"])
    tied = planned("Q4_0", tiny_config(tie_word_embeddings=True), overrides)
    assert tied["token_embd.weight"] == "F16"
    assert tied["blk.0.ffn_down.weight"] == "Q5_1"
    assert tied["blk.1.ffn_down.weight"] == "Q8_0"
    assert tied["blk.0.ffn_up.weight"] == "Q4_0"
    untied = planned("Q4_0", tiny_config(), overrides)
    assert (untied["token_embd.weight"], untied["output.weight"]) == ("Q4_0", "F16")


@pytest.mark.parametrize(
    ("wanted", "columns", "expected"),
    [("Q4_K", 256, "Q4_K"), ("Q4_K", 96, "Q5_0"), ("Q4_K", 100, "F16"), ("Q4_0", 100, "F16"), ("Q6_K", 96, "Q8_0")],
)
def test_rows_that_are_no_whole_blocks_fall_back(wanted: str, columns: int, expected: str) -> None:
    assert fitting_type(quant_type(wanted), columns).name == expected


def test_what_is_no_type_is_refused_by_name() -> None:
    assert mix_name("q4_k") == "Q4_K_M"
    with pytest.raises(RequestError, match="unknown quantization type 'Q9_K'; known: Q2_K, Q3_K_S"):
        mix_name("Q9_K")
    with pytest.raises(RequestError, match="puna convert --type F16"):
        mix_name("f16")
    with pytest.raises(RequestError, match="'Q8_K' is not a tensor type that can be written; known: F32"):
        Overrides.parse("Q8_K", [])
    with pytest.raises(RequestError, match="must be REGEX=TYPE, for example ffn_down=Q6_K; found 'Q6_K'"):
        Overrides.parse(None, ["Q6_K"])
    with pytest.raises(RequestError, match=r"'\(' is not a regular expression"):
        Overrides.parse(None, ["(=Q6_K"])
