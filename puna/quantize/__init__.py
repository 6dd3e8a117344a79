"""Smaller models: which tensor gets which type, what the inputs say of it, and the file that comes of it."""

from puna.quantize.quantize import Quantized, QuantizeSettings, quantize

__all__ = ["QuantizeSettings", "Quantized", "quantize"]
