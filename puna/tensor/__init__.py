"""Weights as values that know their encoding, the codecs of those encodings, and low-rank changes of weights."""

from puna.tensor.low_rank import Adapter, LowRank
from puna.tensor.types import QUANT_TYPES, QuantType, quant_type
from puna.tensor.weight import DeferredWeight, Weight

__all__ = ["QUANT_TYPES", "Adapter", "DeferredWeight", "LowRank", "QuantType", "Weight", "quant_type"]
