"""Quantized Hugging Face folders: the layouts that ``quantization_config`` names, in and out."""
