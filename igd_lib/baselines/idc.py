"""IDC-1 (Kim et al., ICML 2022; "IDC-I" there): images whose loss gradients are those of real ones.

After the authors' code (snu-mllab/Efficient-Dataset-Condensation, `condense.py`, whose defaults are IDC-I: a
stored image is one training image; IDC proper stores several in one, which is not here). An outer loop takes
a newly initialised network theta, which an inner loop trains on real images. At every inner step, for each
class c in turn, real images x and synthetic ones s get one change A, and

    D = sum over layers of d( grad_theta CE(x), grad_theta CE(s) )

where CE is the mean cross-entropy to c, theta the convolutions' weights alone, and d the sum over entries of
|difference| ("l1") or of its square ("mse"). One step of SGD with momentum on the pixels follows for each
class. Then the network takes some steps on real batches of all classes, half or all of them mixed by CutMix.
Pixels are those of [0, 1] images; they are clamped when an outer loop begins, and once more, with rounding to
8 bits, when all is done.

The authors' optimiser holds all images. A class's step therefore moves those of the other classes too, along
what is left of their momenta: between two of its own steps a class coasts K - 1 times, with K classes. That
depends on the number of classes and on nothing else of them, so here each class coasts by itself, as often
before its step as there are classes before it and as often after it as there are behind it. The images are
the same, and do not depend on which classes are made beside them; but the network is trained again in each
process, on all classes.

Cost: of an inner step, for every class a backward pass through the gradients of up to 64 + 128 images, and
`net_images` for the network. On one CPU core, of CIFAR-10 at IPC 10: `IDC.small` takes minutes, `IDC.paper`
weeks; the authors name 8 hours of a GPU for ten ImageNet classes.

What differs from the authors' code. Networks, batches and changes are drawn from the seed, the step and the
label. ImageNet's 100 classes had networks drawn from ten that were trained for five epochs: here each network
is trained for five. Where the last batch of a pass is short, the network may see a few images less. They
save float images, some of which leave [0, 1]; these are 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from igd_lib.baselines.pixels import (
    SAVE_SECONDS,
    SMALL,
    at_hand,
    check_finite,
    depth_for,
    fresh_network,
    generator_of,
    load_state,
    run_of,
    selected,
    stored,
)
from igd_lib.data.augment import cutmix, normalise, to_unit
from igd_lib.data.datasets import DataSpec, Triple, spec_of
from igd_lib.data.dsa import Strategy, apply, diffaug, draw
from igd_lib.data.images import ImageData
from igd_lib.tools import files
from igd_lib.tools.progress import Pace, progress, resumable

NETWORK, CLASS_PASS, PASS, MATCH, TRAIN = range(5)  # what a draw is for


@dataclass(frozen=True)
class IDC:
    """How IDC-1 optimises; the defaults are the authors' for CIFAR-10 and -100."""

    # pixels
    outer: int = 2000  # networks
    inner: int = 100  # steps with each
    metric: Literal["l1", "mse"] = "mse"
    lr: float = 5e-3  # at IPC 10 and `base_side`; it goes with the metric: see `rate`
    base_side: int = 32  # px
    momentum: float = 0.5
    batch_real: int = 64  # of a class and step, and of the network
    batch_synthetic: int = 128  # at most; a random part of more
    augmentation: str = "color_crop_cutout"  # IDC's families (`dsa.diffaug`); the network's without cutout
    # networks, trained on real images
    network: str = "convnet3"
    early: int = 0  # epochs before the first inner step
    net_images: int = 2000  # of an inner step; 0: the network is not trained
    net_lr: float = 0.01
    net_momentum: float = 0.9
    net_weight_decay: float = 5e-4
    mix: float = 0.5  # CutMix's probability
    # of [0, 1] images
    mean: Triple = (0.4914, 0.4822, 0.4465)
    std: Triple = (0.2023, 0.1994, 0.2010)

    def __post_init__(self) -> None:
        counts = (self.outer, self.inner, self.batch_real, self.batch_synthetic, self.base_side)
        if min(counts) < 1 or min(self.early, self.net_images) < 0:
            raise ValueError(
                "outer, inner, batch_real, batch_synthetic and base_side are at least 1, early and "
                f"net_images at least 0, got {counts}, {self.early} and {self.net_images}"
            )
        if self.metric not in ("l1", "mse"):
            raise ValueError(f"metric is 'l1' or 'mse', got {self.metric!r}")
        if min(self.lr, self.net_lr) <= 0 or not 0 <= self.momentum < 1 or not 0 <= self.mix <= 1:
            raise ValueError(
                f"lr and net_lr > 0, 0 <= momentum < 1 and 0 <= mix <= 1, got {self.lr}, {self.net_lr}, "
                f"{self.momentum} and {self.mix}"
            )
        diffaug(self.augmentation)  # refuses unknown families

    @property
    def matching(self) -> Strategy:
        """What real and synthetic images go through together."""
        return diffaug(self.augmentation)

    @property
    def training(self) -> Strategy:
        """What the network's real images go through, each by itself."""
        return diffaug("_".join(name for name in self.augmentation.split("_") if name != "cutout"))

    def rate(self, ipc: int, side: int) -> float:
        """The pixels' learning rate, as the authors scale it: lr x IPC / 10 x (side / base_side)^2."""
        return self.lr * ipc / 10 * (side / self.base_side) ** 2

    @classmethod
    def paper(cls, dataset: str | DataSpec, ipc: int) -> IDC:
        """The authors' own: for CIFAR, for Fashion-MNIST, and for parts of ImageNet by number of classes.

        Other small images get CIFAR's with a ConvNet of their size, other photographs ImageNet's. IPC enters
        by `rate`.
        """
        spec = spec_of(dataset)
        if spec.name in ("cifar-10", "cifar-100"):  # CIFAR-10's mean and deviation for both
            return cls()
        own: dict[str, Any] = {"mean": spec.mean, "std": spec.std}
        if spec.image_size <= SMALL:
            own["network"] = f"convnet{depth_for(spec.image_size)}"
            fashion = {"metric": "l1", "lr": 1e-4, "net_images": 500}
            return cls(**own | (fashion if spec.name == "fashion-mnist" else {}))
        own |= {"network": "resnetap10", "outer": 500, "metric": "l1", "lr": 3e-3, "base_side": 224}
        own |= {"early": 10, "net_images": 500, "mix": 1.0}
        if len(spec.classes) >= 100:
            own |= {"lr": 1e-3, "early": 5, "net_lr": 0.1, "net_weight_decay": 1e-4, "batch_real": 128}
        return cls(**own)

    @classmethod
    def small(cls, ipc: int = 10) -> IDC:
        """Shortened for CIFAR-10 on a CPU: 10 x 20 of 2,000 x 100 steps, half the network's width, a fourth
        of its images.
        """
        return cls(network="convnet3-w64", outer=10, inner=20, net_images=500)


def idc(
    data: ImageData,
    ipc: int,
    settings: IDC | None = None,  # None: `IDC()`
    *,
    labels: Sequence[int] | None = None,  # the classes to make; None: all
    seed: int = 0,
    device: str = "cpu",
    state: str | Path | None = None,  # a file from which an interrupted run goes on; its caller deletes it
) -> ImageData:
    """`ipc` images a class, class after class, uint8 in the data's size, under the data's labels and classes.

    They start as the first `ipc` real images of each class, whatever the seed. A class's images depend on the
    settings, the data with all its classes, seed and label alone. The state is written at most once a minute:
    images, momenta, the network and its optimiser. Raises ValueError for labels that the data do not have, an
    IPC above what a class has, a network with batch statistics, a state of other settings;
    FloatingPointError on a loss that is not finite.
    """
    run = _Run(data, ipc, settings or IDC(), labels=labels, seed=seed, device=device, state=state)
    run.load()
    run.optimise()
    return run.found()


def conv_weights(network: nn.Module) -> list[nn.Parameter]:
    """The parameters whose gradients are matched: convolutions' kernels, no bias, norm or classifier."""
    return [parameter for parameter in network.parameters() if parameter.ndim == 4]


def matching_loss(
    network: nn.Module, real: Tensor, synthetic: Tensor, label: int, metric: Literal["l1", "mse"]
) -> Tensor:
    """D, a scalar, of one class's images (n, C, H, H); its gradient goes to the synthetic ones alone."""
    weights = conv_weights(network)

    def gradients(images: Tensor, create_graph: bool) -> tuple[Tensor, ...]:
        target = torch.full((len(images),), label, device=images.device)
        loss = F.cross_entropy(network(images), target)
        return torch.autograd.grad(loss, weights, create_graph=create_graph)

    total = synthetic.new_zeros(())
    for a, b in zip(gradients(real.detach(), False), gradients(synthetic, True), strict=True):
        total = total + ((a - b).abs().sum() if metric == "l1" else (a - b).square().sum())
    return total


def sgd_step(
    images: Tensor, velocity: Tensor, gradient: Tensor | None, *, lr: float, momentum: float
) -> None:
    """SGD with momentum, in place: v = momentum v + g, x = x - lr v. Without a gradient x coasts."""
    velocity.mul_(momentum)
    if gradient is not None:
        velocity.add_(gradient)
    images.add_(velocity, alpha=-lr)


@dataclass(frozen=True)
class Passes:
    """Batches of shuffled passes over `count` images, one pass after the other, any of them by its number."""

    count: int
    size: int  # of a batch; at most `count`
    seed: tuple[int, ...]
    drop_last: bool  # whether a pass leaves out what makes no whole batch

    @property
    def per_pass(self) -> int:
        return self.count // self.size if self.drop_last else -(-self.count // self.size)

    def batch(self, number: int) -> Tensor:
        """Positions (size,), or fewer at a pass's end."""
        whole, within = divmod(number, self.per_pass)
        order = torch.randperm(self.count, generator=generator_of(*self.seed, whole))
        return order[within * self.size : (within + 1) * self.size]


class _Run:
    """The images of some classes, and the network of the outer loop that is under way."""

    def __init__(
        self,
        data: ImageData,
        ipc: int,
        settings: IDC,
        *,
        labels: Sequence[int] | None,
        seed: int,
        device: str,
        state: str | Path | None,
    ):
        self.data, self.ipc, self.settings, self.seed, self.device = data, ipc, settings, seed, device
        self.labels = selected(data, labels, ipc)
        self.state, self.pace = Path(state) if state else None, Pace(SAVE_SECONDS)
        self.lr = settings.rate(ipc, data.image_size)
        self.network, self.optimizer = self._fresh(0)  # refused before anything is read
        self.real = at_hand(data, device)
        first = [self._pixels(data.class_indices(label)[:ipc]) for label in self.labels]
        self.images = nn.ParameterList([nn.Parameter(images, False) for images in first])  # [0, 1] and beyond
        self.velocities = nn.ParameterList([nn.Parameter(torch.zeros_like(x), False) for x in first])
        self.passes = Passes(len(data), min(settings.batch_real, len(data)), (seed, PASS), False)
        self.ready = -1  # the outer loop whose network is set up
        self.done = self.saved = 0  # inner steps

    def _fresh(self, outer: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        """An outer loop's network before any training, and its optimiser."""
        settings = self.settings
        network = fresh_network(
            settings.network,
            classes=len(self.data.classes),
            image_size=self.data.image_size,
            device=self.device,
            seed=(self.seed, NETWORK, outer),
        )
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=settings.net_lr,
            momentum=settings.net_momentum,
            weight_decay=settings.net_weight_decay,
        )
        return network, optimizer

    def _pixels(self, indices: Tensor) -> Tensor:
        """Real images as [0, 1] floats."""
        return to_unit(self.real.fetch(indices).to(self.device))

    @property
    def steps(self) -> int:
        """Inner steps in all."""
        return self.settings.outer * self.settings.inner

    def optimise(self) -> None:
        """Go on to the last step."""
        with resumable(lambda: self.kept):
            for step in progress(range(self.done, self.steps), "IDC-1, step", done=self.done):
                self._begin(step // self.settings.inner)
                for label, images, velocity in zip(self.labels, self.images, self.velocities, strict=True):
                    self._match(step, label, images, velocity)
                self._train(self._batches(step))
                self.done = step + 1
                self._save_in_time()

    def _begin(self, outer: int) -> None:
        """A new network, and clamped images, where an outer loop begins."""
        if self.ready == outer:
            return
        self.network, self.optimizer = self._fresh(outer)
        first = outer * self._per_outer
        self._train(range(first, first + self.settings.early * self.passes.per_pass))
        for images in self.images:
            images.clamp_(0, 1)
        self.ready = outer
        self._save_in_time()

    # --- pixels

    def _match(self, step: int, label: int, images: Tensor, velocity: Tensor) -> None:
        """A class's step, and those of the other classes, in which it coasts."""
        rates = {"lr": self.lr, "momentum": self.settings.momentum}
        for _ in range(label):
            sgd_step(images, velocity, None, **rates)
        sgd_step(images, velocity, self._gradient(step, label, images), **rates)
        for _ in range(label + 1, len(self.data.classes)):
            sgd_step(images, velocity, None, **rates)

    def _gradient(self, step: int, label: int, images: Tensor) -> Tensor:
        """Of D by a class's images (ipc, 3, H, H)."""
        settings, generator = self.settings, generator_of(self.seed, MATCH, step, label)
        real = self._pixels(self._of_class(step, label))
        whole = images.detach().requires_grad_()
        part = torch.randperm(len(whole), generator=generator)[: settings.batch_synthetic]
        synthetic = whole if len(part) == len(whole) else whole[part.to(whole.device)]
        params = draw(settings.matching, 1, self.data.image_size, generator, per_sample=False)
        both = apply(normalise(torch.cat([real, synthetic]), settings.mean, settings.std), params)
        loss = matching_loss(self.network, both[: len(real)], both[len(real) :], label, settings.metric)
        where = f"step {step + 1}, class {self.data.classes[label]!r}"
        check_finite(loss, "IDC-1", where, f"lower lr ({settings.lr}) or net_lr ({settings.net_lr})")
        return torch.autograd.grad(loss, whole)[0]

    def _of_class(self, step: int, label: int) -> Tensor:
        """Which real images a class is matched with."""
        indices = self.real.class_indices(label)
        size = min(len(indices), self.settings.batch_real)
        return indices[Passes(len(indices), size, (self.seed, CLASS_PASS, label), True).batch(step)]

    # --- the network

    @property
    def _per_step(self) -> int:
        """The network's batches of an inner step: at most a pass."""
        return min(-(-self.settings.net_images // self.passes.size), self.passes.per_pass)

    @property
    def _per_outer(self) -> int:
        """Its batches of an outer loop."""
        return self.settings.early * self.passes.per_pass + self.settings.inner * self._per_step

    def _batches(self, step: int) -> range:
        """The numbers of an inner step's batches."""
        outer, inner = divmod(step, self.settings.inner)
        first = outer * self._per_outer + self.settings.early * self.passes.per_pass + inner * self._per_step
        return range(first, first + self._per_step)

    def _train(self, numbers: range) -> None:
        """SGD on real batches of all classes."""
        for number in numbers:
            loss = self._net_loss(number)
            where, remedy = f"the network's batch {number + 1}", f"lower net_lr ({self.settings.net_lr})"
            check_finite(loss.detach(), "IDC-1", where, remedy)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def _net_loss(self, number: int) -> Tensor:
        settings, generator = self.settings, generator_of(self.seed, TRAIN, number)
        indices = self.passes.batch(number)
        inputs, labels = self._pixels(indices), self.data.labels[indices].to(self.device)
        inputs = normalise(inputs, settings.mean, settings.std)
        params = draw(settings.training, len(inputs), inputs.shape[-1], generator, per_sample=True)
        inputs, other, share = apply(inputs, params), labels, 1.0
        if float(torch.rand((), generator=generator)) < settings.mix:
            inputs, other, share = cutmix(inputs, labels, 1.0, generator)
        logits = self.network(inputs)
        return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, other)

    # --- what is kept

    def found(self) -> ImageData:
        """The set, in 8 bits."""
        split = f"IDC-1, ipc {self.ipc}, seed {self.seed}"
        return stored(self.data, split, list(self.images), self.labels, "IDC-1")

    @property
    def about(self) -> dict[str, Any]:
        """What names the run in its state."""
        return run_of(self.data, self.labels, self.ipc, self.seed, self.settings)

    @property
    def kept(self) -> str:
        """What an interruption leaves, in words."""
        if self.state is None:
            return "nothing of IDC-1's images is kept without a state file"
        return f"{self.saved} of {self.steps} steps of IDC-1 are in {self.state}"

    @property
    def _models(self) -> dict[str, nn.Module]:
        return {"images": self.images, "velocities": self.velocities, "network": self.network}

    def load(self) -> None:
        note = load_state(self.state, self.about, self.optimizer, **self._models)
        self.done = self.saved = note["step"]
        self.ready = note.get("ready", -1)

    def _save_in_time(self) -> None:
        if self.state is None or not self.pace.due or self.done == self.steps:
            return
        with self.pace.saving():
            note = {"about": self.about, "ready": self.ready}
            files.save_training(
                self.state, self.done, self.optimizer, generator=None, note=note, **self._models
            )
        self.saved = self.done
