"""``puna serve``: the HTTP server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from puna.errors import RequestError


@click.command()
@click.option("--host", help="Address to listen on (default: 127.0.0.1).")
@click.option("--port", type=click.IntRange(0, 65535), help="Port (default: 11434; 0: any free one).")
@click.option("--api-key", "api_keys", multiple=True, help="A key that clients must send; may be repeated.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="A file with one key a line.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain (PEM).")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key (PEM).")
@click.option("--origins", help="Origins that browsers may call from, comma-separated (*: any).")
@click.option("--max-queue", type=click.IntRange(0), help="Requests that may wait (default: 512).")
@click.option("--max-loaded", type=click.IntRange(1), help="Models in memory at once (default: 3).")
@click.option("--keep-alive", help="How long an unused model stays loaded: 5m, 1h, -1 for ever (default: 5m).")
@click.option("--context-length", type=click.IntRange(1), help="Tokens of prompt and answer (default: up to 8192).")
@click.option("--parallel", type=click.IntRange(1), help="Requests of a model computed together (default: 64).")
@click.option("--threads", type=click.IntRange(1), help="Threads to compute with (default: physical cores).")
@click.option("--kv-type", type=click.Choice(["f16", "bf16", "q8_0", "f32"]), help="What the cache holds.")
@click.option("--memory-budget", help="Memory that models may use: 6GB (default: 90 % of what is free).")
@click.option("--adapter-dir", type=click.Path(path_type=Path), help="Where adapters may be loaded from.")
@click.option("--log-requests", is_flag=True, default=None, help="Log prompts and answers too.")
@click.option("--insecure", is_flag=True, default=None, help="Listen beyond this machine without a key.")
def serve(**options: Any) -> None:
    """Serve the stored models to clients of ollama, OpenAI and Anthropic.

    Every option can be set by PUNA_<OPTION>. OLLAMA_HOST, OLLAMA_KEEP_ALIVE, OLLAMA_CONTEXT_LENGTH,
    OLLAMA_NUM_PARALLEL, OLLAMA_MAX_LOADED_MODELS, OLLAMA_MAX_QUEUE and OLLAMA_ORIGINS work too.
    """
    from dataclasses import replace

    from puna.server.app import create_app
    from puna.server.logs import configure_logs, logger
    from puna.server.running import Server, check_settings, describe, listen
    from puna.server.settings import parse_bytes, parse_duration, read_settings
    from puna.store import Store

    key_file = options.pop("api_key_file")
    keys = list(options.pop("api_keys"))
    if key_file is not None:
        keys += _read_keys(key_file)
    if options["origins"] is not None:
        options["origins"] = tuple(part.strip() for part in options["origins"].split(",") if part.strip())
    if options["keep_alive"] is not None:
        options["keep_alive"] = parse_duration(options["keep_alive"], "--keep-alive")
    if options["memory_budget"] is not None:
        options["memory_budget"] = parse_bytes(options["memory_budget"], "--memory-budget")
    settings = read_settings({**options, "api_keys": tuple(keys) or None})
    store = Store()
    check_settings(settings, store)
    with listen(settings) as listening:
        settings = replace(settings, port=listening.getsockname()[1])
        configure_logs()
        app = create_app(settings, store)
        click.echo(f"Puna serves on {settings.url}")
        logger.info("serving", extra={"facts": describe(settings)})
        Server(app, settings).run(sockets=[listening])


def _read_keys(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--api-key-file: cannot read {path}: {error}") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
