"""Counts from a configuration alone, against hand computations and real tensors."""

from dataclasses import replace

import pytest

from puna import catalog
from puna.model.shapes import flops_per_token, kv_bytes_per_token, parameter_count, tensor_shapes
from tests.tiny_models import VARIANTS, tiny_config


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_those_of_transformers(variant: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = VARIANTS[variant]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config.to_hf()))
    assert tensor_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_parameters_by_hand() -> None:
    # V=256 D=64 F=96 L=2, 4 heads and 2 kv heads of 16: q, o 64·64; k, v 32·64; gate, up, down 64·96; 2 norms.
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64
    assert parameter_count(tiny_config()) == 2 * layer + 2 * 256 * 64 + 64
    assert parameter_count(tiny_config(tie_word_embeddings=True)) == 2 * layer + 256 * 64 + 64
    biases = 64 + 32 + 32 + 64 + 96 + 96 + 64
    both = tiny_config(attention_bias=True, mlp_bias=True)
    assert parameter_count(both) == parameter_count(tiny_config()) + 2 * biases


def test_flops_by_hand() -> None:
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96
    matrices = 2 * layer + 256 * 64
    assert flops_per_token(tiny_config(), 0) == 2 * matrices
    assert flops_per_token(tiny_config(), 100) == 2 * matrices + 4 * 2 * 4 * 16 * 100
    # A tied head multiplies as an untied one does.
    assert flops_per_token(tiny_config(tie_word_embeddings=True), 7) == flops_per_token(tiny_config(), 7)


def test_flops_are_twice_the_parameters_but_for_the_lookup() -> None:
    """The well-known 2N: of Llama 3 8B all but the embedding table and the norms multiply."""
    config = catalog.get("llama-3-8b").config
    idle = config.vocab_size * config.hidden_size + 65 * config.hidden_size
    assert flops_per_token(config) == 2 * (8_030_261_248 - idle)


def test_torch_counts_the_same_flops() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny_config()
    model = LlamaForCausalLM(LlamaConfig(**config.to_hf(), attn_implementation="eager"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 10, dtype=torch.long), use_cache=False)
    # Eager attention multiplies the masked half too: every token attends to all 10.
    rotary = 2 * config.head_dim // 2 * 10
    assert counter.get_total_flops() - 10 * flops_per_token(config, 10) in (0, rotary)


def test_cache_bytes() -> None:
    assert kv_bytes_per_token(catalog.get("llama-2-7b").config) == 524_288  # half a MiB a token, as often quoted
    assert kv_bytes_per_token(catalog.get("llama-3.1-8b").config) == 131_072
    assert kv_bytes_per_token(catalog.get("llama-3.1-8b").config, 1) == 65_536
    assert kv_bytes_per_token(replace(tiny_config(), num_key_value_heads=1), 34 / 32) == 68
