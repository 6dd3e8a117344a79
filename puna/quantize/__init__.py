"""Smaller models: which tensor gets which type, what the inputs say of it, and the file that comes of it."""

from puna.quantize.folder import QuantizedFolder, quantize_to_folder
from puna.quantize.folder_settings import METHODS, FolderSettings
from puna.quantize.merge import merge_adapter
from puna.quantize.quantize import Quantized, QuantizeSettings, quantize
from puna.quantize.quantizer import quantizer
from puna.quantize.source import Source

__all__ = [
    "METHODS",
    "FolderSettings",
    "QuantizeSettings",
    "Quantized",
    "QuantizedFolder",
    "Source",
    "merge_adapter",
    "quantize",
    "quantize_to_folder",
    "quantizer",
]
