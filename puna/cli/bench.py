"""``puna bench``: how fast a model runs here."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from puna.cli.options import json_option, ops_option, speculative_options, threads_option
from puna.cli.progress import human_bytes

if TYPE_CHECKING:
    from puna.engine import Timings
    from puna.llm import LLM


@click.command()
@click.argument("model")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--gen-tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens to generate.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Runs, of which the median counts.")
@threads_option
@ops_option
@speculative_options
@json_option
def bench(
    model: str,
    prompt_tokens: int,
    gen_tokens: int,
    runs: int,
    threads: int | None,
    ops: str | None,
    speculative: str | None,
    draft_model: str | None,
    as_json: bool,
) -> None:
    """Measure prefill and decode speed of MODEL with random tokens, greedily, one sequence."""
    from puna.llm import LLM

    started = time.perf_counter()
    llm = LLM.load(
        model,
        context_length=prompt_tokens + gen_tokens,
        threads=threads,
        ops=ops,
        speculative=speculative,
        draft_model=draft_model,
    )
    load_seconds = time.perf_counter() - started
    _run(llm, min(prompt_tokens, 32), 2, seed=0)  # touch every weight once
    timings = [_run(llm, prompt_tokens, gen_tokens, seed) for seed in range(1, runs + 1)]
    result = {
        "model": model,
        "ops": llm.model.ops.name,
        "threads": threads or getattr(llm.model.ops, "threads", 1),
        "prompt_tokens": prompt_tokens,
        "gen_tokens": gen_tokens,
        "runs": runs,
        "prefill_tokens_per_second": statistics.median(prompt_tokens / t.prefill_seconds for t in timings),
        "decode_tokens_per_second": statistics.median((gen_tokens - 1) / t.decode_seconds for t in timings),
        "time_to_first_token_seconds": statistics.median(t.prefill_seconds for t in timings),
        "drafted_tokens": sum(t.drafted_tokens for t in timings),
        "accepted_tokens": sum(t.accepted_tokens for t in timings),
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(result)


def _run(llm: LLM, prompt_tokens: int, gen_tokens: int, seed: int) -> Timings:
    from puna.engine import Request, SamplingParams

    ids = np.random.default_rng(seed).integers(0, llm.config.vocab_size, prompt_tokens).tolist()
    params = SamplingParams(temperature=0, max_tokens=gen_tokens)
    # Its own salt, so that no run finds the keys and values of another; no end ids, so that every run is as long.
    stream = llm.engine.submit(Request(ids, params, cache_salt=f"bench {seed}"))
    for event in stream:
        assert event.error is None
    return stream.timings


def peak_rss_bytes() -> int:
    """The most memory this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _print(result: dict[str, Any]) -> None:
    click.echo(f"{result['model']}: {result['ops']} ops, {result['threads']} threads")
    click.echo(f"  prefill of {result['prompt_tokens']} tokens   {result['prefill_tokens_per_second']:10.1f} tokens/s")
    click.echo(f"  decode of {result['gen_tokens']} tokens    {result['decode_tokens_per_second']:10.1f} tokens/s")
    if result["drafted_tokens"]:
        click.echo(f"  drafted tokens accepted {result['accepted_tokens']:6} of {result['drafted_tokens']}")
    click.echo(f"  time to first token     {result['time_to_first_token_seconds']:10.3f} s")
    click.echo(f"  load                    {result['load_seconds']:10.3f} s")
    click.echo(f"  peak memory             {human_bytes(result['peak_rss_bytes']):>12}")
