"""Data sets as they lie on disk: where the files of each layout are, how they are fetched, and how they are read."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from igd_lib import files
from igd_lib.config import data_dir

if TYPE_CHECKING:
    from igd_lib.datasets import DataSpec

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
FETCH_ERRORS = (OSError, http.client.HTTPException, RuntimeError, subprocess.SubprocessError, tarfile.TarError)  # URLError is an OSError


@dataclass(frozen=True)
class Found:
    """One split as stored: `labels` int64 (N,), class after class for image files."""

    where: Path
    classes: tuple[str, ...]
    labels: Tensor
    images: list[str] | Tensor  # files, or uint8 (N, 3, H, H)


def place(spec: DataSpec, root: str | Path | None) -> Path:
    """The data set's folder: `root` where given, else below `$IGD_DATA`."""
    return Path(root) if root is not None else data_dir() / (spec.folder or spec.name)


def read(spec: DataSpec, stored: str, root: str | Path | None) -> Found:
    """The stored split "train" or "test"; small sets are fetched if need be, but never into a given `root`.

    Raises FileNotFoundError (what is missing and how to get it) or ValueError (the first thing that is not as it should be).
    """
    return _LAYOUTS[spec.layout][0](spec, stored, root)


def missing(spec: DataSpec, root: str | Path | None) -> list[str]:
    """What is not there, a line a piece with how to get it."""
    return _LAYOUTS[spec.layout][1](spec, root)


def check_order(ours: Sequence[str], theirs: Sequence[str], where: Path) -> None:
    """Raise ValueError at the first label whose class differs from the list in the file `where`."""
    for label in range(max(len(ours), len(theirs))):
        a, b = (repr(names[label]) if label < len(names) else "not there" for names in (ours, theirs))
        if a != b:
            raise ValueError(f"class orders differ: label {label} is {a} in the DataSpec and {b} in {where}; correct or remove the wrong list")


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# --- any ImageFolder


def _split_folder(base: Path, stored: str) -> Path | None:
    names = ("train",) if stored == "train" else ("test", "val")
    return next((base / name for name in names if (base / name).is_dir()), None)


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _image_folder(spec: DataSpec, stored: str, root: str | Path | None) -> Found:
    from torchvision.datasets.folder import make_dataset

    base = place(spec, root)
    folder = _split_folder(base, stored)
    if folder is None:
        wanted = base / "train" if stored == "train" else f"{base / 'test'} or {base / 'val'}"
        raise FileNotFoundError(f"{spec.name}: no folder {wanted}; put one folder of images a class there, or set IGD_DATA")
    listed = base / "classes.txt"
    order = tuple(_lines(listed)) if listed.is_file() and not spec.subset else ()
    if spec.classes and order:
        check_order(spec.classes, order, listed)
    there = _class_folders(folder)
    classes = spec.classes or order or tuple(there)
    lacking = [name for name in classes if name not in set(there)]
    extra = [] if spec.subset else [name for name in there if name not in set(classes)]
    if lacking or extra or not classes:
        raise ValueError(f"{folder}: class folders do not match; missing: {lacking[:3] or 'none'}, unexpected: {extra[:3] or 'none'}")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):  # ImageFolder's own listing, so the order within a class is its order too
        images = make_dataset(str(folder), {name: label}, IMAGE_SUFFIXES, allow_empty=True)
        if not images:
            raise ValueError(f"{folder / name}: no images in this class folder ({', '.join(IMAGE_SUFFIXES)})")
        paths += [path for path, _ in images]
        labels += [label] * len(images)
    return Found(folder, classes, torch.tensor(labels), paths)


def _missing_image_folder(spec: DataSpec, root: str | Path | None) -> list[str]:
    base = place(spec, root)
    folders = [_split_folder(base, stored) for stored in ("train", "test")]
    if None in folders:
        return [f"the images of {spec.name}: put them into {base}/train and {base}/val, one folder a class (set IGD_DATA to change the place)"]
    lines = []
    for folder in folders:
        there = set(_class_folders(folder))
        lacking = [name for name in spec.classes if name not in there]
        if lacking:
            lines.append(f"the images of {spec.name}: {len(lacking)} of {len(spec.classes)} class folders are not in {folder}, the first is {lacking[0]}")
    return lines


# --- Food-101: images/CLASS/ID.jpg, and meta/train.txt and test.txt, which list CLASS/ID


def _missing_food(spec: DataSpec, root: str | Path | None) -> list[str]:
    base = place(spec, root)
    pieces = [base / "meta" / "train.txt", base / "meta" / "test.txt", *(base / "images" / name for name in spec.classes)]
    lacking = [piece for piece in pieces if not piece.exists()]
    if not lacking:
        return []
    return [f"{spec.name}: no {lacking[0]}; unpack food-101.tar.gz (5 GB) so that {base} holds images and meta, or load it where there is a network"]


def _food(spec: DataSpec, stored: str, root: str | Path | None) -> Found:
    from torchvision.datasets import Food101

    base = place(spec, root)
    if root is None and not ((base / "meta").is_dir() and (base / "images").is_dir()):
        try:
            Food101(str(base.parent), download=True)  # into base.parent/food-101, with its checksum
        except FETCH_ERRORS as error:
            raise FileNotFoundError(f"{_missing_food(spec, root)[0]} (downloading failed: {error})") from error
    lacking = _missing_food(spec, root)
    if lacking:
        raise FileNotFoundError(lacking[0])
    if (base / "meta" / "classes.txt").is_file():  # listed in an order that is not everyone's: the names have to agree
        check_order(spec.classes, sorted(_lines(base / "meta" / "classes.txt")), base / "meta" / "classes.txt")
    listing = base / "meta" / f"{stored}.txt"
    names: dict[str, list[str]] = {name: [] for name in spec.classes}
    for line in _lines(listing):
        name, _, image = line.partition("/")
        if name not in names or not image:
            raise ValueError(f"{listing}: {line!r} is not CLASS/ID of one of the {len(names)} classes; unpack food-101.tar.gz again")
        names[name].append(f"{image}.jpg")
    paths: list[str] = []
    for name, images in names.items():
        folder = base / "images" / name
        there = set(os.listdir(folder))
        absent = next((image for image in images if image not in there), None)
        if absent is not None:
            raise ValueError(f"{folder / absent} is in {listing} and not on disk; unpack food-101.tar.gz again")
        paths += [str(folder / image) for image in images]
    labels = [label for label, images in enumerate(names.values()) for _ in images]
    return Found(base, spec.classes, torch.tensor(labels, dtype=torch.int64), paths)


# --- CIFAR-10 and CIFAR-100: the binary version, fixed-length records of label bytes and 3 x 32 x 32 pixel bytes


@dataclass(frozen=True)
class CifarFiles:
    """What is in a CIFAR archive, and where it comes from. The last of the label bytes is the (fine) label."""

    url: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int
    names: str


CIFAR = {
    "cifar-10": CifarFiles(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), 1, "batches.meta.txt",
    ),
    "cifar-100": CifarFiles(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary",
        ("train.bin",), ("test.bin",), 2, "fine_label_names.txt",
    ),
}  # fmt: skip


def _cifar_folder(spec: DataSpec, root: str | Path | None) -> Path | None:
    kind, base = CIFAR[spec.layout], place(spec, root)
    candidates = [base / kind.folder, base] if root is not None else [base / kind.folder, base, data_dir() / kind.folder]
    return next((folder for folder in candidates if all((folder / name).is_file() for name in kind.train + kind.test)), None)


def _missing_cifar(spec: DataSpec, root: str | Path | None) -> list[str]:
    kind, base = CIFAR[spec.layout], place(spec, root)
    if _cifar_folder(spec, root) is not None:
        return []
    return [f"{spec.name}: not in {base}; unpack {kind.url} (md5 {kind.md5}) there, or load it where there is a network"]


def _cifar(spec: DataSpec, stored: str, root: str | Path | None) -> Found:
    kind = CIFAR[spec.layout]
    folder = _cifar_folder(spec, root)
    if folder is None:
        if root is not None:
            raise FileNotFoundError(_missing_cifar(spec, root)[0])
        folder = _download_cifar(spec)
    if (folder / kind.names).is_file():
        check_order(spec.classes, _lines(folder / kind.names), folder / kind.names)
    size = kind.label_bytes + 3 * 32 * 32
    parts = []
    for name in kind.train if stored == "train" else kind.test:
        raw = np.fromfile(folder / name, np.uint8)
        if len(raw) == 0 or len(raw) % size:
            raise ValueError(f"{folder / name}: {len(raw)} bytes are no whole number of records of {size}; delete it and run again")
        parts.append(raw.reshape(-1, size))
    records = torch.from_numpy(np.concatenate(parts))
    labels = records[:, kind.label_bytes - 1].long()
    if labels.max() >= len(spec.classes):
        raise ValueError(f"{folder}: label {labels.max().item()} among {len(spec.classes)} classes, so these are not {spec.layout}'s files; replace them")
    return Found(folder, spec.classes, labels, records[:, kind.label_bytes :].reshape(-1, 3, 32, 32).contiguous())


def _download_cifar(spec: DataSpec) -> Path:
    from torchvision.datasets.utils import download_and_extract_archive

    kind = CIFAR[spec.layout]
    folder = place(spec, None) / kind.folder
    with tempfile.TemporaryDirectory() as scratch:
        try:
            download_and_extract_archive(kind.url, scratch, md5=kind.md5)
            found = {name: (Path(scratch) / kind.folder / name).read_bytes() for name in (*kind.train, *kind.test, kind.names)}
        except FETCH_ERRORS as error:
            raise FileNotFoundError(f"{_missing_cifar(spec, None)[0]} (downloading failed: {error})") from error
    for name, content in found.items():
        files.write(folder / name, content)
    return folder


# --- Fashion-MNIST

FASHION_FILES = {  # file: sha256 of the uncompressed bytes, so every packaging passes or fails alike
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_SYSTEM = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


def _fashion_mnist(spec: DataSpec, stored: str, root: str | Path | None) -> Found:
    folder = fashion_mnist_folder(root)
    prefix = "train" if stored == "train" else "t10k"
    images = _idx(folder, f"{prefix}-images-idx3-ubyte", offset=16).reshape(-1, 1, 28, 28)
    labels = _idx(folder, f"{prefix}-labels-idx1-ubyte", offset=8)
    # 28 -> 32 with the background's black, three equal channels.
    return Found(folder, spec.classes, labels.long(), F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous())


def _fashion_found(root: str | Path | None) -> Path | None:
    own = Path(root) if root is not None else data_dir() / "fashion-mnist"
    folders = (own,) if root is not None else (own, own.parent / "FashionMNIST" / "raw", FASHION_SYSTEM)
    return next((folder for folder in folders if all(_idx_file(folder, name) for name in FASHION_FILES)), None)


def _missing_fashion(spec: DataSpec, root: str | Path | None) -> list[str]:
    if _fashion_found(root) is not None:
        return []
    own = Path(root) if root is not None else data_dir() / "fashion-mnist"
    needed = ", ".join(f"{name}.gz" for name in FASHION_FILES)
    return [f"{spec.name}: not in {own}; put {needed} there, install Debian's package dataset-fashion-mnist, or load it where there is a network"]


def fashion_mnist_folder(root: str | Path | None = None) -> Path:
    """The folder with Fashion-MNIST's four files, fetched if need be; no root rights needed.

    In this order: `root` or `$IGD_DATA/fashion-mnist`, Debian's installed package, that package
    downloaded and unpacked with apt-get and dpkg-deb, torchvision's download.
    """
    found = _fashion_found(root)
    if found is not None:
        return found
    if root is not None:
        raise FileNotFoundError(f"no Fashion-MNIST in {root}; it needs {', '.join(f + '.gz' for f in FASHION_FILES)}")
    own = data_dir() / "fashion-mnist"
    with tempfile.TemporaryDirectory() as scratch:
        tried = []
        for source in (_from_debian, _from_torchvision):
            try:
                folder = source(Path(scratch))
            except FETCH_ERRORS as error:
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


_LAYOUTS: dict[str, tuple[Callable[..., Found], Callable[..., list[str]]]] = {
    "image-folder": (_image_folder, _missing_image_folder),
    "food-101": (_food, _missing_food),
    "cifar-10": (_cifar, _missing_cifar),
    "cifar-100": (_cifar, _missing_cifar),
    "fashion-mnist": (_fashion_mnist, _missing_fashion),
}
