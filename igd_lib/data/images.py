"""Real images with an explicit class order: the named data sets (`datasets`) and any ImageFolder.

A data set is uint8 images of one size, integer labels, and the tuple of class names whose order
defines the labels. Small sets live in memory; large ones are decoded when asked for. Images of another size
are made from the originals (`ImageData.at`), so that none is resized twice.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from igd_lib.data import sources
from igd_lib.data.datasets import DataSpec, Resize, spec_of
from igd_lib.data.sources.base import Found
from igd_lib.data.sources.fashion import fashion_mnist_folder as fashion_mnist_folder
from igd_lib.data.zca import ZCA

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
    """Images of one split. `fetch(indices)` returns uint8 (n, 3, H, W); `labels` is int64 (N,).

    Images that a method has learned may be float pixels instead, 1.0 a channel's full light, neither rounded
    nor clamped; `targets`, `lr` and `whitening` are what it may have learned with them (`plain` drops them).
    """

    name: str
    split: str
    classes: tuple[str, ...]  # label i is classes[i]
    labels: Tensor
    image_size: int
    fetch: Callable[[Tensor], Tensor]
    # An image as it is stored, of any shape, by its position; None: `fetch` has them.
    original: Callable[[int], Image.Image] | None = None
    resize: Resize = "bilinear"  # how originals come to `image_size`
    slow: bool = False  # whether `fetch` reads files: batches are fetched while the one before is in use
    targets: Tensor | None = None  # soft labels of the images, float32 (N, classes): shares of one
    lr: float | None = None  # what a network is to be trained on them with, by SGD
    whitening: ZCA | None = None  # how a network sees them, in place of a protocol's normalisation

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
        original = self.original
        return replace(
            self,
            split=split or self.split,
            labels=self.labels[indices],
            fetch=lambda wanted: self.fetch(indices[wanted]),
            original=original and (lambda index: original(int(indices[index]))),
            targets=None if self.targets is None else self.targets[indices],
        )

    def plain(self) -> ImageData:
        """The same as others store images: uint8, clamped and rounded, with hard labels and nothing learned.

        Itself where it is that already.
        """
        found = replace(self, targets=None, lr=None, whitening=None)
        if not self.fetch(torch.tensor([0])).is_floating_point():
            nothing = self.targets is None and self.lr is None and self.whitening is None
            return self if nothing else found
        pixels = in_8_bits(self.fetch(torch.arange(len(self))).cpu())
        return replace(found, fetch=lambda indices: pixels[indices], slow=False)

    def photograph(self, index: int) -> Image.Image:
        """The original of the image at `index`: RGB, of any shape."""
        if self.original is not None:
            return self.original(index)
        return TF.to_pil_image(in_8_bits(self.fetch(torch.tensor([index]))[0].cpu()))

    def at(self, size: int, resize: Resize | None = None) -> ImageData:
        """The same images with sides of `size` px, made from the originals; itself where it has them already.

        `resize` is how, by default as now; `split` names another one. In memory up to MEMORY_LIMIT, else made
        when asked for. Raises ValueError for a size below 1, and for another size of whitened images.
        """
        if size < 1:
            raise ValueError(f"an image's side is at least 1 px, got {size}")
        how = resize or self.resize
        if size == self.image_size and (how == self.resize or self.original is None):
            return self
        if self.whitening is not None:
            raise ValueError(
                f"{self.name}, {self.split}: whitened images are of {self.image_size} px alone, not {size}; "
                "take a protocol of that size, or their plain() images"
            )
        split = self.split if how == self.resize else f"{self.split}, {how}"
        found = replace(self, split=split, image_size=size, resize=how, original=self.photograph)
        return held(replace(found, fetch=_maker(self.photograph, size, how), slow=True))

    def of_labels(self, labels: Sequence[int]) -> ImageData:
        """The images of some classes alone, which get the labels 0, 1, ... in that order.

        Raises ValueError where they have soft labels, which are shares of all classes.
        """
        if self.targets is not None:
            raise ValueError(f"{self.name}: soft labels are of all classes; take the plain() images of some")
        chosen = torch.cat([self.class_indices(label) for label in labels])
        found = self.subset(chosen, f"{self.split}, {len(labels)} classes")
        order = torch.zeros(len(self.classes), dtype=torch.long)
        order[list(labels)] = torch.arange(len(labels))
        return replace(found, classes=tuple(self.classes[i] for i in labels), labels=order[found.labels])

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

    def batches(
        self, size: int, generator: torch.Generator | None = None, done: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 images, labels) in batches, without the first `done`; shuffled when a generator is given.

        The order is drawn at once, before the first batch is asked for.
        """
        order = (
            torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        )
        parts = order.split(size)[done:]
        found = ahead(self.fetch, parts) if self.slow else map(self.fetch, parts)
        return ((images, self.labels[indices]) for indices, images in zip(parts, found, strict=True))


Given = TypeVar("Given")
Made = TypeVar("Made")


def ahead(make: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """`map`, where each item is made in a thread while the one before is in use.

    What `make` raises is raised where its item is asked for. The thread ends with the iterator.
    """
    with ThreadPoolExecutor(1, "ahead") as pool:
        following: Future[Made] | None = None
        for item in items:
            current, following = following, pool.submit(make, item)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


@dataclass
class Pass:
    """How far a shuffled pass over data is: what goes on within one needs it beside the generator's state."""

    begun: Tensor  # the generator's state before the pass
    done: int = 0  # batches

    @classmethod
    def begin(cls, generator: torch.Generator) -> Pass:
        return cls(generator.get_state())

    @classmethod
    def of(cls, note: Mapping[str, Any]) -> Pass | None:
        """From a `note`, None where it was made between two passes."""
        if "begun" not in note:
            return None
        return cls(torch.tensor(note["begun"], dtype=torch.uint8), note["batches"])

    @property
    def note(self) -> dict[str, Any]:
        """JSON-able."""
        return {"begun": self.begun.tolist(), "batches": self.done}

    def batches(
        self, data: ImageData, size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that are left, as `ImageData.batches`; `done` counts the one that is in use."""
        now = generator.get_state()
        generator.set_state(self.begun)
        left = data.batches(size, generator, self.done)
        if self.done:
            generator.set_state(now)
        for batch in left:
            self.done += 1
            yield batch


def from_tensors(name: str, split: str, classes: Sequence[str], images: Tensor, labels: Tensor) -> ImageData:
    """In-memory data: images uint8 (N, 3, H, H), labels (N,) in 0..len(classes)-1 (`learned`: float)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    return ImageData(
        name, split, tuple(classes), labels.long(), images.shape[-1], lambda indices: images[indices]
    )


def learned(plain: ImageData, pixels: Tensor, targets: Tensor | None = None, **also: Any) -> ImageData:
    """`plain`'s classes and labels with learned images: pixels float32 or uint8 (N, 3, H, H).

    Targets float32 (N, classes); `also`: lr, whitening. Raises ValueError for other shapes, images or
    targets that are not finite, targets that do not sum to one, and a rate that is not positive.
    """
    found = replace(plain, fetch=lambda indices: pixels[indices], targets=targets, **also)
    shape = (len(plain), 3, plain.image_size, plain.image_size)
    if tuple(pixels.shape) != shape or not pixels.isfinite().all():
        raise ValueError(f"images are finite numbers {shape}, got {tuple(pixels.shape)}")
    if targets is not None and (
        targets.shape != (len(plain), len(plain.classes))
        or not torch.allclose(targets.sum(1), torch.ones(len(plain)), atol=1e-4)
    ):
        raise ValueError(
            f"soft labels are shares of one, ({len(plain)}, {len(plain.classes)}), got {tuple(targets.shape)}"
        )
    if found.lr is not None and not 0 < found.lr < float("inf"):
        raise ValueError(f"a learning rate is positive, got {found.lr}")
    return found


def from_files(
    name: str,
    split: str,
    classes: Sequence[str],
    paths: Sequence[str],
    labels: Tensor,
    image_size: int | None = None,
) -> ImageData:
    """Image files, `labels` (N,) one each; `image_size`: by default the shorter side of the first, in px.

    Raises ValueError as `read_original`.
    """
    size = image_size or min(read_original(paths[0]).size)
    spec = DataSpec(name, tuple(classes), (), size)
    return _image_data(spec, split, Found(Path(), spec.classes, labels.long(), list(paths)))


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255], or float pixels of [0, 1], to float32 [-1, 1]."""
    if images.is_floating_point():
        return images.float().mul(2).sub(1)
    return images.float().div(127.5).sub(1)


def in_8_bits(pixels: Tensor) -> Tensor:
    """float [0, 1] to uint8 [0, 255], clamped and rounded; uint8 as it is."""
    return pixels if pixels.dtype == torch.uint8 else pixels.clamp(0, 1).mul(255).round().to(torch.uint8)


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] to uint8 [0, 255], clamped and rounded."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def load(
    name: str | DataSpec, split: str = "train", root: str | Path | None = None, *, check_sizes: bool = True
) -> ImageData:
    """Load a data set by name, or any other by its DataSpec (`datasets.image_folder` makes one).

    split: "train" (without the held-out part), "validation" (the last `holdout` of each class's
    training images; settings are chosen here) or "test"; images are resized once, as the DataSpec's `resize`
    has it. `root` overrides the folder; without it CIFAR, Food-101 and Fashion-MNIST are downloaded where
    they are not found. Raises FileNotFoundError (what is missing and how to get it) or ValueError: unknown
    name or split, a damaged image, and the first difference between the DataSpec and the disk (a class folder
    missing, extra or empty, another class order, another number of images; the last is allowed with
    check_sizes=False).
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is 'train', 'validation' or 'test', got {split!r}")
    spec = spec_of(name)
    if split == "validation" and spec.holdout == 0:
        raise ValueError(f"{spec.name} has no held-out validation split; give its DataSpec a holdout")
    stored = "test" if split == "test" else "train"
    found = sources.read(spec, stored, root)
    if check_sizes and (problem := _size_problem(spec, stored, found)):
        raise ValueError(f"{problem}; restore the files, or pass check_sizes=False")
    data = _image_data(spec, stored, found)
    if split == "test" or spec.holdout == 0:
        return data
    held = []
    for label in range(len(data.classes)):
        indices = data.class_indices(label)
        held.append(indices[len(indices) - round(len(indices) * spec.holdout) :])
    mask = torch.zeros(len(data), dtype=torch.bool)
    mask[torch.cat(held)] = True
    chosen = (mask if split == "validation" else ~mask).nonzero().flatten()
    return data.subset(chosen, _split(split, spec))


def missing(name: str | DataSpec, root: str | Path | None = None) -> list[str]:
    """What a data set still needs here, a line a piece with how to get it; empty if it is all there.

    Looks for folders and files only: nothing is decoded, counted or fetched. Raises ValueError for an unknown
    name.
    """
    return sources.missing(spec_of(name), root)


def count_problems(name: str | DataSpec) -> list[str]:
    """What is wrong with a data set that is here, folders and numbers of images; nothing is decoded."""
    spec, lines = spec_of(name), []
    if spec.layout.startswith("cifar"):  # archives, whose sums are checked as they are read
        return []
    for stored in ("train", "test"):
        try:
            if problem := _size_problem(spec, stored, sources.read(spec, stored, None)):
                lines.append(f"{problem}; restore the files")
        except (ValueError, OSError) as error:
            lines.append(str(error))
    return lines


def _size_problem(spec: DataSpec, stored: str, found: Found) -> str:
    """The first class, else the whole split, of another size than the DataSpec's; "" if there is none."""
    index = 0 if stored == "train" else 1
    each, total = spec.per_class[index], spec.sizes[index]
    counts = found.labels.bincount(minlength=len(found.classes)).tolist()
    for name, count in zip(found.classes, counts, strict=True):
        if each is not None and count != each:
            size = f"class {name!r} has {count:,} images instead of {each:,}"
            return f"{spec.name}, {stored}: {size} in {found.where}"
    if total is not None and len(found.labels) != total:
        size = f"{len(found.labels):,} images instead of {total:,}"
        return f"{spec.name}, {stored}: {size} in {found.where}"
    return ""


# --- decoding


def _image_data(spec: DataSpec, stored: str, found: Found) -> ImageData:
    """What was found, with sides of the DataSpec's `image_size`."""
    images, size, how, split = found.images, spec.image_size, spec.resize, _split(stored, spec)
    if isinstance(images, Tensor):
        data = from_tensors(spec.name, split, found.classes, images, found.labels)
        return replace(data, resize=how).at(size)

    def original(index: int) -> Image.Image:
        return read_original(images[index])

    fetch = _maker(original, size, how)
    data = ImageData(spec.name, split, found.classes, found.labels, size, fetch, original, how, slow=True)
    return held(data)


def _split(name: str, spec: DataSpec) -> str:
    """The split's name; it says how its images were resized, where not as usual: keys on disk hold it."""
    return name if spec.resize == "bilinear" else f"{name}, {spec.resize}"


def _maker(original: Callable[[int], Image.Image], size: int, how: Resize) -> Callable[[Tensor], Tensor]:
    """`ImageData.fetch` of images that are made from their originals when asked for."""
    return lambda indices: _stacked(lambda index: square(original(index), size, how), indices.tolist(), size)


def held(data: ImageData) -> ImageData:
    """The same with its images in memory, where they take at most MEMORY_LIMIT."""
    if len(data) * 3 * data.image_size**2 > MEMORY_LIMIT:
        return data
    images = data.fetch(torch.arange(len(data)))
    return replace(data, fetch=lambda indices: images[indices], slow=False)


def _stacked(make: Callable[[Any], Image.Image], items: Sequence[Any], size: int) -> Tensor:
    """uint8 (n, 3, size, size): what `make` gives for each, several at once."""
    images = torch.empty(len(items), 3, size, size, dtype=torch.uint8)
    if THREADS == 1 or len(items) < 2:
        for image, item in zip(images, items, strict=True):
            image.copy_(TF.pil_to_tensor(make(item)))
        return images
    with ThreadPoolExecutor(THREADS) as pool:
        for image, made in zip(images, pool.map(make, items), strict=True):
            image.copy_(TF.pil_to_tensor(made))
    return images


def read_images(paths: Sequence[str | Path], size: int, resize: Resize = "bilinear") -> Tensor:
    """uint8 (n, 3, size, size): `read_image` of each file, several at once."""
    return _stacked(lambda path: square(read_original(path), size, resize), paths, size)


def read_image(path: str | Path, size: int, resize: Resize = "bilinear") -> Tensor:
    """uint8 (3, size, size): the file's image, its shorter side resized to `size`, its centre cut out.

    Raises ValueError as `read_original`.
    """
    return TF.pil_to_tensor(square(read_original(path), size, resize))


def square(image: Image.Image, size: int, resize: Resize = "bilinear") -> Image.Image:
    """The image with its shorter side resized to `size` px, and its centre cut out.

    "bilinear" is torchvision's Resize and CenterCrop, which every peer's data go through: antialiased, the
    longer side truncated. "bicubic-halving" is ADM's and DiT's `center_crop_arr`, which Minimax fine-tunes
    on: halved by box filter while the shorter side is at least twice `size`, then bicubic, sides rounded.
    """
    if resize == "bilinear":
        return TF.center_crop(TF.resize(image, [size], TF.InterpolationMode.BILINEAR), [size, size])
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    left, top = ((side - size) // 2 for side in sides)
    return image.resize(sides, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def read_original(path: str | Path) -> Image.Image:
    """The file's image as RGB, in its own size.

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
            return image.convert("RGB")
    except UNREADABLE as error:
        raise ValueError(f"cannot read the image {path}: {error}; replace or remove it") from error
