"""What the lesson shows, a function a picture; those of sampling are in latents (points times the factor)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from igd_lib.analysis import plotting, points
from igd_lib.data.images import ImageData
from igd_lib.experiment import explore, lesson
from igd_lib.experiment.lesson import CLASSES, Lesson
from igd_lib.guidance import deviation_loss
from igd_lib.models.points import to_points

LATENTS, POINTS = 2.6, 1.15  # half sides of the panels
NODES = 25  # of a field's grid, a side; of a network's regions more
MANY = range(10_000, 10_200)  # seeds of samples that are shown and not learned from
KS, GAMMAS = (0.0, 5.0, 15.0, 50.0, 150.0, 500.0), (0.0, 60.0, 120.0, 240.0, 480.0, 960.0)
# The terms of Eq. 9 by what they are called: as `lesson.forces` has them, and what they are coloured by.
TERMS = {
    "denoising $s(z_t, t, \\epsilon_\\phi) - z_t$": ("denoising", "DiT"),
    "$-\\rho_t \\nabla G_I$": ("influence", "DiT + G_I"),
    "$-\\gamma \\nabla G_D$": ("deviation", "DiT + G_D"),
}
VALIDATION_SEEDS = (100, 101, 102)  # of the sliders: not those of the tables


def grid(extent: float, nodes: int = NODES) -> Tensor:
    """The nodes (nodes x nodes, 2) of a square grid, a little within the panel."""
    at = torch.linspace(-0.95 * extent, 0.95 * extent, nodes)
    return torch.cartesian_prod(at, at).flip(1)


def latents_of(own: Lesson, label: int, data: ImageData | None = None) -> Tensor:
    """The real points of a class as latents (N, 2)."""
    return to_points(data or own.train, label) * own.factor


def unguided(own: Lesson, ipc: int) -> Lesson:
    """The same without guidance, with other numbers of points."""
    return replace(own.with_guidance(0.0, 0.0), ipc=ipc)


def samples(own: Lesson) -> Figure:
    """Real points beside as many of the diffusion model's."""
    drawn = lesson.distil(unguided(own, 1), MANY)[:, :, 0].transpose(0, 1)
    real = [to_points(own.train, label)[: len(MANY)] for label in range(len(CLASSES))]
    panels = {"real points": points.Set(real), "samples, no guidance": points.Set(list(drawn))}
    return points.sets(panels, CLASSES, title=f"{len(MANY)} points a class", extent=POINTS)


def denoising(own: Lesson, label: int, indices: Sequence[int] = (45, 20, 5)) -> Figure:
    """Where eps points, at three noise levels: -eps at the nodes of a grid, and the clean latents that the
    model predicts of noisy points (Eq. 2).
    """
    panels, clean = [], latents_of(own, label)[:300]
    for index in indices:
        step = lesson.step_at(own, grid(LATENTS), index, label)
        noisy = _noised(clean, step.alpha_bar)
        predicted = lesson.step_at(own, noisy, index, label).clean.detach().flatten(1)
        title = f"step {index}, $\\bar\\alpha_t$ = {step.alpha_bar.item():.2g}"
        arrows = -step.eps.detach().flatten(1)
        panels.append(points.Field(title, grid(LATENTS), arrows, cloud=noisy, marks=predicted))
    title = (
        f"$-\\epsilon_\\phi(z_t, t, c)$ for the class {CLASSES[label]!r}; grey: its noisy points, "
        "orange: their $\\hat z_{0|t}$"
    )
    return points.fields(panels, title=title, extent=LATENTS)


def influence(own: Lesson, label: int, index: int = 30) -> Figure:
    """G_I over the plane and where its gradient pushes: by checkpoint, all, and as sampling sees it."""
    nodes, cloud = grid(LATENTS), latents_of(own, label)[:300]
    every = list(range(len(own.checkpoints)))
    groups = [*([number] for number in every[:3]), every]
    names = [f"checkpoint of epoch {own.checkpoints.epochs[group[0]]:.2g}" for group in groups[:-1]]
    panels = []
    for name, group in zip([*names, "all kept ones (Eq. 7)"], groups, strict=True):
        loss, arrows = lesson.influence_field(own, nodes, label, group)
        panels.append(points.Field(name, nodes, arrows, loss, cloud, heat_label="$G_I(z)$"))
    step = lesson.step_at(own, nodes, index, label)
    loss, _ = lesson.influence_field(own, step.clean.detach().flatten(1), label, groups[-1])
    arrows = lesson.forces(_guided(own), nodes, index, label)["influence"]
    noisy = _noised(cloud, step.alpha_bar)
    title = f"step {index}: of $\\hat z_{{0|t}}$, by $z_t$"
    panels.append(points.Field(title, nodes, arrows, loss, noisy, heat_label="$G_I(\\hat z_{0|t})$"))
    title = f"$G_I$ and $-\\nabla G_I$ for the class {CLASSES[label]!r}; white dots: its points"
    return points.fields(panels, title=title, extent=LATENTS)


def _noised(clean: Tensor, alpha_bar: Tensor) -> Tensor:
    """Latents (N, 2) with a noise level's noise."""
    eps = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * eps


def _guided(own: Lesson) -> Lesson:
    """With both guidances, at strength 1 where there is none: for directions."""
    return own.with_guidance(own.guidance.k or 1.0, own.guidance.gamma or 1.0)


def deviation(own: Lesson, label: int, seed: int = 0, known: Sequence[int] = (1, 2, 3)) -> Figure:
    """G_D over the plane and where its gradient pushes, with one, two and three points in the memory."""
    nodes, cloud = grid(LATENTS), latents_of(own, label)[:300]
    made = lesson.distil(unguided(own, max(known)), [seed])[0, label] * own.factor
    panels = []
    for count in known:
        memory = made[:count].reshape(-1, 2, 1, 1)
        with torch.enable_grad():
            z = nodes.reshape(-1, 2, 1, 1).clone().requires_grad_()
            loss = deviation_loss(z, [memory] * len(z))
            (gradient,) = torch.autograd.grad(loss.sum(), z)
        title = f"{count} in the memory"
        arrows, heat = -gradient.flatten(1), loss.detach()
        panels.append(points.Field(title, nodes, arrows, heat, cloud, made[:count], "$G_D(z)$"))
    title = f"$G_D$ (Eq. 8) and $-\\nabla G_D$; orange: the memory of the class {CLASSES[label]!r}"
    return points.fields(panels, title=title, extent=LATENTS)


def pulls(own: Lesson, label: int, seed: int = 0) -> Figure:
    """The three terms of Eq. 9 in the first and the last guided step, where unguided points pass then."""
    plain = unguided(own, own.ipc)
    ways = lesson.paths(plain, seed, label)
    memory = ways[:3, -1]
    moments = {}
    for index in reversed(own.guidance.guided_range):
        at = ways[:, own.num_steps - 1 - index]
        found = lesson.forces(own, at, index, label, memory)
        terms = {name: found[key] for name, (key, _) in TERMS.items()}
        moments[f"step {index}"] = points.Moment(at, terms, memory)
    return points.pulls(
        moments,
        {name: look for name, (_, look) in TERMS.items()},
        cloud=latents_of(own, label)[:300],
        title="What moves $z_t$ in one step (Eq. 9); arrows are drawn by the root of their length",
        extent=LATENTS,
    )


def ways(own: Lesson, label: int, seed: int = 0) -> Figure:
    """The ways of a class's points with each guidance, from the same noise, over those without."""
    sampled = {name: one for name, one in lesson.methods(own).items() if one.family != "random"}
    found = {}
    for name, method in sampled.items():
        given = method.guidance
        found[name] = lesson.paths(
            own.with_guidance(given.k if given else 0.0, given.gamma if given else 0.0), seed, label
        )
    guided = [own.guidance.covers(own.num_steps - 1 - number) for number in range(own.num_steps)]
    return points.ways(
        found,
        guided,
        {name: method.look for name, method in sampled.items()},
        reference=next(iter(sampled)),
        cloud=latents_of(own, label)[:300],
        title=f"Algorithm 1, class {CLASSES[label]!r}: open noise, dots guided steps, grey without guidance",
        extent=LATENTS,
    )


def distilled(own: Lesson, found: Mapping[str, Tensor], place: int = 0) -> Figure:
    """Every method's set of one seed over the regions of the network that it trains."""
    seed, nodes = own.seeds[place], grid(POINTS / 0.95, 80)
    panels = {
        name: _panel(own, one[place], seed, nodes, own.test, "test points") for name, one in found.items()
    }
    looks = {name: method.look for name, method in lesson.methods(own).items()}
    title = f"{own.ipc} points a class, seed {seed}; background: what the network that they train says"
    cloud = [to_points(own.train, label)[:300] for label in range(len(CLASSES))]
    return points.sets(panels, CLASSES, title=title, extent=POINTS, cloud=cloud, grid=nodes, looks=looks)


def _panel(own: Lesson, found: Tensor, seed: int, nodes: Tensor, on: ImageData, words: str) -> points.Set:
    """A set with the regions of its network and what it measures."""
    model = lesson.trained_on(own, found, seed)
    with torch.no_grad():
        regions = model(nodes.reshape(-1, 2, 1, 1)).argmax(1)
    score, count = lesson.score(model, on), lesson.modes_found(found)
    return points.Set(list(found), regions, f"{score:.1f} % of {words}, {count} of {lesson.MODES} modes")


def settings(own: Lesson, k: float, gamma: float, plain: points.Set | None = None) -> Figure:
    """A set without guidance and with this pair's, from the same noise, and what the pair reaches.

    All of it on validation points, with other seeds than the tables'. plain: `tried` without guidance.
    """
    panels = {
        "without guidance": plain or tried(own, 0.0, 0.0),
        f"k = {k:g}, gamma = {gamma:g}": tried(own, k, gamma),
    }
    figure = points.sets(
        panels,
        CLASSES,
        title=f"The set of seed {VALIDATION_SEEDS[0]}, and means over seeds",
        extent=POINTS,
        cloud=[to_points(own.train, label)[:300] for label in range(len(CLASSES))],
        grid=grid(POINTS / 0.95, 80),
        panel=4.2,
    )
    return plotting.keep(figure, "", "")


def tried(own: Lesson, k: float, gamma: float) -> points.Set:
    """The panel of a pair: the first validation seed's set, and means over these seeds."""
    found = lesson.distil(own.with_guidance(k, gamma), VALIDATION_SEEDS)
    nodes, first = grid(POINTS / 0.95, 80), VALIDATION_SEEDS[0]
    one = _panel(own, found[0], first, nodes, own.validation, "validation points")
    means = lesson.measures(own, found, VALIDATION_SEEDS)
    words = (
        f"mean of {len(VALIDATION_SEEDS)} seeds: {means['top1']:.1f} %, "
        f"$G_I$ {means['influence_loss']:.3f}, {means['modes_found']:.1f} modes"
    )
    return replace(one, note=f"{one.note}\n{words}")


def sliders(own: Lesson) -> Any:
    """Sliders over k and gamma that sample and train anew, in JupyterLab; elsewhere the lesson's pair."""
    now, plain = own.guidance, tried(own, 0.0, 0.0)
    return explore.sliders(
        lambda k, gamma: settings(own, k, gamma, plain),
        k=(sorted({*KS, now.k}), now.k),
        gamma=(sorted({*GAMMAS, now.gamma}), now.gamma),
    )
