"""The surrogates of an experiment: trained once, with their class gradients and similarities kept in the
cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from igd_lib.config import Fidelity, fixed_checkpoints
from igd_lib.data.images import ImageData
from igd_lib.experiment.scales import Scale
from igd_lib.models.networks import network
from igd_lib.surrogate import (
    Checkpoints,
    ClassGradients,
    class_gradients,
    filter_images,
    kept,
    regular_checkpoints,
    run_training,
    similarities_along,
    similarity_matrices,
)
from igd_lib.tools import files, keys

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
        """A training trajectory, trained once and then read from the cache."""
        model, data, training = self._model(name), self._data, self.scale.training
        return run_training(model, data, training, keys.folder("surrogate", training.settings(model, data)))

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
        """What names a trajectory in the cache: what its training says of itself."""
        return self.scale.training.settings(self._model(name), self._data)

    def _key(self, name: str | None) -> str:
        return keys.key("surrogate", self._settings(name))

    def last_checkpoint(self, name: str | None = None) -> tuple[nn.Module, float]:
        """A copy of a surrogate as its training ended, and its epoch."""
        trajectory = self.trajectory(name)
        model = copy.deepcopy(trajectory.model)
        model.load_state_dict(trajectory.states[-1])
        return model, trajectory.epochs[-1]

    def class_gradients(self, checkpoints: Checkpoints, name: str | None = None) -> ClassGradients:
        """The gradients (E, P) by label that guide, over each class's first images."""
        images = self.scale.fidelity.gradient_images
        settings = {"surrogate": self._key(name), "images": images, "epochs": list(checkpoints.epochs)}
        return ClassGradients(checkpoints, self.train, keys.folder("gradients", settings), images)

    def similarity_matrices(self, name: str | None = None) -> dict[str, Tensor]:
        """Algorithm 2's similarities of all checkpoints, (E, E), in both readings; made once, then read."""
        trajectory, images = self.trajectory(name), self.scale.fidelity.filter_images
        settings = {"surrogate": self._key(name), "images": images, "epochs": list(trajectory.epochs)}
        path = keys.folder("similarities", settings) / "matrices.safetensors"
        if not path.is_file():
            keys.claim(path.parent / "manifest.json", "similarities", settings, "similarities")

            def gradients(label: int) -> Tensor:
                return class_gradients(trajectory, filter_images(self.train, label, images), label)

            files.save_tensors(path, similarity_matrices(gradients, len(self.train.classes)))
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
        if fixed is not None:
            return [trajectory.epochs.index(epoch) for epoch in fixed]
        matrix = self.similarity_matrices(name)[fidelity.similarity]
        return kept(similarities_along(matrix, self.scale.threshold), self.scale.threshold)

    def with_network(self, name: str | None) -> Surrogates:
        """The same with another network as the scale's own."""
        return self if name is None else replace(self, scale=replace(self.scale, surrogate=name))

    def with_threshold(self, threshold: float) -> Surrogates:
        """The same with another threshold of Algorithm 2."""
        return replace(self, scale=replace(self.scale, threshold=threshold))
