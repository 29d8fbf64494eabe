"""Distilled sets in the forms other tools read, each with a manifest that fixes the class order.

    imagefolder  CLASS/00000.png ..., CLASS as the set names it (wnids for ImageNet), classes.txt
    rded         00000/00000.png ..., the zero-padded label, as RDED's loader lists it (DD-Ranking too)
    safetensors  data.safetensors: images uint8 (N, 3, H, W), labels int64 (N,)

torchvision's ImageFolder numbers classes by sorted folder name. ImageWoof's order, for one, is not the
sorted one: `load_image_folder` follows the manifest, and README.txt says what a plain ImageFolder does.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from igd_lib.data.images import ImageData, from_tensors
from igd_lib.tools import files


class FinishedSet(Protocol):
    """What an export reads of a distilled set."""

    path: Path
    classes: tuple[str, ...]
    selected: list[int]
    ipc: int
    manifest: dict[str, Any]

    def finished(self, label: int) -> int: ...

    def image_path(self, label: int, index: int) -> Path: ...

    def images(self, label: int) -> torch.Tensor: ...


FORMATS = ("imagefolder", "rded", "safetensors")
MANIFEST, CLASSES, README, TENSORS = "manifest.json", "classes.txt", "README.txt", "data.safetensors"
# Not a folder's name on every system: hidden, padded with spaces, ending in a dot, with a separator or
# wildcard, or a device of Windows.
_UNSAFE = re.compile(r'^[.\s]|[.\s]$|[/\\:*?"<>|]|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def export(found: FinishedSet, out_dir: str | Path, *, format: str = "imagefolder") -> Path:
    """Write a finished set to `out_dir` in one of `FORMATS` and return that folder.

    PNGs are copied byte for byte; label i is the set's class i in every format. The same export again
    rewrites only what is missing or damaged. Raises ValueError for an unknown format, an unfinished set,
    a damaged image, class names that cannot be folders, and an `out_dir` that holds anything else (the
    first difference is named); nothing is written then.
    """
    if format not in FORMATS:
        raise ValueError(f"format is one of {', '.join(FORMATS)}, got {format!r}")
    out, chosen = Path(out_dir), sorted(found.selected)
    names = (
        check_folder_names(found.classes)
        if format == "imagefolder"
        else [f"{label:05d}" for label in range(len(found.classes))]
    )
    folders = None if format == "safetensors" else {names[label]: label for label in chosen}
    hashes = _image_hashes(found, chosen)
    wanted = {
        "format": format,
        "classes": list(found.classes),
        "counts": [found.ipc if label in chosen else 0 for label in range(len(found.classes))],
        "folders": folders,  # folder: label
        "plain_imagefolder_agrees": None if folders is None else folders == _plain(folders),
        "set": found.manifest,
        "images_sha256": _sha256("\n".join(hashes.values()).encode()),  # of all images in label order
    }
    texts = {README: _readme(wanted)} | (
        {CLASSES: "".join(f"{name}\n" for name in names)} if format == "imagefolder" else {}
    )
    sums = {name: _sha256(text.encode()) for name, text in texts.items()}
    if folders is not None:
        sums |= {f"{names[label]}/{index:05d}.png": value for (label, index), value in hashes.items()}
    present = _present(out, wanted, {MANIFEST, *sums} | ({TENSORS} if folders is None else set()))
    # An unfinished export has no sums: whoever reads it is told, and the same export again completes it.
    if present is None:
        _write_manifest(out, wanted)
    for name, text in texts.items():
        _restore(out / name, sums[name], text.encode())
    for label, index in hashes if folders is not None else ():
        name = f"{names[label]}/{index:05d}.png"
        _restore(out / name, sums[name], found.image_path(label, index))
    if folders is None:
        expected = (present or {}).get("files", {}).get(TENSORS)
        if expected is None or not _intact(out / TENSORS, expected):
            _write_tensors(out / TENSORS, found, chosen)
        sums[TENSORS] = files.sha256(out / TENSORS)
    if present is None or present.get("files") != sums:
        _write_manifest(out, wanted | {"files": sums})
    return out


def check_folder_names(classes: Sequence[str]) -> list[str]:
    """Class names as folder names, unchanged.

    Raises ValueError naming one that some file system cannot hold or tell from another.
    """
    taken = {name.casefold(): name for name in (MANIFEST, CLASSES, README)}
    for name in classes:
        if not name or not name.isprintable() or _UNSAFE.search(name) or len(name.encode()) > 255:
            raise ValueError(
                f"class name {name!r} cannot be a folder's name; export as 'rded' or 'safetensors', whose "
                "folders are labels"
            )
        key = unicodedata.normalize("NFC", name).casefold()
        if key in taken:
            raise ValueError(
                f"{taken[key]!r} and class name {name!r} are one name on some file systems; export as "
                "'rded' or 'safetensors'"
            )
        taken[key] = name
    return list(classes)


# --- reading an export


class ManifestImageFolder(ImageFolder):
    """torchvision's ImageFolder with the labels of the export's manifest; samples in label order.

    `classes` are the set's class names, label i is `classes[i]`; `class_to_idx` maps folders to labels.
    """

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        manifest = read_manifest(directory)
        if manifest["folders"] is None:
            raise ValueError(
                f"{directory} is an export as {manifest['format']!r}, without image folders; use "
                "load_tensors_export"
            )
        return manifest["classes"], manifest["folders"]

    @staticmethod
    def make_dataset(
        directory: str | Path, class_to_idx: dict[str, int], *args: Any, **options: Any
    ) -> list[tuple[str, int]]:
        return sorted(
            ImageFolder.make_dataset(directory, class_to_idx, *args, **options),
            key=lambda sample: (sample[1], sample[0]),
        )


def load_image_folder(path: str | Path, **options: Any) -> ManifestImageFolder:
    """An export as "imagefolder" or "rded" as a torchvision data set.

    Options are ImageFolder's (transform, loader ...).

    Raises FileNotFoundError without an export or with a class folder missing, ValueError for an unfinished
    export and for a class that has lost or gained images.
    """
    data = ManifestImageFolder(str(path), **options)
    here: Counter[int] = Counter(data.targets)
    for label, count in enumerate(read_manifest(path)["counts"]):
        if here[label] != count:
            raise ValueError(
                f"{path}: class {data.classes[label]!r} has {here[label]} images, its manifest says "
                f"{count}; export it again"
            )
    return data


def load_tensors_export(path: str | Path) -> ImageData:
    """An export as "safetensors", in memory.

    Raises FileNotFoundError without one, ValueError where it is unfinished or damaged.
    """
    manifest = read_manifest(path)
    if TENSORS not in manifest["files"]:
        raise ValueError(
            f"{path} is an export as {manifest['format']!r}, without tensors; use load_image_folder"
        )
    file = Path(path) / TENSORS
    if not _intact(file, manifest["files"][TENSORS]):
        raise ValueError(
            f"{file} is missing or damaged: it does not have the manifest's sha256; export it again"
        )
    tensors, _ = files.load_tensors(file)
    return from_tensors(
        manifest["set"]["dataset"],
        f"distilled, ipc {manifest['set']['ipc']}",
        manifest["classes"],
        tensors["images"],
        tensors["labels"],
    )


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a finished export.

    Raises FileNotFoundError without one, ValueError for an unfinished or damaged one.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no export (no {MANIFEST})")
    manifest = _parse(file)
    if missing := {"format", "classes", "counts", "folders", "set"} - manifest.keys():
        raise ValueError(
            f"{file} is not an export's: it lacks {sorted(missing)}. A distilled set is read by "
            "DistilledSet, and exported by its export()"
        )
    if "files" not in manifest:
        raise ValueError(f"{path} is an unfinished export; export the set there again to complete it")
    return manifest


# --- the parts


def _image_hashes(found: FinishedSet, labels: Sequence[int]) -> dict[tuple[int, int], str]:
    """sha256 of every image by (label, index); each is decoded, so that no damaged one is passed on."""
    for label in labels:
        if found.finished(label) < found.ipc:
            raise ValueError(
                f"{found.path}: class {label} has {found.finished(label)} of {found.ipc} images; run "
                "distill again to resume, then export"
            )
    hashes = {}
    for label in labels:
        for index in range(found.ipc):
            path = found.image_path(label, index)
            try:
                with Image.open(path) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(
                    f"cannot read the image {path}: {error}; delete it and run distill again, then export"
                ) from error
            hashes[label, index] = files.sha256(path)
    return hashes


def _present(out: Path, wanted: dict[str, Any], names: set[str]) -> dict[str, Any] | None:
    """The manifest of the same export already in `out`, None where there is nothing.

    Raises ValueError for anything else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a folder")
    present = _parse(out / MANIFEST) if (out / MANIFEST).is_file() else None
    if present is not None:
        if "format" not in present:
            raise ValueError(f"{out} holds a {MANIFEST} that is not an export's; choose another folder")
        if difference := files.difference(present, wanted):
            raise ValueError(f"{out} holds another export: {difference}; choose another folder or delete it")
    strangers = [
        path
        for path in sorted(out.rglob("*"))
        if not path.is_dir() and path.relative_to(out).as_posix() not in names
    ]
    left = {
        path
        for path in strangers
        if path.suffix == ".tmp"
        and path.with_suffix("").stem.removeprefix(".") in {Path(name).name for name in names}
    }
    for path in strangers:
        if path not in left:
            raise ValueError(
                f"{out} holds {path.relative_to(out)}, which is no part of this export; choose another "
                "folder or remove it"
            )
    for path in left:  # what a killed run was writing
        path.unlink()
    return present


def _write_tensors(path: Path, found: FinishedSet, labels: Sequence[int]) -> None:
    first = found.images(labels[0])
    # Filled in place: at the paper's scale it is 10 GB.
    images = torch.empty(len(labels), *first.shape, dtype=torch.uint8)
    for position, label in enumerate(labels):
        images[position] = found.images(label)
    images = images.flatten(0, 1)
    files.save_tensors(
        path,
        {"images": images, "labels": torch.tensor(labels).repeat_interleave(found.ipc)},
        classes=list(found.classes),
        ipc=found.ipc,
    )


def _write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    files.write(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _restore(path: Path, expected: str, content: bytes | Path) -> None:
    if not _intact(path, expected):
        files.write(path, content.read_bytes() if isinstance(content, Path) else content)


def _intact(path: Path, expected: str) -> bool:
    return path.is_file() and files.sha256(path) == expected


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _parse(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); delete that export and export again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged (no JSON object); delete that export and export again")
    return found


def _plain(folders: dict[str, int]) -> dict[str, int]:
    """The labels that torchvision's own ImageFolder gives these folders."""
    return {name: number for number, name in enumerate(sorted(folders))}


def _readme(manifest: dict[str, Any]) -> str:
    """What the export is and how to read it; warns where a plain ImageFolder would give other labels."""
    origin, folders = manifest["set"], manifest["folders"]
    lines = [
        f"A distilled set of {origin['dataset']}: {sum(manifest['counts'])} images, {origin['ipc']} a "
        f"class, seed {origin['seed']}.",
        f'Label i is entry i, from 0, of "classes" in {MANIFEST}, which also has all settings and the '
        "sha256 of every file.",
        "",
    ]
    if folders is None:
        lines += [
            f"{TENSORS}: images uint8 (N, 3, H, W), labels int64 (N,). Read it with safetensors, or with",
            "igd_lib.sets.export.load_tensors_export(path).",
        ]
        return "\n".join(lines) + "\n"
    lines += [
        "igd_lib.sets.export.load_image_folder(path) is torchvision's ImageFolder with these labels.",
        "",
    ]
    if manifest["plain_imagefolder_agrees"]:
        lines.append(
            "Sorted folder names are in the order of the labels, so torchvision's own ImageFolder gives "
            "the same."
        )
    else:
        plain = _plain(folders)
        name = next(name for name in folders if folders[name] != plain[name])
        lines += [
            "WARNING: a plain torchvision ImageFolder numbers sorted folder names and so gives OTHER labels:",
            f"{name!r} is label {folders[name]} here and would be {plain[name]} there. Read with one "
            "order and tested with the other, accuracy means nothing.",
        ]
        if manifest["format"] == "imagefolder":
            lines.append('For tools that sort, export as "rded": its folder names are the labels.')
    return "\n".join(lines) + "\n"
