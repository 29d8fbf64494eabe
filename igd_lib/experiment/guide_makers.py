"""How other papers' guides are made in an experiment: settings, and which real images they look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from igd_lib.anchors import Anchors, RealLatents, Rule
from igd_lib.data.images import ImageData
from igd_lib.guides import Guide, GuideFactory
from igd_lib.other_guides import ClassifierLoss, Modes, Reading, Transport, mode_range
from igd_lib.sampling import Sampling
from igd_lib.tools import files

BETA = 160.0  # of optimal transport, for latents of 4,096 values; chosen on validation images
POINTS = 200  # real latents of a class that it compares with, at most
MakeFactory = Callable[[Any], GuideFactory]  # of an Experiment


def seen_images(experiment: Any) -> ImageData:
    """The real images that guides look at: all for training, or a few where figures mean nothing."""
    scale, train = experiment.scale, experiment.train
    return train if scale.figures_mean_something else train.first(scale.candidates)


def _latents(experiment: Any) -> RealLatents:
    pipe = experiment.models.pipe
    return RealLatents(seen_images(experiment), pipe.vae, pipe.image_size)


# --- MGD3


def modes(name: str, rule: Rule = "k-means", reading: Reading = "code") -> MakeFactory:
    """Who draws images to anchors by a rule; the same ones for every generation seed."""

    def make(experiment: Any) -> GuideFactory:
        latents = _latents(experiment)

        def unknown(*_: Any) -> Guide:
            raise ValueError(f"{name} depends on the images a class of a set; sample by `distill`")

        def for_set(ipc: int, num_steps: int, last: int) -> GuideFactory:
            maker = _Modes(name, Anchors(latents, ipc, rule), reading, mode_range(num_steps, last))
            return GuideFactory(maker, maker.settings, remembers=False, prepare=maker.anchors.keep)

        return GuideFactory(unknown, {"name": name}, remembers=False, for_set=for_set)

    return make


@dataclass(frozen=True)
class _Modes:
    name: str
    anchors: Anchors
    reading: Reading
    guided_range: tuple[int, int]
    scale: float = 0.1

    @property
    def settings(self) -> dict[str, Any]:
        own = {"reading": self.reading, "scale": self.scale, "guided_range": list(self.guided_range)}
        return {"name": self.name, **own, "rule": self.anchors.rule, "anchors": self.anchors.settings}

    def __call__(self, labels: Tensor, indices: Sequence[int], memory: Sequence[Tensor]) -> Guide:
        own = [self.anchors(label)[index] for label, index in zip(labels.tolist(), indices, strict=True)]
        return Modes(torch.stack(own), self.guided_range, self.scale, self.reading)


# --- the control: a classifier's loss


def classifier(experiment: Any) -> GuideFactory:
    """Who goes down the cross-entropy by the checkpoints that guide, with the scale's k and range."""
    own = replace(experiment.scale.guidance, gamma=0.0)
    checkpoints = experiment.checkpoints

    def make(
        labels: Tensor, indices: Sequence[int], memory: Sequence[Tensor], sampling: Sampling
    ) -> ClassifierLoss:
        device = str(labels.device)
        return ClassifierLoss(
            own,
            checkpoints.to(device),
            labels,
            sampling.guidance_decoder or sampling.pipe.vae,
            replace(sampling.fidelity, second_chain=False),
            sampling.shortcuts,
            sampling.resize,
        )

    weights = [files.digest(state) for state in checkpoints.states]
    about = {"epochs": list(checkpoints.epochs), "rates": list(checkpoints.weights), "weights": weights}
    settings = {"name": "classifier", "k": own.k, "guided_range": list(own.guided_range)}
    return GuideFactory(make, settings | {"checkpoints": about}, remembers=False, with_models=True)


# --- optimal transport


def transport(beta: float = BETA) -> MakeFactory:
    """Who draws images to real latents of their class, the same for every generation seed."""

    def make(experiment: Any) -> GuideFactory:
        own = beta * experiment.latent_values / 4096
        maker = _Transport(_latents(experiment), own, experiment.scale.guidance.guided_range)
        return GuideFactory(maker, maker.settings, remembers=True, prepare=maker.latents.keep)

    return make


@dataclass(frozen=True)
class _Transport:
    latents: RealLatents
    beta: float
    guided_range: tuple[int, int]
    points: int = POINTS
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("beta", "points", "seed")}
        own |= {"share": Transport.share, "each": "alike", "guided_range": list(self.guided_range)}
        return {"name": "transport", **own, "latents": self.latents.settings}

    @cached_property
    def _drawn(self) -> dict[int, Tensor]:
        return {}

    def real(self, label: int) -> Tensor:
        """At most `points` of a class, drawn at random."""
        if label not in self._drawn:
            latents, generator = self.latents(label), torch.Generator().manual_seed(self.seed)
            self._drawn[label] = latents[torch.randperm(len(latents), generator=generator)[: self.points]]
        return self._drawn[label]

    def __call__(self, labels: Tensor, indices: Sequence[int], memory: Sequence[Tensor]) -> Guide:
        real = [self.real(label).to(labels.device) for label in labels.tolist()]
        return Transport(self.beta, real, memory, self.guided_range)
