"""The regular expressions that cut text before byte-level BPE, by GGUF's names for them (``tokenizer.ggml.pre``).

Sources: OpenAI's GPT-2 and tiktoken (cl100k_base, o200k_base), Meta's llama-models, Hugging Face's SmolLM2.
"""

from __future__ import annotations

from puna.errors import TokenizerError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA4 = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

GPT2_SPLITS = (_GPT2,)
LLAMA3_SPLITS = (_LLAMA3,)
LLAMA4_SPLITS = (_LLAMA4,)
SMOLLM_SPLITS = (r"\p{N}", _GPT2)

# The first name of equal patterns is the one written; the others are read.
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": GPT2_SPLITS,
    "llama-bpe": LLAMA3_SPLITS,
    "llama3": LLAMA3_SPLITS,
    "llama-v3": LLAMA3_SPLITS,
    "falcon3": LLAMA3_SPLITS,
    "dbrx": LLAMA3_SPLITS,
    "smaug-bpe": LLAMA3_SPLITS,
    "llama4": LLAMA4_SPLITS,
    "gpt-4o": LLAMA4_SPLITS,
    "smollm": SMOLLM_SPLITS,
    "starcoder": SMOLLM_SPLITS,
    "refact": SMOLLM_SPLITS,
}

# Of these names llama.cpp takes a cut that is a token whole, and adds BOS unless the file says otherwise.
LLAMA3_NAMES = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3"})


def splits_of(name: object) -> tuple[str, ...]:
    """The patterns of a GGUF pre-tokenizer name. Raises TokenizerError naming the known ones."""
    if not isinstance(name, str) or name not in SPLITS:
        raise TokenizerError(f"tokenizer.ggml.pre is {name!r}, which is not supported; known: {', '.join(SPLITS)}")
    return SPLITS[name]


def name_of(splits: tuple[str, ...]) -> str:
    """The GGUF name of these patterns. Raises TokenizerError when GGUF has none."""
    for name, patterns in SPLITS.items():
        if patterns == splits:
            return name
    raise TokenizerError(f"GGUF has no name for a tokenizer that cuts text by {splits!r}")
