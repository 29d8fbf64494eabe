"""The surrogate network: its training trajectory, Algorithm 2, and class-averaged gradients."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from igd_lib import files
from igd_lib.data import ImageData, to_float
from igd_lib.progress import progress


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

    @property
    def weights(self) -> list[float]:
        """Eq. 7's learning rates divided by their mean: a common factor drops out of Eq. 9."""
        mean = sum(self.learning_rates) / len(self.learning_rates)
        return [rate / mean for rate in self.learning_rates]


def train_surrogate(
    model: nn.Module,
    data: ImageData,
    *,
    epochs: int = 50,
    lr: float = 1e-2,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    saves_in_first_epoch: int = 1,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Checkpoints:
    """Train by SGD at a constant rate and keep the trajectory, initialisation (epoch 0) included.

    `saves_in_first_epoch` keeps more than one checkpoint, evenly spaced, in the first epoch: on easy
    data that is where the informative early phase lies. Defaults are the released code's for up to
    100 classes. folder: where every checkpoint is written as it is reached, one safetensors file each;
    an interrupted run resumes after its last whole epoch and ends as if it had not been interrupted.
    Raises FloatingPointError on a non-finite loss, ValueError when `folder` holds a trajectory of other
    settings (the first difference is named).
    """
    if epochs < 1 or saves_in_first_epoch < 1:
        raise ValueError(f"epochs and saves_in_first_epoch are at least 1, got {epochs} and {saves_in_first_epoch}")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    steps = -(-len(data) // batch_size)
    saves = {round(steps * i / saves_in_first_epoch) for i in range(1, saves_in_first_epoch + 1)}
    states, at = [_snapshot(model)], [0.0]
    done = 0
    if folder is not None:
        folder = Path(folder)
        _same_trajectory(
            folder / "trajectory.json",
            dict(data=data.name, split=data.split, images=len(data), classes=list(data.classes), lr=lr, momentum=momentum,
                 weight_decay=weight_decay, batch_size=batch_size, saves_in_first_epoch=saves_in_first_epoch, seed=seed,
                 network=type(model).__name__, initial_norm=f"{_norm(states[0]):.5g}"),
        )  # fmt: skip
        done = files.load_training(folder / "training.safetensors", optimizer, generator=generator, model=model)["step"]
        states, at = _read(folder, device, done) if done else (states, at)
        files.save_tensors(folder / "00000.safetensors", states[0], epoch=0.0)
    if done > epochs:  # a longer run is on disk: its beginning is what was asked for
        states = [state for state, epoch in zip(states, at, strict=True) if epoch <= epochs]
        at = at[: len(states)]
        model.load_state_dict(states[-1])
    model.train()
    for epoch in progress(range(done, epochs), "surrogate, epoch"):
        for step, (images, labels) in enumerate(data.batches(batch_size, generator), start=1):
            loss = F.cross_entropy(model(to_float(images).to(device)), labels.to(device))
            if not torch.isfinite(loss):
                raise FloatingPointError(f"surrogate: loss is {loss.item()} in epoch {epoch + 1}; lower lr ({lr})")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == steps or (epoch == 0 and step in saves):
                states.append(_snapshot(model))
                at.append(epoch + step / steps)
                if folder is not None:
                    files.save_tensors(folder / f"{len(states) - 1:05d}.safetensors", states[-1], epoch=at[-1])
        if folder is not None:
            files.save_training(folder / "training.safetensors", epoch + 1, optimizer, generator=generator, model=model)
    return Checkpoints(model.eval(), states, at, [lr] * len(states))


def _same_trajectory(path: Path, wanted: dict[str, Any]) -> None:
    """Write the settings of a new trajectory, or compare them with those on disk."""
    if not path.is_file():
        files.write(path, json.dumps(wanted, indent=2) + "\n")
        return
    present = json.loads(path.read_text())
    for key, value in wanted.items():
        if present.get(key) != value:
            raise ValueError(f"{path.parent} holds a trajectory of other settings: {key} = {present.get(key)}, wanted {value}; choose another folder")


def _read(folder: Path, device: torch.device, done: int) -> tuple[list[dict[str, Tensor]], list[float]]:
    """The checkpoints of the first `done` epochs; later ones belong to an epoch that did not end."""
    found = [files.load_tensors(path) for path in sorted(folder.glob("[0-9]*.safetensors"))]
    kept = [(state, metadata["epoch"]) for state, metadata in found if metadata["epoch"] <= done]
    return [{name: value.to(device) for name, value in state.items()} for state, _ in kept], [epoch for _, epoch in kept]


def _norm(state: dict[str, Tensor]) -> float:
    return sum(value.double().square().sum().item() for value in state.values()) ** 0.5


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def class_gradients(checkpoints: Checkpoints, images_of_one_class: Tensor, label: int, *, batch_size: int = 50) -> Tensor:
    """The gradient of the mean cross-entropy over one class's images, at each checkpoint (Eq. 6).

    images_of_one_class: uint8 (n, 3, H, W). Returns (E, P) float32, P in `model.parameters()` order.
    """
    if len(images_of_one_class) == 0:
        raise ValueError(f"class {label} has no images to average gradients over")
    model = checkpoints.model
    names = [name for name, _ in model.named_parameters()]
    rows = []
    for state in checkpoints.states:
        # Detached copies, so that no gradient accumulates in the model itself.
        tensors = {name: value.detach().clone().requires_grad_(name in names) for name, value in state.items()}
        total = [torch.zeros_like(tensors[name]) for name in names]
        for images in images_of_one_class.split(batch_size):
            inputs = to_float(images).to(total[0].device)
            targets = torch.full((len(inputs),), label, device=inputs.device)
            loss = F.cross_entropy(functional_call(model, tensors, (inputs,)), targets, reduction="sum")
            for sum_, part in zip(total, torch.autograd.grad(loss, [tensors[name] for name in names]), strict=True):
                sum_ += part
        rows.append(torch.cat([sum_.flatten() for sum_ in total]) / len(images_of_one_class))
    return torch.stack(rows)


def epoch_gradients(checkpoints: Checkpoints, data: ImageData, *, images: int | None = 200) -> Iterator[Tensor]:
    """(C, P) of every class over its first `images` images, one checkpoint after the other.

    For Algorithm 2 on large data: only what the consumer keeps stays in memory, so `select_checkpoints` holds two.
    """
    for index in progress(range(len(checkpoints)), "class gradients, checkpoint"):
        one, gradient = checkpoints.keep([index]), None
        for label in range(len(data.classes)):
            row = class_gradients(one, data.of_class(label, images), label)[0]
            gradient = row.new_empty(len(data.classes), len(row)) if gradient is None else gradient
            gradient[label] = row
        yield gradient
        del gradient  # before the next is made


@dataclass(frozen=True)
class ClassGradients:
    """Class gradients (E, P) computed when first asked for and kept on disk, one safetensors file a class.

    At 1,000 classes, 4 checkpoints and 2.8 M parameters they are 45 GB: only the classes being sampled
    are in memory. A file made from other checkpoints, data or numbers of images is refused.
    """

    checkpoints: Checkpoints
    data: ImageData
    folder: Path
    images: int | None = 200

    def __call__(self, label: int) -> Tensor:
        """(E, P) of one class. Raises ValueError when the file on disk is of another origin."""
        path = Path(self.folder) / f"{label:05d}.safetensors"
        origin = {
            "data": self.data.name, "class": self.data.classes[label], "images": self.images, "epochs": list(self.checkpoints.epochs),
            "weights": [f"{_norm(state):.6g}" for state in self.checkpoints.states],
        }  # fmt: skip
        if path.is_file():
            tensors, metadata = files.load_tensors(path)
            if metadata != origin:
                different = next(key for key in origin if metadata.get(key) != origin[key])
                raise ValueError(f"{path} has another origin: {different} = {metadata.get(different)}, wanted {origin[different]}; delete its folder")
            return tensors["gradients"]
        gradients = class_gradients(self.checkpoints, self.data.of_class(label, self.images), label)
        files.save_tensors(path, {"gradients": gradients}, **origin)
        return gradients


def all_class_gradients(checkpoints: Checkpoints, data: ImageData, *, images: int | None = 200) -> Tensor:
    """`class_gradients` of every class over its first `images` images: (E, C, P)."""
    labels = progress(range(len(data.classes)), "class gradients, class")
    return torch.stack([class_gradients(checkpoints, data.of_class(label, images), label) for label in labels], dim=1)


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
    gradients: Tensor | Iterable[Tensor], *, threshold: float = 0.7, similarity: Literal["mean", "per_class"] = "mean"
) -> list[int]:
    """Algorithm 2: keep a checkpoint whose gradient differs from the last kept one's.

    gradients: (epochs, classes, P), or an iterable of (classes, P). Index 0 is always kept; index t is
    kept when its similarity to the reference is below `threshold` (strictly).
    """
    return [index for index, value in enumerate(checkpoint_similarities(gradients, threshold=threshold, similarity=similarity)) if value < threshold]


def checkpoint_similarities(
    gradients: Tensor | Iterable[Tensor], *, threshold: float = 0.7, similarity: Literal["mean", "per_class"] = "mean"
) -> list[float]:
    """The similarity that Algorithm 2 compares with `threshold`, for each checkpoint; -inf for the first."""
    values: list[float] = []
    reference: Tensor | None = None
    for gradient in gradients:
        value = float("-inf") if reference is None else _similarity(gradient, reference, similarity)
        if math.isnan(value):
            raise FloatingPointError(f"Algorithm 2: the similarity at checkpoint {len(values)} is not a number; its gradients are not finite")
        values.append(value)
        if value < threshold:
            reference = gradient
        del gradient  # the reference at most stays while the next one is computed
    if not values:
        raise ValueError("no gradients: Algorithm 2 needs the initialisation at least")
    return values


_similarity = similarity  # the keyword argument above shadows the function's name
