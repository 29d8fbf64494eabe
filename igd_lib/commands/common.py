"""What subcommands share: options, errors in one line, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import click

Command = Callable[..., Any]


@contextmanager
def in_one_line() -> Iterator[None]:
    """What a user can mend ends the command with one line and exit code 1."""
    try:
        yield
    except (OSError, ValueError, FloatingPointError) as error:
        raise click.ClickException(str(error)) from error


def json_option(what: str) -> Callable[[Command], Command]:
    """`--json`, which the command takes as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=f"{what}, as JSON.")


def parameters_option(command: Command) -> Command:
    """A notebook's parameters, which the command takes as `given`: pairs of name and value."""
    return click.option(
        "-p", "given", nargs=2, multiple=True, metavar="NAME VALUE", help="A parameter of the notebook."
    )(command)


@contextmanager
def output_kept_for(as_json: bool) -> Iterator[None]:
    """With `--json` what the library says on the way goes to standard error."""
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        yield


def say(record: object, text: object, as_json: bool) -> None:
    """A command's result: a record for scripts or a text for people."""
    click.echo(json.dumps(record, indent=2) if as_json else text)
