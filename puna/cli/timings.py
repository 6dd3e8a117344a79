"""Where an answer's time went, for people and for scripts."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from puna.engine import Timings


def timing_facts(timings: Timings, load_seconds: float) -> dict[str, Any]:
    """Seconds, counts and rates of one answer."""
    computed = timings.prompt_tokens - timings.cached_tokens
    return {
        "load_seconds": round(load_seconds, 4),
        **{name: round(value, 4) for name, value in asdict(timings).items()},
        "prefill_tokens_per_second": _rate(computed, timings.prefill_seconds),
        # The first token comes out of the prefill, so decoding made one less.
        "decode_tokens_per_second": _rate(timings.generated_tokens - 1, timings.decode_seconds),
    }


def print_timings(timings: Timings, load_seconds: float | None = None) -> None:
    """The timings as lines on standard error."""
    hidden = {"load_seconds"} if load_seconds is None else set()
    if not timings.drafted_tokens:
        hidden |= {"drafted_tokens", "accepted_tokens"}
    if not timings.shifts:
        hidden.add("shifts")
    for name, value in timing_facts(timings, load_seconds or 0.0).items():
        if name not in hidden:
            click.echo(f"{name.replace('_', ' ') + ':':27}{value}", err=True)


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 2) if tokens > 0 and seconds > 0 else None
