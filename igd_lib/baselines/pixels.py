"""What methods that optimise pixels have in common: their draws, networks, real images, and what is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from igd_lib.data.images import ImageData, from_tensors, held, in_8_bits
from igd_lib.evaluation import resident
from igd_lib.models.networks import ConvNet, ResNet
from igd_lib.models.networks import network as make_network
from igd_lib.tools import files

SAVE_SECONDS = 60.0  # at most one training state is written in so much time
SMALL = 64  # px a side: up to there data sets are optimised with the authors' own settings for such


def entropy(*numbers: int) -> int:
    """A seed that depends on each of several numbers of at least 0, and on their places."""
    # Its own length first: numpy takes [1] and [1, 0] for the same.
    return int(
        np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )


def generator_of(*numbers: int) -> torch.Generator:
    """A generator on the CPU, seeded by `entropy`."""
    return torch.Generator().manual_seed(entropy(*numbers))


def depth_for(image_size: int) -> int:
    """Of a ConvNet whose last map has about 4 x 4 px, as condensation methods have it."""
    return max(1, round(math.log2(image_size / 4)))


def fresh_network(
    name: str, *, classes: int, image_size: int, device: str, seed: Sequence[int]
) -> ConvNet | ResNet:
    """A newly initialised network in training mode, the same on every device; no global generator moves.

    A class goes through it by itself. Raises ValueError for one with batch statistics, which would be that
    class's, and for other libraries' networks, which may draw as they run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(entropy(*seed))  # torch's own would seed GPUs too
        model = make_network(name, num_classes=classes, image_size=image_size)
    statistics = any(isinstance(part, _BatchNorm) for part in model.modules())
    if statistics or not isinstance(model, ConvNet | ResNet):
        raise ValueError(
            "classes go through the network one by one, so it may have no batch statistics; "
            f"{name!r} has, or is another library's: choose convnetN, convnetN-wM, resnetN or resnetapN"
        )
    return model.to(device)


def selected(data: ImageData, labels: Sequence[int] | None, ipc: int) -> list[int]:
    """The labels whose images are made: those named, all with None.

    Raises ValueError for a label that the data do not have or that is named twice, and for an IPC below 1 or
    above what a class has.
    """
    classes = len(data.classes)
    found = list(range(classes)) if labels is None else list(labels)
    if not found or len(set(found)) < len(found) or not set(found) <= set(range(classes)):
        raise ValueError(f"labels are some of 0 ... {classes - 1}, each once, got {found}")
    if ipc < 1:
        raise ValueError(f"ipc is at least 1, got {ipc}")
    for label in found:
        if ipc > (count := len(data.class_indices(label))):
            raise ValueError(
                f"ipc {ipc} is more than class {data.classes[label]!r} of {data.name} has, {count} images in "
                f"{data.split!r}; choose a smaller ipc"
            )
    return found


def at_hand(data: ImageData, device: str) -> ImageData:
    """The same with its images in memory, or on a GPU, where they fit."""
    return resident(held(data) if data.slow else data, device)


def of_some_classes(data: ImageData, labels: Sequence[int]) -> ImageData:
    """The images of these classes alone, under the labels and among the classes that they had."""
    if len(labels) == len(data.classes):
        return data
    return data.subset(torch.cat([data.class_indices(label) for label in labels]))


def stored(
    data: ImageData, split: str, images: Sequence[Tensor], labels: Sequence[int], method: str
) -> ImageData:
    """The set that a method ends with: [0, 1] pixels (ipc, 3, H, H) a label, clamped and rounded to 8 bits.

    Labels and classes stay the data's. Raises FloatingPointError for pixels that are not finite.
    """
    pixels = torch.cat([image.detach().cpu() for image in images])
    if not torch.isfinite(pixels).all():
        raise FloatingPointError(f"{method}: pixels are not finite; lower its lr")
    owners = torch.tensor(list(labels)).repeat_interleave(len(images[0]))
    return from_tensors(data.name, split, data.classes, in_8_bits(pixels), owners)


def check_finite(loss: Tensor, method: str, where: str, remedy: str) -> Tensor:
    """The loss; FloatingPointError where it is not finite."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"{method}: the loss is {loss.item()} in {where}; {remedy}")
    return loss


def run_of(data: ImageData, labels: Sequence[int], ipc: int, seed: int, settings: Any) -> dict[str, Any]:
    """What names a run in its state: all that its images depend on. Settings are a dataclass."""
    own = {"labels": list(labels), "ipc": ipc, "seed": seed}
    return own | {"data": data.name, "split": data.split, "images": len(data)} | asdict(settings)


def load_state(
    path: Path | None, about: dict[str, Any], optimizer: torch.optim.Optimizer, **models: nn.Module
) -> dict[str, Any]:
    """Restore what was saved in a file, in place: its note, {"step": 0} where there is none.

    Raises ValueError for a state of other settings than `about`, JSON-able, which the note has.
    """
    if path is None or not path.is_file():
        return {"step": 0}
    _, note = files.load_tensors(path)
    if difference := files.difference(note.get("about", {}), json.loads(json.dumps(about))):
        raise ValueError(f"{path} is of another run ({difference}); delete it, or name another file")
    return files.load_training(path, optimizer, generator=None, **models)
