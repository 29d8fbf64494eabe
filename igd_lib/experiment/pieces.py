"""What a run at the paper's scale needs on this machine, and whether it is usable: found means loadable."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from igd_lib.analysis import features
from igd_lib.baselines import img2img, minimax
from igd_lib.config import STANDARD, Fidelity
from igd_lib.data.datasets import DATASETS, IMAGENET_CLASSES
from igd_lib.data.images import count_problems, missing
from igd_lib.experiment.artefacts import Artefact
from igd_lib.models import loadable
from igd_lib.teachers import imagenet_teacher_file
from igd_lib.tools.machine import cache_dir, data_dir

DIT = ("facebook/DiT-XL-2-256", "eab87f77abd5aef071a632f08807fbaab0b704d0")  # CC-BY-NC 4.0
SD_VAE = ("stabilityai/sd-vae-ft-mse", "31f26fdeee1355a5c34592e401dd41e45d25a493")
TAESD = ("madebyollin/taesd", "taesd")  # and its folder's name
STAND_INS_ALONE = ("fashion-mnist",)  # data that the paper does not have
MINUTE = 60.0  # seconds
TEACHER_SUFFIXES = (".safetensors", ".pth", ".pt")

# base: the data, the DiT, its autoencoder, without which there is no rehearsal either. counts: data that are
# there, but not all or not as they should be. row: without it rows are left out.
Kind = Literal["base", "counts", "extra", "row", "machine"]


@dataclass(frozen=True)
class Piece:
    """Something that a notebook needs."""

    name: str
    where: str  # that it was found there; empty where it was not
    problems: tuple[str, ...] = ()  # why it cannot be used, a line each with the remedy
    kind: Kind = "base"

    @property
    def is_usable(self) -> bool:
        return not self.problems

    @property
    def blocks(self) -> bool:
        """Whether the paper's scale cannot be run without it as it should be."""
        return not self.is_usable and self.kind != "row"

    @property
    def blocks_rehearsal(self) -> bool:
        return not self.is_usable and self.kind == "base"


def pieces(dataset: str, artefact: Artefact, fidelity: Fidelity = STANDARD) -> list[Piece]:
    """All that a notebook needs for a data set, each with what is wrong with it."""
    needs = artefact.needs
    return [
        images(dataset),
        dit(dataset, fidelity),
        autoencoder(fidelity),
        *([teacher(dataset)] if "teacher" in needs else []),
        *([guidance_decoder()] if "taesd" in needs else []),
        *([inception()] if "inception" in needs else []),
        *([minimax_model(dataset)] if "minimax" in needs else []),
        *([stable_diffusion()] if "stable-diffusion" in needs else []),
        gpu(),
    ]


def has_paper_scale(dataset: str, artefact: Artefact) -> bool:
    """Whether there are a paper's settings for it."""
    return artefact.paper and dataset not in STAND_INS_ALONE


def missing_for_paper(dataset: str, artefact: Artefact, fidelity: Fidelity = STANDARD) -> list[str]:
    """What the paper's scale still needs here, a line a piece with how to get it; empty if nothing."""
    if not has_paper_scale(dataset, artefact):
        return [f"here {dataset} is a stand-in's data set and has no paper scale; use scale='small'"]
    return [line for piece in pieces(dataset, artefact, fidelity) if piece.blocks for line in piece.problems]


def images(dataset: str) -> Piece:
    """The images, all of them, in class folders or archives as expected."""
    name, absent = f"the images of {dataset}", missing(dataset)
    if absent:
        return Piece(name, "", tuple(absent))
    lines = _counted(dataset, str(data_dir()), int(time.monotonic() // MINUTE))
    return Piece(name, str(data_dir()), tuple(lines), "counts")


@lru_cache
def _counted(dataset: str, root: str, minute: int) -> list[str]:
    """What is wrong with the images' folders and numbers: looked at once a minute, for many notebooks ask."""
    return count_problems(dataset)


def dit_of(dataset: str) -> tuple[str, str | None]:
    """DiT-XL/2 where it knows the classes; else a DiT fine-tuned on the data, from a local folder only."""
    return DIT if DATASETS[dataset].label_ids else (f"DiT-{dataset}", None)


def vae_of(fidelity: Fidelity) -> tuple[str, str | None]:
    """The autoencoder and its pinned revision; one without a pin is taken from a local folder only."""
    return SD_VAE if fidelity.vae == SD_VAE[0] else (fidelity.vae, None)


def model_folder(repository: str, revision: str | None) -> Path | None:
    """A model's folder under `$IGD_CACHE/models`, or in the Hugging Face cache at the pinned revision."""
    own = cache_dir() / "models" / repository.split("/")[-1]
    if own.is_dir() or revision is None:
        return own if own.is_dir() else None
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def dit(dataset: str, fidelity: Fidelity) -> Piece:
    """The diffusion model: of as many classes as asked for; DiT-XL/2 of the data's resolution too."""
    spec = DATASETS[dataset]
    if spec.label_ids:
        return dit_xl(fidelity, spec.image_size)
    name, _ = dit_of(dataset)
    remedy = f"igd finetune {dataset} {cache_dir() / 'models' / name}, or "
    # Its images may have another size: they are resized.
    return _transformer(name, None, fidelity, remedy, classes=len(spec.classes))


def dit_xl(fidelity: Fidelity, image_size: int | None = None) -> Piece:
    """DiT-XL/2, for images of that size."""
    return _transformer(*DIT, fidelity, classes=len(IMAGENET_CLASSES), image_size=image_size)


def _transformer(
    repository: str, revision: str | None, fidelity: Fidelity, remedy: str = "", **wanted: int | None
) -> Piece:
    vae = model_folder(*vae_of(fidelity))
    return _model(repository, revision, remedy, parts=("transformer",), vae=vae, **wanted)


def autoencoder(fidelity: Fidelity) -> Piece:
    return _model(*vae_of(fidelity), parts=("vae",))


def _model(repository: str, revision: str | None, remedy: str = "", **wanted: Any) -> Piece:
    """A model's folder; wanted: what `loadable.problems` compares it with."""
    name, found = f"the weights {repository}", model_folder(repository, revision)
    if found is not None:
        lines = (f"{name}: {line}" for line in loadable.problems(found, **wanted))
        return Piece(name, str(found), tuple(lines))
    download = f"hf download {repository} --revision {revision}, or " if revision else remedy
    place = cache_dir() / "models" / repository.split("/")[-1]
    return Piece(name, "", (f"{name}: {download}copy the folder to {place}",))


def teacher(dataset: str) -> Piece:
    """What gives soft labels: torchvision's network of ImageNet-1K, else one that is trained here."""
    name = f"the teacher of {dataset}"
    if DATASETS[dataset].classes == IMAGENET_CLASSES:
        path, lines = imagenet_teacher_file()
        return Piece(name, str(path) if path else "downloaded at the start (45 MB)", tuple(lines), "extra")
    path = own_teacher_file(dataset)
    return Piece(name, str(path) if path else "trained here first", (), "extra")


def own_teacher_file(dataset: str) -> Path | None:
    """A teacher that somebody has put beside the models, `Teacher-DATASET`."""
    paths = (cache_dir() / "models" / f"Teacher-{dataset}{suffix}" for suffix in TEACHER_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def guidance_decoder() -> Piece:
    """TAESD, the small decoder that some rows guide through."""
    place = cache_dir() / "models" / TAESD[1]
    if not place.is_dir():
        download = f"hf download {TAESD[0]} --local-dir {place}"
        lines = [f"no guidance decoder in {place}: copy TAESD's folder there ({download})"]
    else:
        lines = loadable.problems_of_decoder(place)
    return Piece("the guidance decoder TAESD", str(place) if not lines else "", tuple(lines), "extra")


def inception() -> Piece:
    lines = features.problems_of_inception()
    return Piece("Inception-V3 (FID)", "" if lines else "found", tuple(lines), "extra")


def minimax_model(dataset: str) -> Piece:
    lines = minimax_problems(dataset)
    return Piece("the Minimax model", "" if lines else str(minimax_folder(dataset)), tuple(lines), "row")


def minimax_folder(dataset: str) -> Path:
    return cache_dir() / "models" / f"Minimax-{dataset}"


def minimax_problems(dataset: str) -> list[str]:
    """Why there is no Minimax model for a data set, and how to make it."""
    place = minimax_folder(dataset)
    if not place.is_dir():
        return [
            f"no Minimax model in {place}: accelerate launch -m igd_lib minimax {dataset} {place}, "
            "or convert its checkpoint (igd convert)"
        ]
    return minimax.problems(place, DATASETS[dataset])


def stable_diffusion() -> Piece:
    """Stable Diffusion 1.5 (CreativeML OpenRAIL-M), which D4M and TDSDM render with."""
    found, (repository, revision) = stable_diffusion_folder(), img2img.SD_15
    lines: tuple[str, ...]
    if found is None:
        place = cache_dir() / "models" / repository.split("/")[-1]
        lines = (
            f"no Stable Diffusion 1.5: hf download {repository} --revision {revision}, or copy it to {place}",
        )
    else:
        lines = tuple(loadable.problems_of_stable_diffusion(found))
    return Piece("Stable Diffusion 1.5", "" if lines else str(found), lines, "row")


def stable_diffusion_folder() -> Path | None:
    return model_folder(*img2img.SD_15)


def gpu() -> Piece:
    if torch.cuda.is_available():
        own = torch.cuda.get_device_properties(0)
        return Piece("a CUDA GPU", f"{own.name}, {own.total_memory / 2**30:.0f} GiB", (), "machine")
    if os.environ.get("IGD_ALLOW_CPU"):
        return Piece("a CUDA GPU", "none, but IGD_ALLOW_CPU is set", (), "machine")
    line = (
        "a CUDA GPU: none was found (set IGD_ALLOW_CPU=1 to run the paper's scale on a CPU all the "
        "same, very slowly)"
    )
    return Piece("a CUDA GPU", "", (line,), "machine")


def replaced(found: Sequence[Piece]) -> list[str]:
    """What a rehearsal does without, or with something else for it, a bold line each."""
    lines = {
        "counts": "**Not all is there of {}**, and the real run would end here",
        "extra": "**In place of {}: a random network of the same interface.** The real run needs it",
        "row": "**In place of {}: the DiT itself.** The real run leaves its rows out without it",
    }
    return [
        f"{lines[piece.kind].format(piece.name)}: {piece.problems[0]}."
        for piece in found
        if not piece.is_usable and piece.kind in lines
    ]
