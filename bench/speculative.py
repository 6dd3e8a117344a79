"""Speculative decoding off and on, in turn, in one process: tokens per second, their ratio, accepted drafts.

Usage: python bench/speculative.py MODEL [--draft-model MODEL] [--data FOLDER] [--tokens N] [--runs N] [--temperature T]
                                   [--batch N] [--threads N]
Prompts that ask for their own text again (edit, quote, summarise, code) and free ones. Both ways must give the same
tokens. Prints a table, then one JSON line. Quote figures of a quiet machine only.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from puna import LLM
from puna.engine import Request, SamplingParams, Timings

ROOT = Path(__file__).resolve().parent.parent
EXCERPT = 1000  # characters

ON_A_TEXT = {
    "spelling": "Correct the spelling of this text and write out the whole text again:\n\n{}",
    "quote": "Quote the most important sentences of this text, word for word:\n\n{}",
    "summarise": "Summarise the following text:\n\n{}",
}
ON_CODE = {
    "comments": "Add comments to this Python code and print the whole code:\n\n```python\n{}```",
    "rename": "Rename the variable `sequence` to `seq` in this code and print all of it again:\n\n```python\n{}```",
}
FREE = {
    "story": "Tell me a story about a lighthouse keeper.",
    "engine": "Explain how a diesel engine works.",
    "poem": "Write a poem about winter.",
    "habits": "What are good habits for learning a language?",
    "bicycle": "Describe the history of the bicycle.",
    "letter": "Write a letter to a friend about a journey to Peru.",
}


def prompts(data: Path) -> list[tuple[str, str, str]]:
    """Kind, name and text of each."""
    text = (data / "text" / "wizard_of_oz_248k.txt").read_text(encoding="utf-8")
    code = (ROOT / "puna" / "engine" / "scheduler.py").read_text(encoding="utf-8")
    found = []
    for number, start in enumerate((20_000, 60_000, 120_000), 1):
        excerpt = text[text.index("\n", start) + 1 :][:EXCERPT]
        found += [("repeats", f"{name} {number}", ask.format(excerpt)) for name, ask in ON_A_TEXT.items()]
    for number, function in enumerate(("    def schedule", "    def _admit", "    def _reserve"), 1):
        excerpt = code[code.index(function) :][:EXCERPT]
        excerpt = excerpt[: excerpt.rindex("\n") + 1]
        found += [("repeats", f"{name} {number}", ask.format(excerpt)) for name, ask in ON_CODE.items()]
    return found + [("free", name, ask) for name, ask in FREE.items()]


def answer(llm: LLM, ids: list[int], params: SamplingParams, batch: int) -> tuple[list[list[int]], list[Timings]]:
    """The same prompt as often as ``batch`` says, with different seeds."""
    streams = [
        llm.engine.submit(
            Request(ids, SamplingParams(**{**vars(params), "seed": seed}), llm.eos_ids, cache_salt=str(seed))
        )
        for seed in range(batch)
    ]
    while llm.engine.has_work:
        llm.engine.step()
    return [[e.token for e in stream if e.token is not None] for stream in streams], [s.timings for s in streams]


def speed(timings: list[Timings]) -> float:
    """Tokens per second of decoding, all sequences together."""
    return sum(t.generated_tokens - 1 for t in timings) / max(t.decode_seconds for t in timings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft-model")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    speculative = None if args.draft_model else "ngram"
    on = LLM.load(args.model, threads=args.threads, speculative=speculative, draft_model=args.draft_model)
    off = LLM(on.model, on.tokenizer)
    params = SamplingParams(temperature=args.temperature, max_tokens=args.tokens)
    results: list[dict[str, Any]] = []
    print(
        f"{'kind':9}{'prompt':14}{'tokens':>7}{'off tok/s':>11}{'on tok/s':>10}{'ratio':>7}"
        f"{'drafted':>9}{'accepted':>9}"
    )
    for kind, name, text in prompts(args.data):
        ids = on.prompt([{"role": "user", "content": text}]).ids
        speeds: dict[bool, list[float]] = {False: [], True: []}
        for run in range(args.runs + 1):
            plain, plain_timings = answer(off, ids, params, args.batch)
            drafted, timings = answer(on, ids, params, args.batch)
            assert drafted == plain, f"speculation changed the answer to {name}"
            if run:  # the first one fills the cache with the prompt
                speeds[False].append(speed(plain_timings))
                speeds[True].append(speed(timings))
        row = {
            "kind": kind,
            "prompt": name,
            "tokens": sum(t.generated_tokens for t in timings),
            "off": statistics.median(speeds[False]),
            "on": statistics.median(speeds[True]),
            "ratio": statistics.median(b / a for a, b in zip(speeds[False], speeds[True], strict=True)),
            "drafted": sum(t.drafted_tokens for t in timings),
            "accepted": sum(t.accepted_tokens for t in timings),
        }
        results.append(row)
        print(
            f"{kind:9}{name:14}{row['tokens']:7}{row['off']:11.1f}{row['on']:10.1f}{row['ratio']:7.2f}"
            f"{row['drafted']:9}{row['accepted']:9}",
            flush=True,
        )
    summary = {}
    for kind in ("repeats", "free"):
        ratios = [row["ratio"] for row in results if row["kind"] == kind]
        summary[kind] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        print(f"{kind}: median {summary[kind]['median']:.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    print(json.dumps({**settings, "isa": getattr(on.model.ops, "isa", ""), "summary": summary, "results": results}))


if __name__ == "__main__":
    main()
