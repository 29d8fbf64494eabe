"""Who gives soft labels, and the checks before it does; what a network predicts on real images.

RDED's teacher of ImageNet-1K is torchvision's ResNet-18. Those of other data sets, ImageNet's parts included,
are networks trained from scratch on the data set itself, by torchvision's reference code as SRe2L's were: so
RDED's README, which says no more of how. `teacher_from_file` reads such a network,
`teacher_training.train_teacher` trains one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, WeightsEnum, get_model_weights

from igd_lib.data.augment import centre, normalise, to_unit
from igd_lib.data.images import ImageData
from igd_lib.models.networks import network
from igd_lib.protocols import RDED_SOFT, Protocol
from igd_lib.tools import files, tensors

# Top-1, in percent, that RDED's README gives for its ResNet-18 teachers ("modified" for CIFAR).
RDED_TEACHERS: Mapping[str, float] = {
    "imagenette": 90.0,
    "imagewoof": 75.0,
    "cifar-10": 93.86,
    "cifar-100": 72.27,
}
RESNET18 = "torchvision/resnet18"
SHORT = 10.0  # points that a teacher of the same data may be below RDED's before it is refused


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
    top1: float | None = None  # percent of the real test images, where it is known

    def __str__(self) -> str:
        share = "" if self.top1 is None else f", {self.top1:.1f} % of the test images"
        return f"labels by {self.architecture} ({self.weights}){share}"


def check_teacher(teacher: Teacher, dataset: ImageData, protocol: Protocol, *, images: int = 200) -> float:
    """Top-1 (percent) of the teacher on `images` real ones spread over `dataset`; classes compared first.

    Raises ValueError for other classes, another order or number of logits, or a top-1 below `teacher.least`:
    a wrong teacher trains a network to chance without any other sign.
    """
    check_class_order(teacher.classes, dataset.classes, ("teacher", "data"))
    few = dataset.subset(torch.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().long())
    few = replace(few, whitening=None)  # a network that is trained on whitened images sees them so, not this
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
    """What a network sees of every image in a test: resized, its centre cut out, normalised or whitened.

    Images that have the protocol's size already are not resized, so whoever tests often gives those.
    """
    seen = seen_by(dataset, protocol, device)
    for images, _ in dataset.at(protocol.test_resize or protocol.image_size).batches(batch_size):
        yield seen(centre(to_unit(images.to(device)), protocol.image_size))


def seen_by(dataset: ImageData, protocol: Protocol, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """From [0, 1] pixels to a network's input: whitened as the images ask for, else the protocol's way."""
    if dataset.whitening is not None:
        return dataset.whitening.to(device)
    return lambda pixels: normalise(pixels, protocol.mean, protocol.std)


def labelled(dataset: ImageData, teacher: Teacher, protocol: Protocol) -> ImageData:
    """The images with a teacher's soft labels, one each for good: its probabilities of the image as it is.

    For a protocol whose labels are "own"; the teacher sees the images at the protocol's size, normalised as
    it was trained, also those that student networks see whitened.
    """
    seen = replace(dataset, whitening=None)
    logits = predict(teacher.model, seen, replace(protocol, mean=teacher.mean, std=teacher.std))
    return replace(dataset, targets=logits.softmax(1))


def accuracy(model: nn.Module, dataset: ImageData, protocol: Protocol) -> tuple[float, float]:
    """Top-1 and top-5 in percent (top-C with fewer than five classes)."""
    logits = predict(model, dataset, protocol)
    return topk(logits, dataset.labels, 1), topk(logits, dataset.labels, min(5, logits.shape[1]))


def topk(logits: Tensor, labels: Tensor, k: int) -> float:
    """The share, in percent, of labels (N,) among the k highest of logits (N, C)."""
    return 100 * (logits.topk(k, dim=1).indices == labels[:, None]).any(1).double().mean().item()


def least_for(dataset: str) -> float:
    """Percent of real images that a teacher of a data set must get right: SHORT below RDED's, else 50."""
    return RDED_TEACHERS[dataset] - SHORT if dataset in RDED_TEACHERS else Teacher.least


def imagenet_teacher(
    classes: Sequence[str], label_ids: Sequence[int], architecture: str = RESNET18
) -> Teacher:
    """torchvision's ResNet-18 of ImageNet-1K (RDED's teacher), with `classes`' logits at `label_ids` only.

    Or another "torchvision/NAME", of its first published weights. The file is checked against the hash in its
    name, wherever it comes from, and read as weights only.
    Raises ValueError where the classes have no ids in ImageNet-1K and for a damaged file, FileNotFoundError
    where the file can neither be found nor downloaded.
    """
    if len(label_ids) != len(classes) or not set(label_ids) <= set(range(1000)):
        raise ValueError(
            f"ImageNet's teacher knows classes by their ids 0 ... 999 there, and {len(classes)} classes came "
            f"with {len(label_ids)}, {list(label_ids)[:3]} ...; name a teacher of these classes "
            "(teacher_from_file), or train one (train_teacher)"
        )
    weights = _imagenet_weights(architecture)
    place = _imagenet_teacher_place(architecture)
    if lines := imagenet_teacher_file(architecture)[1]:
        raise ValueError(lines[0])
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"the teacher's weights could not be had ({error}); download {weights.url} to {place}"
        ) from error
    model = network(architecture, num_classes=1000, image_size=224)
    model.load_state_dict(state)
    ids = torch.tensor(list(label_ids))
    for parameter in list(model.parameters())[-2:]:  # the classifier's weight and bias
        parameter.data = parameter.data[ids]
    return Teacher(model, architecture, place.name, tuple(classes), RDED_SOFT.mean, RDED_SOFT.std)


def _imagenet_weights(architecture: str) -> WeightsEnum:
    if architecture == RESNET18:
        return ResNet18_Weights.IMAGENET1K_V1
    return get_model_weights(architecture.removeprefix("torchvision/"))["IMAGENET1K_V1"]


def _imagenet_teacher_place(architecture: str = RESNET18) -> Path:
    """Where torch.hub puts the weights of ImageNet's teacher."""
    return Path(torch.hub.get_dir()) / "checkpoints" / _imagenet_weights(architecture).url.rsplit("/", 1)[-1]


def imagenet_teacher_file(architecture: str = RESNET18) -> tuple[Path | None, list[str]]:
    """The file of ImageNet's teacher in torch.hub's cache, None where it is not, and what is wrong with it.

    torch.hub checks the hash in a file's name when it downloads, and never again.
    """
    path = _imagenet_teacher_place(architecture)
    if not path.is_file():
        return None, []
    published, found = path.stem.rpartition("-")[2], files.sha256(path)
    if found.startswith(published):
        return path, []
    line = (
        f"{path} is damaged or another file: its SHA-256 begins with {found[: len(published)]}, not "
        f"{published}; delete it and run again"
    )
    return path, [line]


def problems_of_imagenet_teacher() -> list[str]:
    """What keeps ImageNet's teacher from being loaded without a network, a line a problem."""
    path, lines = imagenet_teacher_file()
    if path is not None:
        return lines
    url, place = ResNet18_Weights.IMAGENET1K_V1.url, _imagenet_teacher_place()
    return [f"the teacher's weights (45 MB): not in {place}; curl -L --create-dirs -o {place} {url}"]


def problems_of_teacher_file(
    path: str | Path, num_classes: int, *, architecture: str = "torchvision/resnet18", image_size: int = 224
) -> list[str]:
    """What keeps `teacher_from_file` from reading a file, a line a problem; no weights are loaded."""
    path = Path(path)
    if not path.is_file():
        return [f"no teacher in {path}; put its state dict there"]
    what = f"{path} is no state dict of {architecture} for {num_classes} classes at {image_size} px"
    try:
        found = _shapes(path)
    except ValueError as error:
        return [str(error)]
    except (TypeError, AttributeError):  # plain values, but not those of a state dict
        return [f"{what}; put that of one there"]
    with torch.device("meta"):
        model = network(architecture, num_classes=num_classes, image_size=image_size)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # torch adds a normalisation's count of batches to states of before 2018.
    wanted = {name: shape for name, shape in own.items() if not name.endswith(".num_batches_tracked")}
    line = tensors.difference(found, wanted)
    if line is None and (more := [name for name in found if name not in own]):
        line = f"it has {len(more)} tensors that the network has not, the first is {more[0]}"
    return [f"{what}: {line}; put that of one there"] if line else []


def _shapes(path: Path) -> tensors.Shapes:
    """The shapes of a teacher's tensors, by the names that the network has for them."""
    if path.suffix == ".safetensors":
        return tensors.shapes(path)
    return {name: tuple(value.shape) for name, value in _plain(tensors.mapped(path)).items()}


def teacher_from_file(
    path: str | Path,
    classes: Sequence[str],
    *,
    architecture: str = "torchvision/resnet18",  # a name of `network`; "resnet18_modified" up to 64 px
    image_size: int = 224,
    mean: tuple[float, float, float] = RDED_SOFT.mean,  # RDED's, CIFAR included
    std: tuple[float, float, float] = RDED_SOFT.std,
    least: float = Teacher.least,
) -> Teacher:
    """A teacher from its state dict in a safetensors file, or in a .pt or .pth file read as weights only.

    `classes` in the order of its logits; `check_teacher` sees whether they are. A state dict may lie under
    "model" or "state_dict", as torchvision's reference code (and so RDED) saves it, and have been trained in
    parallel. Raises FileNotFoundError, or ValueError for a file that holds more than weights, or another
    network's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no teacher in {path}; put its state dict there")
    model = network(architecture, num_classes=len(classes), image_size=image_size)
    try:
        model.load_state_dict(_state(path))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        wanted = f"{architecture} for {len(classes)} classes at {image_size} px"
        raise ValueError(f"{path} is no state dict of {wanted}: {error}") from error
    weights = f"{path.name}, sha256 {files.sha256(path)[:12]}"
    return Teacher(model, architecture, weights, tuple(classes), mean, std, least)


def _state(path: Path) -> dict[str, Tensor]:
    """A file's state dict, by the names that the network has for itself."""
    # The reference code saves its settings beside the weights: plain values in a Namespace.
    return _plain(load_file(path) if path.suffix == ".safetensors" else tensors.mapped(path))


def _plain(found: Any) -> dict[str, Tensor]:
    """A state dict from under the names that training scripts put it and its tensors under."""
    for key in ("model", "state_dict"):
        found = found.get(key, found)
    return {name.removeprefix("module."): value for name, value in found.items()}


test_inputs.__test__ = False  # type: ignore[attr-defined]  # for pytest, which collects imported names
