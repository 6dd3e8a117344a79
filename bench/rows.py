"""The rows of the table, as data. A bar is what we want to reach; None where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One speed. ``ratio`` is the bar of Puna ÷ the better llama.cpp, ``share`` of the floor, ``gigabytes`` of memory.

    ``tokens`` is the prompt's length, or how many each of ``parallel`` sequences generates after ``depth`` tokens.
    ``isa`` forces Puna's kernels, and asks for a llama.cpp built for the same.
    """

    group: str
    model: str
    phase: Literal["prefill", "decode"]
    tokens: int
    ratio: float | None = None
    share: float | None = None
    depth: int = 0
    parallel: int = 1
    isa: str | None = None
    gigabytes: float | None = None

    @property
    def title(self) -> str:
        words = f"{self.model} {self.phase} {self.tokens}"
        words += f" at {self.depth}" if self.depth else ""
        words += f" × {self.parallel}" if self.parallel > 1 else ""
        return words + (f" ({self.isa})" if self.isa else "")


ROWS: tuple[Row, ...] = (
    *(Row("1b", f"llama-1b.{mix}", "prefill", 512, r, 0.5) for mix, r in (("Q4_0", 3), ("Q4_K_M", 1.8), ("Q8_0", 3.5))),
    *(
        Row("1b", f"llama-1b.{mix}", "decode", 128, r, 0.8)
        for mix, r in (("Q4_0", 1.8), ("Q4_K_M", 1.7), ("Q8_0", 1.6))
    ),
    *(Row("smollm2", f"smollm2.{mix}", "prefill", 512, 3, 0.35) for mix in ("Q4_1", "Q4_0", "Q8_0")),
    *(Row("smollm2", f"smollm2.{mix}", "decode", 128, 1.7, 0.55) for mix in ("Q4_1", "Q4_0", "Q8_0")),
    *(Row("floats", f"llama-1b.{mix}", "prefill", 512, 1.2) for mix in ("BF16", "F16")),
    *(Row("floats", f"llama-1b.{mix}", "decode", 32, 1.2) for mix in ("BF16", "F16")),
    *(
        Row("depth", model, "decode", 32, 2, 0.6, depth=depth)
        for model in ("smollm2.Q8_0", "llama-1b.Q4_0")
        for depth in (2048, 8192)
    ),
    *(Row("long", m, "prefill", n, 2) for m in ("smollm2.Q8_0", "llama-1b.Q4_0") for n in (2048, 8192)),
    *(
        Row("batch", model, "decode", 64, 2.5 if parallel >= 8 else None, parallel=parallel)
        for model in ("smollm2.Q8_0", "llama-1b.Q4_K_M")
        for parallel in (1, 4, 8, 16, 32)
    ),
    Row("8b", "llama-8b.Q4_K_M", "decode", 32, 1.6, gigabytes=8),
    Row("8b", "llama-8b.Q4_K_M", "prefill", 256, 1.6, gigabytes=8),
    Row("avx2", "llama-1b.Q4_0", "prefill", 512, 1.2, isa="avx2"),
    Row("avx2", "llama-1b.Q4_0", "decode", 128, 1.2, isa="avx2"),
)
