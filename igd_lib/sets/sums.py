"""What may be shared, file by file: plain names, types that hold no code, a sha256 each.

safetensors, PNG, JSON and Markdown alone: none of them is unpickled or run when read. A shared folder has a
`sums.json`, the sha256 of every other file by its path.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from igd_lib.tools import files

SUMS, README, CARD, CROISSANT = "sums.json", "README.md", "card.json", "croissant.json"
PULLED = "pulled.json"  # where a folder was pulled from: of this copy alone
BESIDE = (README, CARD, CROISSANT, SUMS, PULLED)  # what sharing puts beside the work itself
SUFFIXES = (".safetensors", ".png", ".json", ".md")
GIT = ".gitattributes"  # every repository on the hub has it; it is never read
_PNG = b"\x89PNG\r\n\x1a\n"
_HEADER = 100 * 2**20  # bytes, safetensors' own limit
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_name(name: str) -> None:
    """Raise ValueError unless a path in a shared folder is plain, relative and of one of `SUFFIXES`."""
    parts = PurePosixPath(name).parts
    plain = parts and "/".join(parts) == name and not any(part.startswith(".") for part in parts)
    if not plain or name.startswith("/") or "\\" in name or ":" in name or not name.isprintable():
        raise ValueError(f"{name!r} is no plain path within a shared folder: it is refused")
    if PurePosixPath(name).suffix not in SUFFIXES:
        raise ValueError(
            f"{name} is refused: {', '.join(SUFFIXES)} are shared alone, nothing that holds code"
        )


def check_content(path: Path) -> None:
    """Raise ValueError naming a file that is not what its suffix says, such as a pickle in disguise."""
    if path.suffix == ".safetensors":
        header(path)
    elif path.suffix == ".png":
        with open(path, "rb") as file:
            if file.read(len(_PNG)) != _PNG:
                raise ValueError(f"{path} is no PNG, whatever its name says: it is refused")
    elif path.suffix == ".json":
        read_json(path)
    else:
        files.text(path)


def header(path: Path) -> dict[str, Any]:
    """A safetensors file's header: tensors' types, shapes and places by name; no tensor is read.

    Raises ValueError for another file.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(_HEADER, path.stat().st_size - 8):
                raise ValueError(f"a header of {size} bytes")
            found = json.loads(file.read(size))
        if not isinstance(found, dict):
            raise ValueError("a header that is no object")
    except ValueError as error:
        raise ValueError(f"{path} is no safetensors file, whatever its name says: it is refused") from error
    return found


def note(path: Path) -> dict[str, Any]:
    """What `files.save_tensors` wrote beside the tensors. Raises ValueError for a file of other origin."""
    try:
        return dict(json.loads(header(path).get("__metadata__", {}).get("igd", "{}")))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises ValueError naming a damaged one."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); it is refused") from error


def listed(folder: Path) -> list[str]:
    """The paths of all files in a folder, sorted. Raises ValueError naming a link or a device."""
    found = []
    for where, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(where) / name
            if path.is_symlink():
                raise ValueError(f"{path} is a symbolic link: it is refused, copy what it points to")
            if name in names:
                if not path.is_file():
                    raise ValueError(f"{path} is no plain file: it is refused")
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 by path, sorted. Raises ValueError for a file that may not be shared."""
    sums = {}
    for name in sorted(names):
        check_name(name)
        check_content(folder / name)
        sums[name] = files.sha256(folder / name)
    return sums


def check(folder: Path) -> dict[str, str]:
    """sha256 by path of a shared folder whose files are all, and no others than, those of its `sums.json`.

    Raises ValueError naming the first that is missing, was added, was changed, or may not be shared.
    """
    wanted = _noted(folder)
    there = set(listed(folder)) - {SUMS, PULLED, GIT}
    for name in sorted({*wanted, *there}):
        if name not in there:
            raise ValueError(f"{folder}: {name} is missing, which {SUMS} names")
        if name not in wanted:
            raise ValueError(f"{folder}: {name} was added, {SUMS} does not name it")
        if files.sha256(folder / name) != wanted[name]:
            raise ValueError(f"{folder}: {name} was changed, {SUMS} has another sha256 of it")
        check_content(folder / name)
    return wanted


def _noted(folder: Path) -> dict[str, str]:
    """What `sums.json` says, checked as far as that goes without the files."""
    path = folder / SUMS
    if not path.is_file():
        raise ValueError(f"{folder} has no {SUMS}: it was not shared by igd_lib, or is not all there")
    found = read_json(path)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} is damaged (no object of sums); it is refused")
    for name, value in found.items():
        check_name(name)
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise ValueError(f"{path} is damaged (no sha256 of {name}); it is refused")
    return found
