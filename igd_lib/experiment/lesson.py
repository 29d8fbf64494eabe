"""The whole method in two dimensions: points in the plane in place of images, made and measured in a minute.

The data, a diffusion model, a surrogate and its trajectory are made here; sampling, Algorithm 2, the guides
and the class gradients are the library's own, which do not care that a latent is 2 x 1 x 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from igd_lib.analysis import results, statistics
from igd_lib.config import PAPER, Guidance
from igd_lib.data.images import ImageData
from igd_lib.distillation import image_generator
from igd_lib.experiment.methods import Method
from igd_lib.experiment.run import numbers
from igd_lib.guidance import influence_loss
from igd_lib.guides import Deviation, Guide, Influence, Step
from igd_lib.models.points import (
    PointAutoencoder,
    PointTransformer,
    classifier,
    from_points,
    to_points,
    train_denoiser,
)
from igd_lib.sampler import Callback, Denoiser, check_range, predict, sample
from igd_lib.schedulers import make_scheduler
from igd_lib.surrogate import (
    Checkpoints,
    SurrogateTraining,
    class_gradients,
    kept,
    run_training,
    similarities_along,
    similarity_matrices,
)
from igd_lib.tools import keys
from igd_lib.tools.progress import progress
from igd_lib.tools.version import git_revision

CLASSES = ("A", "B", "C")
SHARES = (0.6, 0.3, 0.1)  # of a class's points in its three modes
RADIUS, SPREAD = 0.7, 0.09  # of the circle on which all nine modes lie, and the sd of each
MODES = len(CLASSES) * len(SHARES)
# The text of the paper, but for rho_t's factor, which only the code has: without it k has another unit.
# Steps are numbered from 0.
FIDELITY = replace(PAPER, rho_factor=0.0015, range_counts_from=0)
NETWORK, WIDTH, SURROGATE_WIDTH = "mlp-64", 64, 32
HIGHER = 1000  # added to a generation seed: the seed of the network that is trained on the set
TRAINING = SurrogateTraining(epochs=40, lr=0.03, saves_in_first_epoch=4)


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    name: str
    points: int = 1000  # a class, in each of the three splits
    denoiser_steps: int = 2500
    training: SurrogateTraining = TRAINING
    test_epochs: int = 300  # each one step, with all points of a set
    most: int | None = None  # points a class in a set, and seeds
    figures_mean_something: bool = True


SCALES = {
    "small": Scale("small"),
    "smoke": Scale(
        "smoke",
        points=60,
        denoiser_steps=30,
        training=SurrogateTraining(epochs=2, lr=0.1, saves_in_first_epoch=2),
        test_epochs=5,
        most=2,
        figures_mean_something=False,
    ),
}


@dataclass(frozen=True)
class Lesson:
    """All that the lesson works with. Latents are the points times the scaling factor."""

    scale: Scale
    ipc: int  # points a class in a distilled set
    seeds: tuple[int, ...]
    guidance: Guidance  # gamma as in the paper, for latents of 4,096 values
    cfg_scale: float
    num_steps: int
    threshold: float  # of Algorithm 2
    train: ImageData
    validation: ImageData
    test: ImageData
    autoencoder: PointAutoencoder
    transformer: PointTransformer
    trajectory: Checkpoints
    similarities: Mapping[str, Sequence[float]]  # along Algorithm 2's walk, in both readings
    checkpoints: Checkpoints  # those that it keeps
    gradients: Tensor  # (E, C, P): of the classes at these

    @property
    def banner(self) -> str:
        line = f"**Scale: {self.scale.name}.** Points in the plane; there is no paper scale."
        return line if self.scale.figures_mean_something else f"{line} Its numbers mean nothing."

    @property
    def factor(self) -> float:
        return self.autoencoder.config.scaling_factor

    @property
    def scheduler(self) -> Any:
        """A new one: DDIM, as the paper has it."""
        return make_scheduler(FIDELITY, noise_schedule().config)

    def denoiser(self, labels: Tensor) -> Denoiser:
        return Denoiser(self.transformer, labels, self.cfg_scale, FIDELITY.cfg_channels)

    def with_guidance(self, k: float, gamma: float) -> Lesson:
        return replace(self, guidance=replace(self.guidance, k=k, gamma=gamma))


def noise_schedule() -> DDIMScheduler:
    """DiT's: 1,000 timesteps, linear betas."""
    return DDIMScheduler(num_train_timesteps=1000)


def prepare(
    scale: str = "auto",
    *,
    ipc: int = 10,
    seeds: str = "20",
    k: float = 15.0,
    gamma: float = 480.0,  # as in the paper, for latents of 4,096 values
    guided_range: tuple[int, int] = (30, 45),
    cfg: float = 1.0,
    threshold: float = 0.7,
) -> Lesson:
    """Draw the points, train diffusion model and surrogate, and choose checkpoints by Algorithm 2.

    "auto" is "small". Raises ValueError for a scale that the lesson does not have, and for settings that
    cannot be.
    """
    name = "small" if scale == "auto" else scale
    if name not in SCALES:
        raise ValueError(f"the lesson has the scales auto, {', '.join(SCALES)}, got {scale!r}")
    if ipc < 1:
        raise ValueError(f"ipc is at least 1, got {ipc}")
    own, num_steps, guidance = SCALES[name], 50, Guidance(k, gamma, guided_range)
    check_range(guidance, num_steps, FIDELITY)
    wanted = tuple(range(int(seeds))) if seeds.isdecimal() else numbers("seeds", seeds)
    if not wanted:
        raise ValueError(f"seeds are at least one, got {seeds!r}")
    train, validation, test = (
        draw(own.points, split, seed) for seed, split in enumerate(("train", "validation", "test"))
    )
    autoencoder = PointAutoencoder.of(train)
    transformer = train_denoiser(
        train, autoencoder, noise_schedule().alphas_cumprod, steps=own.denoiser_steps
    )
    surrogate = classifier(len(CLASSES), SURROGATE_WIDTH, seed=0)
    trajectory = run_training(surrogate, train, own.training)
    every = [class_gradients(trajectory, train.of_class(label), label) for label in range(len(CLASSES))]
    matrices = similarity_matrices(lambda label: every[label], len(CLASSES))
    walks = {reading: similarities_along(matrix, threshold) for reading, matrix in matrices.items()}
    keep = kept(walks["per_class"], threshold)
    return Lesson(
        scale=own,
        ipc=min(ipc, own.most or ipc),
        seeds=wanted[: own.most],
        guidance=guidance,
        cfg_scale=cfg,
        num_steps=num_steps,
        threshold=threshold,
        train=train,
        validation=validation,
        test=test,
        autoencoder=autoencoder,
        transformer=transformer,
        trajectory=trajectory,
        similarities=walks,
        checkpoints=trajectory.keep(keep),
        gradients=torch.stack(every, dim=1)[keep],
    )


# --- the data: nine modes on a circle


def modes(label: int) -> Tensor:
    """The centres (3, 2) of a class's modes, a third of the circle apart; those of other classes between."""
    turns = 0.25 + label / MODES + torch.arange(len(SHARES)) / len(SHARES)
    angles = 2 * math.pi * turns
    return RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def draw(count: int, split: str, seed: int) -> ImageData:
    """`count` points a class: a mode by its share, and Gaussian around its centre."""
    generator = torch.Generator().manual_seed(seed)
    points = []
    for label in range(len(CLASSES)):
        chosen = torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=generator)
        points.append(modes(label)[chosen] + SPREAD * torch.randn(count, 2, generator=generator))
    labels = torch.arange(len(CLASSES)).repeat_interleave(count)
    return from_points("ring", split, CLASSES, torch.cat(points), labels)


# --- sampling


def guides(lesson: Lesson, labels: Tensor, memory: Sequence[Tensor]) -> list[Guide]:
    """The paper's two guides for a batch, those of a strength above 0."""
    own, found = lesson.guidance.for_latents(2), list[Guide]()
    if own.k > 0:
        gradients = lesson.gradients[:, labels]
        found.append(Influence(own, lesson.checkpoints, gradients, labels, lesson.autoencoder, FIDELITY))
    if own.gamma > 0:
        found.append(Deviation(own, memory, FIDELITY.memory_size, FIDELITY.cosine_floor))
    return found


def distil(lesson: Lesson, seeds: Sequence[int], callback: Callback | None = None) -> Tensor:
    """Sets of points by Algorithm 1, (seeds, classes, ipc, 2): all seeds and classes side by side.

    Point after point, for one knows those before it; `callback` is that of `sample`.
    """
    labels = torch.arange(len(CLASSES)).repeat(len(seeds))
    places = [(seed, label) for seed in seeds for label in range(len(CLASSES))]
    memory = torch.zeros(len(places), 0, 2, 1, 1)
    for index in range(lesson.ipc):
        generators = [image_generator(seed, label, index) for seed, label in places]
        noise = torch.stack([torch.randn(2, 1, 1, generator=own) for own in generators])
        found = sample(
            lesson.denoiser(labels),
            lesson.scheduler,
            noise,
            guides=guides(lesson, labels, list(memory)),
            num_steps=lesson.num_steps,
            generator=generators,
            callback=callback,
        )
        memory = torch.cat([memory, found[:, None]], dim=1)
    return (memory / lesson.factor).reshape(len(seeds), len(CLASSES), lesson.ipc, 2)


def methods(lesson: Lesson) -> dict[str, Method]:
    """Random real points, sampling without guidance, with each and with both, by label."""
    own, cfg = lesson.guidance, lesson.cfg_scale
    pairs = ((own.k, 0.0), (0.0, own.gamma), (own.k, own.gamma))
    guided = [Method(guidance=replace(own, k=k, gamma=gamma), cfg_scale=cfg) for k, gamma in pairs]
    found = [Method("random", cfg_scale=cfg), Method(cfg_scale=cfg), *guided]
    return {method.label: method for method in found}


def sets(lesson: Lesson) -> dict[str, Tensor]:
    """Every method's sets, (seeds, classes, ipc, 2), by label; sampled ones of a seed share their noise."""
    found = {}
    for label, method in progress(list(methods(lesson).items()), "sets of points, method"):
        if method.family == "random":
            drawn = [to_points(lesson.train.per_class(lesson.ipc, seed)) for seed in lesson.seeds]
            found[label] = torch.stack(drawn).reshape(len(drawn), len(CLASSES), lesson.ipc, 2)
        else:
            own = method.guidance or Guidance(0.0, 0.0)
            found[label] = distil(lesson.with_guidance(own.k, own.gamma), lesson.seeds)
    return found


def paths(lesson: Lesson, seed: int, label: int) -> Tensor:
    """The ways of a class's points, (ipc, num_steps + 1, 2): latents z_T ... z_0 of Algorithm 1."""
    seen: list[Tensor] = []
    distil(lesson, [seed], lambda _, __, info: seen.append(info["latents"][label].flatten()))
    steps = torch.stack(seen).reshape(lesson.ipc, lesson.num_steps, 2)
    first = [torch.randn(2, generator=image_generator(seed, label, index)) for index in range(lesson.ipc)]
    return torch.cat([torch.stack(first)[:, None], steps], dim=1)


# --- what pulls at a point


def step_at(lesson: Lesson, latents: Tensor, index: int, label: int) -> Step:
    """What a guide sees of latents (N, 2) of a class in step `index` (T - 1 first, 0 last)."""
    scheduler = lesson.scheduler
    scheduler.set_timesteps(lesson.num_steps)
    timestep = scheduler.timesteps[lesson.num_steps - 1 - index]
    denoiser = lesson.denoiser(torch.full((len(latents),), label))
    z_t = latents.reshape(-1, 2, 1, 1)
    # As if two guides asked: the graph is there for each gradient.
    return predict(denoiser, scheduler, z_t, timestep, index, lesson.num_steps, through=2)


def forces(
    lesson: Lesson, latents: Tensor, index: int, label: int, memory: Tensor | None = None
) -> dict[str, Tensor]:
    """The terms of Eq. 9 at latents (N, 2), each as it moves z_{t-1}, and -eps; (N, 2).

    memory: latents (M, 2) of the class that were made before; None: none. Raises ValueError in a step that
    is not guided.
    """
    if not lesson.guidance.covers(index):
        raise ValueError(f"step {index} is not guided, only {lesson.guidance.guided_range}")
    step = step_at(lesson, latents, index, label)
    earlier = (torch.zeros(0, 2) if memory is None else memory).reshape(-1, 2, 1, 1)
    scheduler = lesson.scheduler
    scheduler.set_timesteps(lesson.num_steps)
    moved = scheduler.step(step.eps.detach(), step.timestep, step.z.detach()).prev_sample
    found = {"eps": -step.eps, "denoising": moved - step.z}
    found |= {"influence": torch.zeros_like(moved), "deviation": torch.zeros_like(moved)}
    for guide in guides(lesson, torch.full((len(latents),), label), [earlier] * len(latents)):
        shift = guide(step).shift
        assert shift is not None  # both move the latent
        found["influence" if isinstance(guide, Influence) else "deviation"] = -shift
    return {name: value.detach().flatten(1) for name, value in found.items()}


def influence_field(
    lesson: Lesson, latents: Tensor, label: int, checkpoints: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """G_I (N,) of clean latents (N, 2) over some kept checkpoints (Eq. 7), and minus its gradient (N, 2)."""
    with torch.enable_grad():
        z = latents.clone().requires_grad_()
        targets = torch.full((len(z),), label)
        points = (z / lesson.factor).reshape(-1, 2, 1, 1)
        kept_ones, gradients = lesson.checkpoints.keep(checkpoints), lesson.gradients[checkpoints]
        loss = influence_loss(points, targets, kept_ones, gradients[:, targets])
        (gradient,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), -gradient


# --- measures


def accuracy(lesson: Lesson, points: Tensor, seed: int, on: ImageData) -> float:
    """Percent of `on` that a network trained from scratch on a set (classes, ipc, 2) gets right."""
    return score(trained_on(lesson, points, seed), on)


def score(model: torch.nn.Module, on: ImageData) -> float:
    """Percent of some points that a network gets right."""
    with torch.no_grad():
        found = model(to_points(on).reshape(-1, 2, 1, 1)).argmax(1)
    return 100 * (found == on.labels).float().mean().item()


def trained_on(lesson: Lesson, points: Tensor, seed: int) -> torch.nn.Module:
    """The network that a set (classes, ipc, 2) trains, with all of its points in every step."""
    labels = torch.arange(len(CLASSES)).repeat_interleave(points.shape[1])
    data = from_points("set", "train", CLASSES, points.flatten(0, 1), labels)
    model = classifier(len(CLASSES), WIDTH, seed=HIGHER + seed)
    epochs = lesson.scale.test_epochs
    training = SurrogateTraining(epochs, lr=0.1, batch_size=len(data), seed=seed, keep_epochs=[epochs])
    run_training(model, data, training)
    return model


def losses(lesson: Lesson, points: Tensor) -> float:
    """The mean of G_I (Eq. 7) over a set's points (classes, ipc, 2)."""
    targets = torch.arange(len(CLASSES)).repeat_interleave(points.shape[1])
    found = influence_loss(
        points.reshape(-1, 2, 1, 1), targets, lesson.checkpoints, lesson.gradients[:, targets]
    )
    return found.mean().item()


def modes_found(points: Tensor) -> int:
    """How many of the nine modes have one of their class's points within three sds of the centre."""
    distances = [torch.cdist(own, modes(label)) for label, own in enumerate(points)]
    return sum(int((far < 3 * SPREAD).any(dim=0).sum()) for far in distances)


def rows(lesson: Lesson, found: Mapping[str, Tensor], on: ImageData | None = None) -> pd.DataFrame:
    """Result rows, three a set: `top1` on test points (or `on`), `influence_loss` and `modes_found`."""
    own, on = methods(lesson), on or lesson.test
    cells = [(label, place) for label in found for place in range(len(found[label]))]
    made = []
    for label, place in progress(cells, "networks trained on sets"):
        points, seed = found[label][place], lesson.seeds[place]
        made.append(_row(lesson, own[label], seed, "top1", accuracy(lesson, points, seed, on), on))
        made.append(_row(lesson, own[label], seed, "influence_loss", losses(lesson, points), on))
        made.append(_row(lesson, own[label], seed, "modes_found", modes_found(points), on))
    return results.frame(made)


def _row(lesson: Lesson, method: Method, seed: int, metric: str, value: float, on: ImageData) -> results.Row:
    settings = {"guidance": lesson.guidance, "threshold": lesson.threshold, "split": on.split}
    return results.Row(
        artefact="18_lesson",
        dataset=on.name,
        ipc=lesson.ipc,
        network=NETWORK if metric == "top1" else "",
        protocol="points",
        seed=seed,
        metric=metric,
        value=float(value),
        scale=lesson.scale.name,
        seconds=0.0,
        device="cpu",
        git_revision=git_revision(),
        settings_hash=keys.settings_hash(settings),
        **method.columns(fidelity=FIDELITY, num_steps=lesson.num_steps, surrogate="mlp-32"),
    )


def claims(found: pd.DataFrame) -> statistics.Pairs:
    """Each guidance and both against neither, what G_I adds to G_D, and sampling against real points."""
    plain, random = (
        statistics.find(found, family="sampled", guides=""),
        statistics.find(found, family="random"),
    )
    known = [(plain, random)] if plain and random else []
    return [*statistics.ablation_claims(found), *known]


def tried(lesson: Lesson, ks: Sequence[float], gammas: Sequence[float], seeds: Sequence[int]) -> pd.DataFrame:
    """Every pair of k and gamma on validation points: the means of what `rows` measures, by k and gamma."""
    lines = []
    for k, gamma in progress([(k, gamma) for k in ks for gamma in gammas], "pairs of k and gamma"):
        lines.append({"k": k, "gamma": gamma, **measured(lesson.with_guidance(k, gamma), seeds)})
    return pd.DataFrame(lines)


def measured(lesson: Lesson, seeds: Sequence[int]) -> dict[str, float]:
    """`measures` of the sets that the lesson's guidance makes."""
    return measures(lesson, distil(lesson, seeds), seeds)


def measures(lesson: Lesson, found: Tensor, seeds: Sequence[int]) -> dict[str, float]:
    """Means over the seeds of some sets: accuracy on validation points, influence loss and modes found."""
    scores = [
        accuracy(lesson, points, seed, lesson.validation) for points, seed in zip(found, seeds, strict=True)
    ]
    own: dict[str, list[float]] = {
        "top1": scores,
        "influence_loss": [losses(lesson, points) for points in found],
        "modes_found": [modes_found(points) for points in found],
    }
    return {name: sum(values) / len(values) for name, values in own.items()}
