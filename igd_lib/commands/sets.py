"""Distilled sets: make, check, score, convert and share them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click

from igd_lib.commands.common import in_one_line, json_option, output_kept_for, say


@click.command()
@click.argument("dataset")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--ipc", type=click.IntRange(1), default=10, show_default=True, help="Images a class.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("-k", type=click.FloatRange(0), help="Strength of influence guidance.  [default: the scale's]")
@click.option(
    "--gamma",
    type=click.FloatRange(0),
    help="Strength of deviation guidance, for latents of 4,096 values.  [default: the scale's]",
)
@click.option("--cfg", type=float, default=4.0, show_default=True, help="Scale of classifier-free guidance.")
@click.option(
    "--scale",
    type=click.Choice(["auto", "smoke", "small", "rehearsal", "paper"]),
    default="auto",
    show_default=True,
)
@json_option("Where it is, of what, and how long it took")
def distill(
    dataset: str,
    out: Path,
    ipc: int,
    seed: int,
    k: float | None,
    gamma: float | None,
    cfg: float,
    scale: str,
    as_json: bool,
) -> None:
    """Distil DATASET by influence-guided diffusion into the folder OUT; an interrupted run goes on.

    With the paper's models where they are on this machine, else (scale small) on a stand-in, and says so.

    Example: igd distill cifar-10 my_set --ipc 10 --scale small
    """
    from igd_lib.experiment.experiment import prepare
    from igd_lib.experiment.methods import Method
    from igd_lib.experiment.run import Run

    with in_one_line(), output_kept_for(as_json):
        made = prepare("distill", dataset, scale, run=Run(ipc=ipc, seeds=f"{seed}:{seed + 1}"))
        click.echo(made.banner)
        own = made.scale.guidance
        own = replace(own, k=own.k if k is None else k, gamma=own.gamma if gamma is None else gamma)
        found = made.distilled(Method(guidance=own, cfg_scale=cfg), out, seed)
    record = {"folder": str(out), "dataset": found.manifest["dataset"], "images": len(found.data())}
    record |= {"seconds": round(found.seconds, 1), "key": found.manifest["key"]}
    say(record, out, as_json)


@click.command()
@click.argument("folder", metavar="SET", type=click.Path(path_type=Path))
@click.argument("real")
@click.option(
    "--network", help="Names, comma-separated.  [default: a ConvNet of the depth that suits the size]"
)
@click.option(
    "--protocol", help="A name of igd_lib.protocols, such as igd-hard.  [default: by the images' size]"
)
@click.option(
    "--seeds", type=click.IntRange(1), help="How many trainings, seeds 0, 1, ...  [default: the protocol's]"
)
@click.option("--teacher", type=click.Path(path_type=Path), help="Weights of what gives soft labels.")
@click.option("--image-size", type=click.IntRange(8), help="Px that networks see, instead of the protocol's.")
@click.option("--epochs", type=click.IntRange(1), help="Of training, instead of the protocol's.")
@click.option("--device", help="Such as cpu or cuda:1.  [default: a GPU where there is one]")
@json_option("Every score, and the protocol")
def evaluate(
    folder: Path,
    real: str,
    network: str | None,
    protocol: str | None,
    seeds: int | None,
    teacher: Path | None,
    image_size: int | None,
    epochs: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Train networks on SET and test them on REAL images: mean ± sd over training seeds.

    SET is a distilled set's folder, an export of one, or any folder of class folders; REAL a data set's name,
    or a folder with class folders in its test, its val, or itself. Classes are compared by name.

    Example: igd evaluate their_set imagewoof --network resnetap10 --seeds 3
    """
    from igd_lib.experiment import any_set
    from igd_lib.experiment.run import split_names
    from igd_lib.protocols import PROTOCOLS

    if protocol is not None and protocol not in PROTOCOLS:
        raise click.BadParameter(f"one of {', '.join(PROTOCOLS)}, got {protocol!r}", param_hint="--protocol")
    with in_one_line(), output_kept_for(as_json):
        found = any_set.evaluate_set(
            folder,
            real,
            networks=split_names(network or ""),
            protocol=PROTOCOLS[protocol] if protocol else None,
            seeds=None if seeds is None else range(seeds),
            teacher=teacher,
            image_size=image_size,
            epochs=epochs,
            device=device,
        )
    say(found.record(), "\n".join(found.lines()), as_json)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--repair", is_flag=True, help="Remove what is damaged, so that the next run samples it anew.")
@json_option("The folder and its problems")
def verify(folder: Path, repair: bool, as_json: bool) -> None:
    """Read a distilled set again and name what is missing or damaged.

    Exits with 1 if anything is, with 2 where there is no set.

    Example: igd verify ~/.cache/igd/set/0123456789ab-seed0
    """
    from igd_lib.sets.store import DistilledSet

    try:
        lines = DistilledSet(folder).verify(repair=repair)
    except (OSError, ValueError) as error:
        click.echo(error, err=True)
        sys.exit(2)
    say({"folder": str(folder), "problems": lines}, "\n".join(lines) or "complete and unchanged", as_json)
    sys.exit(int(bool(lines)))


@click.command()
@click.argument("folder", metavar="SET", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["imagefolder", "rded", "safetensors"]),
    default="imagefolder",
    show_default=True,
)
@json_option("The export's manifest")
def export(folder: Path, out: Path, form: str, as_json: bool) -> None:
    """Write the finished SET for other tools into the folder OUT.

    imagefolder has a folder a class, rded one a zero-padded label, safetensors one file of tensors; each has
    a manifest with the class order.

    Example: igd export my_set my_set_folders --format rded
    """
    from igd_lib.sets.export import read_manifest
    from igd_lib.sets.store import DistilledSet

    with in_one_line():
        written = DistilledSet(folder).export(out, form)
        manifest = read_manifest(written)
    say(manifest, written, as_json)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="A new repository is seen by its owner alone.")
@click.option("--licence", default="", help="Of weights that igd does not know, such as mit.")
@click.option("--data-licence", default="", help="Of images that igd does not know, such as cc-by-4.0.")
@click.option(
    "--derived-from-imagenet-ok",
    is_flag=True,
    help="Yes, I may share what is derived from ImageNet's images (DM, IDC-1, DATM, D4M, TDSDM, ...).",
)
@json_option("Repository, commit, files and bytes")
def push(
    folder: Path,
    repo: str,
    private: bool,
    licence: str,
    data_licence: str,
    derived_from_imagenet_ok: bool,
    as_json: bool,
) -> None:
    """Share what is in FOLDER: a distilled set, a surrogate, a fine-tuned DiT or an adapter.

    REPO is OWNER/NAME on the Hugging Face hub (log in first: hf auth login), or a folder, file:///PATH. A
    card with licences and settings goes with it. Sets of real images and others' weights are refused.

    Example: igd push my_set me/imagewoof-igd-ipc10
    """
    from igd_lib.sets import sharing
    from igd_lib.sets.shareable import Declared
    from igd_lib.tools.cache import size

    declared = Declared(derived_from_imagenet_ok, licence, data_licence)
    with in_one_line(), output_kept_for(as_json):
        done = sharing.push(folder, repo, declared=declared, private=private)
    said = f"pushed {done.files} files, {size(done.bytes)}, to {repo}: revision {done.commit}"
    say(done.record(), said, as_json)


@click.command()
@click.argument("repo")
@click.argument("into", required=False, type=click.Path(path_type=Path))
@click.option("--revision", help="A branch, tag or commit.  [default: the newest]")
@click.option("--for", "dataset", metavar="DATASET", help="Refuse another class order than this data set's.")
@json_option("Folder, commit, files and bytes")
def pull(repo: str, into: Path | None, revision: str | None, dataset: str | None, as_json: bool) -> None:
    """Fetch what was shared as REPO into the new folder INTO, by default in the cache, and check every file.

    REPO is OWNER/NAME on the Hugging Face hub, or a folder, file:///PATH. An interrupted pull goes on.

    Example: igd pull me/imagewoof-igd-ipc10 my_set --for imagewoof
    """
    from igd_lib.sets import hub
    from igd_lib.tools.cache import size

    with in_one_line(), output_kept_for(as_json):
        done = hub.pull(repo, into, revision=revision, data=dataset)
    said = f"{repo}: revision {done.commit}, {done.files} files, {size(done.bytes)}, in {done.folder}"
    say(done.record(), said, as_json)
