"""Weights as values that know their encoding, and the codecs of those encodings."""

from puna.tensor.types import QUANT_TYPES, QuantType, quant_type
from puna.tensor.weight import Weight

__all__ = ["QUANT_TYPES", "QuantType", "Weight", "quant_type"]
