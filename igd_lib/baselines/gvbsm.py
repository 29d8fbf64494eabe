"""G-VBSM (Shao et al., CVPR 2024; shaoshitong/G_VBSM_Dataset_Condensation): statistics of several networks.

`sre2l` with one of several networks in each iteration, in turn, under CE + 0.01 R + D.

R: what enters batch normalisations is compared with their running statistics, and what enters convolutions
with the same of real images (`targets_of`), by channels and by patches of 16 x 16 px (CIFAR 4 x 4): four
norms a convolution, two a normalisation; the first layer of a network counts tenfold. Compared is an average
over iterations, alpha average + (1 - alpha) current, which has the current statistic's gradient; it starts at
zero (the authors' normalisations too, but in the run that measures the targets) and goes on from one batch to
the next. A convolution is left out with probability beta.
D ("data densification"): for each class, KL(softmax(lambda / 4) || softmax(lambda)) of the eigenvalues of its
images' Gram matrix at 32 px, the left side without gradient: the flatter the spectrum, the more diverse.

Labels are the mean of the networks' logits, on ImageNet after each network's were scaled to the mean norm
(`ensemble`), under `protocols.GVBSM_SOFT`.

A batch costs about twice SRe2L's, and the targets a pass of the real images through each network.

What differs from the authors' code: one device has the whole batch. (For ImageNet and CIFAR-100 they divide
it between two, each with its own statistics; their CE and R are means over half a batch, so that here D
counts half.) All draws come from one generator a batch; the check that they print every 100 iterations, which
moves the last network's averages, is left out; targets are of square images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from igd_lib.baselines.recovery import (
    CROPPED,
    Batches,
    Recovery,
    Run,
    Views,
    by_class,
    channel_statistics,
    check_knows,
    frozen,
    layers_of,
    measured,
    seed_of,
    view,
)
from igd_lib.data.augment import normalise, to_unit
from igd_lib.data.images import ImageData
from igd_lib.teachers import Teacher, check_class_order, imagenet_teacher
from igd_lib.tools import files
from igd_lib.tools.progress import Pace, progress

CHECKPOINT_SECONDS = 60.0  # at most one state of the targets is written in so much time
IMAGENET_NETWORKS = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5")
SIDE = 32  # px at which the images' diversity is measured
WINDOWED = Views(pad=4, flip=True, roll=32)  # CIFAR's: rolled by up to the whole image, as the script has it

Statistics = tuple[Tensor, ...]  # a layer's: mean and variance by channel, then by patch where it has them


@dataclass(frozen=True, kw_only=True)
class GVBSM(Recovery):
    """How images are recovered; the defaults are those of the authors' scripts for CIFAR."""

    size: int = 32
    batch: int = 100  # whole classes, as many as go into it
    iterations: int = 4000
    lr: float = 0.05
    views: Views = WINDOWED
    jpeg_quality: int | None = None
    patch: int = 4  # px a side
    ema: float = 0.8  # alpha: what is kept of the averages in an iteration
    drop_rate: float = 0.4  # beta: the probability that a convolution is left out
    density_weight: float = 1.0  # of D
    temperature: float = 4.0  # of the eigenvalues
    target_images: int | None = None  # real images a class, at most, that the targets are of; None: all
    target_batch: int = 64  # images over which their statistics are taken, before the mean

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema < 1 or not 0 <= self.drop_rate < 1:
            raise ValueError(f"ema and drop_rate are in 0 ... 1, got {self.ema} and {self.drop_rate}")
        if self.patch < 1 or self.target_batch < 1 or self.temperature <= 0:
            raise ValueError(
                f"patch and target_batch are at least 1 and temperature is above 0, got {self.patch}, "
                f"{self.target_batch} and {self.temperature}"
            )

    @classmethod
    def paper(cls, dataset: str, ipc: int) -> GVBSM:
        """The authors' scripts, which are for IPC 10: CIFAR's for CIFAR, ImageNet-1K's for photographs.

        All but CIFAR-10's run on two devices, on one of which D counts half: see the module.

        More images a class need larger batches: of two classes, which is our reading.
        """
        if dataset in ("cifar-10", "cifar-100"):
            return cls(batch=max(100, 2 * ipc), density_weight=1.0 if dataset == "cifar-10" else 0.5)
        return cls(
            size=224,
            batch=max(80, 2 * ipc),
            lr=0.1,
            views=CROPPED,
            jpeg_quality=75,
            patch=16,
            ema=0.4,
            drop_rate=0.0,
            density_weight=0.5,
            target_batch=256,
        )

    @classmethod
    def small(cls, ipc: int = 10) -> GVBSM:
        """CIFAR's with 300 iterations, and targets of 500 images a class: minutes on two CPU cores."""
        return cls(batch=max(100, 2 * ipc), iterations=300, target_images=500)


def gvbsm(
    data: ImageData,
    teachers: Sequence[Teacher],
    ipc: int,
    settings: GVBSM | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    state: str | Path | None = None,  # a folder, as `sre2l`'s; it holds the targets too
) -> ImageData:
    """`ipc` images a class of settings.size px, class after class, from the teachers' statistics.

    One batch after the other, since the averages go on. With a `state` an interrupted run goes on, to the
    same bytes. Raises ValueError for no teachers, teachers that differ in classes or normalisation, have no
    convolutions or are wrong (`check_teacher`), for an ipc below 1 or above a batch's images, or a state of
    other settings; FloatingPointError on a non-finite loss.
    """
    settings = settings or GVBSM()
    check_together(teachers)
    for teacher in teachers:
        check_knows(teacher, data, settings.size)
    batches = _batches(data, teachers, ipc, settings, seed, None if state is None else Path(state))
    work = _Work(batches, teachers, settings, seed, device)
    if lacking := batches.lacking():
        work.prepare(data)
        for number in progress(lacking, "G-VBSM, batch", every=60):
            batches.keep(work.made, number)
    return batches.all()


def _batches(
    data: ImageData, teachers: Sequence[Teacher], ipc: int, settings: GVBSM, seed: int, folder: Path | None
) -> Batches:
    """The set's, none of them made; its folder's settings are noted or compared."""
    if ipc < 1:
        raise ValueError(f"ipc is at least 1, got {ipc}")
    about = asdict(settings) | {
        "data": [data.name, data.split, len(data)],
        "classes": list(data.classes),
        "networks": [[teacher.architecture, teacher.weights] for teacher in teachers],
        "ipc": ipc,
        "seed": seed,
    }
    parts = by_class(len(data.classes), ipc, settings.batch)
    split = f"G-VBSM, ipc {ipc}, seed {seed}"
    batches = Batches(data.name, split, data.classes, ipc, settings.size, parts, about, folder)
    batches.claim()
    return batches


@dataclass
class _Work:
    """A set's batches in the making, and the networks' averages from one to the next."""

    batches: Batches
    teachers: Sequence[Teacher]
    settings: GVBSM
    seed: int
    device: str
    networks: list[Matched] = field(default_factory=list)

    def prepare(self, data: ImageData) -> None:
        """Find the networks' targets, or read them."""
        folder = self.batches.folder
        for number, teacher in enumerate(self.teachers):
            path = folder and folder / f"targets-{number}.safetensors"
            model = frozen(teacher, self.device)
            targets = targets_of(model, teacher, data, self.settings, self.device, path)
            self.networks.append(Matched(model, targets, self.settings))

    def made(self, number: int) -> dict[str, Tensor]:
        """A batch's images, and the averages at its end."""
        averages = nn.ModuleList(network.averages for network in self.networks)
        if number:
            before = self.batches.made(number - 1)
            averages.load_state_dict({name: before[name] for name in averages.state_dict()})
        labels, state = self.batches.labels(number).to(self.device), self.batches.training(number)
        seed = seed_of(self.seed, number)
        run = Run(len(labels), self.settings, self.teachers[0], seed, self.device, state, averages=averages)
        loss = Objective(self.networks, labels, self.settings, number * self.settings.iterations)
        images = run.optimise(loss, f"G-VBSM, batch {number + 1} of {len(self.batches.parts)}")
        return {"images": images} | {name: value.clone() for name, value in averages.state_dict().items()}


def check_together(teachers: Sequence[Teacher]) -> None:
    """Raise ValueError where there are none, or their classes, normalisation or layers do not allow it."""
    if not teachers:
        raise ValueError("G-VBSM needs at least one teacher; name some")
    first = teachers[0]
    for other in teachers:
        names = (first.architecture, other.architecture)
        check_class_order(first.classes, other.classes, names)
        if (other.mean, other.std) != (first.mean, first.std):
            raise ValueError(
                f"{names[1]} was trained with another normalisation than {names[0]}: {other.mean}, "
                f"{other.std}, not {first.mean}, {first.std}; train all with one"
            )
        if not layers_of(other.model, (nn.BatchNorm2d, nn.Conv2d)):
            raise ValueError(
                f"{names[1]} has no convolutions and no batch normalisations, whose inputs G-VBSM matches; "
                "name another network"
            )


# --- statistics


def patch_statistics(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each patch's position in (B, C, H, W), over images, channels and pixels.

    Rows of patches one after the other. Sides are raised to multiples of `patch` px (bilinear).
    """
    rows, columns = (-(-side // patch) for side in x.shape[2:])
    if (rows * patch, columns * patch) != tuple(x.shape[2:]):
        x = F.interpolate(x, size=(rows * patch, columns * patch), mode="bilinear")
    cells = x.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # B, C, row, px, column, px
    variance, mean = torch.var_mean(cells, dim=(0, 1, 3, 5), correction=0)
    return mean.flatten(), variance.flatten()


def statistics(layer: nn.Module, x: Tensor, patch: int) -> Statistics:
    """What is compared of a layer's input: by channels, of a convolution's by patches too."""
    if isinstance(layer, nn.Conv2d):
        return (*channel_statistics(x), *patch_statistics(x, patch))
    return channel_statistics(x)


class Averages(nn.Module):
    """Averages of a network's statistics over iterations, from zero on; buffers, so saved with the images."""

    def __init__(self, targets: Sequence[Statistics]):
        super().__init__()
        for number, values in enumerate(targets):
            for index, value in enumerate(values):
                self.register_buffer(f"{number}_{index}", torch.zeros_like(value))

    def moved(self, number: int, found: Statistics, kept: float) -> Statistics:
        """A layer's averages with `found` in them, kept average + (1 - kept) found; gradients are found's."""
        return tuple(self._moved(f"{number}_{index}", value, kept) for index, value in enumerate(found))

    def _moved(self, name: str, value: Tensor, kept: float) -> Tensor:
        average = self.get_buffer(name)
        average.mul_(kept).add_(value.detach(), alpha=1 - kept)
        return average + (value - value.detach())


class Matched:
    """A frozen network, what its layers' statistics should be, and the averages of what they are."""

    def __init__(self, model: nn.Module, targets: Sequence[Statistics], settings: GVBSM):
        self.model, self.targets, self.settings = model, targets, settings
        self.layers = layers_of(model, (nn.BatchNorm2d, nn.Conv2d))
        self.averages = Averages(targets)

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Logits (B, C), and the distance of the averages, with these images in them, from the targets."""
        settings = self.settings
        drawn = torch.rand(len(self.layers), generator=generator).tolist()
        kept = {
            number: layer
            for number, layer in self.layers.items()
            if drawn[number] >= settings.drop_rate or not isinstance(layer, nn.Conv2d)
        }
        with measured(kept, lambda n, x: statistics(self.layers[n], x, settings.patch)) as found:
            logits = self.model(images)
        distance = logits.new_zeros(())
        for number, values in found.items():
            moved = self.averages.moved(number, values, settings.ema)
            term = sum((a - b).norm() for a, b in zip(moved, self.targets[number], strict=True))
            distance = distance + (settings.first_layer if number == 0 else 1.0) * term
        return logits, distance


def densification(images: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """sum over classes KL(softmax(lambda / T) || softmax(lambda)), lambda of the Gram matrix of its images.

    Images (B, 3, H, H) as the network sees them, pooled to 32 px, neither centred nor scaled. The left side
    has no gradient. Zero for one image of each class, and where all eigenvalues are equal.
    """
    vectors = F.adaptive_avg_pool2d(images, SIDE).flatten(1)
    total = images.new_zeros(())
    for label in labels.unique():
        own = vectors[labels == label]
        spectrum = torch.linalg.eigvalsh(own @ own.mT)
        target = (spectrum / temperature).softmax(0).detach()
        total = total + F.kl_div(spectrum.log_softmax(0), target, reduction="sum")
    return total


class Objective:
    """G-VBSM's loss of images in an iteration, by the network whose turn it is."""

    def __init__(self, networks: Sequence[Matched], labels: Tensor, settings: GVBSM, before: int):
        self.networks, self.labels, self.settings = networks, labels, settings
        self.before = before  # iterations of earlier batches

    def __call__(self, iteration: int, images: Tensor, generator: torch.Generator) -> Tensor:
        settings = self.settings
        seen = view(images, settings.views, generator)
        network = self.networks[(self.before + iteration) % len(self.networks)]
        logits, distance = network(seen, generator)
        density = densification(seen, self.labels, settings.temperature)
        return (
            F.cross_entropy(logits, self.labels)
            + settings.statistics_weight * distance
            + settings.density_weight * density
        )


# --- what the statistics should be


def targets_of(
    model: nn.Module,
    teacher: Teacher,
    data: ImageData,
    settings: GVBSM,
    device: str,
    path: Path | None = None,  # where they are kept, and how far they are
) -> list[Statistics]:
    """What the layers' statistics should be: running ones, for convolutions the mean over real batches.

    Batches are shuffled, their images cropped and flipped as the recovered ones, but each by itself, and the
    same for all seeds of a set. A batch counts by its images.
    """
    layers = layers_of(model, (nn.BatchNorm2d, nn.Conv2d))
    convolutions = {n: layer for n, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    real = data
    if settings.target_images is not None:
        smallest = int(data.labels.bincount(minlength=len(data.classes)).min())
        real = data.per_class(min(settings.target_images, smallest), seed=0)
    sums = _Sums(path, len(real))
    for images in _real_batches(real.at(settings.size), settings, device, sums.done):
        with (
            torch.no_grad(),
            measured(convolutions, lambda n, x: statistics(layers[n], x, settings.patch)) as found,
        ):
            model(normalise(images, teacher.mean, teacher.std))
        sums.add(found, len(images))
        sums.save_in_time()
    sums.save()
    return [
        sums.of(number, device) if number in convolutions else _running(layer)
        for number, layer in layers.items()
    ]


def _running(layer: Any) -> Statistics:
    return layer.running_mean.clone(), layer.running_var.clone()


def _real_batches(real: ImageData, settings: GVBSM, device: str, done: int) -> Iterator[Tensor]:
    """float [0, 1] (B, 3, H, H): real images as networks see them, without the first `done` batches."""
    views = replace(settings.views, roll=0)
    parts = list(range(done, -(-len(real) // settings.target_batch)))
    batches = real.batches(settings.target_batch, torch.Generator().manual_seed(0), done)
    for number in progress(parts, "G-VBSM, real images, batch", done=done, delay=20):
        images, _ = next(batches)
        draws = torch.Generator().manual_seed(number)
        yield view(to_unit(images.to(device)), views, draws, each=True)


class _Sums:
    """Statistics weighted by their batches' images, from where they were left in a file; none without one."""

    def __init__(self, path: Path | None, images: int):
        self.path, self.images, self.done = path, images, 0  # done: batches
        self.sums: dict[str, Tensor] = {}
        self.pace = Pace(CHECKPOINT_SECONDS)
        if path is not None and path.is_file():
            self.sums, note = files.load_tensors(path)
            self.done = note["batches"]

    def add(self, found: Mapping[int, Statistics], count: int) -> None:
        """The statistics of the layers in a batch of `count` images."""
        for number, values in found.items():
            for index, value in enumerate(values):
                name, part = f"{number}_{index}", value.cpu() * (count / self.images)
                self.sums[name] = self.sums[name] + part if name in self.sums else part
        self.done += 1

    def of(self, number: int, device: str) -> Statistics:
        """A layer's."""
        names = (name for name in self.sums if name.split("_")[0] == str(number))
        return tuple(self.sums[name].to(device) for name in sorted(names))

    def save_in_time(self) -> None:
        """Save once in CHECKPOINT_SECONDS."""
        if self.pace.due:
            with self.pace.saving():
                self.save()

    def save(self) -> None:
        if self.path is not None:
            files.save_tensors(self.path, self.sums, batches=self.done)


# --- networks, and labels by all of them


def imagenet_networks(classes: Sequence[str], label_ids: Sequence[int]) -> list[Teacher]:
    """The four of ImageNet-1K, torchvision's, with `classes`' logits alone; errors as `imagenet_teacher`."""
    return [imagenet_teacher(classes, label_ids, f"torchvision/{name}") for name in IMAGENET_NETWORKS]


class Ensemble(nn.Module):
    """The mean of several networks' logits (B, C)."""

    def __init__(self, models: Sequence[nn.Module], equalise: bool):
        super().__init__()
        self.models, self.equalise = nn.ModuleList(models), equalise

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack([model(images).float() for model in self.models])  # network, B, C
        if self.equalise:
            norms = logits.flatten(1).norm(dim=1)[:, None, None]
            logits = logits / norms * norms.mean()
        return logits.mean(0)


def ensemble(teachers: Sequence[Teacher], *, equalise: bool) -> Teacher:
    """A teacher that gives the mean of the teachers' logits.

    equalise: each network's logits of a batch are first scaled to the mean of the networks' norms, a norm
    being that of all its logits of the batch. The authors have it for ImageNet (`GVBSM_SOFT`), not for CIFAR
    (`GVBSM_SOFT_32`, `SMALL_GVBSM`).
    Raises ValueError for other classes or normalisations.
    """
    check_together(teachers)
    first = teachers[0]
    names = ", ".join(teacher.architecture for teacher in teachers)
    architecture = f"ensemble of {names}{' of equal norms' if equalise else ''}"
    weights = "; ".join(teacher.weights for teacher in teachers)
    model = Ensemble([teacher.model for teacher in teachers], equalise)
    least = min(teacher.least for teacher in teachers)
    return Teacher(model, architecture, weights, first.classes, first.mean, first.std, least)
