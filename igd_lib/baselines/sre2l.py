"""SRe2L (Yin, Xing and Shen, NeurIPS 2023; VILA-Lab/SRe2L): images recovered from batch statistics.

Noise s ~ N(0, 1), in normalised pixels, is optimised by Adam under

    CE(f(A(s)), y) + 0.01 sum_l w_l (|mean_l - m_l| + |variance_l - v_l|)

with Euclidean norms (not squared) of the difference between what enters the l-th batch normalisation, over
the batch, and its running statistics m_l and v_l; w_l is 10 for the first layer, else 1; A is a random view.
The images of the last iteration are kept. SRe2L was published with the network's soft labels: train on the
set under a soft-label protocol, with the same teacher.

A batch of 100 images of 224 px passes 4,000 times forward and back through a ResNet-18: some ten minutes of a
recent GPU. Ten images of each of ImageNet's 1,000 classes are 100 such batches.

What differs from the authors' code: all draws come from one generator a batch; and where there are fewer
classes than a batch has images, several images of a class share it (they ran no data of fewer than 100).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from igd_lib.baselines.recovery import (
    CROPPED,
    ROLLED,
    Batches,
    Recovery,
    Run,
    Views,
    by_index,
    channel_statistics,
    check_knows,
    frozen,
    layers_of,
    measured,
    seed_of,
    view,
)
from igd_lib.data.images import ImageData
from igd_lib.teachers import Teacher
from igd_lib.tools.progress import progress


@dataclass(frozen=True, kw_only=True)
class SRe2L(Recovery):
    """How images are recovered; the defaults are those of the authors' script for CIFAR-100."""

    size: int = 32
    batch: int = 100
    iterations: int = 1000
    lr: float = 0.25
    views: Views = ROLLED

    @classmethod
    def paper(cls, dataset: str, ipc: int) -> SRe2L:
        """The authors' scripts: CIFAR-100's for CIFAR, ImageNet-1K's for photographs; whatever the IPC.

        None is for CIFAR-10: that it has CIFAR-100's is our reading.
        """
        if dataset in ("cifar-10", "cifar-100"):
            return cls()
        return cls(size=224, iterations=4000, views=CROPPED)

    @classmethod
    def small(cls, ipc: int = 10) -> SRe2L:
        """CIFAR's with half its iterations, stored without loss: minutes on two CPU cores."""
        return cls(iterations=500, jpeg_quality=None)


def sre2l(
    data: ImageData,
    teacher: Teacher,
    ipc: int,
    settings: SRe2L | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    state: str | Path | None = None,  # a folder: batches as they are done, and the state of the one in hand
) -> ImageData:
    """`ipc` images a class of settings.size px, class after class, from the teacher's batch statistics.

    The real images of `data` only check the teacher. With a `state` an interrupted run goes on, to the same
    bytes. Raises ValueError for a network without batch normalisation or a wrong one (`check_teacher`), an
    ipc below 1, a state of other settings; FloatingPointError on a non-finite loss.
    """
    work = recoverer(data, teacher, ipc, settings, seed=seed, device=device, state=state)
    for number in progress(work.batches.lacking(), "SRe2L, batch", every=60):
        work.run(number)
    return work.batches.all()


@dataclass(frozen=True)
class Recoverer:
    """Who recovers a set's batches; each depends on the seed and its number alone: they may be Ray tasks."""

    batches: Batches
    teacher: Teacher
    settings: SRe2L
    seed: int
    device: str

    def to(self, device: str) -> Recoverer:
        """The same on a device."""
        return replace(self, device=device)

    def run(self, number: int) -> None:
        """Make a batch, unless it is done."""
        self.batches.keep(self._made, number)

    def _made(self, number: int) -> dict[str, Tensor]:
        labels, seed = self.batches.labels(number).to(self.device), seed_of(self.seed, number)
        state = self.batches.training(number)
        run = Run(len(labels), self.settings, self.teacher, seed, self.device, state)
        loss = Objective(frozen(self.teacher, self.device), labels, self.settings)
        return {"images": run.optimise(loss, f"SRe2L, batch {number + 1} of {len(self.batches.parts)}")}


def recoverer(
    data: ImageData,
    teacher: Teacher,
    ipc: int,
    settings: SRe2L | None = None,
    *,
    seed: int,
    device: str,
    state: str | Path | None,
) -> Recoverer:
    """What `sre2l` does batch by batch, the teacher checked. Raises ValueError alike."""
    settings = settings or SRe2L()
    if ipc < 1:
        raise ValueError(f"ipc is at least 1, got {ipc}")
    normalised_layers(teacher)
    check_knows(teacher, data, settings.size)
    about = asdict(settings) | {
        "data": data.name,
        "classes": list(data.classes),
        "network": [teacher.architecture, teacher.weights],
        "ipc": ipc,
        "seed": seed,
    }
    parts = by_index(len(data.classes), ipc, settings.batch)
    folder = None if state is None else Path(state)
    split = f"SRe2L, ipc {ipc}, seed {seed}"
    batches = Batches(data.name, split, data.classes, ipc, settings.size, parts, about, folder)
    batches.claim()
    return Recoverer(batches, teacher, settings, seed, device)


def normalised_layers(teacher: Teacher) -> dict[int, nn.Module]:
    """Its batch normalisations, numbered in order. Raises ValueError where it has none."""
    layers = layers_of(teacher.model, (nn.BatchNorm2d,))
    if not layers:
        raise ValueError(
            f"{teacher.architecture} keeps no batch statistics (it has no BatchNorm2d), which SRe2L matches; "
            "train another network, such as convnet3-bn-w64 or resnet18_modified (train_teacher)"
        )
    return layers


class Objective:
    """SRe2L's loss of images in an iteration, by a frozen network."""

    def __init__(self, model: nn.Module, labels: Tensor, settings: SRe2L):
        self.model, self.labels, self.settings = model, labels, settings
        self.layers = layers_of(model, (nn.BatchNorm2d,))

    def __call__(self, iteration: int, images: Tensor, generator: torch.Generator) -> Tensor:
        settings = self.settings
        with measured(self.layers, lambda _, x: channel_statistics(x)) as found:
            logits = self.model(view(images, settings.views, generator))
        statistics = statistics_loss(self.layers, found, settings.first_layer)
        return F.cross_entropy(logits, self.labels) + settings.statistics_weight * statistics


def statistics_loss(
    layers: Mapping[int, nn.Module], found: Mapping[int, tuple[Tensor, Tensor]], first: float
) -> Tensor:
    """sum_l w_l (|mean_l - running mean_l| + |variance_l - running variance_l|), w = `first`, 1, 1, ..."""
    terms = []
    for number, (mean, variance) in found.items():
        running: Any = layers[number]
        distance = (mean - running.running_mean).norm() + (variance - running.running_var).norm()
        terms.append((first if number == 0 else 1.0) * distance)
    return torch.stack(terms).sum()
