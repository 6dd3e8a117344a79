"""Smaller models: which tensor gets which type, what the inputs say of it, and the file that comes of it."""

from puna.quantize.folder import METHODS, FolderSettings, quantize_to_folder
from puna.quantize.quantize import Quantized, QuantizeSettings, quantize

__all__ = ["METHODS", "FolderSettings", "QuantizeSettings", "Quantized", "quantize", "quantize_to_folder"]
