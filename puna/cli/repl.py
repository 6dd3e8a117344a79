"""The conversation on the terminal, in ollama's habits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puna.chat.messages import parse_messages
from puna.cli.options import SAMPLING, format_constraint
from puna.cli.timings import print_timings
from puna.errors import PunaError, RequestError
from puna.store.disk import disk_errors, write_text
from puna.store.store import default_home

if TYPE_CHECKING:
    from puna.cli.remote import RemoteModel
    from puna.llm import LLM, Chunk

HELP = """\
  /set                parameters and modes; /set alone lists them
  /show               what the model is; /show system, /show template, /show parameters, /show messages
  /save NAME          keep this conversation; /load NAME brings it back
  /load MODEL         continue this conversation with another model
  /clear              forget the conversation
  /bye                leave (also Ctrl-D)
  /?                  this help

  \"\"\"                 begins and ends a message of several lines
  Ctrl-C              stops the answer"""

SET_HELP = """\
  /set parameter NAME VALUE   {names}
  /set system TEXT            system prompt
  /set format json|FILE       answers follow a JSON schema;  /set noformat
  /set verbose                print timings;  /set quiet"""


class Repl:
    """A conversation: its messages, its settings, and the loop that reads lines and commands."""

    def __init__(
        self,
        llm: LLM | RemoteModel,
        model: str,
        *,
        system: str | None = None,
        answer_format: str | None = None,
        adapter: str | None = None,
        sampling: dict[str, Any] | None = None,
        verbose: bool = False,
        read: Callable[[str], str] | None = None,
        open_model: Callable[[str], LLM | RemoteModel],
    ) -> None:
        """``read(prompt)`` gives the next line and raises EOFError at the end; by default it is the terminal's.

        ``open_model`` is how ``/load MODEL`` gets one.
        """
        self.llm = llm
        self.model = model
        self.system = system
        self.answer_format = answer_format
        self.adapter = adapter
        self.sampling = dict(sampling or {})
        self.verbose = verbose
        self.messages: list[dict[str, Any]] = []
        self._read = read or terminal_reader()
        self._open_model = open_model

    def run(self) -> None:
        """Read and answer until the user leaves."""
        while True:
            try:
                text = self._read_message()
            except KeyboardInterrupt:
                click.echo("\nUse Ctrl-D or /bye to leave.")
                continue
            except EOFError:
                return
            if not text.strip():
                continue
            try:
                if text.startswith("/") and not text.startswith("//"):
                    if text.split()[0] in ("/bye", "/exit", "/quit"):
                        return
                    self._command(text.split(maxsplit=2))
                else:
                    self._answer(text)
            except PunaError as error:
                click.echo(f"Error: {error}", err=True)

    def _read_message(self) -> str:
        line = self._read(">>> ")
        if not line.startswith('"""'):
            return line
        lines = [line[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(self._read("... "))
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines)

    def _answer(self, text: str) -> None:
        turn = [*self.messages, {"role": "user", "content": text}]
        head = [{"role": "system", "content": self.system}] if self.system is not None else []
        constraint = format_constraint(self.llm, self.answer_format)
        options = self.sampling | {"constraint": constraint, "adapter": self.adapter}
        if self.llm.has_template:
            chunks = self.llm.chat(head + turn, stream=True, **options)
        else:
            chunks = self.llm.generate(text, stream=True, **options)
        answer = self._show(chunks)
        self.messages = [*turn, {"role": "assistant", "content": answer}]

    def _show(self, chunks: Iterator[Chunk]) -> str:
        """Print the answer; Ctrl-C ends it and keeps what came."""
        pieces: list[str] = []
        try:
            for chunk in chunks:
                pieces.append(chunk.text)
                click.echo(chunk.text, nl=False)
                if self.verbose and chunk.timings is not None:
                    click.echo()
                    print_timings(chunk.timings)
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False)
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()
        click.echo("\n")
        return "".join(pieces)

    def _command(self, words: list[str]) -> None:
        command, arguments = words[0], words[1:]
        if command in ("/?", "/help"):
            click.echo(HELP)
        elif command == "/clear":
            self.messages = []
            click.echo("Cleared the conversation.")
        elif command == "/set":
            self._set(arguments)
        elif command == "/show":
            self._show_facts(arguments[0] if arguments else "")
        elif command == "/save" and arguments:
            path = _session_path(arguments[0])
            with disk_errors(path):
                write_text(path, json.dumps(self._state(), indent=1, ensure_ascii=False))
            click.echo(f"Saved the conversation as {arguments[0]}; `/load {arguments[0]}` brings it back.")
        elif command == "/load" and arguments:
            self._load(arguments[0])
        else:
            raise RequestError(f"unknown command {' '.join(words)!r}; /? shows the commands")

    def _set(self, arguments: list[str]) -> None:
        names = [field for _, field, _, _ in SAMPLING]
        what, rest = (arguments[0] if arguments else ""), (arguments[1] if len(arguments) > 1 else "")
        if what == "parameter" and len(rest.split()) == 2:
            self._set_parameter(*rest.split())
        elif what == "system" and rest:
            self.system = rest.strip('"')
        elif what == "format" and rest:
            format_constraint(self.llm, rest)
            self.answer_format = rest
        elif what == "noformat":
            self.answer_format = None
        elif what in ("verbose", "quiet"):
            self.verbose = what == "verbose"
        else:
            click.echo(SET_HELP.format(names=", ".join([*names, "stop"])))

    def _set_parameter(self, name: str, text: str) -> None:
        name = "max_tokens" if name == "num_predict" else name
        if name == "stop":
            value: Any = (text,)
        elif name in (field for _, field, _, _ in SAMPLING):
            try:
                value = json.loads(text)
            except ValueError:
                raise RequestError(f"{name} must be a number, found {text!r}") from None
        else:
            raise RequestError(f"unknown parameter {name!r}; /set lists them")
        if name == "max_tokens" and value == -1:
            value = None
        self.llm.sampling(**(self.sampling | {name: value}))
        self.sampling[name] = value

    def _show_facts(self, part: str) -> None:
        if part == "parameters":
            click.echo(json.dumps(self.sampling, indent=1))
        elif part == "messages":
            for message in self.messages:
                click.echo(f"{message['role']}: {message['content']}")
        elif part == "system":
            click.echo(self.system or "")
        else:
            self._show_model(part)

    def _show_model(self, part: str) -> None:
        from puna.cli.remote import RemoteModel
        from puna.cli.show import show

        if isinstance(self.llm, RemoteModel):
            facts = self.llm.remote.show(self.model)
            click.echo(json.dumps(facts.get("details"), indent=1) if not part else str(facts.get(part, "")))
        else:
            arguments = [self.model, *([f"--{part}"] if part else [])]
            show.main(arguments, standalone_mode=False)

    def _state(self) -> dict[str, Any]:
        return {"model": self.model, "system": self.system, "sampling": self.sampling, "messages": self.messages}

    def _load(self, name: str) -> None:
        path = _session_path(name) if re.fullmatch(r"[\w.-]+", name) else None
        if path is None or not path.exists():
            self._load_model(name)
            click.echo(f"Continuing with {name}.")
            return
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            model, messages = state["model"], state["messages"]
            parse_messages(messages or [{"role": "user", "content": ""}])
        except (OSError, ValueError, KeyError, TypeError, RequestError):
            raise RequestError(f"the saved conversation {path} is damaged; remove it") from None
        if model != self.model:
            self._load_model(model)
        self.system, self.sampling, self.messages = state.get("system"), state.get("sampling", {}), messages
        click.echo(f"Loaded the conversation {name}: {len(messages)} messages with {model}.")

    def _load_model(self, name: str) -> None:
        self.llm = self._open_model(name)
        self.model = name
        self.adapter = None  # it was the other model's


def terminal_reader() -> Callable[[str], str]:
    """Lines from the terminal, with editing and a history that is kept."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    home = default_home()
    with disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(home / "history")))
    return session.prompt


def _session_path(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+", name):
        raise RequestError(f"{name!r} is not a name for a conversation; use letters, digits, '.', '_' and '-'")
    return default_home() / "sessions" / f"{name}.json"
