"""How single images come about, step by step: the trajectories of Figure 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from igd_lib.data.images import to_uint8
from igd_lib.distillation import image_generator
from igd_lib.experiment.experiment import Experiment, Sets
from igd_lib.experiment.methods import Method
from igd_lib.sets.store import DistilledSet


@dataclass(frozen=True)
class Trace:
    """One image's sampling: latents z_T ... z_0 (num_steps + 1, C, h, w), the clean latents predicted at each
    step (num_steps, C, h, w; Eq. 2), and whether each step was guided.
    """

    latents: Tensor
    clean: Tensor
    guided: list[bool]


def trace(experiment: Experiment, method: Method, images: DistilledSet, label: int, index: int) -> Trace:
    """Sample image `index` of class `label` of a set again, with the memory it had.

    Its last latent is the set's up to rounding.
    """
    sampling, identity = experiment.sampling(method), experiment.label_ids[label]
    generators = [image_generator(images.manifest["seed"], identity, index)]
    noise = sampling.pipe.latent_noise(generators)
    latents, clean, guided = [noise], [], []

    def record(_: int, __: int, info: dict[str, Any]) -> None:
        latents.append(info["latents"])
        clean.append(info["clean"])
        guided.append(info["guided"])

    memory = [images.latents(label, index).to(noise.device) if index else noise[:0]]
    gradients = {label: sampling.class_gradients(experiment.train, label)} if sampling.influences else {}
    guides = sampling.guides([label], [index], memory, gradients, generators)
    sampling.sample(noise, [identity], guides, generators, callback=record)
    return Trace(torch.cat(latents).cpu(), torch.cat(clean).cpu(), guided)


def overview(
    experiment: Experiment, sets: Sets, label: int, indices: Sequence[int], columns: int = 9
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Images of one class from the same noise with each method, of one seed (Figure 5).

    Returns every latent on the way in the plane of all their two principal components (columns method, look,
    image, step, guided, x, y; step counts down to 0, the finished latent), and by method what `columns` steps
    of the last image, evenly spread, predict the image to be, uint8 (columns, 3, H, W).
    """
    found = {
        (method, index): trace(experiment, method, images, label, index)
        for method, seed, images in sets.sampled()
        for index in indices
        if seed == sets.shown_seed
    }
    points = torch.cat([one.latents.flatten(1) for one in found.values()]).double()
    centre = points.mean(0)
    axes = torch.linalg.svd(points - centre, full_matrices=False).Vh[:2].T
    axes = axes * axes[axes.abs().argmax(dim=0), range(2)].sign()  # a component has no sign of its own
    rows, strips = [], {}
    for (method, index), one in found.items():
        for step, (x, y) in enumerate(((one.latents.flatten(1).double() - centre) @ axes).tolist()):
            guided = step > 0 and one.guided[step - 1]
            place = (index, len(one.guided) - step, guided, round(x, 4), round(y, 4))
            rows.append((method.label, method.look, *place))
        shown = [len(one.clean) - 1 - step for step in shown_steps(len(one.clean), columns)]
        pipe = experiment.models.pipe
        strips[method.label] = to_uint8(pipe.decode(one.clean[shown].to(experiment.device))).cpu()
    return pd.DataFrame(rows, columns=["method", "look", "image", "step", "guided", "x", "y"]), strips


def shown_steps(num_steps: int, columns: int) -> list[int]:
    """Which of the steps num_steps - 1 ... 0 a strip of `columns` pictures shows, evenly spread."""
    return torch.linspace(num_steps - 1, 0, columns).round().long().tolist()
