"""What every layout shares: what it finds, where it looks, how class orders are compared."""

from __future__ import annotations

import http.client
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from igd_lib.tools.machine import data_dir

if TYPE_CHECKING:
    from igd_lib.data.datasets import DataSpec

# URLError is an OSError.
FETCH_ERRORS = (
    OSError,
    http.client.HTTPException,
    RuntimeError,
    subprocess.SubprocessError,
    tarfile.TarError,
)


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


def check_order(ours: Sequence[str], theirs: Sequence[str], where: Path) -> None:
    """Raise ValueError at the first label whose class differs from the list in the file `where`."""
    for label in range(max(len(ours), len(theirs))):
        a, b = (repr(names[label]) if label < len(names) else "not there" for names in (ours, theirs))
        if a != b:
            raise ValueError(
                f"class orders differ: label {label} is {a} in the DataSpec and {b} in {where}; "
                "correct or remove the wrong list"
            )


def lines(path: Path) -> list[str]:
    """A text file's lines without white space around them, empty ones left out."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
