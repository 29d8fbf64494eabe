"""Food-101 as archived: images/CLASS/ID.jpg, and meta/train.txt and test.txt, which list CLASS/ID."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torchvision.datasets import Food101

from igd_lib.data.sources.base import FETCH_ERRORS, Found, check_order, lines, place

if TYPE_CHECKING:
    from igd_lib.data.datasets import DataSpec


def missing(spec: DataSpec, root: str | Path | None) -> list[str]:
    base = place(spec, root)
    pieces = [
        base / "meta" / "train.txt",
        base / "meta" / "test.txt",
        *(base / "images" / name for name in spec.classes),
    ]
    lacking = [piece for piece in pieces if not piece.exists()]
    if not lacking:
        return []
    return [
        f"{spec.name}: no {lacking[0]}; unpack food-101.tar.gz (5 GB) so that {base} holds images and "
        "meta, or load it where there is a network"
    ]


def read(spec: DataSpec, stored: str, root: str | Path | None) -> Found:
    base = place(spec, root)
    if root is None and not ((base / "meta").is_dir() and (base / "images").is_dir()):
        try:
            Food101(str(base.parent), download=True)  # into base.parent/food-101, with its checksum
        except FETCH_ERRORS as error:
            raise FileNotFoundError(f"{missing(spec, root)[0]} (downloading failed: {error})") from error
    lacking = missing(spec, root)
    if lacking:
        raise FileNotFoundError(lacking[0])
    # Listed in an order that is not everyone's: the names have to agree.
    if (base / "meta" / "classes.txt").is_file():
        check_order(spec.classes, sorted(lines(base / "meta" / "classes.txt")), base / "meta" / "classes.txt")
    listing = base / "meta" / f"{stored}.txt"
    names: dict[str, list[str]] = {name: [] for name in spec.classes}
    for line in lines(listing):
        name, _, image = line.partition("/")
        if name not in names or not image:
            raise ValueError(
                f"{listing}: {line!r} is not CLASS/ID of one of the {len(names)} classes; unpack "
                "food-101.tar.gz again"
            )
        names[name].append(f"{image}.jpg")
    paths: list[str] = []
    for name, images in names.items():
        folder = base / "images" / name
        there = set(os.listdir(folder))
        absent = next((image for image in images if image not in there), None)
        if absent is not None:
            raise ValueError(
                f"{folder / absent} is in {listing} and not on disk; unpack food-101.tar.gz again"
            )
        paths += [str(folder / image) for image in images]
    labels = [label for label, images in enumerate(names.values()) for _ in images]
    return Found(base, spec.classes, torch.tensor(labels, dtype=torch.int64), paths)
