"""A distilled set on disk: images, latents and the manifest that says how they came about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igd_lib.data.images import ImageData, from_tensors
from igd_lib.sets.export import export
from igd_lib.sets.hub import Hub, Shared, pull, push
from igd_lib.sets.shareable import Declared, of_set
from igd_lib.sets.sums import BESIDE
from igd_lib.tools import files, machine
from igd_lib.tools.locks import say_once

RUN = "a run that samples into it"  # who holds a lock


class DistilledSet:
    """A distilled set on disk: `manifest.json`, `images/CLASS/INDEX.png`, `latents/CLASS/INDEX.safetensors`.

    CLASS is the zero-padded label. Raises FileNotFoundError without a manifest, ValueError for a damaged one.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = self.path / "manifest.json"
        if not manifest.is_file():
            raise FileNotFoundError(f"{self.path} holds no distilled set (no manifest.json)")
        try:
            self.manifest: dict[str, Any] = json.loads(manifest.read_text())
            if not isinstance(self.manifest, dict):
                raise TypeError("no object")
            if "format" in self.manifest:
                raise FileNotFoundError(
                    f"{self.path} holds an export for other tools, not a distilled set; open the folder "
                    "it was made from"
                )
            if (kind := self.manifest.get("kind") or "set") != "set":
                raise FileNotFoundError(
                    f"{self.path} holds work of the kind {kind!r}, not a set that was sampled; other "
                    "methods' sets are read by igd evaluate"
                )
            self.classes = tuple(self.manifest["classes"])
            self.selected: list[int] = list(self.manifest["selected"])
            self.ipc = int(self.manifest["ipc"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{manifest} is damaged ({error!r}); restore it, or delete the folder and distil again"
            ) from error

    def image_path(self, label: int, index: int) -> Path:
        return self.path / "images" / f"{label:05d}" / f"{index:05d}.png"

    def latent_path(self, label: int, index: int) -> Path:
        return self.path / "latents" / f"{label:05d}" / f"{index:05d}.safetensors"

    def finished(self, label: int) -> int:
        """How many images of a class are there, from the first without a gap, at most `ipc`; none is read."""
        count = 0
        while (
            count < self.ipc
            and self.image_path(label, count).is_file()
            and self.latent_path(label, count).is_file()
        ):
            count += 1
        return count

    def valid(self, label: int) -> int:
        """How many finished images of a class, from the first, are readable and as they were sampled."""
        for index in range(finished := self.finished(label)):
            if (problem := self._problem(label, index)) is not None:
                print(
                    f"{self.path}: class {label}, image {index}: {problem}; sampled anew from here",
                    flush=True,
                )
                return index
        return finished

    def lacking(self, labels: Sequence[int] | None = None) -> int:
        """How many images of the classes `labels` (default: all) are still to be sampled.

        Of each class the first that is not there, and all that follow from it.
        """
        chosen = self.selected if labels is None else labels
        return sum(self.ipc - self.finished(label) for label in chosen)

    def remove_leftovers(self, labels: Sequence[int] | None = None) -> None:
        """Delete what a killed run was writing: of the classes `labels`, by default beside the manifest.

        For who holds the lock of these classes, or the set's.
        """
        paths = [
            path(label, 0).parent for label in labels or () for path in (self.image_path, self.latent_path)
        ]
        for folder in [self.path] if labels is None else paths:
            for leftover in folder.glob(".*.tmp"):
                if not leftover.name.startswith(files.LOCK):  # another run is looking whether it can lock
                    leftover.unlink(missing_ok=True)

    # --- locks: a class's, while a run samples it; the set's, for moments, while its manifest is written

    @contextmanager
    def claimed(self, labels: Sequence[int]) -> Iterator[list[int]]:
        """Hold the locks of those of the classes `labels` that no other run holds; gives them."""
        machine.allow_open_files(len(labels))
        with ExitStack() as locks:
            mine = []
            for label in labels:
                with suppress(BlockingIOError):
                    locks.enter_context(files.locked(self._lock_folder(label), RUN))
                    mine.append(label)
            yield mine

    def check_free(self, labels: Sequence[int]) -> None:
        """Raise BlockingIOError where another run holds one of the classes `labels` that is not finished."""
        for label in labels:
            folder = self._lock_folder(label)
            if (folder / files.LOCK).exists() and self.lacking([label]):
                with files.locked(folder, RUN):
                    pass

    def wait_for(self, label: int) -> None:
        """Until no other run holds a class."""
        say_once(f"{self.path}: another run is sampling what is left; waiting for it")
        with files.locked(self._lock_folder(label), RUN, wait=True):
            pass

    def _lock_folder(self, label: int) -> Path:
        return self.image_path(label, 0).parent

    def images(self, label: int) -> Tensor:
        """uint8 (ipc, 3, H, W) of one class, in order.

        Raises ValueError when the class is not finished or an image damaged.
        """
        if self.finished(label) < self.ipc:
            raise ValueError(
                f"{self.path}: class {label} has {self.finished(label)} of {self.ipc} images; run distill "
                "again to resume"
            )
        pictures = []
        for path in (self.image_path(label, index) for index in range(self.ipc)):
            try:
                pictures.append(np.asarray(Image.open(path).convert("RGB")))
            except (OSError, SyntaxError) as error:
                repair = f"igd verify --repair {self.path}"
                raise ValueError(
                    f"{path} cannot be read ({error}); {repair} removes what is damaged, and distill "
                    "samples it anew"
                ) from error
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

    def latents(self, label: int, count: int | None = None) -> Tensor:
        """A class's first `count` (default: all) final latents (n, C, h, w), as the sampler gave them."""
        count = self.ipc if count is None else count
        found = [files.load_tensors(self.latent_path(label, index))[0]["latent"] for index in range(count)]
        return torch.stack(found) if found else torch.empty(0)

    def verify(self, *, repair: bool = False) -> list[str]:
        """Read everything again; what is missing, damaged or changed since sampled, a line each, by class.

        repair: remove damaged images, their latents and leftovers of killed runs, so that `distill` samples
        them anew.
        """
        found = []
        for label in self.selected:
            for index in range(self.ipc):
                if (problem := self._problem(label, index)) is not None:
                    found.append(f"class {label}, image {index}: {problem}")
                    if repair:
                        for path in (self.image_path(label, index), self.latent_path(label, index)):
                            path.unlink(missing_ok=True)
        known = {
            path(label, index)
            for label in self.selected
            for index in range(self.ipc)
            for path in (self.image_path, self.latent_path)
        }
        own = {"manifest.json", files.LOCK, *BESIDE}
        for path in sorted(self.path.rglob("*")):
            if path.is_file() and path not in known and path.name not in own:
                found.append(f"{path.relative_to(self.path)}: no part of the set")
                if repair and path.name.endswith(".tmp"):
                    path.unlink()
        return found

    def _problem(self, label: int, index: int) -> str | None:
        """What is wrong with one image, None if nothing."""
        image, latent = self.image_path(label, index), self.latent_path(label, index)
        if not image.is_file() or not latent.is_file():
            return (
                "missing"
                if not image.is_file() and not latent.is_file()
                else f"no {'image' if latent.is_file() else 'latent'}"
            )
        try:
            tensors, note = files.load_tensors(latent)
            with Image.open(image) as picture:
                size = picture.convert("RGB").size
        except (OSError, ValueError, SyntaxError) as error:
            return f"cannot be read ({error})"
        if size != (self.manifest["image_size"],) * 2:
            return f"{size[0]} x {size[1]} px"
        if not torch.isfinite(tensors["latent"]).all():
            return "its latent is not finite"
        if note.get("latent_sha256", tensor_sha256(tensors["latent"])) != tensor_sha256(tensors["latent"]):
            return "another latent than was sampled"
        if note.get("image_sha256", files.sha256(image)) != files.sha256(image):
            return "another image than was sampled"
        return None

    @property
    def revision(self) -> str:
        """The revision of the code that made the set."""
        return self.manifest.get("revision", "")

    @property
    def seconds(self) -> float:
        """What sampling the finished images took, in all, whether in one run or several."""
        done = [
            self.latent_path(label, index) for label in self.selected for index in range(self.finished(label))
        ]
        return sum(files.load_tensors(path)[1].get("seconds", 0.0) for path in done)

    def data(self) -> ImageData:
        """The whole set in memory, class after class, labels in the manifest's class order."""
        images = torch.cat([self.images(label) for label in self.selected])
        labels = torch.tensor(self.selected).repeat_interleave(self.ipc)
        return from_tensors(
            self.manifest["dataset"], f"distilled, ipc {self.ipc}", self.classes, images, labels
        )

    def push(
        self,
        repo: str,  # OWNER/NAME on the Hugging Face hub, or a folder, file:///PATH
        *,
        private: bool = False,
        licence: str = "",  # of a diffusion model that is not known here
        data_licence: str = "",  # of images that are not known here
        hub: Hub | None = None,  # who talks to the hub; None: huggingface_hub's HfApi
    ) -> Shared:
        """Share the finished set: its files with a card, Croissant metadata and their sums.

        The same push again changes nothing. Raises ValueError where the set is not whole or a licence is not
        known, ConnectionError where the hub does not answer.
        """
        declared = Declared(licence=licence, data_licence=data_licence)
        work = of_set(self, declared)
        return push(work, repo, private=private, hub=hub, beside=self.path.resolve().parent)

    @classmethod
    def pull(
        cls,
        repo: str,
        *,
        revision: str | None = None,  # a branch, tag or commit; None: the newest
        into: str | Path | None = None,  # a new folder; None: in the cache
        data: str | ImageData | Sequence[str] | None = None,  # what it is to be used with: class order
        hub: Hub | None = None,
    ) -> DistilledSet:
        """A sampled set that was pushed, checked file by file; its commit is printed and in `pulled.json`.

        Raises as `igd_lib.sets.hub.pull`: nothing is left in its place then.
        """
        found = pull(repo, into, revision=revision, data=data, repo_type="dataset", hub=hub)
        print(f"{repo}: revision {found.commit} is in {found.folder}", flush=True)
        assert found.folder is not None  # of what was pulled
        return cls(found.folder)

    def export(self, out_dir: str | Path, format: str = "imagefolder") -> Path:
        """Write the finished set for other tools: "imagefolder", "rded", "safetensors" (`igd_lib.export`)."""
        return export(self, out_dir, format=format)


def in_memory(images: ImageData | DistilledSet) -> ImageData:
    """A set's images as data, whichever way it was made."""
    return images.data() if isinstance(images, DistilledSet) else images


def tensor_sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
