"""How single images come about, step by step: the trajectories of Figure 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from igd_lib.data import to_uint8
from igd_lib.distill import DistilledSet, image_generator
from igd_lib.experiment import Experiment
from igd_lib.methods import Method
from igd_lib.sampler import sample_igd


@dataclass(frozen=True)
class Trace:
    """One image's sampling: latents z_T ... z_0 (num_steps + 1, C, h, w), the clean latents predicted at each step
    (num_steps, C, h, w; Eq. 5), and whether each step was guided.
    """

    latents: Tensor
    clean: Tensor
    guided: list[bool]


def trace(setup: Experiment, method: Method, images: DistilledSet, label: int, index: int) -> Trace:
    """Sample image `index` of class `label` of a set again, with the memory it had: its last latent is the set's up to rounding."""
    pipe, checkpoints, gradients, options = setup.sampling(method)
    generators = [image_generator(images.manifest["seed"], setup.label_ids[label], index)]
    noise = pipe.latent_noise(generators)
    latents, clean, guided = [noise], [], []

    def record(_: int, __: int, info: dict[str, Any]) -> None:
        latents.append(info["latents"])
        clean.append(info["clean"])
        guided.append("influence_loss" in info or "deviation_loss" in info)

    sample_igd(
        pipe.transformer, pipe.vae, pipe.scheduler_for(options["fidelity"]), noise, torch.tensor([setup.label_ids[label]], device=noise.device),
        targets=torch.tensor([label], device=noise.device), guidance=method.guidance, checkpoints=checkpoints,
        gradients=gradients(label)[:, None].to(noise.device) if gradients else None,
        memory=[images.latents(label, index).to(noise.device) if index else noise[:0]], generator=generators, callback=record, **options,
    )  # fmt: skip
    return Trace(torch.cat(latents).cpu(), torch.cat(clean).cpu(), guided)


def overview(
    setup: Experiment, methods: Sequence[Method], sets: Mapping[tuple[str, int], DistilledSet], label: int, indices: Sequence[int], columns: int = 9
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Images of one class from the same noise with each method, seed 0 (Figure 5).

    Returns every latent on the way in the plane of all their two principal components (columns method, image, step, guided, x,
    y; step counts down to 0, the finished latent), and by method what `columns` steps of the last image, evenly spread, predict
    the image to be, uint8 (columns, 3, H, W).
    """
    found = {(method.name, index): trace(setup, method, sets[method.name, 0], label, index) for method in methods for index in indices}
    points = torch.cat([one.latents.flatten(1) for one in found.values()]).double()
    centre = points.mean(0)
    axes = torch.linalg.svd(points - centre, full_matrices=False).Vh[:2].T
    axes = axes * axes[axes.abs().argmax(dim=0), range(2)].sign()  # a component has no sign of its own
    rows, strips = [], {}
    for (name, index), one in found.items():
        for step, (x, y) in enumerate(((one.latents.flatten(1).double() - centre) @ axes).tolist()):
            rows.append((name, index, len(one.guided) - step, step > 0 and one.guided[step - 1], round(x, 4), round(y, 4)))
        shown = [len(one.clean) - 1 - step for step in shown_steps(len(one.clean), columns)]
        strips[name] = to_uint8(setup.pipe.decode(one.clean[shown].to(setup.device))).cpu()
    return pd.DataFrame(rows, columns=["method", "image", "step", "guided", "x", "y"]), strips


def shown_steps(num_steps: int, columns: int) -> list[int]:
    """Which of the steps num_steps - 1 ... 0 a strip of `columns` pictures shows, evenly spread."""
    return torch.linspace(num_steps - 1, 0, columns).round().long().tolist()
