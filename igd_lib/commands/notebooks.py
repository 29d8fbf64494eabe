"""Notebooks: run them, plan them, and say what this machine has for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from igd_lib.commands.common import in_one_line, json_option, parameters_option, say


@click.command()
@click.option("--scale", type=click.Choice(["smoke", "small"]), default="small", show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Where results go."
)
def demo(scale: str, out: Path) -> None:
    """Run the quickstart notebook and print its table.

    Example: igd demo --scale smoke
    """
    from igd_lib.experiment.demo import demo as run

    with in_one_line():
        run(scale, out)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def notebooks(folder: Path) -> None:
    """Copy the notebooks into FOLDER, to open them in JupyterLab; one that is there and differs is kept.

    Example: igd notebooks ~/igd && jupyter lab ~/igd
    """
    from igd_lib.experiment.notebooks import copy_into

    with in_one_line():
        click.echo("\n".join(copy_into(folder)))


@click.command()
@click.argument("notebook")
@parameters_option
@click.option(
    "--out", type=click.Path(path_type=Path), help="The executed notebook.  [default: NOTEBOOK.ipynb]"
)
def run(notebook: str, given: tuple[tuple[str, str], ...], out: Path | None) -> None:
    """Execute NOTEBOOK, by its name, number or file, and print what it prints.

    Example: igd run 03_imagenet1k -p ipc 50 -p scale small --out out.ipynb
    """
    from igd_lib.experiment.notebooks import execute

    with in_one_line():
        click.echo(execute(notebook, dict(given), out))


@click.command()
@click.argument("notebook")
@parameters_option
@click.option("--memory", type=click.FloatRange(1), metavar="GIB", help="Of another card, to plan for.")
@click.option("--tflops", nargs=2, type=float, metavar="S T", help="Its TFLOP/s of sampling and of training.")
@json_option("What is needed, stages with GPU-hours, memory and disk")
def plan(
    notebook: str, given: tuple[tuple[str, str], ...], memory: float | None, tflops: Any, as_json: bool
) -> None:
    """What NOTEBOOK needs and costs at the paper's scale, on this machine or a card of another size.

    Exits with 1 where something that it cannot do without is missing.

    Example: igd plan 03_imagenet1k -p ipc 50
    """
    from igd_lib.experiment import plan as library

    with in_one_line():
        asked = library.asked(notebook, dict(given))
        machine = None if memory is None else library.other_machine(memory, tflops or library.ASSUMED)
        found = library.of(*asked, machine)
    say(found.record(), found.text, as_json)
    sys.exit(int(any(piece.blocks for piece in found.pieces)))


@click.command()
@json_option("Every part's lines by its title")
def doctor(as_json: bool) -> None:
    """Say what this machine has, and what each notebook would do on it.

    Example: igd doctor
    """
    from igd_lib.experiment import doctor as library

    found = library.found()
    say(found, library.text(found), as_json)
