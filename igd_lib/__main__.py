"""The command `igd`, also as `python -m igd_lib`: each subcommand is a thin call of the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click

from igd_lib.tools.version import VERSION

# The library is imported by each command when it runs: `igd doctor` has to work where a package is missing or
# broken.


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
        if ctx.invoked_subcommand in (
            "demo",
            "distill",
            "evaluate",
            "finetune",
            "minimax",
            "pull",
            "standin",
        ):
            return "the same command goes on from what is on disk"
        return "run the same command again"


@contextmanager
def in_one_line() -> Iterator[None]:
    """What a user can mend ends the command with one line and exit code 1."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@click.group(cls=Interruptible, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="igd")
def igd() -> None:
    """Influence-guided diffusion for dataset distillation, reproduced."""


@igd.command()
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


@igd.command()
@click.argument("folder", type=click.Path(path_type=Path))
def notebooks(folder: Path) -> None:
    """Copy the notebooks into FOLDER, to open them in JupyterLab; one that is there and differs is kept.

    Example: igd notebooks ~/igd && jupyter lab ~/igd
    """
    from igd_lib.experiment.notebooks import copy_into

    with in_one_line():
        click.echo("\n".join(copy_into(folder)))


@igd.command()
@click.argument("notebook")
@click.option(
    "-p", "given", nargs=2, multiple=True, metavar="NAME VALUE", help="A parameter of the notebook."
)
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


@igd.command()
@click.argument("name")
def fetch(name: str) -> None:
    """Fetch the data set NAME where it is not on this machine, and check it.

    fashion-mnist, cifar-10, cifar-100 and food-101 can be had so. Example: igd fetch cifar-10
    """
    from igd_lib.data.datasets import DATASETS
    from igd_lib.data.images import load

    if name not in DATASETS:
        raise click.BadParameter(f"one of {', '.join(sorted(DATASETS))}, got {name!r}", param_hint="NAME")
    with in_one_line():
        train, test = load(name, "train"), load(name, "test")
    click.echo(f"{name}: {len(train):,} training and {len(test):,} test images are here")


@igd.command()
def doctor() -> None:
    """Say what this machine has, and what each notebook would do on it.

    Example: igd doctor
    """
    from igd_lib.experiment.doctor import report

    click.echo(report())


@igd.command()
@click.argument("notebook")
@click.option(
    "-p", "given", nargs=2, multiple=True, metavar="NAME VALUE", help="A parameter of the notebook."
)
@click.option("--memory", type=click.FloatRange(1), metavar="GIB", help="Of another card, to plan for.")
@click.option("--tflops", nargs=2, type=float, metavar="S T", help="Its TFLOP/s of sampling and of training.")
def plan(notebook: str, given: tuple[tuple[str, str], ...], memory: float | None, tflops: Any) -> None:
    """What NOTEBOOK needs and costs at the paper's scale, on this machine or a card of another size.

    Exits with 1 where something that it cannot do without is missing.

    Example: igd plan 03_imagenet1k -p ipc 50
    """
    from igd_lib.experiment import plan as library

    try:
        asked = library.asked(notebook, dict(given))
        machine = None if memory is None else library.other_machine(memory, tflops or library.ASSUMED)
        found = library.of(*asked, machine)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(found.text)
    sys.exit(int(any(piece.blocks for piece in found.pieces)))


@igd.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--repair", is_flag=True, help="Remove what is damaged, so that the next run samples it anew.")
def verify(folder: Path, repair: bool) -> None:
    """Read a distilled set again and name what is missing or damaged.

    Exits with 1 if anything is. Example: igd verify ~/.cache/igd/sets/0123456789ab-seed0
    """
    from igd_lib.sets.store import DistilledSet

    try:
        lines = DistilledSet(folder).verify(repair=repair)
    except (OSError, ValueError) as error:
        click.echo(error, err=True)
        sys.exit(2)
    click.echo("\n".join(lines) if lines else "complete and unchanged")
    sys.exit(int(bool(lines)))


@igd.command()
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
@click.option("--json", "as_json", is_flag=True, help="Every score, and the protocol, as JSON.")
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
    try:
        with redirect_stdout(sys.stderr if as_json else sys.stdout):  # what the library says on the way
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
    except (OSError, ValueError, FloatingPointError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(found.record(), indent=2) if as_json else "\n".join(found.lines()))


@igd.command()
@click.argument("dataset")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--ipc", type=click.IntRange(1), default=10, show_default=True, help="Images a class.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("-k", type=click.FloatRange(0), help="Of influence guidance.  [default: the scale's]")
@click.option(
    "--gamma",
    type=click.FloatRange(0),
    help="Of deviation guidance, for latents of 4,096 values.  [default: the scale's]",
)
@click.option("--cfg", type=float, default=4.0, show_default=True, help="Of classifier-free guidance.")
@click.option(
    "--scale",
    type=click.Choice(["auto", "smoke", "small", "rehearsal", "paper"]),
    default="auto",
    show_default=True,
)
@click.option("--json", "as_json", is_flag=True, help="Where it is, of what, and how long it took, as JSON.")
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

    With the paper's models where they are on this machine, else (scale small) on a stand-in, which is said.

    Example: igd distill cifar-10 my_set --ipc 10 --scale small
    """
    from igd_lib.experiment.experiment import prepare
    from igd_lib.experiment.methods import Method
    from igd_lib.experiment.run import Run

    try:
        with redirect_stdout(sys.stderr if as_json else sys.stdout):  # what the library says on the way
            made = prepare("distill", dataset, scale, run=Run(ipc=ipc, seeds=f"{seed}:{seed + 1}"))
            click.echo(made.banner)
            own = made.scale.guidance
            own = replace(own, k=own.k if k is None else k, gamma=own.gamma if gamma is None else gamma)
            found = made.distilled(Method(guidance=own, cfg_scale=cfg), out, seed)
    except (OSError, ValueError, FloatingPointError) as error:
        raise click.ClickException(str(error)) from error
    record = {"folder": str(out), "dataset": found.manifest["dataset"], "images": len(found.data())}
    record |= {"seconds": round(found.seconds, 1), "key": found.manifest["key"]}
    click.echo(json.dumps(record, indent=2) if as_json else out)


@igd.command()
@click.argument("folder", metavar="SET", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["imagefolder", "rded", "safetensors"]),
    default="imagefolder",
    show_default=True,
)
@click.option("--json", "as_json", is_flag=True, help="The export's manifest as JSON.")
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
    click.echo(json.dumps(manifest, indent=2) if as_json else written)


@igd.command()
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
@click.option("--json", "as_json", is_flag=True, help="Repository, commit, files and bytes as JSON.")
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
    with in_one_line(), redirect_stdout(sys.stderr if as_json else sys.stdout):
        done = sharing.push(folder, repo, declared=declared, private=private)
    said = f"pushed {done.files} files, {size(done.bytes)}, to {repo}: revision {done.commit}"
    click.echo(json.dumps(done.record(), indent=2) if as_json else said)


@igd.command()
@click.argument("repo")
@click.argument("into", required=False, type=click.Path(path_type=Path))
@click.option("--revision", help="A branch, tag or commit.  [default: the newest]")
@click.option("--for", "dataset", metavar="DATASET", help="Refuse another class order than this data set's.")
@click.option("--json", "as_json", is_flag=True, help="Folder, commit, files and bytes as JSON.")
def pull(repo: str, into: Path | None, revision: str | None, dataset: str | None, as_json: bool) -> None:
    """Fetch what was shared as REPO into the new folder INTO, by default in the cache, and check every file.

    REPO is OWNER/NAME on the Hugging Face hub, or a folder, file:///PATH. An interrupted pull goes on.

    Example: igd pull me/imagewoof-igd-ipc10 my_set --for imagewoof
    """
    from igd_lib.sets import hub
    from igd_lib.tools.cache import size

    with in_one_line(), redirect_stdout(sys.stderr if as_json else sys.stdout):
        done = hub.pull(repo, into, revision=revision, data=dataset)
    said = f"{repo}: revision {done.commit}, {done.files} files, {size(done.bytes)}, in {done.folder}"
    click.echo(json.dumps(done.record(), indent=2) if as_json else said)


@igd.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--vae", help="The autoencoder: a folder or a hub id.  [default: the pinned sd-vae-ft-mse]")
@click.option("--heads", type=click.IntRange(1), help="Attention heads, for a width that is none of DiT's.")
def convert(file: Path, out: Path, vae: str | None, heads: int | None) -> None:
    """Convert DiT's or Minimax's own FILE (.pt, .safetensors) to a diffusers pipeline, the new folder OUT.

    Nothing is written before all of it is there, the autoencoder too.

    Example: igd convert DiT-XL-2-256x256.pt ~/.cache/igd/models/DiT-XL-2-256
    """
    from igd_lib.data.datasets import DATASETS
    from igd_lib.models import folder
    from igd_lib.models.dit import from_original, read

    with in_one_line():
        folder.refuse_taken(out)
        autoencoder = _autoencoder(vae)
        transformer = from_original(read(file), num_attention_heads=heads)
        imagenet = DATASETS["imagenet"].names
        known = transformer.config.num_embeds_ada_norm == len(imagenet)
        names = {str(label): name for label, name in enumerate(imagenet)} if known else None
        folder.write_pipeline(out, transformer, autoencoder, folder.dit_scheduler(), names)
    click.echo(out)


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


def _found_model(repository: str, revision: str | None) -> Path:
    """A model's folder on this machine. Raises FileNotFoundError with the ways to get it."""
    from igd_lib.experiment.pieces import model_folder
    from igd_lib.tools.machine import cache_dir

    found = model_folder(repository, revision)
    if found is None:
        raise FileNotFoundError(
            f"the model {repository} is not on this machine: hf download {repository} --revision {revision}; "
            "or, without a network, copy its folder from a machine that has it to "
            f"{cache_dir() / 'models' / repository.split('/')[-1]}, or name the folder in the command"
        )
    return found


def _autoencoder(name: str | None) -> Any:
    """The AutoencoderKL of a folder (or of the pipeline in it), else of the hub; None: the pinned one."""
    from diffusers import AutoencoderKL

    from igd_lib.experiment.pieces import SD_VAE

    where: str | Path = _found_model(*SD_VAE) if name is None else name
    if (Path(where) / "vae").is_dir():
        where = Path(where) / "vae"
    try:
        return AutoencoderKL.from_pretrained(where).eval()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no autoencoder in {where} ({str(error).splitlines()[0]}); without a network, copy a folder "
            "with config.json and diffusion_pytorch_model.safetensors here, and name it: --vae FOLDER"
        ) from error


@igd.command()
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

    Example: accelerate launch -m igd_lib minimax imagewoof Minimax-imagewoof
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


@igd.command()
@click.argument("dataset")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="A pipeline's folder.  [default: DiT-XL/2]")
@click.option("--vae", help="The autoencoder: a folder or a hub id.  [default: the pinned one; BASE's own]")
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
    from igd_lib.data.datasets import DATASETS
    from igd_lib.data.images import load
    from igd_lib.data.your_folder import IDS, your_folder
    from igd_lib.experiment.pieces import DIT, dit_of
    from igd_lib.models.dit import match_original
    from igd_lib.pipeline import IGDPipeline

    with in_one_line():
        if dataset not in DATASETS and not Path(dataset).expanduser().is_dir():
            known = ", ".join(sorted(DATASETS))
            raise ValueError(f"DATASET is a folder or one of {known}; there is no folder {dataset}")
        spec = DATASETS.get(dataset) or your_folder(dataset, image_size=image_size)
        data = load(spec, "train")
        if base is None and (dit_of(dataset) == DIT if dataset in DATASETS else spec.label_ids):
            listed = "" if dataset in DATASETS else f" ({Path(spec.folder) / IDS})"
            raise ValueError(
                f"DiT-XL/2 knows the classes of {dataset}{listed}: it is sampled as it is; --base FOLDER "
                "fine-tunes all the same"
            )
        own = base is not None and vae is None
        models = {} if own else {"vae": _autoencoder(vae)}
        pipe = IGDPipeline.from_pretrained(base or _found_model(*DIT), **models)
        if base is None:
            match_original(pipe.transformer)
        recipe = library.recipe_for(parameters)
        recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
        library.finetune(
            pipe, data, out, recipe=recipe, mixed_precision=mixed_precision, accumulate=accumulate
        )
    click.echo(out)


@igd.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="Default: the package's assets folder.")
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


@igd.command()
@click.option("--remove", multiple=True, metavar="KIND|KEY|all", help="Delete this work; may be repeated.")
@click.option(
    "--older-than", type=click.FloatRange(min=0), default=0.0, metavar="DAYS", help="Not used since."
)
@click.option("--yes", is_flag=True, help="Delete without asking.")
@click.option("--json", "as_json", is_flag=True, help="The list as JSON.")
def cache(remove: tuple[str, ...], older_than: float, yes: bool, as_json: bool) -> None:
    """List work on disk by kind, size and last use, or remove some of it; all but models is made anew.

    Exits with 1 if some could not be removed. Example: igd cache --remove set --older-than 30
    """
    from igd_lib.tools import cache as library

    try:
        found = library.work(older_than)
        found = library.chosen(found, remove) if remove else found
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--remove") from error
    if as_json:
        entries = [
            {
                "kind": one.kind,
                "key": one.key,
                "path": str(one.path),
                "bytes": one.bytes,
                "last_used": one.last_used,
            }
            for one in found
        ]
        click.echo(json.dumps(entries, indent=2))
    else:
        click.echo(library.table(found))
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


if __name__ == "__main__":
    igd(prog_name="igd")
