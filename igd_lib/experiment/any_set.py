"""Evaluation of anybody's set of images: a distilled set, an export of one, or a folder of class folders."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from igd_lib.data.datasets import DATASETS, IMAGENET_CLASSES, image_folder
from igd_lib.data.images import ImageData, from_files, load
from igd_lib.data.sources import folder as source
from igd_lib.data.sources.base import composed
from igd_lib.evaluation import Score, evaluate_all
from igd_lib.protocols import PROTOCOLS, Protocol, at_size, usual_network, usual_protocol
from igd_lib.sets import export, learned
from igd_lib.sets.class_files import ClassFiles
from igd_lib.sets.kinds import METHODS, images_of
from igd_lib.sets.store import DistilledSet
from igd_lib.teacher_training import teacher_recipe
from igd_lib.teachers import Teacher, imagenet_teacher, least_for, teacher_from_file
from igd_lib.tools.machine import cache_dir, ray_cluster


@dataclass(frozen=True)
class Evaluated:
    """Scores of networks trained on a set, one a network and training seed, and what they are of."""

    train: ImageData
    test: ImageData
    protocol: Protocol
    teacher: Teacher | None
    scores: Sequence[Score]

    def lines(self) -> list[str]:
        """In words: the set, what it was tested on and how, then a line a network."""
        own, test = self.train, self.test
        counts = own.labels.bincount(minlength=len(own.classes)).tolist()
        each = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        return [
            f"set: {own.name}, {own.split}: {len(own):,} images of {own.image_size} px, {each} in each of "
            f"{len(own.classes)} classes",
            f"tested on: {test.name}, {test.split}: {len(test):,} images",
            self._how(),
            *(self._line(network) for network in dict.fromkeys(score.network for score in self.scores)),
        ]

    def _how(self) -> str:
        protocol, first = self.protocol, self.scores[0]
        usual = PROTOCOLS.get(protocol.name, protocol)
        ipc = round(len(self.train) / len(self.train.classes))
        epochs, size = usual.epochs_for(ipc, len(self.train.classes)), usual.image_size
        length = f"{first.epochs:,} epochs" + (f", not its {epochs:,}" if first.epochs != epochs else "")
        side = f"{protocol.image_size} px" + (f", not its {size}" if protocol.image_size != size else "")
        labels = f"; {self.teacher}" if self.teacher else ""
        return f"protocol: {protocol.name}; {length}; {side}; {first.precision}{labels}"

    def _line(self, network: str) -> str:
        scores = [score for score in self.scores if score.network == network]
        reported, last, best, top5 = (
            _spread(getattr(score, name) for score in scores)
            for name in ("reported", "last", "best", "last_top5")
        )
        seeds = f"n = {len(scores)}, training seeds {', '.join(str(score.seed) for score in scores)}"
        return (
            f"{network}: top-1 {reported} % ({self.protocol.reported}; {seeds}); best during training "
            f"{best}, last {last}, top-5 of the last {top5}"
        )

    def record(self) -> dict[str, Any]:
        """JSON-able: the same with every score."""
        return {
            "set": {"name": self.train.name, "images": len(self.train), "classes": list(self.train.classes)},
            "tested_on": {"name": self.test.name, "split": self.test.split, "images": len(self.test)},
            "protocol": {"name": self.protocol.name, "image_size": self.protocol.image_size},
            "teacher": self.teacher and [self.teacher.architecture, self.teacher.weights],
            "scores": [asdict(score) for score in self.scores],
        }


def evaluate_set(
    folder: str | Path,
    real: str | Path,  # a data set's name, or a folder
    *,
    networks: Sequence[str] = (),  # none: a ConvNet of the usual depth for the images' size
    protocol: Protocol | None = None,  # None: `usual_protocol`
    seeds: Sequence[int] | None = None,  # of training; None: the protocol's
    teacher: str | Path | None = None,  # the file of what gives soft labels
    image_size: int | None = None,  # px that networks see; None: the protocol's
    epochs: int | None = None,  # instead of the protocol's
    device: str | None = None,
) -> Evaluated:
    """Train networks on the images in `folder` and test them on `real` ones; finished cells are read.

    Raises FileNotFoundError or ValueError where one of them is no set, is not whole, or where their classes
    differ: the first difference is named.
    """
    folder = Path(folder).expanduser().resolve()
    train = read_set(folder)
    protocol = protocol or usual_protocol(train.image_size, soft=teacher is not None)
    protocol = at_size(protocol, image_size) if image_size else protocol
    protocol = replace(protocol, epochs=epochs) if epochs else protocol
    has_order = (folder / export.MANIFEST).is_file()
    test = read_real(
        str(real), protocol.test_resize or protocol.image_size, train.classes if has_order else None
    )
    if not has_order:
        train = relabelled(train, test.classes, folder)
    given = _teacher(teacher, protocol, test)
    names = list(networks) or [usual_network(protocol.image_size)]
    chosen = list(protocol.seeds if seeds is None else seeds)
    scores = evaluate_all(
        train,
        test,
        networks=names,
        seeds=chosen,
        protocol=protocol,
        teacher=given,
        device=device,
        folder=cache_dir() / "evaluation",
        ray=ray_cluster() if len(names) * len(chosen) > 1 else False,
    )
    return Evaluated(train, test, protocol, given, scores)


# --- the two folders


def read_set(folder: Path) -> ImageData:
    """A set of any method, an export, or anybody's class folders (its `train`, where that holds them).

    The last are numbered by their sorted names. Raises FileNotFoundError, or ValueError for a set that is
    unfinished or damaged, or has no images of a class.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"SET is a folder of images; there is no folder {folder}")
    manifest = folder / export.MANIFEST
    if not manifest.is_file():
        base = _holder(folder, ("train",))
        found = source.read_classes(base)
        return from_files(folder.name, "class folders", found.classes, list(found.images), found.labels)
    try:
        noted = json.loads(manifest.read_text())
        is_export, kind = "format" in noted, noted.get("kind")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest} is damaged ({error}); restore it, or name another folder") from error
    if kind in METHODS:
        data = _of_method(folder, noted)
    else:
        data = _exported(folder) if is_export else DistilledSet(folder).data()
    present = set(data.labels.tolist())
    if lacking := [name for label, name in enumerate(data.classes) if label not in present]:
        count = f"{len(lacking)} of its {len(data.classes)} classes"
        raise ValueError(f"{folder} has no images of {count}, the first is {lacking[0]!r}")
    return replace(data, classes=tuple(composed(name) for name in data.classes))


def _of_method(folder: Path, manifest: dict[str, Any]) -> ImageData:
    """What one of the compared methods made, from its folder in the cache or where it was pulled to."""
    if (folder / learned.FILE).is_file():
        return learned.load(folder / learned.FILE)
    about = manifest["settings"]
    _, classes, side = images_of(folder, about["data"])
    split = f"{METHODS[manifest['kind']]}, ipc {about['ipc']}, seed {about['seed']}"
    return ClassFiles(folder, about["data"], split, classes, about["ipc"], side).data()


def _exported(folder: Path) -> ImageData:
    manifest = export.read_manifest(folder)
    if manifest["folders"] is None:
        return export.load_tensors_export(folder)
    images = export.load_image_folder(folder)
    paths, labels = zip(*images.samples, strict=True)
    name, split = manifest["set"]["dataset"], f"distilled, ipc {manifest['set']['ipc']}"
    return from_files(name, split, images.classes, paths, torch.tensor(labels))


def read_real(given: str, side: int, order: Sequence[str] | None = None) -> ImageData:
    """The test images of a data set by name, or a folder's `test`, `val` or class folders at `side` px.

    A folder without `classes.txt` takes over `order`, a set's classes. Raises FileNotFoundError, and
    ValueError where names differ.
    """
    if given in DATASETS:
        return load(given, "test")
    path = Path(given).expanduser().resolve()
    if not path.is_dir():
        known = ", ".join(sorted(DATASETS))
        raise FileNotFoundError(f"REAL is a folder or a data set ({known}); there is no folder {path}")
    base = _holder(path, ("test", "val"))
    names = (
        source.known_classes(image_folder(path, image_size=side), path) or source.read_classes(base).classes
    )
    if order is not None and not (path / "classes.txt").is_file():
        _check_names(order, names, "the set", str(path))
        names = tuple(order)
    found = source.read_classes(base, names)
    # Evaluations in the cache are found by the test images' name: other files are other data.
    name = f"{path.name}-{source.listing(found)}"
    return from_files(name, "test", found.classes, list(found.images), found.labels, side)


def _holder(folder: Path, splits: Sequence[str]) -> Path:
    """The folder that holds class folders: the first split that has folders in it, else the folder itself.

    So a class that is called "train" is none.
    """
    there = (folder / name for name in splits)
    return next((one for one in there if one.is_dir() and source.class_folders(one)), folder)


def relabelled(train: ImageData, classes: tuple[str, ...], folder: Path) -> ImageData:
    """The same images with labels in the order of `classes`: folders are known by their names.

    Raises ValueError where the names differ.
    """
    _check_names(train.classes, classes, str(folder), "the real images")
    labels = torch.tensor([classes.index(name) for name in train.classes])[train.labels]
    return replace(train, classes=classes, labels=labels)


def _check_names(ours: Sequence[str], theirs: Sequence[str], where: str, other: str) -> None:
    """Raise ValueError at the first name, in sorted order, that one side alone has."""
    alone = sorted(set(ours) ^ set(theirs))
    if not alone:
        return
    here, there = (where, other) if alone[0] in ours else (other, where)
    count = f"{len(ours)} and {len(theirs)} classes, {len(alone)} names in one alone"
    hint = ""
    if all(name.isdecimal() for name in ours):
        hint = "; numbers do not say which classes they are: give the folders the classes' names"
    raise ValueError(f"classes differ: {here} has {alone[0]!r} and {there} has not ({count}){hint}")


# --- soft labels


def _teacher(file: str | Path | None, protocol: Protocol, test: ImageData) -> Teacher | None:
    """What gives a soft-label protocol its labels: the file's network, of ImageNet-1K else torchvision's."""
    if file is not None:
        name, _ = teacher_recipe(protocol.image_size)
        size, least = protocol.image_size, least_for(test.name)
        return teacher_from_file(file, test.classes, architecture=name, image_size=size, least=least)
    if protocol.labels == "hard":
        return None
    if test.classes == IMAGENET_CLASSES:
        return imagenet_teacher(test.classes, range(len(test.classes)))
    raise ValueError(
        f"the protocol {protocol.name} has soft labels: name the file of what gives them, --teacher"
    )


def _spread(values: Iterable[float]) -> str:
    """Mean ± sd (n - 1), of one value the value."""
    found = list(values)
    sd = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.1f}{sd}"
