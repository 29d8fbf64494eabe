"""What a file of tensors holds, told without reading them: names and shapes, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

_POINTER = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Raise ValueError where the file is git-lfs's stand-in for one that was not downloaded."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{path} is a git-lfs pointer, {path.stat().st_size} bytes of text in place of the file; "
                "run git lfs pull in its repository, or download the file itself"
            )


def shapes(path: str | Path) -> Shapes:
    """Every tensor's shape by its name, of a safetensors file or of a state dict in a torch file.

    Of torch's formats the present one is mapped, not read; the one before 2020 is read. Raises ValueError
    with what to do for a git-lfs pointer, a file that is cut short, and one that holds anything but tensors.
    """
    path = Path(path)
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    found = mapped(path)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict; download it again")
    return {name: tuple(value.shape) for name, value in found.items()}


def mapped(path: Path) -> Any:
    """What a torch file holds, read as weights only, its tensors left on the disk until they are used.

    A training script's Namespace of plain values may lie beside them. Raises ValueError as `shapes`.
    """
    refuse_pointer(path)
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is cut short: {path.stat().st_size:,} bytes, and its end is missing; delete it and "
            "download it again"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(
            f"{path} cannot be read as plain tensors ({type(error).__name__}): it is damaged, or holds code; "
            "delete it and download it again"
        ) from error


def _of_safetensors(path: Path) -> Shapes:
    """From the header, which also says how long the file is."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length <= size else b""
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        whole = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        found = {name: tuple(entry["shape"]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is no safetensors file, or its beginning is damaged; delete it and download it again"
        ) from error
    if size != whole:
        what = "is cut short" if size < whole else "has more than its tensors"
        raise ValueError(
            f"{path} {what}: {size:,} bytes, and its header asks for {whole:,}; delete it and download it "
            "again"
        )
    return found


def difference(found: Shapes, wanted: Shapes) -> str | None:
    """The first thing that keeps tensors from being loaded as a model's, in words; None where nothing does.

    Others may lie beside them, but not those of layers that the model has fewer of.
    """
    if lacking := [name for name in wanted if name not in found]:
        return f"{len(lacking)} of the model's {len(wanted)} tensors are missing, the first is {lacking[0]}"
    for name, shape in wanted.items():
        if found[name] != shape:
            return f"the tensor {name} has the shape {found[name]}, and the model's has {shape}"
    known = {_any_layer(name) for name in wanted}
    if more := [name for name in found if name not in wanted and _any_layer(name) in known]:
        return f"it has {len(more)} tensors of layers that the model has not, the first is {more[0]}"
    return None


def _any_layer(name: str) -> str:
    """The name without its layers' numbers."""
    return ".".join("N" if part.isdigit() else part for part in name.split("."))
