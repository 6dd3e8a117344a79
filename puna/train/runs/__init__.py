"""What is kept of a training run in its folder, and how people look at it. No torch here."""

from puna.train.runs.folder import RunFolder, runs_home
from puna.train.runs.record import DataFacts, Evaluation, RunInputs, RunRecord, Sample
from puna.train.runs.run import Run

__all__ = ["DataFacts", "Evaluation", "Run", "RunFolder", "RunInputs", "RunRecord", "Sample", "runs_home"]
