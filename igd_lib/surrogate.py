"""The surrogate network: its training trajectory, Algorithm 2, and class-averaged gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

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
) -> Checkpoints:
    """Train by SGD at a constant rate and keep the trajectory, initialisation (epoch 0) included.

    `saves_in_first_epoch` keeps more than one checkpoint, evenly spaced, in the first epoch: on easy
    data that is where the informative early phase lies. Defaults are the released code's for up to
    100 classes. Raises FloatingPointError on a non-finite loss.
    """
    if epochs < 1 or saves_in_first_epoch < 1:
        raise ValueError(f"epochs and saves_in_first_epoch are at least 1, got {epochs} and {saves_in_first_epoch}")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    steps = -(-len(data) // batch_size)
    saves = {round(steps * i / saves_in_first_epoch) for i in range(1, saves_in_first_epoch + 1)}
    states, at = [_snapshot(model)], [0.0]
    model.train()
    for epoch in progress(range(epochs), "surrogate, epoch"):
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
    return Checkpoints(model.eval(), states, at, [lr] * len(states))


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


def all_class_gradients(checkpoints: Checkpoints, data: ImageData, *, images: int | None = 200) -> Tensor:
    """`class_gradients` of every class over its first `images` images: (E, C, P)."""
    labels = progress(range(len(data.classes)), "class gradients, class")
    return torch.stack([class_gradients(checkpoints, data.of_class(label, images), label) for label in labels], dim=1)


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
    if not values:
        raise ValueError("no gradients: Algorithm 2 needs the initialisation at least")
    return values


_similarity = similarity  # the keyword argument above shadows the function's name
