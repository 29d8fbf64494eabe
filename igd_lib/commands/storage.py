"""What is on disk: data sets and work."""

from __future__ import annotations

import sys

import click

from igd_lib.commands.common import in_one_line, json_option, say


@click.command()
@click.argument("name")
def fetch(name: str) -> None:
    """Fetch the data set NAME where it is not on this machine, and check it.

    fashion-mnist, cifar-10, cifar-100 and food-101 can be had so.

    Example: igd fetch cifar-10
    """
    from igd_lib.data.datasets import DATASETS
    from igd_lib.data.images import load

    if name not in DATASETS:
        raise click.BadParameter(f"one of {', '.join(sorted(DATASETS))}, got {name!r}", param_hint="NAME")
    with in_one_line():
        train, test = load(name, "train"), load(name, "test")
    click.echo(f"{name}: {len(train):,} training and {len(test):,} test images are here")


@click.command()
@click.option("--remove", multiple=True, metavar="KIND|KEY|all", help="Delete this work; may be repeated.")
@click.option(
    "--older-than", type=click.FloatRange(min=0), default=0.0, metavar="DAYS", help="Not used since."
)
@click.option("--yes", is_flag=True, help="Delete without asking.")
@json_option("The list")
def cache(remove: tuple[str, ...], older_than: float, yes: bool, as_json: bool) -> None:
    """List work on disk by kind, size and last use, or remove some of it.

    What is removed is made anew when it is needed, but for models.
    Exits with 1 if some could not be removed.

    Example: igd cache --remove set --older-than 30
    """
    from igd_lib.tools import cache as library

    try:
        found = library.work(older_than)
        found = library.chosen(found, remove) if remove else found
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--remove") from error
    say([one.record() for one in found], library.table(found), as_json)
    if not remove or not found:
        return
    if not yes:
        click.confirm("Delete these?", abort=True, err=True)
    failed = 0
    for one in found:
        try:
            library.remove(one)
        except OSError as error:
            failed += 1
            click.echo(f"kept: {error}", err=True)
    click.echo(f"deleted: {len(found) - failed}", err=True)
    sys.exit(int(failed > 0))
