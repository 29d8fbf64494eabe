"""The surrogates of an experiment: trained once, with their class gradients and similarities kept in the
cache.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from igd_lib import surrogate
from igd_lib.config import Fidelity, fixed_checkpoints
from igd_lib.data.images import ImageData
from igd_lib.experiment.scales import Scale
from igd_lib.models.networks import network
from igd_lib.surrogate import (
    GRADIENTS,
    Checkpoints,
    ClassGradients,
    Sums,
    class_gradients,
    filter_images,
    kept,
    parts,
    regular_checkpoints,
    run_training,
    similarities_along,
    trained_epochs,
)
from igd_lib.teachers import Teacher
from igd_lib.tools import cluster, files, keys
from igd_lib.tools.machine import ray_cluster
from igd_lib.tools.progress import Pace, progress, resumable

ALGORITHM_2 = "Algorithm 2, class"  # in lines of progress
EARLY = 0.1  # of a training: EL2N's networks are of epoch 20 of 200
HALVES = ((0.5,) * 3, (0.5,) * 3)  # a surrogate's mean and standard deviation of [0, 1] images
CHUNK = 5  # classes whose gradients are one task
READINGS = {
    "mean of per-class cosines (released)": "per_class",
    "cosine of the mean gradient (paper)": "mean",
}


@dataclass(frozen=True)
class Surrogates:
    """Surrogates by the network's name; None is the scale's own."""

    scale: Scale
    train: ImageData
    device: str

    def of(self, fidelity: Fidelity) -> Surrogates:
        """The surrogates that another fidelity asks for: trained and filtered as it says."""
        return replace(self, scale=self.scale.with_fidelity(fidelity, len(self.train.classes)))

    def trajectory(self, name: str | None = None) -> Checkpoints:
        """A training trajectory, trained once, on a Ray cluster where one is named, then read from disk."""
        settings = self._settings(name)
        folder = keys.folder("surrogate", settings)
        where = ray_cluster()
        if where and trained_epochs(folder) < self.scale.training.epochs:
            there = replace(self, device="cpu")  # where it is sent from

            def done() -> str:
                return f"{trained_epochs(folder)} of {self.scale.training.epochs} epochs are in {folder}"

            with cluster.cluster(where) as ray:
                cluster.run_all(ray, _train, there, [(name, folder, settings)], label="surrogate", done=done)
        return run_training(self._model(name), self._data, self.scale.training, folder, settings)

    def to(self, device: str) -> Surrogates:
        """The same on a device."""
        return replace(self, device=device)

    @property
    def _data(self) -> ImageData:
        count = self.scale.train_images
        return self.train.per_class(count, seed=0) if count else self.train

    def _model(self, name: str | None) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            classes, side = len(self.train.classes), self.train.image_size
            made = network(name or self.scale.surrogate, num_classes=classes, image_size=side)
        return made.to(self.device)

    def _settings(self, name: str | None) -> dict[str, Any]:
        """What names a trajectory in the cache: what its training says of itself, and where it is trained."""
        where = cluster.device(ray_cluster(), self.device)
        return self.scale.training.settings(self._model(name), self._data) | {"device": where}

    def _key(self, name: str | None) -> str:
        return keys.key("surrogate", self._settings(name))

    def last_checkpoint(self, name: str | None = None) -> tuple[nn.Module, float]:
        """A copy of a surrogate as its training ended, and its epoch."""
        trajectory = self.trajectory(name)
        model = copy.deepcopy(trajectory.model)
        model.load_state_dict(trajectory.states[-1])
        return model, trajectory.epochs[-1]

    def early(self) -> list[Teacher]:
        """The scale's own surrogate early in its training, as classifiers, for EL2N's mean over networks.

        Its checkpoints of the first tenth of the training, or of the first epoch where that is longer.
        """
        trajectory, classes = self.trajectory(), self.train.classes
        last = max(1.0, EARLY * trajectory.epochs[-1])
        found = []
        for epoch, state in zip(trajectory.epochs, trajectory.states, strict=True):
            if 0 < epoch <= last:
                model = copy.deepcopy(trajectory.model)
                model.load_state_dict(state)
                origin = f"the surrogate's trajectory, epoch {epoch:g}; {files.digest(state)}"
                found.append(Teacher(model, self.scale.surrogate, origin, classes, *HALVES, least=0.0))
        return found

    def class_gradients(self, checkpoints: Checkpoints, name: str | None = None) -> ClassGradients:
        """The gradients (E, P) by label that guide, over each class's first images."""
        images = self.scale.fidelity.gradient_images
        settings = {"surrogate": self._key(name), "images": images, "epochs": list(checkpoints.epochs)}
        return ClassGradients(checkpoints, self.train, keys.folder("gradients", settings), images)

    def similarity_matrices(self, name: str | None = None) -> dict[str, Tensor]:
        """Algorithm 2's similarities of all checkpoints, (E, E), in both readings; made once, then read."""
        trajectory, images = self.trajectory(name), self.scale.fidelity.filter_images
        settings = {"surrogate": self._key(name), "images": images, "epochs": list(trajectory.epochs)}
        folder = keys.folder("similarities", settings)
        path = folder / "matrices.safetensors"
        if not path.is_file():
            keys.claim(folder / "manifest.json", "similarities", settings, "similarities")
            with files.locked(folder, "a run that compares checkpoints", wait=True):
                if not path.is_file():
                    made = _Similarities(trajectory, self.train, images, folder).made()
                    files.save_tensors(path, made)
                    shutil.rmtree(folder / PARTS, ignore_errors=True)
        return files.load_tensors(path)[0]

    def similarities(self) -> dict[str, list[float]]:
        """Algorithm 2's similarity to the last kept checkpoint, along the trajectory, in both readings."""
        matrices = self.similarity_matrices()
        return {
            label: similarities_along(matrices[kind], self.scale.threshold)
            for label, kind in READINGS.items()
        }

    def choices(self, thresholds: Sequence[float]) -> pd.DataFrame:
        """What Algorithm 2 keeps (indices, epochs) by similarity and threshold; as many regular ones."""
        epochs, rows = self.trajectory().epochs, []
        for kind, matrix in sorted(self.similarity_matrices().items(), reverse=True):
            for threshold in thresholds:
                keep = kept(similarities_along(matrix, threshold), threshold)
                regular = regular_checkpoints(len(epochs) - 1, len(keep)) if len(keep) > 1 else [0]
                rows.append((kind, threshold, keep, [round(epochs[index], 2) for index in keep], regular))
        return pd.DataFrame(rows, columns=["similarity", "threshold", "kept", "epochs", "regular"])

    def retained(
        self, keep: Sequence[int] | None = None, name: str | None = None
    ) -> tuple[Checkpoints, Callable[[int], Tensor]]:
        """The checkpoints to guide with, `keep` or what the fidelity chooses, and their class gradients
        (E, P) by label.
        """
        trajectory = self.trajectory(name)
        keep = list(keep) if keep is not None else self._chosen(trajectory, name)
        checkpoints = trajectory.keep(keep)
        gradients_of = self.class_gradients(checkpoints, name)
        if self.scale.many_classes:
            return checkpoints, gradients_of
        labels = range(len(self.train.classes))  # a few classes, a small network: in memory
        if where := ray_cluster():
            _on_cluster(where, ClassGradients.keep, gradients_of, _chunks(gradients_of, labels), GRADIENTS)
        gradients = torch.stack([gradients_of(label) for label in labels], dim=1).to(self.device)
        return checkpoints, lambda label: gradients[:, label]

    @property
    def fixed(self) -> tuple[int, ...] | None:
        """The released code's list of epochs for this data set and surrogate, where it has one."""
        if self.train.name != self.scale.dataset:  # a stand-in's data
            return None
        return fixed_checkpoints(self.scale.dataset, self.scale.surrogate)

    def _chosen(self, trajectory: Checkpoints, name: str | None) -> list[int]:
        """The released code's list where there is one for this data set, else Algorithm 2's choice."""
        fidelity = self.scale.fidelity
        fixed = self.with_network(name).fixed if fidelity.checkpoints == "fixed" else None
        if fixed is not None:  # in a rehearsal, whose training is short, the last epoch stands for later ones
            last = float("inf") if self.scale.figures_mean_something else trajectory.epochs[-1]
            reached = [min(float(epoch), last) for epoch in fixed]
            return [trajectory.epochs.index(epoch) for epoch in dict.fromkeys(reached)]
        matrix = self.similarity_matrices(name)[fidelity.similarity]
        return kept(similarities_along(matrix, self.scale.threshold), self.scale.threshold)

    def with_network(self, name: str | None) -> Surrogates:
        """The same with another network as the scale's own."""
        return self if name is None else replace(self, scale=replace(self.scale, surrogate=name))

    def with_threshold(self, threshold: float) -> Surrogates:
        """The same with another threshold of Algorithm 2."""
        return replace(self, scale=replace(self.scale, threshold=threshold))


PARTS = "parts"  # the folder of unfinished work


@dataclass(frozen=True)
class _Similarities:
    """Algorithm 2's pass over all classes, its sums kept on disk part by part, and within a part by time."""

    checkpoints: Checkpoints
    data: ImageData
    images: tuple[int, int] | None  # of a class; see `filter_images`
    folder: Path

    def to(self, device: str) -> _Similarities:
        return replace(self, checkpoints=self.checkpoints.to(device))

    def made(self) -> dict[str, Tensor]:
        """The matrices, from the parts that are there and those that lack."""
        lacking = [number for number in range(len(self._parts)) if not self._path(number).is_file()]
        with resumable(lambda: self.kept):
            if lacking and (where := ray_cluster()):
                _on_cluster(where, _Similarities.run, self, [[number] for number in lacking], ALGORITHM_2)
            else:
                self.run(lacking)
        whole = Sums(len(self.data.classes))
        for number in range(len(self._parts)):
            part = Sums(whole.classes)
            part.load(self._path(number))
            whole.join(part)
        return whole.matrices

    @property
    def kept(self) -> str:
        """What an interruption leaves, in words."""
        finished = sum(self._path(number).is_file() for number in range(len(self._parts)))
        done = f"the sums of {finished} of {len(self._parts)} parts of the classes"
        return f"{done}, and the next part's as far as they were saved, are in {self.folder}"

    def run(self, numbers: Sequence[int]) -> None:
        """Make the sums of parts, going on where an earlier run saved them."""
        begun = {number: self._begun(number) for number in numbers}
        labels = [
            (number, label) for number in numbers for label in self._parts[number][begun[number].count :]
        ]
        pace = Pace(surrogate.SAVE_SECONDS, times=20.0)
        before = len(self.data.classes) - len(labels)
        for number, label in progress(labels, ALGORITHM_2, done=before):
            sums, last = begun[number], label == self._parts[number][-1]
            sums.add(class_gradients(self.checkpoints, filter_images(self.data, label, self.images), label))
            if last or pace.due:
                with pace.saving():
                    sums.save(self._path(number) if last else self._unfinished(number))
            if last:
                self._unfinished(number).unlink(missing_ok=True)
                del begun[number]

    def _begun(self, number: int) -> Sums:
        found = Sums(len(self.data.classes))
        if self._unfinished(number).is_file():
            found.load(self._unfinished(number))
        return found

    @property
    def _parts(self) -> list[range]:
        return parts(len(self.data.classes))

    def _path(self, number: int) -> Path:
        return self.folder / PARTS / f"{number:05d}.safetensors"

    def _unfinished(self, number: int) -> Path:
        return self.folder / PARTS / f"{number:05d}-unfinished.safetensors"


# --- on a Ray cluster


def _train(there: Surrogates, work: tuple[str | None, Path, dict[str, Any]]) -> None:
    name, folder, settings = work
    run_training(there._model(name), there._data, there.scale.training, folder, settings)


def _chunks(gradients: ClassGradients, labels: Sequence[int]) -> list[list[int]]:
    """The classes that are not on disk, a task each chunk."""
    lacking = [label for label in labels if not gradients.is_kept(label)]
    return [lacking[first : first + CHUNK] for first in range(0, len(lacking), CHUNK)]


def _on_cluster(
    where: bool | str, work: Callable[..., None], shared: Any, items: Sequence[Any], label: str
) -> None:
    """Work whose results are files as tasks; what it needs is sent from host memory."""
    if not items:
        return
    model = copy.deepcopy(shared.checkpoints.model)
    sent = replace(shared, checkpoints=replace(shared.checkpoints, model=model)).to("cpu")
    with cluster.cluster(where) as ray:
        cluster.run_all(ray, work, sent, items, label=f"{label}, chunk")
