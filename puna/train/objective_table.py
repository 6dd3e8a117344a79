"""The objectives by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from puna.train.module import LlamaModule
from puna.train.trainer import NextToken, Objective


class Knobs(Protocol):
    rows: ClassVar[str]

    def objective(self, module: LlamaModule) -> Objective: ...


@dataclass(frozen=True)
class SFT:
    rows: ClassVar[str] = "documents"

    def objective(self, module: LlamaModule) -> NextToken:
        return NextToken()


@dataclass(frozen=True)
class Pretrain:
    rows: ClassVar[str] = "documents"

    def objective(self, module: LlamaModule) -> NextToken:
        return NextToken()


OBJECTIVES: dict[str, type[Knobs]] = {"pretrain": Pretrain, "sft": SFT}
