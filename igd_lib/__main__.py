"""The command `igd`, also as `python -m igd_lib`: each subcommand is a thin call of the library."""

from __future__ import annotations

import click

from igd_lib.commands import models, notebooks, sets, storage
from igd_lib.tools.version import VERSION

COMMANDS = (
    *(notebooks.demo, notebooks.notebooks, notebooks.run, notebooks.plan, notebooks.doctor),
    *(sets.distill, sets.evaluate, sets.verify, sets.export, sets.push, sets.pull),
    *(models.convert, models.finetune, models.minimax, models.standin),
    *(storage.fetch, storage.cache),
)
GO_ON = ("demo", "distill", "evaluate", "finetune", "minimax", "pull", "standin")


class Interruptible(click.Group):
    """Ctrl-C ends a command with one line that says how to go on, and 130, as shells have it."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            click.echo(f"\n{error}" if str(error) else f"\ninterrupted; {self.go_on(ctx)}", err=True)
            ctx.exit(130)

    def go_on(self, ctx: click.Context) -> str:
        """What to do next."""
        if ctx.invoked_subcommand in GO_ON:
            return "the same command goes on from what is on disk"
        return "run the same command again"


@click.group(cls=Interruptible, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="igd")
def igd() -> None:
    """Influence-guided diffusion for dataset distillation, reproduced."""


for command in COMMANDS:
    igd.add_command(command)


if __name__ == "__main__":
    igd(prog_name="igd")
