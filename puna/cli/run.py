"""``puna run``: one answer, or a conversation."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from puna.cli.options import (
    context_option,
    format_constraint,
    host_option,
    json_option,
    kv_type_option,
    ops_option,
    prefix_cache_options,
    sampling_options,
    sampling_values,
    speculative_options,
    threads_option,
)
from puna.cli.timings import print_timings, timing_facts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from puna.llm import Chunk

_HERE_ONLY = (
    *("threads", "ops", "kv_type", "speculative", "draft_model", "no_packed", "packed", "cache_dir", "cache_size"),
    *("adapter", "explain_prompt"),
)


@click.command()
@click.argument("model")
@click.argument("prompt", nargs=-1)
@click.option("--system", help="System prompt.")
@click.option("--format", "answer_format", help="json, a JSON schema, or a file with one: the answer will follow it.")
@click.option("--adapter", metavar="PATH", help="A LoRA adapter of the model: a PEFT folder or a GGUF file.")
@click.option("--raw", is_flag=True, help="Continue the prompt's text itself, without the chat template.")
@click.option("--explain-prompt", is_flag=True, help="Show the exact prompt, its token ids and where each came from.")
@click.option("--verbose", is_flag=True, help="Print timings after each answer.")
@sampling_options
@context_option
@threads_option
@ops_option
@kv_type_option
@speculative_options
@click.option("--no-packed", is_flag=True, help="Ignore the model's packed file.")
@click.option("--packed", type=click.Path(dir_okay=False), help="Start from this packed file (puna pack --out).")
@prefix_cache_options
@host_option
@json_option
def run(
    model: str,
    prompt: tuple[str, ...],
    system: str | None,
    answer_format: str | None,
    adapter: str | None,
    raw: bool,
    explain_prompt: bool,
    verbose: bool,
    context_length: int | None,
    threads: int | None,
    ops: str | None,
    kv_type: str | None,
    speculative: str | None,
    draft_model: str | None,
    no_packed: bool,
    packed: str | None,
    cache_dir: str | None,
    cache_size: int,
    host: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT with MODEL, or open a chat when there is none.

    With --host or PUNA_HOST, a running server does it; without, MODEL is loaded here.

    What is piped in is added to the prompt: cat notes.txt | puna run smollm2 "Summarise this:"
    """
    from puna.cli.remote import server_url

    if packed and no_packed:
        raise click.UsageError("--packed and --no-packed contradict each other; leave out one of them")
    text = _with_piped_input(" ".join(prompt))
    if text is None and not _on_a_terminal():
        raise click.UsageError("there is no prompt, and no terminal to chat on")
    url = server_url(host, "PUNA_HOST")
    if url is not None:
        from puna.cli.run_remote import run_remote

        _refuse_here_only(url)
        values = sampling_values(options)
        run_remote(url, model, text, values, context_length, system, answer_format, raw, verbose, as_json)
        return
    from puna.llm import LLM

    def open_model(name: str) -> LLM:
        return LLM.load(
            name,
            context_length=context_length,
            threads=threads,
            ops=ops,
            kv_type=kv_type,
            speculative=speculative,
            draft_model=draft_model if name == model else None,  # it has this model's vocabulary
            packed=(packed if name == model else None) or not no_packed,
            cache_dir=cache_dir,
            cache_size=cache_size,
        )

    started = time.perf_counter()
    llm = open_model(model)
    if adapter is not None:
        llm.load_adapter(adapter, adapter)
    load_seconds = time.perf_counter() - started
    values = sampling_values(options)
    if text is None:
        from puna.cli.repl import Repl

        Repl(
            llm,
            model,
            system=system,
            answer_format=answer_format,
            adapter=adapter,
            sampling=values,
            verbose=verbose,
            open_model=open_model,
        ).run()
        return
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    if explain_prompt:
        from puna.cli.explain import explain

        explain(llm, messages, raw_text=text if raw else None, as_json=as_json)
        return
    values |= {"constraint": format_constraint(llm, answer_format), "adapter": adapter}
    if raw or not llm.has_template:
        chunks = llm.generate(text, stream=True, **values)
    else:
        chunks = llm.chat(messages, stream=True, **values)
    answer, last = show_answer(chunks, quiet=as_json)
    assert last.timings is not None
    if as_json:
        summary = {"model": model, "response": answer, "finish_reason": last.finish_reason}
        click.echo(json.dumps(summary | timing_facts(last.timings, load_seconds), ensure_ascii=False))
    elif verbose:
        print_timings(last.timings, load_seconds)


def show_answer(chunks: Iterator[Chunk], *, quiet: bool = False) -> tuple[str, Chunk]:
    """Print an answer as it comes; give its text and its last chunk."""
    pieces = []
    for chunk in chunks:
        pieces.append(chunk.text)
        if not quiet and chunk.text:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    if not quiet:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return "".join(pieces), chunk


def _refuse_here_only(url: str) -> None:
    """Options of a model that is loaded here do nothing at a server: say so instead of ignoring them."""
    for name in _HERE_ONLY:
        source = click.get_current_context().get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag} has no meaning for the server at {url}; remove it, or --host and PUNA_HOST")


def _on_a_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _with_piped_input(prompt: str) -> str | None:
    """The prompt and what is piped in, or None when there is neither."""
    piped = "" if sys.stdin is None or _on_a_terminal() else sys.stdin.read().strip("\n")
    return "\n\n".join(part for part in (prompt, piped) if part) or None
