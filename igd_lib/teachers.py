"""Who gives soft labels, and the checks before it does; what a network predicts on real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from igd_lib.data.augment import centre, normalise, resize
from igd_lib.data.images import ImageData
from igd_lib.models.networks import network
from igd_lib.protocols import RDED_SOFT, Protocol


@dataclass(frozen=True)
class Teacher:
    """What gives soft labels: a trained network and everything that says which one it is."""

    model: nn.Module
    architecture: str  # e.g. "resnet18"
    weights: str  # where they come from: a file's sha256, a published name
    classes: tuple[str, ...]  # logit i is classes[i]
    mean: tuple[float, float, float]  # what it was trained with, of [0, 1] images
    std: tuple[float, float, float]
    least: float = 50.0  # percent of real images that it must get right before it labels anything


def check_teacher(teacher: Teacher, dataset: ImageData, protocol: Protocol, *, images: int = 200) -> float:
    """Top-1 (percent) of the teacher on `images` real ones spread over `dataset`; classes compared first.

    Raises ValueError for other classes, another order or number of logits, or a top-1 below `teacher.least`:
    a wrong teacher trains a network to chance without any other sign.
    """
    check_class_order(teacher.classes, dataset.classes, ("teacher", "data"))
    few = dataset.subset(torch.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().long())
    logits = predict(teacher.model, few, replace(protocol, mean=teacher.mean, std=teacher.std))
    if logits.shape[1] != len(dataset.classes):
        raise ValueError(
            f"the teacher {teacher.architecture} ({teacher.weights}) has {logits.shape[1]} logits for "
            f"{len(dataset.classes)} classes"
        )
    top1 = topk(logits, few.labels, 1)
    if top1 < teacher.least:
        raise ValueError(
            f"the teacher {teacher.architecture} ({teacher.weights}) gets {top1:.1f} % of {len(few)} real "
            f"images of {dataset.name}, "
            f"below {teacher.least:.0f} %: wrong weights, class order or normalisation? Set its `least` "
            "if it is meant to be this weak"
        )
    return top1


def check_class_order(
    ours: tuple[str, ...], theirs: tuple[str, ...], names: tuple[str, str] = ("distilled set", "test set")
) -> None:
    """Raise ValueError at the first label whose class differs."""
    for label, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            raise ValueError(
                f"class orders differ: label {label} is {a!r} in the {names[0]} and {b!r} in the {names[1]}"
            )
    if len(ours) != len(theirs):
        raise ValueError(
            f"class orders differ: {len(ours)} classes in the {names[0]}, {len(theirs)} in the {names[1]}"
        )


@torch.no_grad()
def predict(model: nn.Module, dataset: ImageData, protocol: Protocol, batch_size: int = 250) -> Tensor:
    """The logits of every image, float32 (N, C) on the CPU; the model is left in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat(
        [model(inputs).float().cpu() for inputs in test_inputs(dataset, protocol, device, batch_size)]
    )


def test_inputs(
    dataset: ImageData, protocol: Protocol, device: torch.device | str, batch_size: int = 250
) -> Iterator[Tensor]:
    """What a network sees of every image in a test: resized, its centre cut out, normalised."""
    for images, _ in dataset.batches(batch_size):
        pixels = resize(images.to(device), protocol.test_resize or protocol.image_size)
        yield normalise(centre(pixels, protocol.image_size), protocol.mean, protocol.std)


def accuracy(model: nn.Module, dataset: ImageData, protocol: Protocol) -> tuple[float, float]:
    """Top-1 and top-5 in percent (top-C with fewer than five classes)."""
    logits = predict(model, dataset, protocol)
    return topk(logits, dataset.labels, 1), topk(logits, dataset.labels, min(5, logits.shape[1]))


def topk(logits: Tensor, labels: Tensor, k: int) -> float:
    """The share, in percent, of labels (N,) among the k highest of logits (N, C)."""
    return 100 * (logits.topk(k, dim=1).indices == labels[:, None]).any(1).double().mean().item()


def imagenet_teacher(classes: Sequence[str], label_ids: Sequence[int]) -> Teacher:
    """torchvision's ResNet-18 of ImageNet-1K (RDED's teacher), with `classes`' logits at `label_ids` only.

    Its file is checked against the hash in its name and read as weights only. Raises FileNotFoundError where
    it can neither be found nor downloaded.
    """
    weights = ResNet18_Weights.IMAGENET1K_V1
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise FileNotFoundError(
            f"the teacher's weights could not be had ({error}); download {weights.url} to {place}"
        ) from error
    model: Any = network("timm/resnet18", num_classes=1000, image_size=224)
    model.load_state_dict(state)
    ids = torch.tensor(list(label_ids))
    model.fc.weight, model.fc.bias = (
        torch.nn.Parameter(value.detach()[ids]) for value in (model.fc.weight, model.fc.bias)
    )
    return Teacher(
        model, "resnet18", weights.url.rsplit("/", 1)[-1], tuple(classes), RDED_SOFT.mean, RDED_SOFT.std
    )


test_inputs.__test__ = False  # type: ignore[attr-defined]  # for pytest, which collects imported names
