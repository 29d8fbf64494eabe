"""An experiment's models: the paper's weights, or a stand-in's and what is trained for it here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from diffusers import AutoencoderKL, AutoencoderTiny

from igd_lib.analysis import features
from igd_lib.baselines import minimax
from igd_lib.config import Fidelity
from igd_lib.data.datasets import DATASETS, IMAGENET_CLASSES
from igd_lib.data.images import ImageData, load
from igd_lib.experiment.plan import dit_of, model_folder, vae_of
from igd_lib.experiment.surrogates import Surrogates
from igd_lib.models import standin
from igd_lib.models.dit import match_original
from igd_lib.pipeline import IGDPipeline
from igd_lib.teacher_training import teacher_recipe, train_teacher
from igd_lib.teachers import Teacher, imagenet_teacher, least_for, teacher_from_file
from igd_lib.tools import files, keys
from igd_lib.tools.machine import cache_dir


class Models(Protocol):
    """What an experiment asks for."""

    @property
    def pipe(self) -> IGDPipeline:
        """The diffusion model and its autoencoder."""
        ...

    @property
    def minimax_missing(self) -> str:
        """Why there is no Minimax backbone here, and how to make it; empty where there is one."""
        ...

    @property
    def minimax(self) -> IGDPipeline:
        """The Minimax-tuned backbone. Raises FileNotFoundError without one."""
        ...

    @property
    def tiny_decoder(self) -> AutoencoderTiny:
        """The small guidance decoder. Raises FileNotFoundError without one."""
        ...

    def teacher(self, classes: Sequence[str], label_ids: Sequence[int]) -> Teacher:
        """What gives soft labels."""
        ...

    def extractor(self) -> features.Extractor:
        """The features that distances are measured in."""
        ...


class PaperModels:
    """DiT-XL/2 and what goes with it, from folders and from the hub's cache."""

    def __init__(self, dataset: str, fidelity: Fidelity, device: str):
        self.dataset, self.device = dataset, device
        self.dit = dit_of(dataset)[0]
        vae = AutoencoderKL.from_pretrained(model_folder(*vae_of(fidelity)))
        self.pipe = IGDPipeline.from_pretrained(model_folder(*dit_of(dataset)), vae=vae).to(device)
        if fidelity.timestep_frequencies == "original":
            match_original(self.pipe.transformer)

    @property
    def _minimax_folder(self) -> Path:
        return cache_dir() / "models" / f"Minimax-{self.dataset}"

    @property
    def minimax_missing(self) -> str:
        folder = self._minimax_folder
        if folder.is_dir():
            return ""
        return (
            f"no Minimax model in {folder}: accelerate launch -m igd_lib minimax {self.dataset} {folder}, "
            "or convert its checkpoint (igd convert)"
        )

    @cached_property
    def minimax(self) -> IGDPipeline:
        if self.minimax_missing:
            raise FileNotFoundError(self.minimax_missing)
        return IGDPipeline.from_pretrained(self._minimax_folder, vae=self.pipe.vae).to(self.device)

    @cached_property
    def tiny_decoder(self) -> AutoencoderTiny:
        folder = cache_dir() / "models" / "taesd"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no guidance decoder in {folder}: copy TAESD's folder there "
                f"(hf download madebyollin/taesd --local-dir {folder})"
            )
        return AutoencoderTiny.from_pretrained(folder).to(self.device).eval()

    def teacher(self, classes: Sequence[str], label_ids: Sequence[int]) -> Teacher:
        """As RDED has it: torchvision's ResNet-18 of ImageNet-1K, for other data a network trained there."""
        if DATASETS[self.dataset].classes == IMAGENET_CLASSES:
            return imagenet_teacher(classes, label_ids)
        return self._own_teacher

    @cached_property
    def _own_teacher(self) -> Teacher:
        """The file `$IGD_CACHE/models/Teacher-DATASET`, else one that is trained here once, then read."""
        train, least = load(self.dataset, "train"), least_for(self.dataset)
        architecture, recipe = teacher_recipe(train.image_size)
        for suffix in (".safetensors", ".pth", ".pt"):
            path = cache_dir() / "models" / f"Teacher-{self.dataset}{suffix}"
            if path.is_file():
                size = recipe.image_size
                return teacher_from_file(
                    path, train.classes, architecture=architecture, image_size=size, least=least
                )
        return train_teacher(train, load(self.dataset, "test"), least=least, device=self.device)

    def extractor(self) -> features.Extractor:
        """Inception-V3's features."""
        return features.inception(device=self.device)


@dataclass
class StandInModels:
    """A stand-in from the package, and what is trained for it once and then read from `$IGD_CACHE`."""

    name: str
    train: ImageData
    label_ids: tuple[int, ...]
    surrogates: Surrogates
    recipe: minimax.Minimax
    device: str
    minimax_missing: str = ""  # it is quickly made

    @cached_property
    def pipe(self) -> IGDPipeline:
        pipe = IGDPipeline.from_pretrained(standin.path(self.name)).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def minimax(self) -> IGDPipeline:
        every = range(len(self.train.classes))
        folder = keys.folder(
            "minimax", minimax.settings(self.pipe, self.train, self.recipe, every, self.label_ids)
        )
        with files.locked(folder, "a fine-tuning", wait=True):  # of a notebook that runs beside this one
            minimax.finetune(self.pipe, self.train, folder, recipe=self.recipe, label_ids=self.label_ids)
        return IGDPipeline.from_pretrained(folder, vae=self.pipe.vae).to(self.device)

    @cached_property
    def tiny_decoder(self) -> AutoencoderTiny:
        return standin.tiny_decoder(self.name).to(self.device)

    def teacher(self, classes: Sequence[str], label_ids: Sequence[int]) -> Teacher:
        """The surrogate's last checkpoint."""
        model, epoch = self.surrogates.last_checkpoint()
        origin = f"the surrogate's trajectory, epoch {epoch:g}"
        half = (0.5,) * 3
        return Teacher(
            model,
            self.surrogates.scale.surrogate,
            origin,
            tuple(classes),
            half,
            half,
            self.surrogates.scale.teacher_least,
        )

    def extractor(self) -> features.Extractor:
        """The surrogate's last checkpoint's features."""
        return features.network_extractor(
            self.surrogates.last_checkpoint()[0], self.surrogates.scale.surrogate
        )
