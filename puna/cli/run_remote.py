"""``puna run --host``: the same answers and conversations, with a model of a running server."""

from __future__ import annotations

import json
from typing import Any

import click

from puna.cli.options import format_constraint
from puna.cli.remote import Remote, RemoteModel
from puna.cli.timings import print_timings, timing_facts


def run_remote(
    url: str,
    model: str,
    text: str | None,
    values: dict[str, Any],
    context_length: int | None,
    system: str | None,
    answer_format: str | None,
    raw: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Answer ``text``, or open a chat when it is None. ``values`` are sampling parameters."""
    from puna.cli.run import show_answer

    remote = Remote(url)

    def open_model(name: str) -> RemoteModel:
        remote.show(name)  # raises where there is no such model
        return RemoteModel(remote, name, context_length)

    llm = open_model(model)
    llm.sampling(**values)
    if text is None:
        from puna.cli.repl import Repl

        settings: dict[str, Any] = {"system": system, "answer_format": answer_format, "verbose": verbose}
        Repl(llm, model, sampling=values, open_model=open_model, **settings).run()
        return
    values["constraint"] = format_constraint(llm, answer_format)
    answer, last = show_answer(llm.generate(text, system=system, raw=raw, **values), quiet=as_json)
    assert last.timings is not None
    if as_json:
        summary = {"model": model, "response": answer, "finish_reason": last.finish_reason}
        click.echo(json.dumps(summary | timing_facts(last.timings, llm.load_seconds), ensure_ascii=False))
    elif verbose:
        print_timings(last.timings, llm.load_seconds)
