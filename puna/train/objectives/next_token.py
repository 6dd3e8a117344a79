"""Continued pretraining and supervised fine-tuning: the next token, of whatever the data says to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from puna.train.module import LlamaModule
from puna.train.objectives.metrics import Metrics
from puna.train.objectives.objective import Rows
from puna.train.trainer import NextToken


class MeasuredNextToken(NextToken):
    """Cross entropy by trained token, which measures nothing beside it."""

    def __init__(self) -> None:
        self.metrics = Metrics()


@dataclass(frozen=True)
class Pretrain:
    """Continued pretraining: every token is learnt. The rows are text, or are rendered to train on everything."""

    rows: ClassVar[Rows] = "documents"

    def objective(self, module: LlamaModule) -> MeasuredNextToken:
        return MeasuredNextToken()


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning: of conversations the assistant's messages are learnt, or what the rows are rendered to
    train on."""

    rows: ClassVar[Rows] = "documents"

    def objective(self, module: LlamaModule) -> MeasuredNextToken:
        return MeasuredNextToken()
