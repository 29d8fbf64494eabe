"""Real images with an explicit class order: the named data sets (`datasets`) and any ImageFolder.

A data set is uint8 images of one size, integer labels, and the tuple of class names whose order
defines the labels. Small sets live in memory; large ones are decoded when asked for.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from igd_lib.data import sources
from igd_lib.data.datasets import DataSpec, spec_of
from igd_lib.data.sources.base import Found
from igd_lib.data.sources.fashion import fashion_mnist_folder as fashion_mnist_folder

MEMORY_LIMIT = 2 << 30  # bytes of decoded images that are kept in memory
# PIL decodes without the interpreter's lock.
THREADS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
# What PIL raises for files that are no image, cut short or damaged (UnidentifiedImageError is an OSError).
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    IndexError,
    KeyError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageData:
    """Images of one split. `fetch(indices)` returns uint8 (n, 3, H, W); `labels` is int64 (N,)."""

    name: str
    split: str
    classes: tuple[str, ...]  # label i is classes[i]
    labels: Tensor
    image_size: int
    fetch: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def class_indices(self, label: int) -> Tensor:
        """Positions of one class's images, in file order."""
        return (self.labels == label).nonzero().flatten()

    def of_class(self, label: int, count: int | None = None) -> Tensor:
        """uint8 (n, 3, H, W): the first `count` images of a class in file order (all with None)."""
        return self.fetch(self.class_indices(label)[:count])

    def subset(self, indices: Tensor, split: str | None = None) -> ImageData:
        """The images at `indices`, in that order."""
        return ImageData(
            self.name,
            split or self.split,
            self.classes,
            self.labels[indices],
            self.image_size,
            lambda wanted: self.fetch(indices[wanted]),
        )

    def first(self, count: int) -> ImageData:
        """The first `count` images of each class in file order (all where a class has fewer)."""
        chosen = torch.cat([self.class_indices(label)[:count] for label in range(len(self.classes))])
        return self.subset(chosen, f"{self.split}, first {count} a class")

    def per_class(self, count: int, seed: int) -> ImageData:
        """A random draw of `count` images a class, without replacement: the Random baseline.

        Raises ValueError when `count` is below 1 or above what a class has.
        """
        if count < 1:
            raise ValueError(f"ipc is at least 1, got {count}")
        generator = torch.Generator().manual_seed(seed)
        chosen = []
        for label, name in enumerate(self.classes):
            indices = self.class_indices(label)
            if count > len(indices):
                raise ValueError(
                    f"ipc={count}, but class {name!r} of {self.name} has {len(indices)} images in "
                    f"{self.split!r}"
                )
            chosen.append(indices[torch.randperm(len(indices), generator=generator)[:count]])
        return self.subset(torch.cat(chosen), f"{self.split}, random {count} a class, seed {seed}")

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 images, labels) in batches; shuffled when a generator is given."""
        order = (
            torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        )
        for indices in order.split(size):
            yield self.fetch(indices), self.labels[indices]


def from_tensors(name: str, split: str, classes: Sequence[str], images: Tensor, labels: Tensor) -> ImageData:
    """In-memory data: images uint8 (N, 3, H, H), labels (N,) in 0..len(classes)-1."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    return ImageData(
        name, split, tuple(classes), labels.long(), images.shape[-1], lambda indices: images[indices]
    )


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.float().div(127.5).sub(1)


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] to uint8 [0, 255], clamped and rounded."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def load(
    name: str | DataSpec, split: str = "train", root: str | Path | None = None, *, check_sizes: bool = True
) -> ImageData:
    """Load a data set by name, or any other by its DataSpec (`datasets.image_folder` makes one).

    split: "train" (without the held-out part), "validation" (the last `holdout` of each class's
    training images; settings are chosen here) or "test". `root` overrides the folder; without it CIFAR,
    Food-101 and Fashion-MNIST are downloaded where they are not found. Raises FileNotFoundError (what is
    missing and how to get it) or ValueError: unknown name or split, a damaged image, and the first
    difference between the DataSpec and the disk (a class folder missing, extra or empty, another class
    order, another number of images; the last is allowed with check_sizes=False).
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is 'train', 'validation' or 'test', got {split!r}")
    spec = spec_of(name)
    if split == "validation" and spec.holdout == 0:
        raise ValueError(f"{spec.name} has no held-out validation split; give its DataSpec a holdout")
    stored = "test" if split == "test" else "train"
    found = sources.read(spec, stored, root)
    if check_sizes:
        _check_sizes(spec, stored, found)
    data = _image_data(spec, stored, found)
    if split == "test" or spec.holdout == 0:
        return data
    held = []
    for label in range(len(data.classes)):
        indices = data.class_indices(label)
        held.append(indices[len(indices) - round(len(indices) * spec.holdout) :])
    mask = torch.zeros(len(data), dtype=torch.bool)
    mask[torch.cat(held)] = True
    return data.subset((mask if split == "validation" else ~mask).nonzero().flatten(), split)


def missing(name: str | DataSpec, root: str | Path | None = None) -> list[str]:
    """What a data set still needs here, a line a piece with how to get it; empty if it is all there.

    Looks for folders and files only: nothing is decoded, counted or fetched. Raises ValueError for an unknown
    name.
    """
    return sources.missing(spec_of(name), root)


def _check_sizes(spec: DataSpec, stored: str, found: Found) -> None:
    """Raise ValueError at the first class, else at the whole split, of another size than the DataSpec's."""
    index, remedy = (0 if stored == "train" else 1), "restore the files, or pass check_sizes=False"
    each, total = spec.per_class[index], spec.sizes[index]
    for name, count in zip(
        found.classes, found.labels.bincount(minlength=len(found.classes)).tolist(), strict=True
    ):
        if each is not None and count != each:
            raise ValueError(
                f"{spec.name}, {stored}: class {name!r} has {count:,} images instead of {each:,} in "
                f"{found.where}; {remedy}"
            )
    if total is not None and len(found.labels) != total:
        raise ValueError(
            f"{spec.name}, {stored}: {len(found.labels):,} images instead of {total:,} in {found.where}; "
            f"{remedy}"
        )


# --- decoding


def _image_data(spec: DataSpec, stored: str, found: Found) -> ImageData:
    """In memory up to MEMORY_LIMIT, else decoded (or resized) when asked for."""
    images, size = found.images, spec.image_size
    if isinstance(images, Tensor) and images.shape[-1] == size:
        return from_tensors(spec.name, stored, found.classes, images, found.labels)

    def fetch(indices: Tensor) -> Tensor:
        if isinstance(images, Tensor):
            return TF.resize(images[indices], [size, size], TF.InterpolationMode.BICUBIC, antialias=True)
        return read_images([images[i] for i in indices.tolist()], size)

    if len(found.labels) * 3 * size**2 <= MEMORY_LIMIT:
        return from_tensors(
            spec.name, stored, found.classes, fetch(torch.arange(len(found.labels))), found.labels
        )
    return ImageData(spec.name, stored, found.classes, found.labels, size, fetch)


def read_images(paths: Sequence[str | Path], size: int) -> Tensor:
    """uint8 (n, 3, size, size): `read_image` of each file, several at once."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    if THREADS == 1 or len(paths) < 2:
        for image, path in zip(images, paths, strict=True):
            image.copy_(read_image(path, size))
        return images
    with ThreadPoolExecutor(THREADS) as pool:
        for image, decoded in zip(images, pool.map(lambda path: read_image(path, size), paths), strict=True):
            image.copy_(decoded)
    return images


def read_image(path: str | Path, size: int) -> Tensor:
    """uint8 (3, size, size): the image as RGB, shorter side resized to `size`, centre-cropped.

    16-bit grey keeps its upper 8 bits, transparency is dropped, and an EXIF orientation is not applied,
    as in torchvision's ImageFolder. Raises ValueError naming a file that cannot be read, is cut short, or
    has 32 bits a pixel (whose range is anyone's guess).
    """
    try:
        with Image.open(path) as file:
            file.load()
            image: Image.Image = file
            if image.mode.startswith("I;16"):  # PIL would clip 16 bits to white
                image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError("it has 32 bits a pixel; store it with 8 or 16")
            # Through RGBA: PIL warns of the direct way.
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            image = image.convert("RGB")
    except UNREADABLE as error:
        raise ValueError(f"cannot read the image {path}: {error}; replace or remove it") from error
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize(
            [max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC
        )
    return TF.pil_to_tensor(TF.center_crop(image, [size, size]))
