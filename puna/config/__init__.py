"""The facts of one model."""

from puna.config.model_config import ModelConfig
from puna.config.rope import RopeScaling, llama3_factors

__all__ = ["ModelConfig", "RopeScaling", "llama3_factors"]
