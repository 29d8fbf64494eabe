"""Diffusion models: convert, fine-tune and train them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click

from igd_lib.commands.common import in_one_line


def _of_training(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every fine-tuning has."""
    accumulate = click.option(
        "--accumulate",
        default=1,
        show_default=True,
        help="So many parts one after the other, of each process's share of a batch.",
    )
    kinds = click.Choice(["no", "bf16", "fp16"])
    return click.option("--mixed-precision", type=kinds, default="no", show_default=True)(accumulate(command))


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--vae", help="The autoencoder: a folder or a hub id.  [default: the pinned sd-vae-ft-mse]")
@click.option("--heads", type=click.IntRange(1), help="Attention heads, for a width that is none of DiT's.")
def convert(file: Path, out: Path, vae: str | None, heads: int | None) -> None:
    """Convert DiT's or Minimax's own FILE (.pt, .safetensors) to a diffusers pipeline, the new folder OUT.

    Nothing is written before all of it is there, the autoencoder too.

    Example: igd convert DiT-XL-2-256x256.pt ~/.cache/igd/models/DiT-XL-2-256
    """
    from igd_lib.experiment import weights

    with in_one_line():
        weights.convert(file, out, vae=vae, heads=heads)
    click.echo(out)


@click.command()
@click.argument("dataset")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="A pipeline's folder.  [default: DiT-XL/2]")
@click.option("--vae", help="The autoencoder: a folder or a hub id.  [default: sd-vae-ft-mse, or BASE's own]")
@click.option(
    "--image-size",
    type=click.IntRange(8),
    default=256,
    show_default=True,
    help="Px a side that a folder's images are used at; the DiT learns them at its own.",
)
@click.option("--parameters", type=click.Choice(["difffit", "all"]), default="difffit", show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Of the optimiser, instead of the recipe's.")
@click.option("--batch-size", type=click.IntRange(1), help="Images a step, instead of the recipe's.")
@click.option("--lr", type=float, help="Of AdamW, instead of the recipe's.")
@_of_training
def finetune(
    dataset: str,
    out: Path,
    base: Path | None,
    vae: str | None,
    image_size: int,
    parameters: Literal["all", "difffit"],
    mixed_precision: str,
    accumulate: int,
    **changes: Any,
) -> None:
    """Fine-tune DiT on DATASET, whose classes it does not know, into the new folder OUT.

    DATASET is a name, or a folder of one's own with one folder of images a class in train and test. The
    paper's scale finds it as DiT-NAME, NAME being the folder's. Images are resized to the DiT's own size.

    Example: accelerate launch -m igd_lib finetune ~/flowers ~/.cache/igd/models/DiT-flowers
    """
    from igd_lib.baselines import finetuning as library
    from igd_lib.experiment import weights

    with in_one_line():
        pipe, data = weights.to_finetune_on(dataset, weights.Base(base, vae), image_size)
        recipe = library.recipe_for(parameters)
        recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
        library.finetune(
            pipe, data, out, recipe=recipe, mixed_precision=mixed_precision, accumulate=accumulate
        )
    click.echo(out)


@click.command()
@click.argument("dataset")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--scale", type=click.Choice(["small", "paper"]), default="paper", show_default=True)
@click.option(
    "--shards",
    default=1,
    show_default=True,
    help="Train so many models, each on its own classes, in folders OUT/shard-I-of-N.",
)
@click.option("--shard", type=int, help="This one alone, from 0.")
@_of_training
@click.option("--steps", type=int, help="Stop there, instead of where the method does; 0: after all epochs.")
def minimax(
    dataset: str,
    out: Path,
    scale: str,
    shards: int,
    shard: int | None,
    mixed_precision: str,
    accumulate: int,
    steps: int | None,
) -> None:
    """Fine-tune DiT on DATASET by Minimax, on one GPU or several, into the folder OUT.

    A batch (8 images) is divided among the processes and their parts, whose number has to divide it.

    Example: accelerate launch -m igd_lib minimax imagewoof
    ~/.cache/igd/models/Minimax-imagewoof
    """
    from igd_lib.baselines import minimax as library
    from igd_lib.experiment.experiment import prepare

    made = prepare("minimax", dataset, scale)
    recipe = made.scale.minimax if steps is None else replace(made.scale.minimax, steps=steps or None)
    if not 1 <= shards <= len(made.train.classes):
        message = f"{dataset} has {len(made.train.classes)} classes, got {shards} shards"
        raise click.BadParameter(message, param_hint="--shards")
    if shard is not None and not 0 <= shard < shards:
        raise click.BadParameter(f"0 ... {shards - 1}, got {shard}", param_hint="--shard")
    division = library.Shards(out, made.train.classes, shards)
    for number in range(shards) if shard is None else [shard]:
        labels, folder = division.labels[number], division.path(number) if shards > 1 else out
        click.echo(json.dumps({"shard": number, "classes": len(labels), "out": str(folder)}))
        library.finetune(
            made.models.pipe,
            made.train,
            folder,
            recipe=recipe,
            classes=labels,
            label_ids=made.label_ids,
            mixed_precision=mixed_precision,
            accumulate=accumulate,
        )
    if shards > 1:
        click.echo(division.describe())


@click.command()
@click.argument("name")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Where it goes.  [default: over the shipped one, in the package]",
)
@click.option(
    "--decoder",
    is_flag=True,
    help="Train the guidance decoder and the teacher alone, for the stand-in that is there.",
)
def standin(name: str, out: Path | None, decoder: bool) -> None:
    """Train the embedded stand-in NAME (fashion-mnist, cifar-10) from scratch; an interrupted run goes on.

    Example: igd standin fashion-mnist --out out/standin
    """
    from igd_lib.models import standin as library
    from igd_lib.teacher_training import add_teacher
    from igd_lib.tools.machine import reuse_memory

    if name not in library.STANDINS:
        raise click.BadParameter(f"one of {', '.join(library.STANDINS)}, got {name!r}", param_hint="NAME")
    reuse_memory()
    folder = out or library.ASSETS / name
    if not decoder:
        click.echo(library.build(name, folder))
    click.echo(library.add_decoder(name, folder))
    if library.STANDINS[name].teacher:
        click.echo(add_teacher(name, folder))
