"""Real images with an explicit class order: Fashion-MNIST and any ImageFolder.

A data set is uint8 images of one size, integer labels, and the tuple of class names whose order
defines the labels. Small sets live in memory; large ones are decoded when asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from igd_lib import files
from igd_lib.config import DATASETS, DataSpec, data_dir

MEMORY_LIMIT = 2 << 30  # bytes of decoded images that are kept in memory
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}

FASHION_FILES = {  # file: sha256 of the uncompressed bytes, so every packaging passes or fails alike
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_SYSTEM = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


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
            self.name, split or self.split, self.classes, self.labels[indices], self.image_size,
            lambda wanted: self.fetch(indices[wanted]),
        )  # fmt: skip

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
                raise ValueError(f"ipc={count}, but class {name!r} of {self.name} has {len(indices)} images in {self.split!r}")
            chosen.append(indices[torch.randperm(len(indices), generator=generator)[:count]])
        return self.subset(torch.cat(chosen), f"{self.split}, random {count} a class, seed {seed}")

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 images, labels) in batches; shuffled when a generator is given."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for indices in order.split(size):
            yield self.fetch(indices), self.labels[indices]


def from_tensors(
    name: str, split: str, classes: Sequence[str], images: Tensor, labels: Tensor
) -> ImageData:
    """In-memory data: images uint8 (N, 3, H, H), labels (N,) in 0..len(classes)-1."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    return ImageData(name, split, tuple(classes), labels.long(), images.shape[-1], lambda indices: images[indices])


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.float().div(127.5).sub(1)


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] to uint8 [0, 255], clamped and rounded."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def load(name: str | DataSpec, split: str = "train", root: str | Path | None = None) -> ImageData:
    """Load a data set by name.

    split: "train" (without the held-out part), "validation" (the last `holdout` of each class's
    training images; settings are chosen here) or "test". `root` overrides the folder. Raises
    FileNotFoundError (what is missing and how to get it) or ValueError (unknown name or split, a
    class folder missing, extra or empty, a damaged image).
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is 'train', 'validation' or 'test', got {split!r}")
    if isinstance(name, str) and name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(sorted(DATASETS))}, or pass a DataSpec")
    spec = DATASETS[name] if isinstance(name, str) else name
    stored = "test" if split == "test" else "train"
    data = _fashion_mnist(spec, stored, root) if spec.name == "fashion-mnist" else _image_folder(spec, stored, root)
    if split == "test" or spec.holdout == 0:
        if split == "validation":
            raise ValueError(f"{spec.name} has no held-out validation split; give its DataSpec a holdout")
        return data
    held = []
    for label in range(len(data.classes)):
        indices = data.class_indices(label)
        held.append(indices[len(indices) - round(len(indices) * spec.holdout) :])
    mask = torch.zeros(len(data), dtype=torch.bool)
    mask[torch.cat(held)] = True
    return data.subset((mask if split == "validation" else ~mask).nonzero().flatten(), split)


# --- any ImageFolder


def _image_folder(spec: DataSpec, stored: str, root: str | Path | None) -> ImageData:
    root = Path(root) if root is not None else data_dir() / (spec.folder or spec.name)
    candidates = ["train"] if stored == "train" else ["test", "val"]
    folder = next((root / name for name in candidates if (root / name).is_dir()), None)
    if folder is None:
        wanted = " or ".join(str(root / name) for name in candidates)
        raise FileNotFoundError(f"{spec.name}: no folder {wanted}; put one folder of images a class there, or set IGD_DATA")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = spec.classes or tuple(found)
    missing, extra = [c for c in classes if c not in found], [f for f in found if f not in classes]
    if missing or extra or not classes:
        raise ValueError(f"{folder}: class folders do not match; missing: {missing[:3] or 'none'}, unexpected: {extra[:3] or 'none'}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise ValueError(f"{folder / name}: no images in this class folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
        paths += images
        labels += [label] * len(images)

    def decode(indices: Tensor) -> Tensor:
        return torch.stack([read_image(paths[i], spec.image_size) for i in indices.tolist()])

    every = torch.arange(len(paths))
    if len(paths) * 3 * spec.image_size**2 <= MEMORY_LIMIT:
        return from_tensors(spec.name, stored, classes, decode(every), torch.tensor(labels))
    return ImageData(spec.name, stored, classes, torch.tensor(labels), spec.image_size, decode)


def read_image(path: str | Path, size: int) -> Tensor:
    """uint8 (3, size, size): the image as RGB, shorter side resized to `size`, centre-cropped.

    Raises ValueError naming a file that cannot be read or is cut short.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # PIL would clip 16 bits to white
                image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
            image = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read the image {path}: {error}; replace or remove it") from error
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, [size, size]))


# --- Fashion-MNIST


def _fashion_mnist(spec: DataSpec, stored: str, root: str | Path | None) -> ImageData:
    folder = fashion_mnist_folder(root)
    prefix = "train" if stored == "train" else "t10k"
    images = _idx(folder, f"{prefix}-images-idx3-ubyte", offset=16).reshape(-1, 1, 28, 28)
    labels = _idx(folder, f"{prefix}-labels-idx1-ubyte", offset=8)
    # 28 -> 32 with the background's black, three equal channels.
    images = F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
    return from_tensors(spec.name, stored, spec.classes, images, labels)


def fashion_mnist_folder(root: str | Path | None = None) -> Path:
    """The folder with Fashion-MNIST's four files, fetched if need be; no root rights needed.

    In this order: `root` or `$IGD_DATA/fashion-mnist`, Debian's installed package, that package
    downloaded and unpacked with apt-get and dpkg-deb, torchvision's download.
    """
    own = Path(root) if root is not None else data_dir() / "fashion-mnist"
    for folder in (own,) if root is not None else (own, own.parent / "FashionMNIST" / "raw", FASHION_SYSTEM):
        if all(_idx_file(folder, name) for name in FASHION_FILES):
            return folder
    if root is not None:
        raise FileNotFoundError(f"no Fashion-MNIST in {own}; it needs {', '.join(f + '.gz' for f in FASHION_FILES)}")
    with tempfile.TemporaryDirectory() as scratch:
        tried = []
        for source in (_from_debian, _from_torchvision):
            try:
                folder = source(Path(scratch))
            except (OSError, RuntimeError, subprocess.SubprocessError, urllib.error.URLError) as error:
                tried.append(f"{source.__name__.removeprefix('_from_')}: {str(error).strip().splitlines()[0]}")
                continue
            for name in FASHION_FILES:
                files.write(own / f"{name}.gz", (folder / f"{name}.gz").read_bytes())
            return own
    raise FileNotFoundError(
        f"Fashion-MNIST is not in {own} or {FASHION_SYSTEM} and could not be fetched ({'; '.join(tried)}). Install "
        f"Debian's package dataset-fashion-mnist, or put {', '.join(f + '.gz' for f in FASHION_FILES)} into {own}"
    )


def _from_debian(scratch: Path) -> Path:
    """Download and unpack Debian's package without installing it; uses private package lists if there are none."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise OSError("no apt-get and dpkg-deb here")
    folder = scratch / "debian"
    (folder / "lists" / "partial").mkdir(parents=True)

    def apt(*words: str) -> None:
        subprocess.run(["apt-get", "-qq", *words], cwd=folder, check=True, capture_output=True, timeout=600)

    try:
        apt("download", "dataset-fashion-mnist")
    except subprocess.CalledProcessError:
        private = ("-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}", "-o", "Debug::NoLocking=1")
        (folder / "cache" / "archives" / "partial").mkdir(parents=True)
        apt(*private, "update")
        apt(*private, "download", "dataset-fashion-mnist")
    package = next(folder.glob("*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True, capture_output=True, timeout=600)
    return folder / FASHION_SYSTEM.relative_to("/")


def _from_torchvision(scratch: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    FashionMNIST(str(scratch / "torchvision"), download=True)
    return scratch / "torchvision" / "FashionMNIST" / "raw"


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _idx(folder: Path, name: str, offset: int) -> Tensor:
    path = _idx_file(folder, name)
    assert path is not None  # fashion_mnist_folder looked
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
    if hashlib.sha256(raw).hexdigest() != FASHION_FILES[name]:
        raise ValueError(f"{path} does not have Fashion-MNIST's checksum; delete it and run again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=offset).copy())
