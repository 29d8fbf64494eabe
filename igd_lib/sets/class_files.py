"""A set of images that is made class by class, each class in a file of its own.

So an interrupted run goes on with the next class, several processes share the classes, and no more than one
class is in memory while it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from igd_lib.data.images import ImageData, held
from igd_lib.tools import cluster, files, keys
from igd_lib.tools.machine import ray_cluster
from igd_lib.tools.progress import progress, resumable
from igd_lib.tools.version import git_revision

MakeClass = Callable[[int], Tensor]  # uint8 (ipc, 3, H, H) of a label


@dataclass(frozen=True)
class ClassFiles:
    """`ipc` images a class, class after class, in `folder`."""

    folder: Path
    name: str  # of the data set
    split: str
    classes: tuple[str, ...]
    ipc: int
    image_size: int

    def lacking(self) -> list[int]:
        """The labels that are not there."""
        return [label for label in range(len(self.classes)) if not self._path(label).is_file()]

    def keep(self, make: MakeClass, labels: Sequence[int], what: str) -> None:
        """Make the classes that lack of `labels`.

        One that another process is making is left to it, and waited for at the end.
        """
        done = len(self.classes) - len(self.lacking())
        places = progress(labels, f"{what}, class", done=done)
        busy = [label for label in places if not self._kept(make, label, wait=False)]
        for label in busy:
            self._kept(make, label, wait=True)

    def _kept(self, make: MakeClass, label: int, *, wait: bool) -> bool:
        """Make a class if it lacks; False where another process is making it, unless waited for."""
        what = f"a run that makes class {label}"
        with ExitStack() as stack:
            try:
                stack.enter_context(files.locked(self.folder, what, wait=wait, name=f".{label:05d}.lock"))
            except BlockingIOError:
                return False
            if not self._path(label).is_file():
                files.save_tensors(self._path(label), {"images": make(label)}, revision=git_revision())
        return True

    def data(self) -> ImageData:
        """The whole set: in memory up to `images.MEMORY_LIMIT`, else read when asked for."""
        labels = torch.arange(len(self.classes)).repeat_interleave(self.ipc)
        return held(
            ImageData(self.name, self.split, self.classes, labels, self.image_size, self._fetch, slow=True)
        )

    def _fetch(self, indices: Tensor) -> Tensor:
        found = torch.empty(len(indices), 3, self.image_size, self.image_size, dtype=torch.uint8)
        owners = indices // self.ipc
        for label in owners.unique().tolist():
            self._read(label, indices, (owners == label).nonzero().flatten().tolist(), found)
        return found

    def _read(self, label: int, indices: Tensor, places: Sequence[int], found: Tensor) -> None:
        """A class's images at `places` of `indices`, into the same places of `found`."""
        path = self._path(label)
        try:
            with safe_open(path, "pt") as file:
                images = file.get_slice("images")
                for place in places:
                    number = int(indices[place]) % self.ipc
                    found[place] = images[number : number + 1][0]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error

    def _path(self, label: int) -> Path:
        return self.folder / f"{label:05d}.safetensors"


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
            fill(kept, prepare(), lacking, what)
    return kept.data()


def fill(kept: ClassFiles, maker: ClassMaker, lacking: Sequence[int], what: str) -> None:
    """Make the classes that lack, as Ray tasks where `IGD_RAY` names a cluster."""
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
