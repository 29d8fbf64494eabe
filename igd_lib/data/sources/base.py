"""What every layout shares: what it finds, where it looks, how class orders are compared."""

from __future__ import annotations

import http.client
import subprocess
import tarfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from igd_lib.tools import files
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
        a, b = (
            repr(composed(names[label])) if label < len(names) else "not there" for names in (ours, theirs)
        )
        if a != b:
            raise ValueError(
                f"class orders differ: label {label} is {a} in the DataSpec and {b} in {where}; "
                "correct or remove the wrong list"
            )


def lines(path: Path) -> list[str]:
    """A text file's lines without white space around them, composed (NFC), empty ones left out.

    Raises ValueError as `files.text`.
    """
    return [composed(line.strip()) for line in files.text(path).splitlines() if line.strip()]


def composed(name: str) -> str:
    """A name in Unicode's normal form NFC: macOS writes others (NFD) than most lists have."""
    return unicodedata.normalize("NFC", name)


# What desktops, file servers and archives put beside a user's files; all else that they leave is hidden.
_LEFT_BEHIND = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin"),
    *("@eadir", "#recycle", "__macosx", "lost+found"),
}


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name is nobody's data.

    It is hidden (.DS_Store, AppleDouble's ._x.jpg), or left behind by a system.
    """
    return name.startswith(".") or name.casefold() in _LEFT_BEHIND
