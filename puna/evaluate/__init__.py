"""Two models side by side: what a derived model still has in common with its source, and what it costs."""

from puna.evaluate.compare import compare
from puna.evaluate.report import ModelFacts, Report

__all__ = ["ModelFacts", "Report", "compare"]
