"""Text to token ids and back, from tokenizer.json, tokenizer.model (SentencePiece or tiktoken) or GGUF metadata."""

from puna.tokenizer.gguf import tokenizer_from_gguf, tokenizer_to_gguf
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "tokenizer_from_gguf", "tokenizer_to_gguf"]
