"""Any ImageFolder: `train` and `test` (else `val`), each with one folder of images a class."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from igd_lib.data.sources.base import Found, check_order, composed, is_clutter, lines, place
from igd_lib.tools.locks import say_once

if TYPE_CHECKING:
    from igd_lib.data.datasets import DataSpec

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def _split_folder(base: Path, stored: str, classes: Collection[str]) -> Path | None:
    """The split's folder: the first with a folder of some class, else the first that is there.

    Some data sets come with unsorted images in `test` beside a sorted `val`.
    """
    names = ("train",) if stored == "train" else ("test", "val")
    there = [base / name for name in names if (base / name).is_dir()]
    wanted = {composed(name) for name in classes}
    fit = [folder for folder in there if not wanted.isdisjoint(class_folders(folder))]
    if there and fit and fit[0] != there[0]:
        say_once(f"{there[0]} holds no class folders: the test images are those of {fit[0]}")
    return next(iter([*fit, *there]), None)


def class_folders(folder: Path) -> dict[str, str]:
    """The folders in it, but those that systems leave behind: composed name (NFC) to name on disk, sorted.

    Raises ValueError for two that differ in their Unicode normal form alone.
    """
    found: dict[str, str] = {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not is_clutter(entry.name) and _is_folder(entry))
    for name in names:
        if (twin := found.setdefault(composed(name), name)) != name:
            raise ValueError(
                f"{folder}: {twin!a} and {name!a} are one name in two Unicode forms; join or rename one"
            )
    return dict(sorted(found.items()))


def known_classes(spec: DataSpec, base: Path) -> tuple[str, ...]:
    """The class names as far as they are known without the split, so that one it lacks is found out.

    The DataSpec's, else those of `classes.txt`, else of the folders in `train`; empty without any of these.
    Raises ValueError where DataSpec and `classes.txt` differ.
    """
    listed = base / "classes.txt"
    order = tuple(lines(listed)) if listed.is_file() and not spec.subset else ()
    if spec.classes and order:
        check_order(spec.classes, order, listed)
    train = base / "train"
    return spec.classes or order or (tuple(class_folders(train)) if train.is_dir() else ())


def read(spec: DataSpec, stored: str, root: str | Path | None) -> Found:
    base = place(spec, root)
    known = known_classes(spec, base)
    folder = _split_folder(base, stored, known)
    if folder is None:
        wanted = base / "train" if stored == "train" else f"{base / 'test'} or {base / 'val'}"
        raise FileNotFoundError(
            f"{spec.name}: no folder {wanted}; put one folder of images a class there, or set IGD_DATA"
        )
    return read_classes(folder, known, others=spec.subset)


def read_classes(folder: Path, known: tuple[str, ...] = (), *, others: bool = False) -> Found:
    """A folder of class folders; `known`: the classes in label order, else sorted folder names.

    others: folders of other classes may lie beside them. Raises ValueError where class folders are missing,
    unexpected or empty.
    """
    there = class_folders(folder)
    classes = known or tuple(there)
    lacking = [name for name in classes if composed(name) not in there]
    expected = {composed(name) for name in classes}
    extra = [] if others else [name for name in there if name not in expected]
    if lacking or extra or not classes:
        raise ValueError(
            f"{folder}: class folders do not match; missing: {lacking[:3] or 'none'}, unexpected: "
            f"{extra[:3] or 'none'}"
        )
    paths: list[str] = []
    labels: list[int] = []
    left_out = [str(folder / name) for name in sorted(os.listdir(folder)) if is_clutter(name)]
    for label, name in enumerate(classes):
        images = list(_images(folder / there[composed(name)], (folder.parent, folder), left_out))
        if not images:
            raise ValueError(f"{folder / name}: no images in this class folder ({', '.join(IMAGE_SUFFIXES)})")
        paths += images
        labels += [label] * len(images)
    if left_out:
        say_once(
            f"{folder}: {len(left_out)} files and folders that systems leave behind, and links back to a "
            f"folder above, are left out, the first is {left_out[0]}"
        )
    return Found(folder, classes, torch.tensor(labels), paths)


def listing(*found: Found) -> str:
    """Six hex digits of which files there are: the relative path and the bytes of each image, in order."""
    names = [
        [Path(path).relative_to(one.where).as_posix(), os.stat(path).st_size]
        for one in found
        for path in one.images
    ]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:6]


def _images(folder: Path, above: tuple[Path, ...], left_out: list[str]) -> Iterator[str]:
    """A class's image files in torchvision's ImageFolder's order; what is left out, to `left_out`."""
    found = []
    pending = [(str(folder), frozenset(_identity(path) for path in above))]
    while pending:
        where, ancestors = pending.pop()
        own = ancestors | {_identity(where)}
        kept = []
        with os.scandir(where) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
        for entry in entries:
            is_folder = _is_folder(entry)
            if is_clutter(entry.name) or (is_folder and _identity(entry.path) in own):
                left_out.append(entry.path)
            elif is_folder:
                pending.append((entry.path, own))
            else:
                kept.append(entry.path)
        found.append((where, kept))
    for _, kept in sorted(found):
        yield from (path for path in kept if path.lower().endswith(IMAGE_SUFFIXES))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: str | Path) -> tuple[int, int]:
    """What a folder is, whatever links lead to it."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def missing(spec: DataSpec, root: str | Path | None) -> list[str]:
    base = place(spec, root)
    try:
        known = known_classes(spec, base)
        folders = [_split_folder(base, stored, known) for stored in ("train", "test")]
    except ValueError as error:
        return [f"the images of {spec.name}: {error}"]
    if any(folder is None for folder in folders):
        return [
            f"the images of {spec.name}: put them into {base}/train and {base}/val, one folder a class "
            "(set IGD_DATA to change the place)"
        ]
    found = []
    for folder in folders:
        there = class_folders(folder) if folder is not None else {}
        lacking = [name for name in spec.classes if composed(name) not in there]
        if lacking:
            found.append(
                f"the images of {spec.name}: {len(lacking)} of {len(spec.classes)} class folders are not "
                f"in {folder}, the first is {lacking[0]}"
            )
    return found
