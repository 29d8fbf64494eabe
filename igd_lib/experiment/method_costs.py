"""What the compared methods cost at the paper's scale: their authors' settings, counted operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from igd_lib.baselines.d4m import D4M
from igd_lib.baselines.datm import DATM
from igd_lib.baselines.dm import DM
from igd_lib.baselines.gvbsm import GVBSM, IMAGENET_NETWORKS
from igd_lib.baselines.idc import IDC
from igd_lib.baselines.img2img import Img2Img
from igd_lib.baselines.sre2l import SRe2L
from igd_lib.baselines.tdsdm import TDSDM
from igd_lib.data.datasets import DATASETS, IMAGENET_CLASSES
from igd_lib.experiment.counting import SECOND_ORDER, TO_PIXELS, TRAINING, counted, operations_of
from igd_lib.models.shapes import sd_15_unet, sd_vae
from igd_lib.sampler import steps_taken
from igd_lib.teacher_training import teacher_recipe


@dataclass(frozen=True)
class Asked:
    """Of which data, and how many sets."""

    dataset: str
    ipc: int
    seeds: int
    images: int  # for training, in all

    @property
    def classes(self) -> int:
        return len(DATASETS[self.dataset].classes)

    @property
    def sets_images(self) -> int:
        """Images of all sets together."""
        return self.seeds * self.ipc * self.classes

    def forward(self, network: str, image_size: int | None = None) -> float:
        """Of a network's pass over one image."""
        return operations_of(network, image_size or DATASETS[self.dataset].image_size, self.classes)


Cost = tuple[str, float]  # what is done, in words, and its operations


def _dm(asked: Asked) -> Cost:
    own = DM.paper(asked.dataset, asked.ipc)
    passes = asked.classes * (own.batch_real + TO_PIXELS * asked.ipc)
    what = f"{asked.seeds} seeds x {own.iterations:,} iterations x {asked.classes:,} classes"
    return what, asked.seeds * own.iterations * passes * asked.forward(own.network)


def _idc(asked: Asked) -> Cost:
    own = IDC.paper(asked.dataset, asked.ipc)
    steps = own.outer * own.inner
    matched = asked.classes * (TRAINING * own.batch_real + SECOND_ORDER * min(asked.ipc, own.batch_synthetic))
    trained = TRAINING * (own.net_images + own.early * asked.images / own.inner)
    what = f"{asked.seeds} seeds x {steps:,} steps x {asked.classes:,} classes"
    return what, asked.seeds * steps * (matched + trained) * asked.forward(own.network)


def _datm(asked: Asked) -> Cost:
    """The experts, which serve all seeds, and the sets."""
    own = DATM.paper(asked.dataset, asked.ipc)
    experts = 2 * TRAINING * own.experts.count * own.experts.epochs * asked.images
    batch = min(own.batch_size, asked.ipc * asked.classes)
    sets = SECOND_ORDER * asked.seeds * own.iterations * own.steps * batch
    what = f"{own.experts.count} experts; {asked.seeds} seeds x {own.iterations:,} iterations"
    return what, (experts + sets) * asked.forward(own.experts.network)


def _sre2l(asked: Asked) -> Cost:
    own = SRe2L.paper(asked.dataset, asked.ipc)
    network = teacher_recipe(DATASETS[asked.dataset].image_size)[0]
    what = f"{asked.sets_images:,} images x {own.iterations:,} iterations"
    return what, TO_PIXELS * asked.sets_images * own.iterations * asked.forward(network, own.size)


def _gvbsm(asked: Asked) -> Cost:
    """Its networks take turns, and see the real images once."""
    own, spec = GVBSM.paper(asked.dataset, asked.ipc), DATASETS[asked.dataset]
    of_imagenet = spec.classes == IMAGENET_CLASSES
    names = [f"torchvision/{name}" for name in IMAGENET_NETWORKS] if of_imagenet else []
    names = names or [teacher_recipe(spec.image_size)[0]]
    each = [asked.forward(name, own.size) for name in names]
    passes = TO_PIXELS * asked.sets_images * own.iterations / len(each) + asked.images
    what = f"{asked.sets_images:,} images x {own.iterations:,} iterations, {len(names)} networks"
    return what, passes * sum(each)


def _d4m(asked: Asked) -> Cost:
    encode = sd_operations()[1] * asked.images * asked.seeds
    return f"{asked.sets_images:,} images", encode + _rendered(D4M.paper(asked.dataset, asked.ipc), asked)


def _tdsdm(asked: Asked) -> Cost:
    """The adapter, which serves all seeds, and the sets."""
    own = TDSDM.paper(asked.dataset, asked.ipc)
    unet, encode, _ = sd_operations()
    seen = own.adapter.epochs * asked.images
    what = f"an adapter, {own.adapter.epochs} epochs of {asked.images:,} images; {asked.sets_images:,} images"
    return what, seen * (TRAINING * unet + encode) + _rendered(own, asked)


def _rendered(how: Img2Img, asked: Asked) -> float:
    unet, _, decode = sd_operations()
    each = 2 * unet * steps_taken(how.num_steps, how.strength) + decode
    return asked.sets_images * each


@cache
def sd_operations() -> tuple[float, float, float]:
    """Of Stable Diffusion 1.5 at 512 px: a pass of its network, encoding an image, decoding one."""
    with torch.device("meta"):
        unet, vae, latent = sd_15_unet(), sd_vae(), torch.empty(1, 4, 64, 64)
        prompt, step = torch.empty(1, 77, 768), torch.zeros(1)
        return (
            counted(lambda: unet(latent, step, encoder_hidden_states=prompt)),
            counted(lambda: vae.encode(torch.empty(1, 3, 512, 512))),
            counted(lambda: vae.decode(latent)),
        )


METHODS: Mapping[str, Callable[[Asked], Cost]] = {  # by family
    "dm": _dm,
    "idc": _idc,
    "datm": _datm,
    "datm-plain": _datm,
    "sre2l": _sre2l,
    "gvbsm": _gvbsm,
    "d4m": _d4m,
    "tdsdm": _tdsdm,
}
RENDERED = ("d4m", "tdsdm")  # by a diffusion model, at its speed
