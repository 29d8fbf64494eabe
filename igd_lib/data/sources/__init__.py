"""Data sets on disk: a file a layout, which says where its files are, how they are fetched and read.

A new layout is one file with `read` and `missing`, and one line in LAYOUTS.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from igd_lib.data.sources import cifar, fashion, folder, food
from igd_lib.data.sources.base import Found

if TYPE_CHECKING:
    from igd_lib.data.datasets import DataSpec

LAYOUTS: dict[str, ModuleType] = {
    "image-folder": folder,
    "food-101": food,
    "cifar-10": cifar,
    "cifar-100": cifar,
    "fashion-mnist": fashion,
}


def read(spec: DataSpec, stored: str, root: str | Path | None) -> Found:
    """The stored split "train" or "test"; small sets are fetched if need be, but never into a given `root`.

    Raises FileNotFoundError (what is missing and how to get it) or ValueError (the first thing that is not as
    it should be).
    """
    return LAYOUTS[spec.layout].read(spec, stored, root)


def missing(spec: DataSpec, root: str | Path | None) -> list[str]:
    """What is not there, a line a piece with how to get it."""
    return LAYOUTS[spec.layout].missing(spec, root)
