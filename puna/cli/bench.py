"""``puna bench``: how fast a model runs here, alone or beside llama.cpp."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from puna.cli.options import json_option, kv_type_option, ops_option, speculative_options, threads_option
from puna.cli.progress import human_bytes
from puna.errors import RequestError

if TYPE_CHECKING:
    from puna.engine import Stream
    from puna.llm import LLM


@click.command()
@click.argument("model")
@click.option(
    "--prompt-tokens", type=click.IntRange(0), default=512, show_default=True, help="Tokens of the prompt (0: skip)."
)
@click.option(
    "--gen-tokens", type=click.IntRange(0), default=128, show_default=True, help="Tokens to generate (0: skip)."
)
@click.option(
    "--depth", type=click.IntRange(0), default=0, show_default=True, help="Tokens in the cache before generating."
)
@click.option(
    "--parallel", type=click.IntRange(1, 64), default=1, show_default=True, help="Sequences that generate together."
)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Runs, of which the median counts.")
@click.option(
    "--compare",
    type=click.Choice(["llama.cpp"]),
    help="Measure this program too, on the same GGUF file, at the better of its settings.",
)
@threads_option
@ops_option
@kv_type_option
@speculative_options
@json_option
def bench(
    model: str,
    prompt_tokens: int,
    gen_tokens: int,
    depth: int,
    parallel: int,
    runs: int,
    compare: str | None,
    as_json: bool,
    **load_options: Any,
) -> None:
    """Measure prefill and decode speed of MODEL with random tokens, greedily.

    Prefill starts from an empty context; decode from one of --depth tokens, as llama-bench does.
    """
    if not prompt_tokens and not gen_tokens:
        raise RequestError("--prompt-tokens and --gen-tokens are both 0: there is nothing to measure")
    if compare is not None:
        from puna.cli.compare import Work, compare_with_llama_cpp, print_comparison
        from puna.ops.threads import default_threads
        from puna.store import resolve

        for name in ("ops", "kv_type", "speculative", "draft_model"):
            if load_options[name] not in (None, "native"):
                raise RequestError(
                    f"--compare measures both programs as they are; leave out --{name.replace('_', '-')}"
                )
        work = Work(
            resolve(model).path,
            prompt_tokens,
            gen_tokens,
            depth,
            parallel,
            load_options["threads"] or default_threads(),
        )
        comparison = compare_with_llama_cpp(work, runs)
        if as_json:
            click.echo(json.dumps(comparison.facts()))
        else:
            print_comparison(comparison)
        return
    result = _measure(model, prompt_tokens, gen_tokens, depth, parallel, runs, load_options)
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(result)


def _measure(
    model: str,
    prompt_tokens: int,
    gen_tokens: int,
    depth: int,
    parallel: int,
    runs: int,
    load_options: dict[str, Any],
) -> dict[str, Any]:
    from puna.llm import LLM

    # The cache is shared: a context of all sequences together has room for each.
    context = max(prompt_tokens + 1, parallel * _tokens_of_one(gen_tokens, depth, parallel))
    started = time.perf_counter()
    llm = LLM.load(model, context_length=context, **load_options)
    load_seconds = time.perf_counter() - started
    _prefill_seconds(llm, max(1, prompt_tokens), "warm up")  # touches weights, cache and working memory, as llama-bench
    prefill = [_prefill_seconds(llm, prompt_tokens, f"prefill {run}") for run in range(runs if prompt_tokens else 0)]
    decode = [_decode(llm, gen_tokens, depth, parallel, f"decode {run}") for run in range(runs if gen_tokens else 0)]
    return {
        "model": model,
        "ops": llm.model.ops.name,
        "isa": getattr(llm.model.ops, "isa", None),
        "threads": getattr(llm.model.ops, "threads", 1),
        "prompt_tokens": prompt_tokens,
        "gen_tokens": gen_tokens,
        "depth": depth,
        "parallel": parallel,
        "runs": runs,
        "prefill_tokens_per_second": prompt_tokens / statistics.median(prefill) if prefill else None,
        "decode_tokens_per_second": statistics.median(speed for speed, _, _ in decode) if decode else None,
        "time_to_first_token_seconds": statistics.median(prefill) if prefill else None,
        "drafted_tokens": sum(drafted for _, drafted, _ in decode),
        "accepted_tokens": sum(accepted for _, _, accepted in decode),
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _tokens_of_one(gen_tokens: int, depth: int, parallel: int) -> int:
    """At most so many tokens does a sequence come to; while the last prompts are prefilled, the first ones generate."""
    return max(1, depth) + gen_tokens + parallel * (1 + depth // 256) + 1


def _submit(llm: LLM, tokens: int, salt: str, max_tokens: int | None = None) -> Stream:
    """A greedy request for random tokens. No run finds the keys and values of another; no end ids end it early."""
    from puna.engine import Request, SamplingParams

    seed = [ord(letter) for letter in salt]
    ids = np.random.default_rng(seed).integers(0, llm.config.vocab_size, tokens).tolist()
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return llm.engine.submit(Request(ids, params, cache_salt=salt))


def _prefill_seconds(llm: LLM, tokens: int, salt: str) -> float:
    stream = _submit(llm, tokens, salt, max_tokens=1)
    for event in stream:
        assert event.error is None
    return stream.timings.prefill_seconds


def _decode(llm: LLM, tokens: int, depth: int, parallel: int, salt: str) -> tuple[float, int, int]:
    """Tokens per second of all sequences together, from when each has its first; drafted and accepted tokens."""
    streams = [_submit(llm, max(1, depth), f"{salt} {number}") for number in range(parallel)]
    while any(stream.timings.generated_tokens == 0 for stream in streams):
        llm.engine.step()
    before = sum(stream.timings.generated_tokens for stream in streams)
    wanted = before + tokens * parallel
    started = time.perf_counter()
    while (now := sum(stream.timings.generated_tokens for stream in streams)) < wanted:
        llm.engine.step()
    seconds = time.perf_counter() - started
    for stream in streams:
        llm.engine.cancel(stream.id)
    timings = [stream.timings for stream in streams]
    drafted, accepted = sum(t.drafted_tokens for t in timings), sum(t.accepted_tokens for t in timings)
    return (now - before) / seconds, drafted, accepted


def peak_rss_bytes() -> int:
    """The most memory this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _print(result: dict[str, Any]) -> None:
    click.echo(f"{result['model']}: {result['ops']} ops, {result['threads']} threads")
    if result["prompt_tokens"]:
        speed = result["prefill_tokens_per_second"]
        click.echo(f"  prefill of {result['prompt_tokens']} tokens   {speed:10.1f} tokens/s")
    if result["gen_tokens"]:
        click.echo(f"  decode of {result['gen_tokens']} tokens    {result['decode_tokens_per_second']:10.1f} tokens/s")
    if result["drafted_tokens"]:
        click.echo(f"  drafted tokens accepted {result['accepted_tokens']:6} of {result['drafted_tokens']}")
    if result["depth"] or result["parallel"] > 1:
        click.echo(f"    after {result['depth']} tokens, {result['parallel']} sequences together")
    if result["prompt_tokens"]:
        click.echo(f"  time to first token     {result['time_to_first_token_seconds']:10.3f} s")
    click.echo(f"  load                    {result['load_seconds']:10.3f} s")
    click.echo(f"  peak memory             {human_bytes(result['peak_rss_bytes']):>12}")
