"""Text in, text out: what scripts, the command line and everything above use."""

from puna.llm.answers import Chunk, Completion, TokenLogprob
from puna.llm.llm import LLM
from puna.llm.scoring import Score

__all__ = ["LLM", "Chunk", "Completion", "Score", "TokenLogprob"]
