"""The Llama forward, and what a configuration says of a model."""

from puna.model import shapes

__all__ = ["shapes"]
