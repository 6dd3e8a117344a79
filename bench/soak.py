"""Thousands of requests of every kind to one server, to see that its memory stays what it was.

    python -m bench.soak MODEL.gguf --requests 10000

Streams, whole answers, refused requests, and clients that leave in the middle; prompts and lengths are random. Memory
counts from the end of the first requests on: they fill the prefix cache, and the allocators' pools of every thread.
Up to 4 MB is no growth: the table of interned strings (names of files, for one), which Python rebuilds now and then,
takes 2 MB or less, and pages of the pools are touched late. A kilobyte that each request leaves behind is 10 MB.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

from puna.store import Store, import_file

WARM_UP = 3000  # requests
MOST_GROWTH = 4e6  # bytes that count as none


def soak(url: str, model: str, requests: int, seed: int, clients: int = 4) -> None:
    """Send that many requests, ``clients`` at once. Raises AssertionError for an answer that is not what it must be."""

    def client(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        with httpx.Client(base_url=url, timeout=120) as http:
            for _ in range(requests // clients):
                _request(http, model, chance)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


def _request(http: httpx.Client, model: str, chance: random.Random) -> None:
    prompt = " ".join(str(chance.randrange(1000)) for _ in range(chance.randrange(1, 40)))
    body = {"model": model, "prompt": prompt, "raw": True, "options": {"num_predict": chance.randrange(1, 16)}}
    kind = chance.choice(["stream", "whole", "leave", "refused", "listing"])
    if kind == "stream":
        with http.stream("POST", "/api/generate", json=body) as response:
            assert response.status_code == 200
            assert '"done":true' in list(response.iter_lines())[-1].replace(" ", "")
    elif kind == "whole":
        assert http.post("/api/generate", json={**body, "stream": False}).status_code == 200
    elif kind == "leave":
        with http.stream("POST", "/api/generate", json=body) as response:
            next(response.iter_lines())
    elif kind == "refused":
        assert http.post("/api/generate", json={**body, "options": {"top_p": 7}}).status_code == 400
        assert http.get(f"/nothing/{chance.random()}").status_code == 404
    else:
        assert http.get("/api/tags").status_code == http.get("/metrics").status_code == 200


def resident_bytes(process_id: int) -> int:
    """What a process holds in memory now."""
    return int(psutil.Process(process_id).memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        import_file(options.model, "soak", store=Store(Path(home)))
        command = [sys.executable, "-m", "puna", "serve", "--port", "0"]
        environment = {**os.environ, "PUNA_HOME": home}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            try:
                growth = _growth(url, server.pid, options.requests)
            finally:
                server.terminate()
    if growth > MOST_GROWTH:
        sys.exit(f"memory grew by {growth / 1e6:.1f} MB")


def _growth(url: str, process_id: int, requests: int) -> int:
    """Bytes by which a server's memory grows while it answers that many."""
    soak(url, "soak", WARM_UP, seed=-1)
    sizes = []
    for part in range(11):
        sizes.append(resident_bytes(process_id))
        print(f"{part * requests // 10:6} requests: {sizes[-1] / 1e6:.1f} MB", flush=True)
        if part < 10:
            soak(url, "soak", requests // 10, seed=part)
    return sizes[-1] - sizes[0]


if __name__ == "__main__":
    main()
