"""Fashion-MNIST's four idx files, wherever they come from."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import FashionMNIST

from igd_lib.data.sources.base import FETCH_ERRORS, Found
from igd_lib.tools import files
from igd_lib.tools.machine import data_dir

if TYPE_CHECKING:
    from igd_lib.data.datasets import DataSpec

FASHION_FILES = {  # file: sha256 of the uncompressed bytes, so every packaging passes or fails alike
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_SYSTEM = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


def read(spec: DataSpec, stored: str, root: str | Path | None) -> Found:
    folder = fashion_mnist_folder(root)
    prefix = "train" if stored == "train" else "t10k"
    images = _idx(folder, f"{prefix}-images-idx3-ubyte", offset=16).reshape(-1, 1, 28, 28)
    labels = _idx(folder, f"{prefix}-labels-idx1-ubyte", offset=8)
    # 28 -> 32 with the background's black, three equal channels.
    return Found(
        folder, spec.classes, labels.long(), F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
    )


def _fashion_found(root: str | Path | None) -> Path | None:
    own = Path(root) if root is not None else data_dir() / "fashion-mnist"
    folders = (own,) if root is not None else (own, own.parent / "FashionMNIST" / "raw", FASHION_SYSTEM)
    return next(
        (folder for folder in folders if all(_idx_file(folder, name) for name in FASHION_FILES)), None
    )


def missing(spec: DataSpec, root: str | Path | None) -> list[str]:
    if _fashion_found(root) is not None:
        return []
    own = Path(root) if root is not None else data_dir() / "fashion-mnist"
    needed = ", ".join(f"{name}.gz" for name in FASHION_FILES)
    return [
        f"{spec.name}: not in {own}; put {needed} there, install Debian's package dataset-fashion-mnist, "
        "or load it where there is a network"
    ]


def fashion_mnist_folder(root: str | Path | None = None) -> Path:
    """The folder with Fashion-MNIST's four files, fetched if need be; no root rights needed.

    In this order: `root` or `$IGD_DATA/fashion-mnist`, Debian's installed package, that package
    downloaded and unpacked with apt-get and dpkg-deb, torchvision's download.
    """
    found = _fashion_found(root)
    if found is not None:
        return found
    if root is not None:
        raise FileNotFoundError(
            f"no Fashion-MNIST in {root}; it needs {', '.join(f + '.gz' for f in FASHION_FILES)}"
        )
    own = data_dir() / "fashion-mnist"
    with tempfile.TemporaryDirectory() as scratch:
        tried = []
        for source in (_from_debian, _from_torchvision):
            try:
                folder = source(Path(scratch))
            except FETCH_ERRORS as error:
                tried.append(
                    f"{source.__name__.removeprefix('_from_')}: {str(error).strip().splitlines()[0]}"
                )
                continue
            for name in FASHION_FILES:
                files.write(own / f"{name}.gz", (folder / f"{name}.gz").read_bytes())
            return own
    raise FileNotFoundError(
        f"Fashion-MNIST is not in {own} or {FASHION_SYSTEM} and could not be fetched "
        f"({'; '.join(tried)}). Install "
        f"Debian's package dataset-fashion-mnist, or put {', '.join(f + '.gz' for f in FASHION_FILES)} "
        f"into {own}"
    )


def _from_debian(scratch: Path) -> Path:
    """Download and unpack Debian's package without installing it.

    Uses private package lists if there are none.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise OSError("no apt-get and dpkg-deb here")
    folder = scratch / "debian"
    (folder / "lists" / "partial").mkdir(parents=True)

    def apt(*words: str) -> None:
        subprocess.run(["apt-get", "-qq", *words], cwd=folder, check=True, capture_output=True, timeout=600)

    try:
        apt("download", "dataset-fashion-mnist")
    except subprocess.CalledProcessError:
        private = (
            "-o",
            f"Dir::State::Lists={folder / 'lists'}",
            "-o",
            f"Dir::Cache={folder / 'cache'}",
            "-o",
            "Debug::NoLocking=1",
        )
        (folder / "cache" / "archives" / "partial").mkdir(parents=True)
        apt(*private, "update")
        apt(*private, "download", "dataset-fashion-mnist")
    package = next(folder.glob("*.deb"))
    subprocess.run(
        ["dpkg-deb", "-x", str(package), str(folder)], check=True, capture_output=True, timeout=600
    )
    return folder / FASHION_SYSTEM.relative_to("/")


def _from_torchvision(scratch: Path) -> Path:
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
