"""Which tensor gets which type: llama.cpp's named mixes, and what users override.

The rules are those of llama.cpp's quantizer (src/llama-quant.cpp) for the architecture ``llama``: values and the
projections back into the residual stream get more bits than the rest, in some layers or all, and so does the head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from puna.checkpoint.gguf_writer import FILE_TYPES, MIX_FILE_TYPES
from puna.config import ModelConfig
from puna.errors import CheckpointError, RequestError
from puna.tensor import QUANT_TYPES, QuantType, quant_type

# Each mix and the type of most of its tensors.
MIXES = {
    "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "IQ4_XS": "IQ4_XS",
    "IQ4_NL": "IQ4_NL",
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "Q8_0": "Q8_0",
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# What takes the place of a type whose blocks of 256 do not fit a tensor's rows.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor (its GGUF name); ``wanted`` is a type that did not fit its rows."""

    name: str
    shape: tuple[int, ...]
    type: QuantType
    wanted: str | None = None


@dataclass(frozen=True)
class Overrides:
    """Types that a user sets: of the head, and of tensors whose name a pattern is found in; the first match counts."""

    head: QuantType | None = None
    patterns: Sequence[tuple[re.Pattern[str], QuantType]] = ()

    @classmethod
    def parse(cls, head: str | None, patterns: Sequence[str]) -> Overrides:
        """From ``T`` and ``REGEX=T``. Raises RequestError naming what is wrong."""
        parsed = []
        for text in patterns:
            pattern, _, name = text.rpartition("=")
            if not pattern:
                raise RequestError(f"--tensor-type must be REGEX=TYPE, for example ffn_down=Q6_K; found {text!r}")
            try:
                parsed.append((re.compile(pattern), writable_type(name)))
            except re.error as error:
                raise RequestError(
                    f"--tensor-type {text!r}: {pattern!r} is not a regular expression: {error}"
                ) from None
        return cls(writable_type(head) if head else None, tuple(parsed))

    def type_of(self, name: str, *, is_head: bool) -> QuantType | None:
        if is_head and self.head is not None:
            return self.head
        return next((kind for pattern, kind in self.patterns if pattern.search(name)), None)


def writable_type(name: str) -> QuantType:
    """The tensor type of that name. Raises RequestError when there is none, or it cannot be written."""
    known = [kind.name for kind in QUANT_TYPES.values() if kind.can_encode]
    if name.upper() not in known:
        raise RequestError(f"{name!r} is not a tensor type that can be written; known: {', '.join(known)}")
    return quant_type(name)


def mix_name(name: str) -> str:
    """The mix of that name (case-insensitive), aliases resolved. Raises RequestError naming the known ones."""
    upper = ALIASES.get(name.upper(), name.upper())
    if upper in ("F32", "F16", "BF16"):
        raise RequestError(f"{upper} is not a quantized type; puna convert --type {upper} writes it")
    if upper not in MIXES:
        raise RequestError(f"unknown quantization type {name!r}; known: {', '.join(MIXES)}")
    return upper


def file_type(mix: str) -> int:
    """The number that ``general.file_type`` has for a mix."""
    return (FILE_TYPES | MIX_FILE_TYPES)[mix]


def plan_mix(
    mix: str,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    overrides: Overrides,
    *,
    has_importance: bool,
) -> list[TensorPlan]:
    """The type of every tensor (GGUF names) in a mix; vectors stay F32, as llama.cpp requires."""

    def choose(name: str, columns: int) -> QuantType:
        return quant_type(_mix_type(mix, config, name, columns, has_importance=has_importance))

    return plan_types({name: choose(name, shape[-1]) for name, shape in shapes.items()}, shapes, overrides)


def plan_types(
    types: Mapping[str, QuantType], shapes: Mapping[str, tuple[int, ...]], overrides: Overrides
) -> list[TensorPlan]:
    """A plan of chosen types, after the user's overrides, with others where rows are not whole blocks."""
    head = head_name(shapes)
    plans = []
    for name, shape in shapes.items():
        if len(shape) == 1:
            plans.append(TensorPlan(name, shape, quant_type("F32")))
            continue
        wanted = overrides.type_of(name, is_head=name == head) or types[name]
        kind = fitting_type(wanted, shape[-1])
        plans.append(TensorPlan(name, shape, kind, None if kind == wanted else wanted.name))
    return plans


def head_name(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The matrix that gives logits: the embedding itself where they are tied."""
    return HEAD if HEAD in shapes else EMBEDDING


def fitting_type(wanted: QuantType, columns: int) -> QuantType:
    """``wanted``, or what llama.cpp takes instead where rows of ``columns`` are not whole blocks of it."""
    if columns % wanted.block_size == 0:
        return wanted
    smaller = FALLBACKS.get(wanted.name)
    if smaller is not None and columns % quant_type(smaller).block_size == 0:
        return quant_type(smaller)
    return quant_type("F16")


def layer_and_role(name: str) -> tuple[int, str]:
    """``blk.3.ffn_up.weight`` -> (3, "ffn_up"); a tensor outside the layers is its own role, of layer 0."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (0, name.removesuffix(".weight"))


def _mix_type(mix: str, config: ModelConfig, name: str, columns: int, *, has_importance: bool) -> str:
    base = MIXES[mix]
    layer, role = layer_and_role(name)
    layers = config.num_hidden_layers
    queries_per_key = config.num_attention_heads // config.num_key_value_heads
    if role == "output" or (role == "token_embd" and config.tie_word_embeddings):
        return "Q8_0" if base == "Q8_0" or columns % quant_type(base).block_size else "Q6_K"
    if role == "attn_v":
        kind = _value_type(mix, layer, layers, grouped=queries_per_key >= 4)
        # The values of 70B models are small, for 8 query heads share each.
        shared = layers == 80 and queries_per_key > 1
        return "Q5_K" if shared and kind in ("Q3_K", "Q4_K") else kind
    if role == "ffn_down":
        return _down_type(mix, layer, layers, has_importance=has_importance)
    if role == "attn_output":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix, base)
    return base


def _value_type(mix: str, layer: int, layers: int, *, grouped: bool) -> str:
    if mix == "Q2_K":
        return "Q4_K" if grouped else "Q3_K"
    if mix == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if mix == "Q3_K_L" or (mix == "Q4_K_S" and layer < 4) or (mix in ("IQ4_NL", "IQ4_XS") and grouped):
        return "Q5_K"
    if mix in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, layers):
        return "Q6_K"
    return MIXES[mix]


def _down_type(mix: str, layer: int, layers: int, *, has_importance: bool) -> str:
    first = layer < layers // 8
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if mix == "Q3_K_L" or (first and mix == "Q4_K_S"):
        return "Q5_K"
    if mix in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, layers):
        return "Q6_K"
    if first and mix in ("IQ4_NL", "IQ4_XS") and not has_importance:
        return "Q5_K"
    if first and mix in ("Q4_0", "Q5_0") and has_importance:
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[mix]
    return MIXES[mix]


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def check_plan_changes(plans: Sequence[TensorPlan], types: Mapping[str, QuantType], source: str) -> None:
    """Raise CheckpointError when a tensor that is quantized already would be quantized again, which loses more."""
    again = [p for p in plans if types[p.name].block_size > 1 and types[p.name] != p.type]
    if again:
        raise CheckpointError(
            f"{source} is quantized already ({len(again)} tensors, the first {again[0].name} as "
            f"{types[again[0].name].name}); quantize the original model, or accept the further loss with --requantize"
        )
