"""How a table's row makes its set, if not by the paper's guidance: one function and one line each.

BASELINES: other methods, each a file in `igd_lib.baselines`. GUIDES: other guidance, each a class in
`igd_lib.guides`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from igd_lib.baselines import rded
from igd_lib.data.images import ImageData, from_tensors
from igd_lib.guides import GuideFactory
from igd_lib.teachers import Teacher
from igd_lib.tools import files, keys
from igd_lib.tools.version import git_revision


class Workplace(Protocol):
    """What a baseline may use of an experiment."""

    @property
    def train(self) -> ImageData: ...

    @property
    def device(self) -> str: ...

    @property
    def candidates(self) -> int: ...

    def any_teacher(self) -> Teacher: ...


@dataclass(frozen=True)
class Baseline:
    """A method that is no guided sampling."""

    name: str  # the paper's
    make: Callable[[Any, int, int], ImageData]  # of a Workplace, IPC and generation seed


@dataclass(frozen=True)
class OtherGuide:
    """Another paper's guidance."""

    name: str  # as a label has it: "DiT + NAME"
    make: Callable[[Any], GuideFactory]  # of an Experiment


def random_images(place: Workplace, ipc: int, seed: int) -> ImageData:
    """Real images drawn at random."""
    return place.train.per_class(ipc, seed)


def rded_images(place: Workplace, ipc: int, seed: int) -> ImageData:
    """RDED's images by the teacher of the soft-label protocol; selected once, then read from the cache."""
    teacher = place.any_teacher()
    grids = asdict(rded.grids_of(place.train.image_size, place.candidates))
    settings = {
        "data": place.train.name,
        "split": place.train.split,
        "images": len(place.train),
        "teacher": [teacher.architecture, teacher.weights],
        "ipc": ipc,
        "seed": seed,
    }

    def make() -> ImageData:
        return rded.rded(place.train, teacher, ipc, **grids, seed=seed, device=place.device)

    return kept_set("rded", settings | grids, place.train.classes, make)


def kept_set(
    kind: str, settings: Mapping[str, Any], classes: tuple[str, ...], make: Callable[[], ImageData]
) -> ImageData:
    """A set of images in memory: made once, then read from the cache."""
    folder = keys.folder(kind, settings)
    path = folder / "images.safetensors"
    if not path.is_file():
        keys.claim(folder / "manifest.json", kind, settings, "a set")
        made = make()
        tensors = {"images": made.fetch(torch.arange(len(made))), "labels": made.labels}
        files.save_tensors(path, tensors, name=made.name, split=made.split, revision=git_revision())
    tensors, note = files.load_tensors(path)
    return from_tensors(note["name"], note["split"], classes, tensors["images"], tensors["labels"])


BASELINES: dict[str, Baseline] = {
    "random": Baseline("Random", random_images),
    "rded": Baseline("RDED", rded_images),
}
GUIDES: dict[str, OtherGuide] = {}
