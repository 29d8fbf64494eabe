"""D4M (Su et al., CVPR 2024): the centres of a class's latents, noised in part and denoised again.

From the released code (github.com/suduo94/D4M). A class's images are encoded, their latents clustered by
mini-batch k-means into IPC clusters, and each centre c becomes an image: z = sqrt(alpha_bar_t) c +
sqrt(1 - alpha_bar_t) eps at the step where 70 % of the steps are left, denoised with the class's prompt. Its
third part, training with a teacher's soft labels, is a protocol here (`RDED_SOFT`).

Latents: (C, h, w), 4 x 64 x 64 at Stable Diffusion's 512 px, 4 x 8 x 8 of the stand-ins, clustered flat.
Cost: a class is encoded once; then each image takes num_steps x strength evaluations of the network (35 of
50, and PNDM, Stable Diffusion's, one more), and nothing is trained. Here differently: each class's left-over
images are clustered too (`centres`), a class's noise is its own, so its images depend on no other class's,
and resizing to the set's size comes before rounding. On a DiT the label takes the prompt's place, with DiT's
guidance scale and a strength for its noise schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from igd_lib.baselines.img2img import Backbone, Img2Img, check_counts, encode, made, rendered
from igd_lib.baselines.tuning import Posterior
from igd_lib.config import Solver
from igd_lib.data.datasets import DATASETS
from igd_lib.data.images import ImageData


@dataclass(frozen=True, kw_only=True)
class D4M(Img2Img):
    """How D4M's images are made; the defaults are its code's, on Stable Diffusion 1.5.

    There the scheduler is the pipeline's (PNDM).
    """

    strength: float = 0.7
    cfg_scale: float = 8.0
    num_steps: int = 50
    solver: Solver = "configured"
    posterior: Posterior = "sample"
    negative_prompt: str = "cartoon, anime, painting"
    km_expand: int = 10  # k-means sees km_expand x IPC latents at a time
    images: int | None = None  # a class to cluster, the first in file order; None: all

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.km_expand < 1 or (self.images is not None and self.images < 1):
            raise ValueError(
                "km_expand is at least 1, images too (None: all of a class), got "
                f"{self.km_expand} and {self.images}"
            )

    @classmethod
    def paper(cls, dataset: str, ipc: int) -> D4M:
        """The authors' by data set: of ImageNet and its parts km_expand 1 and 224 px; else the defaults.

        Their script for ImageNet is of IPC 10; other IPCs are read alike.
        """
        of_imagenet = dataset in DATASETS and bool(DATASETS[dataset].label_ids)
        return cls(km_expand=1, size=224) if of_imagenet else cls()

    @classmethod
    def dit(cls, dataset: str, ipc: int) -> D4M:
        """The same on a DiT: DDIM in place of PNDM, guidance scale 4, the data's own size.

        Strength 0.5 leaves as much of a centre as 0.7 on Stable Diffusion (`img2img`).
        """
        own = cls.paper(dataset, ipc)
        return replace(own, strength=0.5, cfg_scale=4.0, solver="ddim", size=None)

    @classmethod
    def small(cls, ipc: int = 10) -> D4M:
        """On a stand-in, whose DiT was trained on posterior means: 1,000 images a class are clustered."""
        return replace(cls.dit("cifar-10", ipc), posterior="mean", images=1000)


def d4m(
    data: ImageData,
    backbone: Backbone,
    ipc: int,
    settings: D4M | None = None,
    *,
    labels: Sequence[int] | None = None,  # the classes to make; None: all
    seed: int = 0,
    device: str = "cpu",
) -> ImageData:
    """`ipc` images a class, class after class, of the data's size or `settings.size` px.

    A class's images depend on the seed and its own images alone. Raises ValueError for too large an IPC, or a
    model of other classes; FloatingPointError where latents or pixels are not finite.
    """
    chosen = prototypes(data, backbone, ipc, settings or D4M(), seed=seed, device=device)
    return made(data, chosen, labels, split_of(ipc, seed), "D4M")


def split_of(ipc: int, seed: int) -> str:
    """What the images call themselves."""
    return f"D4M, ipc {ipc}, seed {seed}"


@dataclass(frozen=True)
class Prototypes:
    """Who makes images of what: a label's images, uint8 (ipc, 3, size, size), where it is called."""

    data: ImageData  # of the model's size
    backbone: Backbone
    ipc: int
    settings: D4M
    size: int
    seed: int

    def to(self, device: str) -> Prototypes:
        """The same with its models on a device."""
        return replace(self, backbone=self.backbone.to(device))

    def __call__(self, label: int) -> Tensor:
        found = self.centres(label)
        return rendered(self.backbone, found, label, self.settings, self.seed, self.size)

    def centres(self, label: int) -> Tensor:
        """(ipc, C, h, w): the centres of a class's scaled latents, its prototypes.

        Mini-batch k-means takes one step for each km_expand x ipc latents, in random order, and one for those
        that are left over where they are at least `ipc`: as the authors mean it, whose code has this step for
        the last class alone. Fewer are left out.
        """
        together = self.settings.km_expand * self.ipc
        means = MiniBatchKMeans(self.ipc, batch_size=together, random_state=self.seed, n_init="auto")
        latents = None
        for latents in self._chunks(label):
            means.partial_fit(latents.flatten(1).numpy())
        assert latents is not None  # a class has at least `ipc` images
        return torch.from_numpy(means.cluster_centers_).float().reshape(-1, *latents.shape[1:])

    def _chunks(self, label: int) -> Iterator[Tensor]:
        """Scaled latents of the class's images in random order, as many as k-means takes at once."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + label)
        indices = self.data.class_indices(label)[: self.settings.images]
        order = indices[torch.randperm(len(indices), generator=generator)]
        for chunk in order.split(self.settings.km_expand * self.ipc):
            if len(chunk) >= self.ipc:
                yield encode(self.backbone, self.data.fetch(chunk), self.settings, generator).cpu()


def prototypes(
    data: ImageData, backbone: Backbone, ipc: int, settings: D4M, *, seed: int, device: str
) -> Prototypes:
    """What `d4m` asks for each class. Raises ValueError alike."""
    check_counts(data, backbone, ipc)
    if settings.images is not None and settings.images < ipc:
        raise ValueError(
            f"{ipc} clusters need as many images a class: images is {settings.images}; take more"
        )
    on_device = backbone.to(device)
    return Prototypes(on_device.sized(data), on_device, ipc, settings, settings.size or data.image_size, seed)
