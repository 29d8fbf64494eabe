"""Any ImageFolder: `train` and `test` (else `val`), each with one folder of images a class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torchvision.datasets.folder import make_dataset

from igd_lib.data.sources.base import Found, check_order, lines, place

if TYPE_CHECKING:
    from igd_lib.data.datasets import DataSpec

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def _split_folder(base: Path, stored: str) -> Path | None:
    names = ("train",) if stored == "train" else ("test", "val")
    return next((base / name for name in names if (base / name).is_dir()), None)


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def read(spec: DataSpec, stored: str, root: str | Path | None) -> Found:
    base = place(spec, root)
    folder = _split_folder(base, stored)
    if folder is None:
        wanted = base / "train" if stored == "train" else f"{base / 'test'} or {base / 'val'}"
        raise FileNotFoundError(
            f"{spec.name}: no folder {wanted}; put one folder of images a class there, or set IGD_DATA"
        )
    listed = base / "classes.txt"
    order = tuple(lines(listed)) if listed.is_file() and not spec.subset else ()
    if spec.classes and order:
        check_order(spec.classes, order, listed)
    there = _class_folders(folder)
    classes = spec.classes or order or tuple(there)
    lacking = [name for name in classes if name not in set(there)]
    extra = [] if spec.subset else [name for name in there if name not in set(classes)]
    if lacking or extra or not classes:
        raise ValueError(
            f"{folder}: class folders do not match; missing: {lacking[:3] or 'none'}, unexpected: "
            f"{extra[:3] or 'none'}"
        )
    paths: list[str] = []
    labels: list[int] = []
    # ImageFolder's own listing, so the order within a class is its order too.
    for label, name in enumerate(classes):
        images = make_dataset(str(folder), {name: label}, IMAGE_SUFFIXES, allow_empty=True)
        if not images:
            raise ValueError(f"{folder / name}: no images in this class folder ({', '.join(IMAGE_SUFFIXES)})")
        paths += [path for path, _ in images]
        labels += [label] * len(images)
    return Found(folder, classes, torch.tensor(labels), paths)


def missing(spec: DataSpec, root: str | Path | None) -> list[str]:
    base = place(spec, root)
    folders = [_split_folder(base, stored) for stored in ("train", "test")]
    if any(folder is None for folder in folders):
        return [
            f"the images of {spec.name}: put them into {base}/train and {base}/val, one folder a class "
            "(set IGD_DATA to change the place)"
        ]
    found = []
    for folder in folders:
        there = set(_class_folders(folder)) if folder is not None else set()
        lacking = [name for name in spec.classes if name not in there]
        if lacking:
            found.append(
                f"the images of {spec.name}: {len(lacking)} of {len(spec.classes)} class folders are not "
                f"in {folder}, the first is {lacking[0]}"
            )
    return found
