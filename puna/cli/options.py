"""Options that several commands share, and how their values become sampling parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puna.errors import RequestError

if TYPE_CHECKING:
    from puna.cli.remote import RemoteModel
    from puna.engine import Constraint
    from puna.llm import LLM

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

threads_option: Decorator = click.option(
    "--threads", type=click.IntRange(1), help="Threads to compute with (default: physical cores)."
)
ops_option: Decorator = click.option(
    "--ops", type=click.Choice(["native", "reference"]), help="Implementation to run on."
)
kv_type_option: Decorator = click.option(
    "--kv-type",
    type=click.Choice(["f16", "bf16", "q8_0", "f32"]),
    help="What the key/value cache holds (default: f16).",
)
host_option: Decorator = click.option("--host", metavar="URL", help="A running server: host:port or a URL.")
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
context_option: Decorator = click.option(
    "--context-length",
    type=click.IntRange(1),
    help="Tokens of prompt and answer together (default: the model's, up to 8192).",
)


def speculative_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the choice of speculative decoding."""
    function = click.option("--draft-model", help="A smaller model of the same vocabulary that drafts tokens.")(
        function
    )
    return click.option(
        "--speculative",
        type=click.Choice(["ngram", "off"]),
        help="ngram: draft tokens from what prompt and answer repeat; the answer is the same.",
    )(function)


def parse_size(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """Bytes, from a number with or without a decimal unit: 500MB, 2GB."""
    found = re.fullmatch(r"(\d+)\s*(?:([kMGT]?)B)?", value, re.IGNORECASE | re.ASCII)
    if found is None:
        raise click.BadParameter(f"{value!r} is not a size such as 500MB or 2GB", context, parameter)
    return int(found[1]) * int(1000 ** " KMGT".index((found[2] or " ").upper()))


def prefix_cache_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the choice of keeping prefixes on disk."""
    function = click.option(
        "--cache-size",
        callback=parse_size,
        default="1GB",
        metavar="SIZE",
        show_default=True,
        help="At most this much in --cache-dir.",
    )(function)
    return click.option("--cache-dir", help="A private folder that keeps computed prompts for the next run.")(function)


def _parse_columns(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    columns = {}
    for value in values:
        field, equals, source = value.partition("=")
        if not (field and equals and source):
            raise click.BadParameter(f"{value!r} is not FIELD=COLUMN, such as output=response", context, parameter)
        columns[field] = source
    return columns


def row_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what says how rows of training data are read."""
    for option in (
        click.option("--skip-bad", type=click.IntRange(0), default=0, metavar="N", help="Accept up to N bad rows."),
        click.option(
            "--train-on",
            type=click.Choice(["assistant", "last", "everything"]),
            default="assistant",
            show_default=True,
            help="Which messages are learnt.",
        ),
        click.option(
            "--column",
            "columns",
            multiple=True,
            callback=_parse_columns,
            metavar="FIELD=COLUMN",
            help="Rename a field.",
        ),
        click.option("--format", "form", help="The rows' format (default: told from the first rows)."),
    ):
        function = option(function)
    return function


# Option name, SamplingParams field, type, help. Names are ollama's where it has one.
SAMPLING: list[tuple[str, str, Any, str]] = [
    ("--temperature", "temperature", click.FloatRange(0), "0: always the most probable token."),
    ("--num-predict", "max_tokens", int, "At most this many tokens of answer (-1: until the context is full)."),
    ("--seed", "seed", int, "Makes a sampled answer repeatable."),
    ("--top-k", "top_k", click.IntRange(0), "Choose among this many tokens (0: all)."),
    ("--top-p", "top_p", click.FloatRange(0, 1), "Choose among the most probable tokens that sum to this."),
    ("--min-p", "min_p", click.FloatRange(0, 1), "Drop tokens less probable than this share of the best."),
    ("--typical-p", "typical_p", click.FloatRange(0, 1), "Locally typical sampling."),
    ("--repeat-penalty", "repeat_penalty", float, "Above 1 discourages repetition."),
    ("--repeat-last-n", "repeat_last_n", click.IntRange(-1), "Tokens that penalties look back on (-1: all)."),
    ("--presence-penalty", "presence_penalty", float, "Added once for a token that occurred."),
    ("--frequency-penalty", "frequency_penalty", float, "Added for each time a token occurred."),
]


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds every sampling option to a command."""
    for flag, field, kind, text in reversed(SAMPLING):
        function = click.option(flag, field, type=kind, help=text)(function)
    return click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated.")(function)


def sampling_values(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams that the user set."""
    values = {field: options[field] for _, field, _, _ in SAMPLING if options.get(field) is not None}
    if values.get("max_tokens", 0) < 0:
        values["max_tokens"] = None
    if options.get("stop"):
        values["stop"] = tuple(options["stop"])
    return values


def format_constraint(llm: LLM | RemoteModel, text: str | None) -> Constraint | None:
    """``--format``: the word json, a JSON schema, or a file that holds one. Raises RequestError for anything else."""
    if text is None:
        return None
    if text == "json":
        return llm.constraints.json_object()
    if not text.lstrip().startswith("{"):
        path = Path(text)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise RequestError(
                f"--format must be json, a JSON schema, or a file with one; cannot read {path}"
            ) from None
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise RequestError(f"--format: the schema is not valid JSON: {error}") from None
    return llm.constraints.json_schema(schema)
