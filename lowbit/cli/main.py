"""The command line's entry point and its table of commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from .. import __version__
from ..errors import LowbitError
from . import looking, making, measuring, running, training

app = typer.Typer(
    name="lowbit",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make large language models small, write the files that real programs load, and measure what was lost.",
    epilog="First steps: **lowbit demo**, then **lowbit quantize MODEL -o OUT** and **lowbit compare OUT --against MODEL**.",
)

COMMANDS: dict[str, Callable[..., None]] = {  # in the order of --help
    "quantize": making.quantize,
    "imatrix": making.imatrix,
    "methods": looking.methods,
    "compare": measuring.compare,
    "eval": measuring.evaluate,
    "convert": making.convert,
    "merge": making.merge,
    "run": running.run,
    "serve": running.serve,
    "bench": running.bench,
    "verify": measuring.verify,
    "push": making.push,
    "demo": making.demo,
    "plan": looking.plan,
    "inspect": looking.inspect,
    "doctor": looking.doctor,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(training.app)


def main() -> None:
    """Entry point: readable errors, exit code 1; a traceback only with --debug."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except LowbitError as error:
        if debug:
            raise
        from .console import err, plain

        err.print(f"[bold red]error[/] {plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lowbit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    pass
