"""An experiment's models: the paper's weights, or a stand-in's and what is trained for it here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Protocol

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from igd_lib.analysis import features
from igd_lib.baselines import img2img, minimax
from igd_lib.baselines.gvbsm import IMAGENET_NETWORKS, imagenet_networks
from igd_lib.baselines.minimax import Shards
from igd_lib.baselines.recovery import SMALL_IMAGES, SMALL_NETWORKS, SMALL_TRAINING
from igd_lib.config import Fidelity
from igd_lib.data.datasets import DATASETS, IMAGENET_CLASSES
from igd_lib.data.images import ImageData, load
from igd_lib.experiment.pieces import (
    dit_of,
    guidance_decoder,
    minimax_folder,
    minimax_problems,
    model_folder,
    own_teacher_file,
    stable_diffusion,
    stable_diffusion_folder,
    vae_of,
)
from igd_lib.experiment.scales import Scale
from igd_lib.experiment.surrogates import Surrogates
from igd_lib.models import standin
from igd_lib.models.dit import match_original
from igd_lib.models.folder import is_whole
from igd_lib.models.networks import keep_outputs, network
from igd_lib.pipeline import IGDPipeline
from igd_lib.teacher_training import stand_in_teacher, teacher_recipe, train_teacher
from igd_lib.teachers import (
    Teacher,
    imagenet_teacher,
    imagenet_teacher_file,
    least_for,
    teacher_from_file,
)
from igd_lib.tools import files, keys


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
    def minimax_shards(self) -> Shards | None:
        """The Minimax backbone's shards, where it is made of several."""
        ...

    @property
    def tiny_decoder(self) -> AutoencoderTiny:
        """The small guidance decoder. Raises FileNotFoundError without one."""
        ...

    def teacher(self, classes: Sequence[str], label_ids: Sequence[int]) -> Teacher:
        """What gives soft labels."""
        ...

    def recovery_networks(self, data: Data, count: int) -> list[Teacher]:
        """Up to `count` networks whose batch statistics images are recovered from, the first one SRe2L's."""
        ...

    @property
    def renderer_missing(self) -> str:
        """Why nothing here makes new images of given ones, and how to get it; empty where something does."""
        ...

    def renderer(self, data: Data) -> img2img.Backbone:
        """What makes new images of given ones. Raises FileNotFoundError without one."""
        ...

    def extractor(self) -> features.Extractor:
        """The features that distances are measured in."""
        ...


@dataclass(frozen=True)
class Data:
    """An experiment's images, and how the diffusion model and people call their classes."""

    train: ImageData
    test: ImageData
    label_ids: tuple[int, ...]
    names: tuple[str, ...]
    scale: Scale


class PaperModels:
    """DiT-XL/2 and what goes with it, from folders and from the hub's cache."""

    def __init__(self, dataset: str, fidelity: Fidelity, device: str):
        self.dataset, self.device = dataset, device
        self.dit = dit_of(dataset)[0]
        found, vae = (
            model_folder(*dit_of(dataset)),
            AutoencoderKL.from_pretrained(model_folder(*vae_of(fidelity))),
        )
        assert found is not None  # or prepare has said that it is missing
        self.pipe = IGDPipeline.stored(found, vae=vae).to(device)
        if fidelity.timestep_frequencies == "original":
            match_original(self.pipe.transformer)

    @property
    def minimax_missing(self) -> str:
        return "; ".join(minimax_problems(self.dataset))

    @cached_property
    def minimax(self) -> IGDPipeline:
        if self.minimax_missing:
            raise FileNotFoundError(self.minimax_missing)
        return IGDPipeline.stored(minimax_folder(self.dataset), vae=self.pipe.vae).to(self.device)

    @cached_property
    def minimax_shards(self) -> Shards | None:
        place = minimax_folder(self.dataset)
        whole = is_whole(place) or minimax_problems(self.dataset)
        return None if whole else Shards.find(place, DATASETS[self.dataset].classes)

    @cached_property
    def tiny_decoder(self) -> AutoencoderTiny:
        piece = guidance_decoder()
        if not piece.is_usable:
            raise FileNotFoundError("; ".join(piece.problems))
        return AutoencoderTiny.from_pretrained(piece.where).to(self.device).eval()

    def fetch(self) -> None:
        """Download what a teacher needs: one that cannot be had is known now, not after hours."""
        spec = DATASETS[self.dataset]
        if spec.classes == IMAGENET_CLASSES:
            imagenet_teacher(spec.classes, spec.label_ids)

    def teacher(self, classes: Sequence[str], label_ids: Sequence[int]) -> Teacher:
        """As RDED has it: torchvision's ResNet-18 of ImageNet-1K, for other data a network trained there."""
        if DATASETS[self.dataset].classes == IMAGENET_CLASSES:
            return imagenet_teacher(classes, label_ids)
        return self._own_teacher

    @cached_property
    def _own_teacher(self) -> Teacher:
        """The file `$IGD_CACHE/models/Teacher-DATASET`, else one that is trained here once, then read."""
        least, path = least_for(self.dataset), own_teacher_file(self.dataset)
        train = load(self.dataset, "train")
        if path is None:
            return train_teacher(train, load(self.dataset, "test"), least=least, device=self.device)
        architecture, recipe = teacher_recipe(train.image_size)
        size = recipe.image_size
        return teacher_from_file(path, train.classes, architecture=architecture, image_size=size, least=least)

    def recovery_networks(self, data: Data, count: int) -> list[Teacher]:
        """Of ImageNet-1K torchvision's, as the authors have them; of other data the teacher alone."""
        if DATASETS[self.dataset].classes == IMAGENET_CLASSES and count > 1:
            return imagenet_networks(data.train.classes, data.label_ids)[:count]
        return [self.teacher(data.train.classes, data.label_ids)]

    @property
    def renderer_missing(self) -> str:
        return "; ".join(stable_diffusion().problems)

    def renderer(self, data: Data) -> img2img.Backbone:
        """Stable Diffusion 1.5, told classes by their names; in half precision on a GPU as there."""
        if self.renderer_missing:
            raise FileNotFoundError(self.renderer_missing)
        return self._stable_diffusion(data.names)

    @lru_cache(maxsize=1)  # noqa: B019  # an experiment has one
    def _stable_diffusion(self, names: tuple[str, ...]) -> img2img.Backbone:
        on_gpu = torch.device(self.device).type == "cuda"
        dtype = torch.float16 if on_gpu else torch.float32
        pipe = img2img.stable_diffusion(stable_diffusion_folder(), dtype=dtype)
        return img2img.StableDiffusion(pipe, names).to(self.device)

    def extractor(self) -> features.Extractor:
        """Inception-V3's features."""
        return features.inception(device=self.device)


class RehearsalModels(PaperModels):
    """The same, with something of the same interface in place of what is missing beside DiT.

    Those are random networks, and the DiT itself where the Minimax model should be. No teacher has to be
    right.
    """

    minimax_missing = ""

    def fetch(self) -> None:
        """Nothing is downloaded for a rehearsal."""

    @cached_property
    def minimax(self) -> IGDPipeline:
        return self.pipe if minimax_problems(self.dataset) else super().minimax

    @cached_property
    def tiny_decoder(self) -> AutoencoderTiny:
        if guidance_decoder().is_usable:
            return super().tiny_decoder
        with _seeded():
            return AutoencoderTiny().to(self.device).eval()

    def teacher(self, classes: Sequence[str], label_ids: Sequence[int]) -> Teacher:
        """That of the real run where its file is here, else a random network."""
        spec = DATASETS[self.dataset]
        architecture, recipe = teacher_recipe(spec.image_size)
        own, size = own_teacher_file(self.dataset), recipe.image_size
        if spec.classes == IMAGENET_CLASSES and imagenet_teacher_file()[0] is not None:
            return replace(imagenet_teacher(classes, label_ids), least=0.0)
        if spec.classes != IMAGENET_CLASSES and own is not None:
            return _of_first(
                teacher_from_file(own, spec.classes, architecture=architecture, image_size=size), len(classes)
            )
        return self._random(architecture, classes)

    def recovery_networks(self, data: Data, count: int) -> list[Teacher]:
        """Random networks, where a file is not here."""
        if DATASETS[self.dataset].classes != IMAGENET_CLASSES or count == 1:
            return [self.teacher(data.train.classes, data.label_ids)]
        return [self._random(f"torchvision/{name}", data.train.classes) for name in IMAGENET_NETWORKS[:count]]

    def _random(self, architecture: str, classes: Sequence[str]) -> Teacher:
        """A random network that need not be right."""
        recipe = teacher_recipe(DATASETS[self.dataset].image_size)[1]
        with _seeded():
            model = network(architecture, num_classes=len(classes), image_size=recipe.image_size).eval()
        return Teacher(model, architecture, "random", tuple(classes), recipe.mean, recipe.std, 0.0)

    renderer_missing = ""

    def renderer(self, data: Data) -> img2img.Backbone:
        """Stable Diffusion where it is here, else the DiT itself."""
        if stable_diffusion().is_usable:
            return self._stable_diffusion(data.names)
        return img2img.DiT.of(self.pipe, data.train, data.label_ids)

    def extractor(self) -> features.Extractor:
        """Inception-V3's features, or those of a random network."""
        if not features.problems_of_inception():
            return super().extractor()
        with _seeded():
            model = network("convnet3", num_classes=10, image_size=32).to(self.device)
        return features.network_extractor(model, "a random ConvNet-3", image_size=32)


def _of_first(teacher: Teacher, count: int) -> Teacher:
    """A teacher of the first classes alone, which need not be right."""
    keep_outputs(teacher.model, len(teacher.classes), count)
    return replace(teacher, classes=teacher.classes[:count], least=0.0)


@contextmanager
def _seeded() -> Iterator[None]:
    """Random networks are the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


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
    minimax_shards: Shards | None = None
    _recovery: dict[str, Teacher] = field(default_factory=dict)

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

    @cached_property
    def _shipped_teacher(self) -> Teacher | None:
        found = stand_in_teacher(self.name)
        return found and replace(found, model=found.model.to(self.device))

    def teacher(self, classes: Sequence[str], label_ids: Sequence[int]) -> Teacher:
        """The one that the stand-in has for these classes, else the surrogate's last checkpoint."""
        own, least = self.surrogates.scale.surrogate, self.surrogates.scale.teacher_least
        shipped = self._shipped_teacher
        if shipped is not None and shipped.classes == tuple(classes):  # a folder of one's own has others
            return replace(shipped, least=least)
        model, epoch = self.surrogates.last_checkpoint()
        origin = f"the surrogate's trajectory, epoch {epoch:g}"
        return Teacher(model, own, origin, tuple(classes), (0.5,) * 3, (0.5,) * 3, least)

    def recovery_networks(self, data: Data, count: int) -> list[Teacher]:
        """Small ones with batch statistics, trained on the stand-in's images once, then read."""
        return [self._recovery_network(name, data) for name in SMALL_NETWORKS[:count]]

    def _recovery_network(self, name: str, data: Data) -> Teacher:
        if name not in self._recovery:
            scale = data.scale
            count = SMALL_IMAGES if scale.figures_mean_something else scale.train_images or 1
            self._recovery[name] = train_teacher(
                data.train.per_class(count, seed=0),
                data.test,
                network=name,
                recipe=scale.cut(SMALL_TRAINING),
                least=scale.teacher_least,
                device=self.device,
            )
        return self._recovery[name]

    renderer_missing = ""

    def renderer(self, data: Data) -> img2img.Backbone:
        """The stand-in's own DiT."""
        return img2img.DiT.of(self.pipe, data.train, data.label_ids)

    def extractor(self) -> features.Extractor:
        """The features of its teacher, else of the surrogate's last checkpoint."""
        if self._shipped_teacher is not None:
            return features.network_extractor(self._shipped_teacher.model, "the stand-in's teacher")
        last, own = self.surrogates.last_checkpoint()[0], self.surrogates.scale.surrogate
        return features.network_extractor(last, own)
