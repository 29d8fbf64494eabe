"""One's own folder: a name that says which files are in it, and ImageNet-1K's ids of its classes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from igd_lib.data.datasets import IMAGENET_CLASSES, IMAGENET_TITLES, DataSpec, image_folder
from igd_lib.data.sources import folder as source
from igd_lib.data.sources.base import composed
from igd_lib.tools import files

IDS = "imagenet_ids.csv"
COLUMNS = ["folder", "wnid"]


def your_folder(path: str | Path, *, image_size: int) -> DataSpec:
    """`image_folder` of `path` (`train`, `test` or `val`), its classes and their ImageNet ids read from it.

    The name is the folder's with six digits of which files are in it, since work in the cache is found by the
    name: with other images it is other data. Without `imagenet_ids.csv` there are no ids. Raises
    FileNotFoundError or ValueError as `load` and `imagenet_ids`.
    """
    plain = image_folder(path, image_size=image_size)
    train, test = (source.read(plain, stored, None) for stored in ("train", "test"))
    known = replace(plain, name=f"{plain.name}-{source.listing(train, test)}", classes=train.classes)
    if not (Path(known.folder) / IDS).is_file():
        return known
    ids = imagenet_ids(known.folder, known.classes)
    return replace(known, label_ids=ids, titles=tuple(IMAGENET_TITLES[number] for number in ids))


def imagenet_ids(path: str | Path, classes: Sequence[str] = ()) -> tuple[int, ...]:
    """ImageNet-1K's id, which is DiT's too, of each of `classes`, for `image_folder(..., label_ids=...)`.

    path: a CSV file with the columns `folder` (the class folder's name) and `wnid`, or the data's folder with
    `imagenet_ids.csv` in it; classes: in label order, by default those of the data's folder. Names are
    compared in Unicode's composed form. Raises FileNotFoundError, and ValueError naming file and line: for
    other columns, an unknown or double wnid, a double folder, one that is no class; and for a class without
    a line.
    """
    path = Path(path).expanduser()
    file = path / IDS if path.is_dir() else path
    names = [composed(name) for name in classes or _classes_of(file.parent)]
    found: dict[str, tuple[str, int]] = {}  # wnid and line, by folder
    lines: dict[str, int] = {}  # by wnid
    for line, folder, wnid in _rows(file):
        where = f"{file}, line {line}"
        if wnid not in IMAGENET_CLASSES:
            raise ValueError(f"{where}: {wnid!r} is no wnid of ImageNet-1K's 1,000 classes (as n02111889 is)")
        if folder in found:
            raise ValueError(f"{where}: the folder {folder!r} is in line {found[folder][1]} already")
        if wnid in lines:
            raise ValueError(f"{where}: the wnid {wnid} is in line {lines[wnid]} already")
        if folder not in names:
            raise ValueError(f"{where}: there is no class folder {folder!r}")
        found[folder], lines[wnid] = (wnid, line), line
    if lacking := [name for name in names if name not in found]:
        last = max(lines.values(), default=1)
        raise ValueError(
            f"{file} ends with line {last} and has none for the class {lacking[0]!r} ({len(lacking)} of "
            f"{len(names)} classes lack theirs)"
        )
    return tuple(IMAGENET_CLASSES.index(found[name][0]) for name in names)


def _classes_of(base: Path) -> tuple[str, ...]:
    return source.known_classes(image_folder(base, image_size=1), base)


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, folder in composed form, wnid) of each line that is not empty."""
    if not file.is_file():
        raise FileNotFoundError(
            f"no file {file}; write one with the columns {','.join(COLUMNS)}, a line a class"
        )
    reader, header = csv.reader(io.StringIO(files.text(file), newline="")), True
    wanted = ",".join(COLUMNS)
    for row in reader:
        cells, where = [composed(cell.strip()) for cell in row], f"{file}, line {reader.line_num}"
        if not any(cells):
            continue
        if header and cells != COLUMNS:
            raise ValueError(f"{where}: the columns are {wanted}, got {','.join(cells)}")
        if len(cells) != len(COLUMNS):
            quoted = "a name with a comma stands in double quotes"
            raise ValueError(f"{where}: {len(cells)} values for the columns {wanted}; {quoted}")
        if not header:
            yield reader.line_num, cells[0], cells[1]
        header = False
