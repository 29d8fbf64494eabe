"""How a table's row makes its set, if not by the paper's guidance: one function and one line each.

BASELINES: other methods, each a file in `igd_lib.baselines`. GUIDES: other guidance, each a class in
`igd_lib.guides`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from igd_lib.baselines import rded
from igd_lib.data.images import ImageData
from igd_lib.guides import GuideFactory
from igd_lib.sets.class_files import ClassFiles
from igd_lib.teachers import Teacher
from igd_lib.tools import cluster, keys
from igd_lib.tools.machine import ray_cluster
from igd_lib.tools.progress import resumable


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
    # Of a method that takes long: minutes of two cores for a set on a stand-in, by Workplace and IPC, and
    # whether it is in the cache already.
    minutes: Callable[[Any, int], float] | None = None
    is_made: Callable[[Any, int, int], bool] = lambda place, ipc, seed: False


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
    train, teacher = place.train, place.any_teacher()
    grids = rded.grids_of(train.image_size, place.candidates)
    settings = {
        "data": train.name,
        "split": train.split,
        "images": len(train),
        "teacher": [teacher.architecture, teacher.weights],
        "ipc": ipc,
        "seed": seed,
    }
    settings |= asdict(grids)
    split = rded.split_of(ipc, grids.factor, seed)
    kept = ClassFiles(keys.folder("rded", settings), train.name, split, train.classes, ipc, grids.size)

    def prepare() -> rded.Selection:
        return rded.selection(train, teacher, ipc, grids, seed=seed, device=place.device)

    return kept_by_class("rded", settings, kept, prepare, "RDED")


class ClassMaker(Protocol):
    """Makes the images of a label, uint8 (ipc, 3, H, H), on its device; its results depend on no other."""

    def __call__(self, label: int) -> Tensor: ...

    def to(self, device: str) -> ClassMaker: ...


def kept_by_class(
    kind: str,
    settings: Mapping[str, Any],
    kept: ClassFiles,
    prepare: Callable[[], ClassMaker],  # asked where a class lacks
    what: str,  # in lines of progress
) -> ImageData:
    """A set that is made class by class, as Ray tasks where `IGD_RAY` names a cluster; made once, then read.

    An interrupted run goes on with the classes that lack; of two processes each makes what the other does
    not.
    """
    keys.claim(kept.folder / "manifest.json", kind, settings, "a set")
    if lacking := kept.lacking():
        count = len(kept.classes)
        with resumable(lambda: f"{count - len(kept.lacking())} of {count} classes are in {kept.folder}"):
            _make(kept, prepare(), lacking, what)
    return kept.data()


def _make(kept: ClassFiles, maker: ClassMaker, lacking: Sequence[int], what: str) -> None:
    where = ray_cluster()
    if not where:
        kept.keep(maker, lacking, what)
        return
    with cluster.cluster(where) as ray:
        work = _ClassWork(kept, maker.to("cpu"), what)
        cluster.run_all(ray, _ClassWork.run, work, lacking, label=f"{what}, class")


@dataclass(frozen=True)
class _ClassWork:
    """What a task needs to make a class."""

    kept: ClassFiles
    maker: ClassMaker
    what: str

    def to(self, device: str) -> _ClassWork:
        return replace(self, maker=self.maker.to(device))

    def run(self, label: int) -> None:
        self.kept.keep(self.maker, [label], self.what)


BASELINES: dict[str, Baseline] = {
    "random": Baseline("Random", random_images),
    "rded": Baseline("RDED", rded_images),
}
GUIDES: dict[str, OtherGuide] = {}
