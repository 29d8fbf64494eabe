"""DATM (Guo et al., ICLR 2024): images, soft labels and a rate that train a network along experts' ways.

After its authors' code (NUS-HPC-AI-Lab/DATM, `distill/DATM.py`). From real images and `trajectories` of
experts, `iterations` times: draw an expert and an epoch t, start a network at the expert's parameters th*_t,
train it N steps of plain SGD on the synthetic set, and lower how far it is from the expert M epochs later,

    th_0 = th*_t,  th_{i+1} = th_i - eta grad CE( f(A_i(s_b)), softmax(y_b) )        i = 0 ... N - 1
    L = || th_N - th*_{t+M} ||^2 / || th*_t - th*_{t+M} ||^2

by SGD on images s, labels' logits y and rate eta, through all N steps. A_i is DSA, drawn for each image;
batches b are cut from permutations. An iteration with L above a threshold changes nothing. t is drawn from
[first_epoch, upper), and the upper end grows: a small set learns what experts learn early, which is easy
(the difficulty that is aligned with the size).

Images begin as real ones that an expert gets right in the end, their logits as the mean of those of all
experts that get them right; with init="real" as any real ones, with the first expert's logits. Networks see
images whitened by ZCA, so that a set carries its whitening; it is evaluated under `protocols.DATM_OWN`, by
its own labels and rate.

Cost: an iteration is N passes and about three times as much backwards; memory grows with N x batch. The
authors' 10,000 iterations take one GPU (CIFAR-10, IPC 10) to four.

What differs: experts are drawn anew each iteration rather than in shuffled rounds; a loss that is not finite
stops the run, where theirs passes over it. Their best of twenty sets by test accuracy is not taken: the last
one is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from igd_lib.baselines.trajectories import Experts, Flat, Trajectories
from igd_lib.data.dsa import Params, apply, draw, dsa
from igd_lib.data.images import ImageData, in_8_bits, learned
from igd_lib.tools import files
from igd_lib.tools.progress import Pace, progress, resumable

SAVE_SECONDS = 60.0  # at most one training state is written in so much time
BATCH = 250  # images that an expert looks at at a time


@dataclass(frozen=True)
class DATM:
    """How a set is matched to experts; the defaults are the authors' for CIFAR-10 at 10 images a class."""

    experts: Experts = field(default_factory=Experts)
    iterations: int = 10_000
    steps: int = 80  # N, of the network that is trained on the set
    expert_epochs: int = 2  # M
    batch_size: int = 100  # of those steps
    first_epoch: int = 0  # the range of t
    upper: int = 10  # exclusive, at first ...
    last_upper: int = 20  # ... and in the end,
    widened_by: int = 1_000  # from this iteration on
    threshold: float = 1.0
    lr_images: float = 100.0  # SGD with momentum 0.5
    lr_labels: float = 2.0  # 0.9
    lr_rate: float = 1e-5  # 0.5
    rate: float = 0.01  # eta as it begins
    init: Literal["correct", "real"] = "correct"  # real images that an expert gets right, or any
    labels: Literal["soft", "hard"] = "soft"  # hard: neither initialised by experts nor learned
    images: Literal["float", "8-bit"] = "float"  # as they are given back

    def __post_init__(self) -> None:
        if min(self.iterations, self.steps, self.expert_epochs, self.batch_size, self.widened_by) < 1:
            raise ValueError("iterations, steps, expert_epochs, batch_size and widened_by are at least 1")
        if not 0 <= self.first_epoch < self.upper <= self.last_upper:
            raise ValueError(
                "start epochs are 0 <= first_epoch < upper <= last_upper, got "
                f"{self.first_epoch}, {self.upper} and {self.last_upper}"
            )
        if (needed := self.last_upper - 1 + self.expert_epochs) > self.experts.epochs:
            raise ValueError(
                f"epochs up to {needed} are matched and experts have {self.experts.epochs}; train them "
                "longer, or lower last_upper"
            )
        if self.rate <= 0:
            raise ValueError(f"a learning rate is positive, got {self.rate}")

    @classmethod
    def paper(cls, dataset: str, ipc: int) -> DATM:
        """The authors' settings for CIFAR-10 or CIFAR-100; other data take CIFAR-10's.

        An IPC that they have none for takes those of the nearest by ratio.
        """
        rows = PAPER.get(dataset, PAPER["cifar-10"])
        return rows[min(rows, key=lambda known: max(known / ipc, ipc / known))]

    @classmethod
    def small(cls, ipc: int = 10) -> DATM:
        """For 32-px images on two cores, a quarter of an hour: few, short experts of a thin ConvNet-3."""
        upper, last_upper = (2, 4) if ipc < 5 else (4, 10) if ipc < 25 else (8, 12)
        return cls(
            SMALL_EXPERTS,
            iterations=200,
            steps=20,
            expert_epochs=1,
            batch_size=25,
            upper=upper,
            last_upper=last_upper,
            widened_by=100,
            rate=0.04,
        )

    def upper_at(self, iteration: int) -> int:
        """The exclusive upper end of start epochs in an iteration, counted from 0."""
        grown = self.upper + int((self.last_upper - self.upper) * iteration / self.widened_by)
        return min(grown, self.last_upper)


_WIDE: dict[str, Any] = dict(
    upper=60, last_upper=60, first_epoch=40, batch_size=1000, lr_images=50.0, lr_labels=10.0
)
_HUNDRED: dict[str, Any] = dict(batch_size=1000, lr_images=1000.0, lr_labels=10.0)  # classes
PAPER: dict[str, dict[int, DATM]] = {
    "cifar-10": {
        1: DATM(upper=4, last_upper=4, batch_size=10, lr_labels=5.0, lr_rate=1e-7, threshold=1.1),
        10: DATM(),
        50: DATM(upper=20, last_upper=40, widened_by=2000, batch_size=500, lr_images=1000.0),
        500: DATM(steps=40, **_WIDE),
        1000: DATM(steps=100, **_WIDE),
    },
    "cifar-100": {
        1: DATM(steps=40, expert_epochs=3, **_HUNDRED),
        10: DATM(upper=30, last_upper=50, widened_by=2000, **_HUNDRED),
        50: DATM(first_epoch=20, upper=70, last_upper=70, init="real", **_HUNDRED),
        100: DATM(first_epoch=30, upper=70, last_upper=70, **(_HUNDRED | {"lr_images": 50.0})),
    },
}
SMALL_EXPERTS = Experts("convnet3-w64", count=3, epochs=12, lr=0.02, batch_size=64, images=500)


def datm(
    data: ImageData,
    ipc: int,
    settings: DATM,
    experts: str | Path,  # a folder that has them, or gets them
    *,
    seed: int = 0,
    device: str = "cpu",
    state: str | Path | None = None,  # a file; where it is given, an interrupted run goes on from there
) -> ImageData:
    """`ipc` learned images a class, class after class, with what was learned beside them.

    Float pixels of [0, 1] that may leave it, rounded to uint8 with settings.images "8-bit"; their soft labels
    (none with settings.labels "hard"), rate and whitening; `plain()` has what other tools can read. Experts
    that lack are trained first. Raises ValueError for too large an IPC, or too few images that experts get
    right, and FloatingPointError for a loss, or a rate in the end, that no network can be trained with.
    """
    _check(data, ipc)
    trajectories = Trajectories(data, settings.experts, Path(experts), device)
    trajectories.train()
    run = _Matching(trajectories, ipc, settings, seed, None if state is None else Path(state))
    run.go_on()
    return run.result()


def _check(data: ImageData, ipc: int) -> None:
    smallest = int(data.labels.bincount(minlength=len(data.classes)).min())
    if not 1 <= ipc <= smallest:
        raise ValueError(f"ipc is 1 ... {smallest}, which the smallest class of {data.name} has, got {ipc}")


# --- how a set begins


def initial(trajectories: Trajectories, ipc: int, init: str, seed: int) -> tuple[Tensor, Tensor]:
    """Real images as networks see them, (C ipc, 3, H, H), class after class, and logits of theirs (C ipc, C).

    Drawn without replacement, a class by itself; of "correct" ones those that the first expert gets right,
    then, where they are too few, the next one.
    """
    chosen = []
    for label in range(len(trajectories.data.classes)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + label)
        indices = trajectories.images.class_indices(label)
        indices = indices[torch.randperm(len(indices), generator=generator)]
        if init == "correct":
            indices = torch.tensor(_right(trajectories, indices, label, ipc))
        chosen.append(indices[:ipc])
        if len(indices) < ipc:
            raise ValueError(
                f"ipc is {ipc}, and experts get {len(indices)} images of "
                f"{trajectories.data.classes[label]!r} right that they learned from; train them longer or on "
                "more images, or take init='real'"
            )
    images = trajectories.inputs[torch.cat(chosen).to(trajectories.device)]
    if init == "real":
        return images, _predicted(trajectories, 0, images)
    labels = torch.arange(len(chosen)).repeat_interleave(ipc)
    count = trajectories.recipe.count
    logits = torch.stack([_predicted(trajectories, number, images) for number in range(count)])
    return images, mean_of_right(logits, labels.to(logits.device))


def _right(trajectories: Trajectories, indices: Tensor, label: int, ipc: int) -> list[int]:
    """The first `ipc` of `indices` that an expert gets right, those of the first expert first."""
    found: list[int] = []
    for number in range(trajectories.recipe.count):
        left = [index for index in indices.tolist() if index not in set(found)]
        for part in torch.tensor(left, dtype=torch.long).split(BATCH):
            inputs = trajectories.inputs[part.to(trajectories.device)]
            right = _predicted(trajectories, number, inputs).argmax(1) == label
            found += part[right.cpu()].tolist()
            if len(found) >= ipc:
                return found[:ipc]
    return found


@torch.no_grad()
def _predicted(trajectories: Trajectories, number: int, inputs: Tensor) -> Tensor:
    """The logits that an expert ends with, (N, C)."""
    w = trajectories.state(number, -1)
    return torch.cat([trajectories.network(w, part) for part in inputs.split(BATCH)])


def mean_of_right(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, C): of logits (experts, N, C) the mean over experts that get an image right; if none, over all."""
    right = logits.argmax(2) == labels
    weights = torch.where(right.any(0), right, torch.ones_like(right)).to(logits.dtype)
    return (logits * weights[:, :, None]).sum(0) / weights.sum(0)[:, None]


# --- matching

Step = tuple[Tensor, Params]  # which images of the set, and how they are changed


def student(
    network: Flat, start: Tensor, steps: Sequence[Step], images: Tensor, labels: Tensor, rate: Tensor
) -> Tensor:
    """th_N (P,) of SGD from `start` on a set, with its graph: gradients reach images, labels and rate.

    labels: logits (N, C) of soft ones, or int64 (N,) hard ones.
    """
    w = start.detach().requires_grad_()
    for indices, changes in steps:
        target = labels[indices].softmax(1) if labels.is_floating_point() else labels[indices]
        loss = F.cross_entropy(network(w, apply(images[indices], changes)), target)
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        w = w - rate * gradient
    return w


def matching_loss(end: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """L = ||end - target||^2 / ||start - target||^2."""
    return (end - target).square().sum() / (start - target).square().sum()


def drawn_steps(count: int, settings: DATM, side: int, generator: torch.Generator) -> Iterator[Step]:
    """N batches of `count` images, cut from permutations, each with its own changes of every image."""
    strategy, left = dsa(settings.experts.augmentation), list[Tensor]()
    for _ in range(settings.steps):
        if not left:
            left = list(torch.randperm(count, generator=generator).split(settings.batch_size))
        indices = left.pop()
        yield indices, draw(strategy, len(indices), side, generator, per_sample=True)


class _Set(nn.Module):
    """What is learned."""

    def __init__(self, images: Tensor, logits: Tensor | None, rate: float):
        super().__init__()
        self.images = nn.Parameter(images.clone())
        self.rate = nn.Parameter(torch.tensor(rate, device=images.device))
        self.logits = None if logits is None else nn.Parameter(logits.clone())


class _Matching:
    """A set on its way, with its optimiser and generator."""

    def __init__(self, trajectories: Trajectories, ipc: int, settings: DATM, seed: int, state: Path | None):
        self.trajectories, self.ipc, self.settings, self.seed = trajectories, ipc, settings, seed
        self.state, self.pace = state, Pace(SAVE_SECONDS)
        images, logits = initial(trajectories, ipc, settings.init, seed)
        self.labels = torch.arange(len(trajectories.data.classes)).repeat_interleave(ipc)
        soft = settings.labels == "soft"
        self.set = _Set(images, logits if soft else None, settings.rate)
        groups: list[dict[str, Any]] = [
            {"params": [self.set.images], "lr": settings.lr_images, "momentum": 0.5},
            {"params": [self.set.rate], "lr": settings.lr_rate, "momentum": 0.5},
        ]
        if self.set.logits is not None:
            groups.append({"params": [self.set.logits], "lr": settings.lr_labels, "momentum": 0.9})
        self.optimizer = torch.optim.SGD(groups)
        self.generator = torch.Generator().manual_seed(seed)
        self.done = self.saved = self.skipped = 0

    def go_on(self) -> None:
        """All iterations that are left, from the state on disk on where there is one."""
        self.load()
        count = self.settings.iterations
        with resumable(lambda: f"{self.saved} of {count} iterations are in {self.state}"):
            for iteration in progress(range(self.done, count), "DATM, iteration", every=20, done=self.done):
                self.iterate(iteration)
                self.done = iteration + 1
                if self.pace.due and self.done < count:
                    self.save()
        if self.skipped:
            unchanged = "; the images are those that it began with" if self.skipped == count else ""
            print(
                f"DATM: {self.skipped} of {count} iterations had a loss above the threshold{unchanged}",
                flush=True,
            )

    def iterate(self, iteration: int) -> float:
        """One iteration; its L."""
        loss = self.loss(*self.segment(iteration))
        if not loss.isfinite():
            raise FloatingPointError(
                f"DATM: the loss is {loss.item()} in iteration {iteration}; lower lr_images "
                f"({self.settings.lr_images}) or the rate's ({self.settings.lr_rate})"
            )
        if loss <= self.settings.threshold:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        else:
            self.skipped += 1
        return loss.item()

    def segment(self, iteration: int) -> tuple[Tensor, Tensor]:
        """A drawn expert's parameters at a drawn epoch, and M epochs later."""
        settings, generator = self.settings, self.generator
        number = int(torch.randint(settings.experts.count, (), generator=generator))
        upper = settings.upper_at(iteration)
        epoch = int(torch.randint(settings.first_epoch, upper, (), generator=generator))
        return (
            self.trajectories.state(number, epoch),
            self.trajectories.state(number, epoch + settings.expert_epochs),
        )

    def loss(self, start: Tensor, target: Tensor) -> Tensor:
        found, device = self.set, start.device
        labels = self.labels.to(device) if found.logits is None else found.logits
        side = found.images.shape[-1]
        steps = list(drawn_steps(len(found.images), self.settings, side, self.generator))
        end = student(self.trajectories.network, start, steps, found.images, labels, found.rate)
        return matching_loss(end, start, target)

    # --- on disk

    @property
    def about(self) -> dict[str, Any]:
        """What the state belongs to, JSON-able."""
        return {"settings": asdict(self.settings), "ipc": self.ipc, "seed": self.seed}

    def save(self) -> None:
        if self.state is None:
            return
        note = {"about": self.about, "skipped": self.skipped}
        with self.pace.saving():
            files.save_training(
                self.state, self.done, self.optimizer, generator=self.generator, note=note, set=self.set
            )
        self.saved = self.done

    def load(self) -> None:
        if self.state is None or not self.state.is_file():
            return
        note = files.load_tensors(self.state)[1]
        if found := files.difference(note.get("about"), json.loads(json.dumps(self.about))):
            raise ValueError(f"{self.state} is of another set: {found}; delete it, or choose another file")
        note = files.load_training(self.state, self.optimizer, generator=self.generator, set=self.set)
        self.done = self.saved = note["step"]
        self.skipped = note["skipped"]

    # --- what comes of it

    def result(self) -> ImageData:
        """The set as data: images back from what networks see, rounded where they are to be, and the rest."""
        found, data, settings = self.set, self.trajectories.data, self.settings
        rate = float(found.rate.detach())
        if rate <= 0:
            raise FloatingPointError(
                f"DATM: the learned rate is {rate:g}; lower the rate's ({settings.lr_rate})"
            )
        view = self.trajectories.view
        pixels = view.pixels(found.images.detach().cpu())
        if settings.images == "8-bit":
            pixels = in_8_bits(pixels)
        targets = None if found.logits is None else found.logits.detach().cpu().softmax(1)
        split = f"DATM, ipc {self.ipc}, seed {self.seed}"
        size = data.image_size
        base = ImageData(data.name, split, data.classes, self.labels, size, lambda indices: pixels[indices])
        return learned(base, pixels, targets, lr=rate, whitening=view.whitening)
