"""What a known prefix is worth: the time to the first token, computed, from disk, and from memory.

Usage: python bench/prefix.py MODEL [--data FOLDER] [--tokens N] [--runs N] [--threads N] [--kv-type TYPE]
A first turn of a chat with about N tokens of text, computed; the same in a new engine that finds it on disk; its second
turn, which finds it in memory. All must give the same tokens as without any cache. "On disk" means in the system's page
cache, since it was written just before. Prints a table of medians, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from puna import LLM
from puna.engine import PrefixCache

ROOT = Path(__file__).resolve().parent.parent
ANSWER_TOKENS = 16


def turn(llm: LLM, messages: Sequence[Mapping[str, str]]) -> tuple[float, float, int, int, tuple[str, list[int]]]:
    """Seconds to the first token and from the last token's step to the end, prompt tokens, cached ones, the answer."""
    started = time.perf_counter()
    chunks, first = [], 0.0
    for chunk in llm.chat(messages, temperature=0, max_tokens=ANSWER_TOKENS, stream=True):
        first = first or time.perf_counter() - started
        chunks.append(chunk)
    whole = time.perf_counter() - started
    timings = chunks[-1].timings
    assert timings is not None
    rest = whole - timings.queue_seconds - timings.prefill_seconds - timings.decode_seconds
    text = "".join(chunk.text for chunk in chunks)
    ids = [chunk.token_id for chunk in chunks if chunk.token_id is not None]
    return first, rest, timings.prompt_tokens, timings.cached_tokens, (text, ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv-type")
    args = parser.parse_args()
    loaded = LLM.load(args.model, threads=args.threads, kv_type=args.kv_type)
    text = (args.data / "text" / "wizard_of_oz_248k.txt").read_text(encoding="utf-8")[20_000:]
    text = loaded.tokenizer.decode(loaded.tokenizer.encode(text[: 8 * args.tokens])[: args.tokens])
    first = [{"role": "user", "content": f"{text}\n\nWho is in this story?"}]
    rows: dict[str, list[tuple[float, float, int, int]]] = {}

    def measure(name: str, llm: LLM, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]]:
        *figures, answer = turn(llm, messages)
        rows.setdefault(name, []).append((figures[0], figures[1], figures[2], figures[3]))
        return answer

    def fresh(cache: PrefixCache | None) -> LLM:
        return LLM(loaded.model, loaded.tokenizer, kv_type=args.kv_type, prefix_cache=cache)

    measure("warm-up", fresh(None), first)
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as folder:
            cache = PrefixCache(Path(folder), args.model, 10**10)
            plain = fresh(None)
            expected = measure("first turn, computed", plain, first)
            second = [*first, {"role": "assistant", "content": expected[0]}, {"role": "user", "content": "Go on."}]
            wanted = measure("second turn, memory", plain, second)
            assert measure("first turn, computed and saved", fresh(cache), first) == expected
            assert measure("first turn, disk", fresh(cache), first) == expected
            assert measure("second turn, disk", fresh(cache), second) == wanted
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
    del rows["warm-up"]
    print(f"{'':32}{'prompt':>8}{'cached':>8}{'first token ms':>16}{'after the last ms':>19}")
    results = {}
    for name, figures in rows.items():
        seconds, rest = (statistics.median(row[i] for row in figures) for i in (0, 1))
        prompt, cached = figures[0][2:]
        results[name] = {"prompt": prompt, "cached": cached, "first_token_ms": seconds * 1e3, "after_ms": rest * 1e3}
        print(f"{name:32}{prompt:8}{cached:8}{seconds * 1e3:16.1f}{rest * 1e3:19.1f}")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    print(json.dumps({**settings, "isa": getattr(loaded.model.ops, "isa", ""), "bytes": size, "results": results}))


if __name__ == "__main__":
    main()
