"""Model files in and out; past this door there is one tensor naming and one RoPE layout."""

from puna.checkpoint.checkpoint import Checkpoint, open_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "open_checkpoint", "save_checkpoint"]
