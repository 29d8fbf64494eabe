"""What an experiment runs with at each scale: settings, as values, each made in one place.

At "paper" the paper's data, models and settings; in a "rehearsal" the same cut to minutes; at "small" the
stand-in, real but small; at "smoke" the stand-in cut to seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from igd_lib.baselines.minimax import Minimax
from igd_lib.config import AUGMENTATION, STANDARD, Augment, Fidelity, Guidance, preset, surrogate_training
from igd_lib.data.resizing import Filter
from igd_lib.experiment.run import AUTO, Run
from igd_lib.protocols import (
    IGD_CIFAR,
    IGD_HARD,
    RDED_SOFT,
    SMALL_HARD,
    SMALL_HARD_COLOUR,
    SMALL_SOFT,
    Protocol,
)
from igd_lib.sampling import FAST
from igd_lib.surrogate import SurrogateTraining


@dataclass(frozen=True)
class Scale:
    """Everything about a scale that is no data and no model. gamma is the paper's, for latents of 4,096
    values.
    """

    name: str  # "smoke", "small", "rehearsal" or "paper"
    dataset: str  # the one asked for; a stand-in's data are another
    guidance: Guidance
    surrogate: str  # the network's name
    training: SurrogateTraining
    protocol: Protocol
    num_steps: int
    augment: Augment = AUGMENTATION  # of the surrogate's training images, where the fidelity asks for it
    train_images: int | None = None  # a class, for the surrogate; None: all
    fidelity: Fidelity = STANDARD
    threshold: float = 0.7  # of Algorithm 2
    best_cfg: float = 1.5  # vanilla's, on validation data
    minimax: Minimax = field(default_factory=Minimax)
    minimax_guidance: Guidance | None = None  # None: `guidance`
    few_steps: int = FAST.num_steps  # of the quick solver (Table 10), ...
    few_range: tuple[int, int] = FAST.guided_range  # ... and its guided range
    most: int | None = None  # at most so many images a class, seeds, and values of a grid
    candidates: int = 300  # RDED's, a class
    all_images: int | None = (
        None  # what "all images of a class" is read as where they are compared; None: all
    )
    papers: bool = (
        False  # the paper's own data, models and code, whole or cut down: every field of `Fidelity`
    )
    output_resize: Filter | None = None  # of a model's images to the data's size, where it makes others
    classes: int | None = None  # so many of the data's, the first ones; None: all
    images: tuple[int, int] | None = None  # at most so many of a class, for training and testing; None: all
    test_images: int | None = None  # a class, the first ones of the test split; None: all
    many_classes: bool = False  # class gradients of all checkpoints are too large to keep
    teacher_least: float = 50.0  # percent of real images that a teacher must get right
    from_table_12: bool = False  # whether k and gamma are the paper's for this data set
    figures_mean_something: bool = True

    def with_fidelity(self, fidelity: Fidelity, num_classes: int) -> Scale:
        """The scale under another fidelity: how the surrogate is trained follows it."""
        if self.papers:
            training = SurrogateTraining(**surrogate_training(fidelity, num_classes))
            training = training if self.figures_mean_something else replace(training, epochs=REHEARSED)
        else:
            training = replace(
                self.training, augment=self.augment if fidelity.surrogate_augmentation else None
            )
        return replace(self, fidelity=fidelity, training=training)

    def cut(self, protocol: Protocol) -> Protocol:
        """Another protocol, as short as the scale is."""
        return protocol if self.figures_mean_something else short(protocol)

    @property
    def guiding(self) -> tuple[object, ...]:
        """What decides which checkpoints guide, and their class gradients."""
        own = self.fidelity
        chosen = (own.checkpoints, own.similarity, own.filter_images, self.threshold)
        return self.surrogate, self.training, own.gradient_images, *chosen

    def limit(self, run: Run) -> tuple[int, tuple[int, ...]]:
        """IPC and generation seeds to run: what was asked for, but no more than the scale allows."""
        return min(run.ipc, self.most or run.ipc), run.generation_seeds[: self.most]

    def on_minimax(self) -> Guidance:
        """The guidance of the Minimax backbone."""
        return self.minimax_guidance or self.guidance

    def grid_values(self, ks: str, gammas: str) -> tuple[list[float], list[float]]:
        """k and gamma to search, from comma-separated numbers; "auto": 0 and the setting in use."""
        own = (self.guidance.k, self.guidance.gamma)
        k, gamma = (
            [0.0, value] if text == "auto" else [float(part) for part in text.split(",")]
            for text, value in zip((ks, gammas), own, strict=True)
        )
        return (k, gamma) if self.most is None else (k[-self.most :], gamma[-self.most :])


def paper_scale(
    dataset: str, *, fidelity: Fidelity, ipc: int, labels: str, num_classes: int, image_size: int
) -> Scale:
    """The paper's settings: Table 12's where it has the data set."""
    try:
        guidance, minimax = preset(dataset, "dit", ipc), preset(dataset, "minimax", ipc)
    except KeyError:
        guidance, minimax = Guidance(), None
    hard = IGD_CIFAR if image_size <= IGD_CIFAR.image_size else IGD_HARD
    return Scale(
        name="paper",
        dataset=dataset,
        guidance=guidance,
        minimax_guidance=minimax or Guidance(),
        surrogate="convnet6" if image_size > 64 else "convnet3",
        training=SurrogateTraining(**surrogate_training(fidelity, num_classes)),
        protocol=RDED_SOFT if labels == "soft" else hard,
        num_steps=50,
        fidelity=fidelity,
        papers=True,
        many_classes=True,
        from_table_12=minimax is not None,
    )


REHEARSED = 1  # epochs of a surrogate in a rehearsal


def rehearsal_scale(paper: Scale) -> Scale:
    """The paper's scale cut down, so that all of its code runs in minutes and its numbers mean nothing."""
    guided = (1, 2)
    return replace(
        paper,
        name="rehearsal",
        guidance=replace(paper.guidance, guided_range=guided),
        minimax_guidance=replace(paper.on_minimax(), guided_range=guided),
        training=replace(paper.training, epochs=REHEARSED),
        protocol=short(paper.protocol),
        num_steps=4,
        few_steps=4,
        few_range=guided,
        classes=2,
        images=(8, 2),  # RDED takes four for each of two
        fidelity=replace(paper.fidelity, gradient_images=3, filter_images=(2, 3)),
        most=2,
        candidates=8,
        all_images=4,
        teacher_least=0.0,
        figures_mean_something=False,
    )


def short(protocol: Protocol) -> Protocol:
    """A protocol cut to two epochs and one test."""
    return replace(protocol, epochs=2, evaluations=1, test_every=None, test_after=0.0)


# Chosen on the stand-in's validation split.
STAND_INS: Mapping[str, Scale] = {
    "fashion-mnist": Scale(
        name="small",
        dataset="fashion-mnist",
        guidance=Guidance(30.0, 480.0, (15, 22)),
        surrogate="convnet3",
        training=SurrogateTraining(epochs=2, saves_in_first_epoch=6),
        train_images=1000,
        augment=replace(AUGMENTATION, jitter=0.0, lighting=0.0),  # its images are grey
        protocol=SMALL_HARD,
        num_steps=25,
        minimax=Minimax(images=200, ema=0.999, flip=False, posterior="mean"),  # 2,000 steps: a few minutes
        all_images=1000,
        test_images=200,
    ),
    "cifar-10": Scale(
        name="small",
        dataset="cifar-10",
        guidance=Guidance(30.0, 480.0, (15, 22)),
        surrogate="convnet3-w32",
        training=SurrogateTraining(epochs=5, saves_in_first_epoch=4),
        train_images=1000,
        protocol=SMALL_HARD_COLOUR,
        num_steps=25,
        minimax=Minimax(images=200, ema=0.999, posterior="mean"),
        all_images=1000,
        test_images=200,
    ),
}
# Vanilla's by labels and IPC: under hard labels more images a class are to differ more, a teacher's labels
# ask for typical ones. (Grey images were tried with hard labels at IPC 10 alone.)
ALWAYS = float("inf")
BEST_CFG: Mapping[str, Mapping[str, tuple[tuple[float, float], ...]]] = {
    "fashion-mnist": {"hard": ((ALWAYS, 1.5),), "soft": ((ALWAYS, 1.5),)},
    "cifar-10": {"hard": ((10, 4.0), (ALWAYS, 2.0)), "soft": ((ALWAYS, 7.0),)},
}
DEFAULTS = {"small": "cifar-10", "smoke": "fashion-mnist"}  # the stand-ins of the scales


def stand_in_of(name: str, scale: str) -> str:
    """The stand-in of that name; "auto": a scale's own. Raises ValueError for a name that there is not."""
    if name == AUTO:
        return DEFAULTS.get(scale, DEFAULTS["small"])
    if name not in STAND_INS:
        raise ValueError(f"stand_in is {AUTO}, {', '.join(STAND_INS)}, got {name!r}")
    return name


def small_scale(dataset: str, stand_in: str, *, fidelity: Fidelity, ipc: int, labels: str) -> Scale:
    """A stand-in's settings."""
    own = STAND_INS[stand_in].with_fidelity(fidelity, num_classes=10)
    protocol = SMALL_SOFT if labels == "soft" else own.protocol
    best = next(cfg for most, cfg in BEST_CFG[stand_in][protocol.labels] if ipc <= most)
    return replace(own, dataset=dataset, protocol=protocol, best_cfg=best)


def smoke_scale(dataset: str, stand_in: str, *, fidelity: Fidelity, ipc: int, labels: str) -> Scale:
    """The same cut to seconds."""
    small = small_scale(dataset, stand_in, fidelity=fidelity, ipc=ipc, labels=labels)
    guided = replace(small.guidance, guided_range=(6, 7))
    return replace(
        small,
        name="smoke",
        surrogate="convnet3-w32",
        guidance=guided,
        minimax_guidance=replace(small.on_minimax(), guided_range=(6, 7)),
        training=replace(small.training, epochs=1, saves_in_first_epoch=2),
        train_images=20,
        protocol=short(small.protocol),
        num_steps=10,
        fidelity=replace(fidelity, gradient_images=10, filter_images=(10, 20)),
        minimax=replace(small.minimax, epochs=1, images=2),
        few_steps=10,
        few_range=(6, 7),
        most=2,
        candidates=10,
        all_images=20,
        test_images=20,
        teacher_least=0.0,
        figures_mean_something=False,
    )
