"""The table of commands, and how errors reach the user: one sentence, no traceback."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module

import click

import puna
from puna.errors import PunaError

COMMANDS: dict[str, str] = {
    "run": "puna.cli.run:run",
    "serve": "puna.cli.serve:serve",
    "ps": "puna.cli.ps:ps",
    "stop": "puna.cli.stop:stop",
    "keys": "puna.cli.keys:keys",
    "pull": "puna.cli.pull:pull",
    "list": "puna.cli.list:list_models",
    "show": "puna.cli.show:show",
    "rm": "puna.cli.rm:rm",
    "cp": "puna.cli.cp:cp",
    "create": "puna.cli.create:create_model",
    "import": "puna.cli.import_model:import_model",
    "pack": "puna.cli.pack:pack",
    "convert": "puna.cli.convert:convert",
    "data": "puna.cli.data:data",
    "finetune": "puna.cli.finetune:finetune",
    "train": "puna.cli.train:train",
    "runs": "puna.cli.runs:runs",
    "quantize": "puna.cli.quantize:quantize",
    "merge": "puna.cli.merge:merge",
    "compare": "puna.cli.compare_models:compare_models",
    "bench": "puna.cli.bench:bench",
    "doctor": "puna.cli.doctor:doctor",
}


class LazyGroup(click.Group):
    """Loads a command's module when the command is named, so that ``puna run`` pays only for itself."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(puna.__version__, "-v", "--version", prog_name="puna")
def cli() -> None:
    """Run, serve, inspect, convert, quantize and fine-tune models of the Llama family on this machine."""


def main(arguments: list[str] | None = None) -> None:
    """The program's entry. Exit codes: 0 done, 1 an error that was told, 2 a misused command, 130 interrupted."""
    warnings.showwarning = _show_warning
    try:
        cli.main(arguments, prog_name="puna", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except PunaError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except MemoryError:
        click.echo("Error: not enough memory; choose a smaller --context-length or a smaller model", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # The reader went away (puna list | head); leave quietly, also when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    click.echo(f"Warning: {message}", err=True)
