"""An experiment of one's own folder of images; without a folder one of a stand-in's images is written."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torchvision.transforms.v2 import functional as TF

from igd_lib.analysis import features
from igd_lib.baselines import img2img
from igd_lib.config import STANDARD, Fidelity, preset
from igd_lib.data.datasets import DATASETS, DataSpec
from igd_lib.data.images import ImageData, load
from igd_lib.data.your_folder import IDS, your_folder
from igd_lib.experiment import comparisons
from igd_lib.experiment.experiment import Experiment, Sets, few_classes, get_ready, images_of
from igd_lib.experiment.methods import Method
from igd_lib.experiment.models import Data, StandInModels
from igd_lib.experiment.pictures import Gallery
from igd_lib.experiment.pieces import DIT, autoencoder, dit_xl, gpu, model_folder, vae_of
from igd_lib.experiment.run import AUTO, Run
from igd_lib.experiment.scales import (
    STAND_INS,
    Scale,
    paper_scale,
    rehearsal_scale,
    small_scale,
    smoke_scale,
    stand_in_of,
)
from igd_lib.experiment.surrogates import Surrogates
from igd_lib.models.dit import class_ids, image_size_of, match_original
from igd_lib.models.folder import is_whole
from igd_lib.pipeline import IGDPipeline
from igd_lib.protocols import PROTOCOLS
from igd_lib.sets.export import check_folder_names
from igd_lib.teacher_training import train_teacher
from igd_lib.teachers import Teacher
from igd_lib.tools import files
from igd_lib.tools.machine import cache_dir

# Classes, and training images a class, of the folder that is written.
LESSON = {"small": (10, 1000), "smoke": (3, 40)}


def prepare(
    artefact: str,
    folder: str,  # with `train` and `test` (or `val`); empty: one of the stand-in's images is written
    scale: str = "auto",
    *,
    run: Run | None = None,
    k: str = "auto",  # of the influence guidance, and ...
    gamma: str = "auto",  # ... of the deviation guidance; "auto": the scale's
    save_to: str = "",
) -> Experiment:
    """The experiment of a folder: at "paper" with DiT-XL/2 or a DiT fine-tuned on it, else with a stand-in.

    "auto" is "paper" for a folder, else "small"; "rehearsal" is "paper" cut to minutes. Raises
    FileNotFoundError naming every piece that "paper" lacks, ValueError where the stand-in's DiT does not know
    the folder's classes.
    """
    if scale == "auto":
        scale = "paper" if folder else "small"
    get_ready(scale)
    run = run or Run()
    if scale in ("paper", "rehearsal"):
        made = _with_dit(artefact, folder, run, rehearsal=scale == "rehearsal")
    else:
        stand_in = stand_in_of(run.stand_in, scale)
        place = folder or _lesson_folder(stand_in, scale, save_to)
        made = _on_stand_in(artefact, place, run, scale, stand_in)
    made = made if run.protocol == AUTO else made.with_protocol(made.scale.cut(PROTOCOLS[run.protocol]))
    own = made.scale.guidance
    guidance = replace(own, k=_strength(k, own.k, "k"), gamma=_strength(gamma, own.gamma, "gamma"))
    return replace(made, scale=replace(made.scale, guidance=guidance))


def _strength(given: str, own: float, name: str) -> float:
    try:
        return own if given == "auto" else float(given)
    except ValueError as error:
        raise ValueError(f'{name} is a number, or "auto" for {own:g}, got {given!r}') from error


def methods(experiment: Experiment) -> list[Method]:
    """`comparisons.comparison`, DiT at its best cfg only where that was chosen on such images."""
    rows = comparisons.comparison(experiment)
    return [row for row in rows if not (experiment.scale.papers and row.cfg_choice)]


# --- a folder with DiT


def _with_dit(
    artefact: str, folder: str, run: Run, fidelity: Fidelity = STANDARD, *, rehearsal: bool
) -> Experiment:
    if not folder:
        raise ValueError("scale='paper' is for a folder of yours: name it by the parameter `folder`")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = your_folder(folder, image_size=1)  # the DiT says the size
    if lacking := missing_for(spec, fidelity):
        todo = "; or leave `folder` empty to see the notebook on the stand-in's images"
        raise FileNotFoundError(f"{folder} lacks{todo}:\n" + "\n".join(f"- {line}" for line in lacking))
    pipe = _dit(spec, fidelity).to(device)
    ids = _ids(pipe, spec)
    spec = replace(spec, image_size=image_size_of(pipe.transformer, pipe.vae))
    scale = paper_scale(
        spec.name,
        fidelity=fidelity,
        ipc=run.ipc,
        labels="hard",
        num_classes=len(spec.classes),
        image_size=spec.image_size,
    )
    like = "imagewoof" if len(spec.classes) <= 100 else "imagenet"
    scale = replace(scale, guidance=preset(like, "dit", run.ipc))
    scale = rehearsal_scale(scale) if rehearsal else scale
    spec, ids = few_classes(spec, scale.classes), ids[: scale.classes]
    train, test = images_of(spec, "train", scale), images_of(spec, "test", scale)
    dit = f"{DIT[0]} by {IDS}" if spec.label_ids else str(_own_dit(spec))
    banner = (
        f"**Scale: {scale.name}.** Your folder {spec.folder}, {len(train.classes)} classes, {dit} (CC-BY-NC "
        f"4.0). k and gamma, where not given, are Table 12's for {like}: nobody chose them on your images."
    )
    if rehearsal:
        banner += " A few images of the first classes and few steps: **its numbers mean nothing.**"
    surrogates = Surrogates(scale, train, str(pipe._execution_device))
    models = FolderModels(pipe, train, test, device)
    return Experiment(artefact, run, scale, models, surrogates, train, test, tuple(ids), spec, banner)


def missing_for(spec: DataSpec, fidelity: Fidelity = STANDARD) -> list[str]:
    """What a folder still needs at the paper's scale, a line a piece with how to get it."""
    models = [dit_xl(fidelity), autoencoder(fidelity)] if spec.label_ids else []
    lines = [line for piece in models for line in piece.problems]
    if not spec.label_ids and not is_whole(_own_dit(spec)):
        command = shlex.join(["igd_lib", "finetune", spec.folder, str(_own_dit(spec))])
        lines.append(
            "a DiT that knows its classes. Where they are ImageNet-1K's, say which: write "
            f"{spec.folder}/{IDS}, columns folder,wnid. Else fine-tune DiT: accelerate launch -m {command}"
        )
    return [*lines, *gpu().problems]


def _own_dit(spec: DataSpec) -> Path:
    """Where `igd finetune` puts the DiT of a folder."""
    return cache_dir() / "models" / f"DiT-{Path(spec.folder).name}"


def _dit(spec: DataSpec, fidelity: Fidelity) -> IGDPipeline:
    """DiT-XL/2 where it knows the classes; else the folder's own, with the autoencoder it was made with."""
    if not spec.label_ids:
        return IGDPipeline.stored(_own_dit(spec))
    found, vae = model_folder(*DIT), AutoencoderKL.from_pretrained(model_folder(*vae_of(fidelity)))
    assert found is not None  # or `missing_for` has said so
    pipe = IGDPipeline.stored(found, vae=vae)
    if fidelity.timestep_frequencies == "original":
        match_original(pipe.transformer)
    return pipe


def _ids(pipe: IGDPipeline, spec: DataSpec) -> list[int]:
    """The DiT's ids of the folder's classes. Raises ValueError for a DiT that was fine-tuned for others."""
    ids = class_ids(pipe.transformer, len(spec.classes), spec.label_ids or None)
    for label, name in enumerate(spec.classes) if pipe.labels and not spec.label_ids else ():
        known = pipe.labels.get(name.replace(",", " ").strip())
        if known != label:
            place = "is none of its classes" if known is None else f"has its id {known}"
            raise ValueError(
                f"{_own_dit(spec)} was fine-tuned for other classes: {name!r}, label {label}, {place}; "
                "fine-tune it anew, or rename your folder"
            )
    return ids


@dataclass
class FolderModels:
    """The models of a folder at the paper's scale: a DiT, and a teacher that is trained on its images."""

    pipe: IGDPipeline
    train: ImageData
    test: ImageData
    device: str
    minimax_missing: str = "Minimax is fine-tuned for data sets that have a name"
    minimax_shards: None = None

    @property
    def minimax(self) -> IGDPipeline:
        raise FileNotFoundError(self.minimax_missing)

    @property
    def tiny_decoder(self) -> AutoencoderTiny:
        raise FileNotFoundError("no guidance decoder is set up for a folder of one's own")

    def teacher(self, *_: object) -> Teacher:
        return self._teacher

    @cached_property
    def _teacher(self) -> Teacher:
        return train_teacher(self.train, self.test, device=self.device)

    renderer_missing = ""

    def renderer(self, data: Data) -> img2img.Backbone:
        return img2img.DiT.of(self.pipe, data.train, data.label_ids)

    def recovery_networks(self, *_: object) -> list[Teacher]:
        return [self._teacher]

    def extractor(self) -> features.Extractor:
        return features.inception(device=self.device)


# --- a folder with the stand-in


def _on_stand_in(artefact: str, folder: str | Path, run: Run, name: str, stand_in: str) -> Experiment:
    device, known = "cuda" if torch.cuda.is_available() else "cpu", DATASETS[stand_in]
    spec = your_folder(folder, image_size=known.image_size)
    for own in spec.classes:
        if own not in known.classes:
            raise ValueError(
                f"{spec.folder}: the stand-in's DiT, which scale={name!r} samples with, does not know the "
                f"class {own!r} but {', '.join(known.classes)}. Take scale='paper', or leave `folder` empty"
            )
    # Its ids are positions in its own order; here labels go by sorted folder names.
    ids = tuple(known.classes.index(own) for own in spec.classes)
    spec = replace(spec, label_ids=ids, titles=())
    train, test = load(spec, "train"), load(spec, "test")
    make = smoke_scale if name == "smoke" else small_scale
    scale = _for_images(make(spec.name, stand_in, fidelity=STANDARD, ipc=run.ipc, labels="hard"), train)
    surrogates = Surrogates(scale, train, str(torch.device(device)))
    models = StandInModels(stand_in, train, ids, surrogates, scale.minimax, device)
    banner = (
        f"**Scale: {name}.** {spec.folder}: an ordinary folder with {len(train):,} training images of "
        f"{stand_in}'s classes; the embedded stand-in, a tiny DiT and autoencoder."
    )
    if not scale.figures_mean_something:
        banner += " Seconds long, to show that everything works: its numbers mean nothing."
    return Experiment(artefact, run, scale, models, surrogates, train, test, ids, spec, banner)


def _for_images(scale: Scale, train: ImageData) -> Scale:
    """The scale with no more training images a class than there are."""
    least = int(train.labels.bincount().min())
    return replace(scale, train_images=min(scale.train_images or least, least))


def _lesson_folder(stand_in: str, scale: str, save_to: str) -> Path:
    """An ordinary ImageFolder of the first images of a stand-in's data set, written once."""
    classes, count = LESSON[scale]
    out = (Path(save_to) if save_to else cache_dir() / "folders") / f"{stand_in}-{count}"
    if out.is_dir():
        return out
    train = _first(load(stand_in, "train"), classes, count)
    test = _first(load(stand_in, "test"), classes, min(count, STAND_INS[stand_in].test_images or count))
    return write_folder({"train": train, "test": test}, out)


def _first(data: ImageData, classes: int, count: int) -> ImageData:
    """The first images of the first classes."""
    few = data.first(count)
    return replace(few.subset((few.labels < classes).nonzero().flatten()), classes=few.classes[:classes])


def write_folder(splits: Mapping[str, ImageData], out: Path) -> Path:
    """Write `out/SPLIT/CLASS/00000.png` ..., and return `out`; a folder that is there is left as it is.

    It is written beside and moved to its place when it is whole. Raises ValueError for a class name that
    cannot be a folder's, OSError where it cannot be written.
    """
    with files.locked(out.parent, "a run that writes a folder of images", wait=True):
        if out.is_dir():
            return out
        half = out.with_name(f".{out.name}.half")
        shutil.rmtree(half, ignore_errors=True)  # of a process that was killed
        for split, data in splits.items():
            for label, name in enumerate(check_folder_names(data.classes)):
                (half / split / name).mkdir(parents=True)
                for number, image in enumerate(data.of_class(label)):
                    TF.to_pil_image(image).save(half / split / name / f"{number:05d}.png")
        os.rename(half, out)
    return out


# --- what the notebook shows


def real_images(experiment: Experiment, classes: int = 10, count: int = 10) -> Gallery:
    """The first training images of the first classes, a row a class."""
    train = experiment.train
    names = (experiment.spec.titles or train.classes)[:classes]
    count = min(count, int(train.labels.bincount()[: len(names)].min()))
    rows = {name: train.of_class(label, count) for label, name in enumerate(names)}
    title = f"The first training images of {len(names)} of {len(train.classes)} classes"
    return Gallery(rows, [str(number) for number in range(count)], title, {})


def hand_over(
    experiment: Experiment, sets: Sets, method: Method, networks: Sequence[str], save_to: str
) -> tuple[Path, str]:
    """Export a method's set of one seed as an ImageFolder; its place, and in Markdown what to do with it."""
    found, protocol = sets.distilled(method, sets.shown_seed), experiment.scale.protocol
    base = Path(save_to).resolve() if save_to else cache_dir() / "exports"
    out = found.export(base / found.path.name)
    command = ["igd", "evaluate", str(out), experiment.spec.folder, "--network", ",".join(networks)]
    command += ["--protocol", protocol.name, "--seeds", "3"]
    if protocol.epochs is not None and protocol != PROTOCOLS.get(protocol.name):
        command += ["--epochs", str(protocol.epochs)]
    return out, (
        f"- {method.label}, seed {sets.shown_seed}, with its latents and settings: `{found.path}`\n"
        f"- the same as a plain ImageFolder, with a manifest that names the class order: `{out}`\n"
        f"- to evaluate it, here or elsewhere: `{shlex.join(command)}`"
    )
