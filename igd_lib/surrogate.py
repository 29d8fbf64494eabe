"""The surrogate network: its training trajectory, Algorithm 2, and class-averaged gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from igd_lib.config import Augment
from igd_lib.data.augment import augment, normalise
from igd_lib.data.images import ImageData, Pass, to_float
from igd_lib.tools import files, keys
from igd_lib.tools.machine import ram
from igd_lib.tools.progress import Pace, progress, resumable
from igd_lib.tools.recent import Recent

SAVE_SECONDS = 120.0  # a training within an epoch, and sums over classes, are saved once in so much time
STATE = "training.safetensors"
PART = 50  # classes
GRADIENTS = "class gradients, class"  # in lines of progress


@dataclass(frozen=True)
class Checkpoints:
    """A trajectory: `states[i]` is a state dict of `model` after `epochs[i]` epochs (may be fractional)."""

    model: nn.Module
    states: list[dict[str, Tensor]]
    epochs: list[float]
    learning_rates: list[float]

    def __len__(self) -> int:
        return len(self.states)

    def keep(self, indices: Sequence[int]) -> Checkpoints:
        """The checkpoints at `indices`."""
        return Checkpoints(
            self.model,
            [self.states[i] for i in indices],
            [self.epochs[i] for i in indices],
            [self.learning_rates[i] for i in indices],
        )

    def to(self, device: str) -> Checkpoints:
        """The same on a device."""
        states = [{name: value.to(device) for name, value in state.items()} for state in self.states]
        return Checkpoints(self.model.to(device), states, self.epochs, self.learning_rates)

    @property
    def weights(self) -> list[float]:
        """Eq. 7's learning rates divided by their mean: a common factor drops out of Eq. 9."""
        mean = sum(self.learning_rates) / len(self.learning_rates)
        return [rate / mean for rate in self.learning_rates]


@dataclass(frozen=True)
class SurrogateTraining:
    """How a surrogate is trained: SGD at a constant rate. Raises ValueError for what cannot be."""

    epochs: int = 50
    lr: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    saves_in_first_epoch: int = 1  # checkpoints of the first epoch, evenly spaced
    seed: int = 0
    keep_epochs: Sequence[float] | None = None  # keep these checkpoints alone; None: all
    augment: Augment | None = None  # what the training images go through; None: nothing

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.saves_in_first_epoch < 1:
            raise ValueError(
                "epochs and saves_in_first_epoch are at least 1, "
                f"got {self.epochs} and {self.saves_in_first_epoch}"
            )

    def settings(self, model: nn.Module, data: ImageData) -> dict[str, Any]:
        """What names the trajectory on disk. Not the number of epochs: a longer run holds a shorter one."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "epochs"}
        keep = self.keep_epochs and [float(epoch) for epoch in sorted(set(self.keep_epochs))]
        return own | {
            "keep_epochs": keep,
            "augment": self.augment and asdict(self.augment),
            "data": data.name,
            "split": data.split,
            "images": len(data),
            "classes": list(data.classes),
            "network": type(model).__name__,
            "initial_norm": f"{_norm(model.state_dict()):.5g}",
            "device": next(model.parameters()).device.type,
        }

    def saves(self, steps: int) -> set[int]:
        """After which steps of the first epoch's `steps` a checkpoint is kept."""
        return {round(steps * i / self.saves_in_first_epoch) for i in range(1, self.saves_in_first_epoch + 1)}

    def kept(self, steps: int) -> list[float]:
        """The epochs, some of them fractional, whose checkpoints are kept."""
        early = (step / steps for step in sorted(self.saves(steps) - {steps}))
        possible = [0.0, *early, *(float(epoch + 1) for epoch in range(self.epochs))]
        chosen = (
            possible if self.keep_epochs is None else sorted({float(epoch) for epoch in self.keep_epochs})
        )
        if not chosen or not set(chosen) <= set(possible):
            raise ValueError(
                f"keep_epochs are among {[round(epoch, 3) for epoch in possible]}, got {self.keep_epochs}"
            )
        return chosen


def train_surrogate(
    model: nn.Module,
    data: ImageData,
    *,
    epochs: int = 50,
    lr: float = 1e-2,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    saves_in_first_epoch: int = 1,  # on easy data the informative early phase lies within the first epoch
    seed: int = 0,
    keep_epochs: Sequence[float] | None = None,  # where the retained ones are known beforehand (fixed lists)
    augment: Augment | None = None,  # the released code's: `config.AUGMENTATION`; None: images as they are
    folder: str | Path | None = None,  # where every checkpoint is written as it is reached
) -> Checkpoints:
    """Train by SGD at a constant rate and keep the trajectory, initialisation (epoch 0) included.

    Defaults are the released code's for up to 100 classes. With a `folder`, an interrupted run goes on where
    it was saved, within an epoch too, and ends as if it had not been interrupted; of two processes one waits
    for the other. Raises FloatingPointError on a non-finite loss, ValueError when `folder` holds a trajectory
    of other settings (the first difference is named) or an epoch of `keep_epochs` has no checkpoint.
    """
    training = SurrogateTraining(
        epochs, lr, momentum, weight_decay, batch_size, saves_in_first_epoch, seed, keep_epochs, augment
    )
    return run_training(model, data, training, folder)


def run_training(
    model: nn.Module,
    data: ImageData,
    training: SurrogateTraining,
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,  # what names it on disk; None: `training.settings`
) -> Checkpoints:
    """`train_surrogate` for a training that has been described."""
    run = _Run(model, data, training, Path(folder) if folder is not None else None)
    if run.folder is None:
        run.train()
        return run.checkpoints()
    own = training.settings(model, data) if settings is None else settings
    keys.claim(run.folder / "trajectory.json", "surrogate", own, "a trajectory")
    run.load()
    if run.epoch < training.epochs:
        with files.locked(run.folder, "a surrogate's training", wait=True):
            run.load()  # what another process has done meanwhile
            run.train()
    return run.checkpoints()


def trained_epochs(folder: str | Path) -> int:
    """How many whole epochs of a trajectory are in a folder."""
    state = Path(folder) / STATE
    return files.load_tensors(state)[1]["step"] if state.is_file() else 0


class _Run:
    """A surrogate in training and its trajectory so far, which a folder, if there is one, holds too.

    Iterated over it gives the batches that are left.
    """

    def __init__(self, model: nn.Module, data: ImageData, training: SurrogateTraining, folder: Path | None):
        self.model, self.data, self.training, self.folder = model, data, training, folder
        self.steps = -(-len(data) // training.batch_size)  # an epoch
        self.saves, self.chosen = training.saves(self.steps), training.kept(self.steps)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=training.lr,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
        )
        self.generator = torch.Generator().manual_seed(training.seed)
        self.states: list[dict[str, Tensor]] = []
        self.epochs: list[float] = []  # of the states
        self.epoch = 0  # whole ones
        self.within: Pass | None = None  # where it is in the next one
        self.saved = self._place

    @property
    def done(self) -> int:
        """Steps."""
        return self.epoch * self.steps + (self.within.done if self.within else 0)

    def __len__(self) -> int:
        return self.training.epochs * self.steps - self.done

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.epoch < self.training.epochs:
            if self.within is None:
                self.within = Pass.begin(self.generator)
            yield from self.within.batches(self.data, self.training.batch_size, self.generator)

    def train(self) -> None:
        """Train to the end, saving at the end of every epoch and within long ones."""
        if self.done == 0 and 0.0 in self.chosen:
            self._add(0.0)
        pace, label = Pace(SAVE_SECONDS), f"surrogate ({self.steps:,} steps an epoch), step"
        self.model.train()
        with resumable(lambda: self.kept):
            for images, labels in progress(self, label, every=15, done=self.done):
                self._step(images, labels)
                if self.within is None or pace.due:
                    with pace.saving():
                        self._save()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        assert self.within is not None  # a batch is of an epoch
        inputs = _inputs(images, self.training.augment, self.generator)
        where = f"epoch {self.epoch + 1}; lower lr ({self.training.lr})"
        _train_step(self.model, self.optimizer, inputs, labels, where)
        step = self.within.done
        if step == self.steps:
            self.epoch, self.within = self.epoch + 1, None
            if self.epoch in self.chosen:
                self._add(float(self.epoch))
        elif self.epoch == 0 and step in self.saves and step / self.steps in self.chosen:
            self._add(step / self.steps)

    def _add(self, epoch: float) -> None:
        """Keep the model as it is now."""
        self.states.append({name: value.detach().clone() for name, value in self.model.state_dict().items()})
        self.epochs.append(epoch)
        if self.folder is not None:
            path = self.folder / f"{len(self.states) - 1:05d}.safetensors"
            files.save_tensors(path, self.states[-1], epoch=epoch)

    def _save(self) -> None:
        if self.folder is not None:
            note = self.within.note if self.within else {}
            files.save_training(
                self.folder / STATE,
                self.epoch,
                self.optimizer,
                generator=self.generator,
                note=note,
                model=self.model,
            )
            self.saved = self._place

    def load(self) -> None:
        """Go on where it was saved, if it was; checkpoints behind that are made again."""
        assert self.folder is not None  # asked with one alone
        state = self.folder / STATE
        if not state.is_file():
            return
        note = files.load_training(state, self.optimizer, generator=self.generator, model=self.model)
        self.epoch, self.within = note["step"], Pass.of(note)
        reached = self.epoch + (self.within.done / self.steps if self.within else 0.0)
        device = next(self.model.parameters()).device
        found = [files.load_tensors(path) for path in sorted(self.folder.glob("[0-9]*.safetensors"))]
        whole = [(tensors, about["epoch"]) for tensors, about in found if about["epoch"] <= reached]
        self.states = [{name: value.to(device) for name, value in tensors.items()} for tensors, _ in whole]
        self.epochs = [epoch for _, epoch in whole]
        self.saved = self._place

    @property
    def _place(self) -> str:
        """Where it is, in words."""
        within = f" and {self.within.done} of {self.steps} steps" if self.within else ""
        return f"{self.epoch} of {self.training.epochs} epochs{within}"

    @property
    def kept(self) -> str:
        """What an interruption leaves, in words."""
        if self.folder is None:
            return "nothing of the trajectory is kept without a folder"
        return f"{self.saved} of the trajectory are in {self.folder}"

    def checkpoints(self) -> Checkpoints:
        """The trajectory, of a longer run its beginning; of a whole one the last is the model's state too."""
        count = sum(epoch <= self.training.epochs for epoch in self.epochs)
        longer = self.epoch > self.training.epochs or self.within is not None
        if longer and self.training.keep_epochs is None:
            self.model.load_state_dict(self.states[count - 1])
        rates = [self.training.lr] * count
        return Checkpoints(self.model.eval(), self.states[:count], self.epochs[:count], rates)


@dataclass(frozen=True)
class _Recipe(Augment):
    """An augmentation with what else `augment` asks for."""

    image_size: int = 256  # px
    patch_factor: int = 1


def _inputs(images: Tensor, augmentation: Augment | None, generator: torch.Generator) -> Tensor:
    """What a surrogate is trained on, float (B, 3, H, W), of uint8 images: in [-1, 1], or a little beyond."""
    if augmentation is None:
        return to_float(images)
    recipe = _Recipe(**asdict(augmentation), image_size=images.shape[-1])
    return normalise(augment(images.float() / 255, recipe, generator), (0.5,) * 3, (0.5,) * 3)


def _train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor, where: str
) -> None:
    device = next(model.parameters()).device
    loss = F.cross_entropy(model(inputs.to(device)), labels.to(device))
    if not torch.isfinite(loss):
        raise FloatingPointError(f"surrogate: loss is {loss.item()} in {where}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _norm(state: dict[str, Tensor]) -> float:
    return sum(value.double().square().sum().item() for value in state.values()) ** 0.5


def class_gradients(
    checkpoints: Checkpoints, images_of_one_class: Tensor, label: int, *, batch_size: int = 50
) -> Tensor:
    """The gradient of the mean cross-entropy over one class's images, at each checkpoint (Eq. 6).

    images_of_one_class: uint8 (n, 3, H, W). Returns (E, P) float32, P in `model.parameters()` order, on the
    model's device, wherever the states lie.
    """
    if len(images_of_one_class) == 0:
        raise ValueError(f"class {label} has no images to average gradients over")
    model = checkpoints.model
    names = [name for name, _ in model.named_parameters()]
    device, rows = next(model.parameters()).device, []
    for state in checkpoints.states:
        # Detached copies, so that no gradient accumulates in the model itself.
        tensors = {
            name: value.detach().to(device, copy=True).requires_grad_(name in names)
            for name, value in state.items()
        }
        total = [torch.zeros_like(tensors[name]) for name in names]
        for images in images_of_one_class.split(batch_size):
            inputs = to_float(images).to(total[0].device)
            targets = torch.full((len(inputs),), label, device=inputs.device)
            loss = F.cross_entropy(functional_call(model, tensors, (inputs,)), targets, reduction="sum")
            for sum_, part in zip(
                total, torch.autograd.grad(loss, [tensors[name] for name in names]), strict=True
            ):
                sum_ += part
        rows.append(torch.cat([sum_.flatten() for sum_ in total]) / len(images_of_one_class))
    return torch.stack(rows)


def filter_images(data: ImageData, label: int, images: tuple[int, int] | None) -> Tensor:
    """The images of a class whose gradients Algorithm 2 compares, uint8 (n, 3, H, W): the same every time.

    images: (n, of the first m), drawn at random as the released filter does, all of the m where they are
    fewer than n; None: all of the class (the paper).
    """
    if images is None:
        return data.of_class(label)
    count, first = images
    indices = data.class_indices(label)[:first]
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(label))
    return data.fetch(indices[order[:count].sort().values])


@dataclass(frozen=True)
class ClassGradients:
    """Class gradients (E, P) computed when first asked for and kept on disk, one safetensors file a class.

    At 1,000 classes, 4 checkpoints and 2.8 M parameters they are 45 GB: the classes last asked for stay in
    host memory, so that several sets sampled class after class read each file once, and none on the device.
    A file made from other checkpoints, data or numbers of images is refused. A class that another process
    computes is waited for, that class alone.
    """

    checkpoints: Checkpoints
    data: ImageData
    folder: Path
    images: int | None = 200
    limit: int | None = None  # bytes that stay in host memory; None: an eighth of the machine's

    def __call__(self, label: int) -> Tensor:
        """(E, P) of one class, on the model's device whether computed or read.

        Raises ValueError when the file on disk is of another origin.
        """
        found = self._recent.get(label)
        if found is None:
            found = self._read(label) if self.is_kept(label) else self._make(label)
            self._recent.put(label, found)
        return found.to(next(self.checkpoints.model.parameters()).device)

    def to(self, device: str) -> ClassGradients:
        """The same computed on a device."""
        return replace(self, checkpoints=self.checkpoints.to(device))

    def is_kept(self, label: int) -> bool:
        """Whether a class is on disk."""
        return self._path(label).is_file()

    def keep(self, labels: Sequence[int]) -> None:
        """See to it that classes are on disk."""
        for label in progress([label for label in labels if not self.is_kept(label)], GRADIENTS):
            self._make(label)

    def _path(self, label: int) -> Path:
        return Path(self.folder) / f"{label:05d}.safetensors"

    def _make(self, label: int) -> Tensor:
        """Compute a class, or read what another process has just computed."""
        what, lock = f"a run that computes the gradients of class {label}", f".{label:05d}.lock"
        with files.locked(self.folder, what, wait=True, name=lock):
            if self.is_kept(label):
                return self._read(label)
            gradients = class_gradients(self.checkpoints, self.data.of_class(label, self.images), label)
            files.save_tensors(self._path(label), {"gradients": gradients}, **self._origin_of(label))
        return gradients

    def _read(self, label: int) -> Tensor:
        path, origin = self._path(label), self._origin_of(label)
        tensors, metadata = files.load_tensors(path)
        if metadata != origin:
            different = next(key for key in origin if metadata.get(key) != origin[key])
            raise ValueError(
                f"{path} has another origin: {different} = {metadata.get(different)}, wanted "
                f"{origin[different]}; delete its folder"
            )
        return tensors["gradients"]

    def _origin_of(self, label: int) -> dict[str, Any]:
        return self._origin | {"class": self.data.classes[label]}

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """What the gradients are of, as their files say."""
        weights = [f"{_norm(state):.6g}" for state in self.checkpoints.states]
        about = {"data": self.data.name, "images": self.images, "epochs": list(self.checkpoints.epochs)}
        return {"schema": keys.SCHEMA["gradients"]} | about | {"weights": weights}

    @cached_property
    def _recent(self) -> Recent:
        return Recent(ram() // 8 if self.limit is None else self.limit)


def regular_checkpoints(epochs: int, count: int) -> list[int]:
    """`count` epochs at regular intervals from 0, Table 6's baseline: 4 of 50 epochs are [0, 16, 32, 48].

    Raises ValueError when there are not so many.
    """
    if not 2 <= count <= epochs + 1:
        raise ValueError(f"count is 2 ... {epochs + 1} (epochs 0 ... {epochs}), got {count}")
    return [index * (epochs // (count - 1)) for index in range(count)]


def similarity(gradient: Tensor, reference: Tensor, kind: Literal["mean", "per_class"]) -> float:
    """Algorithm 2's cosine of two (C, P) gradients.

    "mean": of the gradients averaged over classes (the paper); "per_class": the mean over classes of
    each class's cosine (the released code).
    """
    if kind == "mean":
        return F.cosine_similarity(gradient.mean(0), reference.mean(0), dim=0).item()
    if kind == "per_class":
        return F.cosine_similarity(gradient, reference, dim=1).mean().item()
    raise ValueError(f"similarity is 'mean' or 'per_class', got {kind!r}")


def select_checkpoints(
    gradients: Tensor | Iterable[Tensor],
    *,
    threshold: float = 0.7,
    similarity: Literal["mean", "per_class"] = "mean",
) -> list[int]:
    """Algorithm 2: keep a checkpoint whose gradient differs from the last kept one's.

    gradients: (epochs, classes, P), or an iterable of (classes, P). Index 0 is always kept; index t is
    kept when its similarity to the reference is below `threshold` (strictly).
    """
    return kept(checkpoint_similarities(gradients, threshold=threshold, similarity=similarity), threshold)


def checkpoint_similarities(
    gradients: Tensor | Iterable[Tensor],
    *,
    threshold: float = 0.7,
    similarity: Literal["mean", "per_class"] = "mean",
) -> list[float]:
    """The similarity that Algorithm 2 compares with `threshold`, for each checkpoint; -inf for the first."""
    return _along(
        gradients, lambda gradient, reference: _similarity(gradient, reference, similarity), threshold
    )


_similarity = similarity  # the keyword argument above shadows the function's name


class Sums:
    """Sums over classes that Algorithm 2's similarities are made of: `classes` in all, `count` so far."""

    def __init__(self, classes: int):
        self.classes, self.count = classes, 0
        self.cosines = torch.zeros(())  # (E, E): of every two checkpoints, a class's share of their mean
        self.total = torch.zeros(())  # (E, P): of gradients

    def add(self, gradients: Tensor) -> None:
        """Count a class's (E, P)."""
        unit = F.normalize(gradients, dim=1)
        self._add((unit @ unit.T).cpu() / self.classes, gradients.cpu(), 1)

    def join(self, others: Sums) -> None:
        """Count the classes of other sums."""
        self._add(others.cosines, others.total, others.count)

    def _add(self, cosines: Tensor, total: Tensor, count: int) -> None:
        self.cosines, self.count = self.cosines + cosines, self.count + count
        self.total = self.total + total if self.total.ndim == 0 else self.total.add_(total)

    @property
    def matrices(self) -> dict[str, Tensor]:
        """The similarity of every two checkpoints, (E, E), in both readings: "mean" and "per_class"."""
        unit = F.normalize(self.total, dim=1)
        return {"mean": unit @ unit.T, "per_class": self.cosines}

    def save(self, path: Path) -> None:
        files.save_tensors(path, {"cosines": self.cosines, "total": self.total}, count=self.count)

    def load(self, path: Path) -> None:
        """Go on where `save` left off."""
        tensors, note = files.load_tensors(path)
        self.cosines, self.total, self.count = tensors["cosines"], tensors["total"], note["count"]


def parts(classes: int) -> list[range]:
    """Classes in the parts in which sums are made, wherever: the order of a sum is its last bits."""
    return [range(first, min(first + PART, classes)) for first in range(0, classes, PART)]


def similarity_matrices(gradients: Callable[[int], Tensor], classes: int) -> dict[str, Tensor]:
    """Algorithm 2's similarity of every two checkpoints, (E, E), in both readings: "mean" and "per_class".

    gradients: the class gradients (E, P) of a label, asked for once, in order. So one pass over the images
    serves any threshold and both readings, and memory is that of three classes, whatever their number.
    """
    whole = Sums(classes)
    for labels in parts(classes):
        own = Sums(classes)
        for label in progress(labels, GRADIENTS):
            own.add(gradients(label))
        whole.join(own)
    return whole.matrices


def similarities_along(matrix: Tensor, threshold: float = 0.7) -> list[float]:
    """`checkpoint_similarities` from one of `similarity_matrices`."""
    return _along(range(len(matrix)), lambda index, reference: matrix[index, reference].item(), threshold)


def _along(items: Iterable[Any], compare: Callable[[Any, Any], float], threshold: float) -> list[float]:
    """Algorithm 2's walk: each item's similarity to the last kept, -inf at first; kept below `threshold`."""
    values: list[float] = []
    reference = None
    for item in items:
        value = float("-inf") if reference is None else compare(item, reference)
        if math.isnan(value):
            raise FloatingPointError(
                f"Algorithm 2: the similarity at checkpoint {len(values)} is not a number; its gradients "
                "are not finite"
            )
        values.append(value)
        if value < threshold:
            reference = item
        del item  # the reference at most stays while the next one is computed
    if not values:
        raise ValueError("no gradients: Algorithm 2 needs the initialisation at least")
    return values


def kept(similarities: Sequence[float], threshold: float = 0.7) -> list[int]:
    """The indices that Algorithm 2 keeps, from the similarities along its walk at the same threshold."""
    return [index for index, value in enumerate(similarities) if value < threshold]
