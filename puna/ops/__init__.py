"""Arithmetic backends behind one protocol."""

from puna.ops.protocol import Batch, KVCache, Ops, Sampled, SamplingRow

__all__ = ["Batch", "KVCache", "Ops", "Sampled", "SamplingRow"]
