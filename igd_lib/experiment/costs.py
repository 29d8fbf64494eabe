"""What an experiment at the paper's scale costs, stage by stage, from counted operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from igd_lib.baselines.rded import grids_of
from igd_lib.experiment.counting import SECOND_ORDER, TO_PIXELS, TRAINING, counted, operations_of
from igd_lib.experiment.makers import BY_EARLY, BY_TEACHER
from igd_lib.experiment.method_costs import METHODS, RENDERED, Asked
from igd_lib.experiment.methods import SAMPLED, Method
from igd_lib.experiment.registry import GUIDES
from igd_lib.experiment.scales import Scale
from igd_lib.experiment.surrogates import EARLY
from igd_lib.models.networks import network
from igd_lib.models.shapes import dit_xl_2, sd_vae
from igd_lib.protocols import Protocol
from igd_lib.teacher_training import teacher_recipe
from igd_lib.tools.machine import tf32

CHECKPOINTS = 4  # that guide, where Algorithm 2 has not chosen yet
PNG, LATENT = 0.62, 16_500  # bytes: of a PNG by byte of its pixels; of a latent's file


@dataclass(frozen=True)
class Stage:
    """A part of a run, with its operations."""

    name: str
    what: str
    operations: float
    samples: bool = False  # whether the diffusion model does it, rather than small networks


@dataclass(frozen=True)
class Work:
    """What there is to do: rows, generation seeds and networks, on how much data."""

    scale: Scale
    rows: Sequence[Method]
    ipc: int
    seeds: int
    networks: Sequence[str]
    classes: int
    images: tuple[int, int]  # for training and testing
    image_size: int
    has_teacher: bool = True  # or it is trained first
    protocols: Sequence[Protocol] = ()  # that networks are trained under; empty: the scale's
    validated: Sequence[Method] = ()  # rows that are evaluated on validation images too

    @property
    def sampled(self) -> list[Method]:
        return [row for row in self.rows if row.family == SAMPLED]

    @property
    def set_images(self) -> int:
        """Images of one set."""
        return self.ipc * self.classes

    @property
    def surrogates(self) -> list[str]:
        """Every surrogate that guides, each once."""
        names = (row.surrogate or self.scale.surrogate for row in self.sampled if row.uses_surrogate)
        return list(dict.fromkeys(names))


def stages(work: Work) -> list[Stage]:
    """Every stage of the work that has operations worth counting, in order."""
    parts = (
        _surrogate_stages,
        _encoding_stages,
        _sampling_stages,
        _rded_stages,
        _method_stages,
        _coreset_stages,
        _influence_stages,
        _evaluation_stages,
    )
    return [stage for part in parts for stage in part(work) if stage.operations]


def _surrogate_stages(work: Work) -> list[Stage]:
    training, fidelity, found = work.scale.training, work.scale.fidelity, []
    for name in work.surrogates or ([work.scale.surrogate] if not work.rows else []):
        forward = operations_of(name, work.image_size, work.classes)
        images = work.images[0]
        found.append(
            Stage(
                f"surrogate {name}",
                f"{training.epochs} epochs of {images:,} images",
                TRAINING * forward * images * training.epochs,
            )
        )
        each = min(fidelity.gradient_images or images, images // work.classes)
        found.append(
            Stage(
                "class gradients",
                f"{work.classes:,} classes, {each} images, {CHECKPOINTS} checkpoints",
                TRAINING * forward * each * work.classes * CHECKPOINTS,
            )
        )
    return found


def _encoding_stages(work: Work) -> list[Stage]:
    """Real images that guides look at, encoded once."""
    if not any(GUIDES[name].encodes for row in work.sampled for name in row.guides):
        return []
    what = f"{work.images[0]:,} images encoded"
    return [Stage("real latents", what, encoding_operations() * work.images[0], samples=True)]


def _sampling_stages(work: Work) -> list[Stage]:
    parts: dict[str, list[Method]] = {"no influence": [], "influence-guided": [], "other guides": []}
    for row in work.sampled:
        name = "other guides" if row.guides else "influence-guided" if row.influenced else "no influence"
        parts[name].append(row)
    found = []
    for name, rows in parts.items():
        images = len(rows) * work.seeds * work.set_images
        count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
        what = f"{count} x {work.seeds} seeds x {work.set_images:,} images"
        each = sum(image_operations(row, work.scale, work.classes, work.image_size) for row in rows)
        found.append(Stage(f"sampling, {name}", what, each * images / max(1, len(rows)), samples=True))
    return found


def image_operations(row: Method, scale: Scale, classes: int, image_size: int) -> float:
    """Of one sampled image."""
    transformer, decoder = paper_operations()
    steps = row.num_steps or scale.num_steps
    total = steps * 2 * transformer + decoder  # with and without its class
    influenced = row.guidance if row.influenced else None
    others = [GUIDES[name] for name in row.guides if GUIDES[name].through_model]
    if influenced is None and not others:
        return total
    first, last = (influenced or scale.guidance).guided_range
    gradients = -(-(last - first + 1) // row.shortcuts.every)
    forward = operations_of(row.surrogate or scale.surrogate, image_size, classes)
    count = row.shortcuts.checkpoints_per_step or (len(row.selection.keep) if row.selection else CHECKPOINTS)
    back = 2 * transformer if row.shortcuts.jacobian == "full" else 0.0
    decoded = 0.04 * decoder if row.tiny_decoder else 2 * decoder
    if influenced is not None:
        total += gradients * (back + decoded + count * forward * SECOND_ORDER)
    for other in others:  # TO_PIXELS: the gradient by an image of a network that stays as it is
        surrogate = decoded + count * forward * TO_PIXELS if other.by_surrogate else 0.0
        total += gradients * (back + surrogate)
    return total


def _rded_stages(work: Work) -> list[Stage]:
    if not any(row.family == "rded" for row in work.rows):
        return []
    architecture, recipe = teacher_recipe(work.image_size)
    found = []
    if not work.has_teacher:
        forward, epochs = operations_of(architecture, recipe.image_size, work.classes), recipe.epochs or 0
        what = f"{epochs} epochs of {work.images[0]:,} images"
        found.append(Stage("teacher", what, TRAINING * forward * work.images[0] * epochs))
    grids, forward = grids_of(work.image_size), operations_of(architecture, recipe.image_size, work.classes)
    patches = min(grids.candidates, work.images[0] // work.classes) * grids.crops * work.classes * work.seeds
    return [*found, Stage("RDED", f"{patches:,} patches scored", forward * patches)]


def _method_stages(work: Work) -> list[Stage]:
    """A stage each of the compared methods that optimise or render images, by their authors' settings."""
    asked = Asked(work.scale.dataset, work.ipc, work.seeds, work.images[0])
    found = []
    for row in work.rows:
        if (cost := METHODS.get(row.family)) is not None:
            what, operations = cost(asked)
            found.append(Stage(row.label, what, operations, samples=row.family in RENDERED))
    return found


def _coreset_stages(work: Work) -> list[Stage]:
    """Every image is seen once by the teacher, and by EL2N's early surrogates."""
    families = {row.family for row in work.rows}
    architecture, recipe = teacher_recipe(work.image_size)
    each = 0.0
    if families & set(BY_TEACHER):
        each += operations_of(architecture, recipe.image_size, work.classes)
    if families & set(BY_EARLY):
        early = max(1, round(EARLY * work.scale.training.epochs))
        each += early * operations_of(work.scale.surrogate, work.image_size, work.classes)
    return [Stage("coresets", f"{work.images[0]:,} images looked at", each * work.images[0])]


def _influence_stages(work: Work) -> list[Stage]:
    """The influence loss of the finished sets."""
    if not work.surrogates:
        return []
    images = len(work.rows) * work.seeds * work.set_images
    each = CHECKPOINTS * TRAINING * operations_of(work.scale.surrogate, work.image_size, work.classes)
    return [Stage("influence loss", f"{images:,} images", each * images)]


def _evaluation_stages(work: Work) -> list[Stage]:
    protocols, found = work.protocols or [work.scale.protocol], []
    for name in work.networks:
        cells = (len(work.rows) + len(work.validated)) * work.seeds
        plan = protocols[0].training(name, work.ipc, work.classes)
        total = cells * sum(cell_operations(protocol, name, work) for protocol in protocols)
        what = f"{cells * len(protocols)} sets, {plan.epochs} epochs of {work.set_images:,} images"
        found.append(Stage(f"evaluation, {name}", what, total))
    return found


def cell_operations(protocol: Protocol, name: str, work: Work) -> float:
    """Of one network trained on one set and tested."""
    plan = protocol.training(name, work.ipc, work.classes)
    forward = operations_of(name, protocol.image_size, work.classes)
    passes = TRAINING * forward + (forward if protocol.double_pass else 0.0)
    if protocol.labels == "soft":
        architecture, _ = teacher_recipe(work.image_size)
        passes += operations_of(architecture, protocol.image_size, work.classes)
    tests = len(protocol.tests(plan.epochs)) * work.images[1]
    return passes * work.set_images * plan.epochs + forward * tests


# --- the paper's models, and timing


@cache
def parameters_of(name: str, image_size: int, classes: int) -> int:
    """Of a network; on shapes alone."""
    with torch.device("meta"):
        model = network(name, num_classes=classes, image_size=image_size)
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def paper_operations() -> tuple[float, float]:
    """Of DiT-XL/2's pass over one latent, and of decoding one."""
    with torch.device("meta"):
        transformer, vae, latent = dit_xl_2(), sd_vae(), torch.empty(1, 4, 32, 32)
        label = torch.zeros(1, dtype=torch.long)
        return (
            counted(lambda: transformer(latent, timestep=label, class_labels=label)),
            counted(lambda: vae.decode(latent)),
        )


@cache
def encoding_operations() -> float:
    """Of encoding an image of 256 px."""
    with torch.device("meta"):
        vae = sd_vae()
        return counted(lambda: vae.encode(torch.empty(1, 3, 256, 256)))


def sampling_speed(device: str, precision: str = "float32", batch: int = 8) -> float:
    """Operations a second of a pass through two layers of DiT-XL/2."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = dit_xl_2(layers=2).to(device)
    if dtype != torch.float32:
        model.to(dtype)
    latents = torch.randn(batch, 4, 32, 32, device=device, dtype=dtype)
    labels = torch.zeros(batch, dtype=torch.long, device=device)

    def call() -> None:
        model(latents, timestep=labels, class_labels=labels)

    with torch.no_grad(), tf32(device, "all" if precision == "tf32" else "off"):
        return counted(call) / _seconds(call, device)


def training_speed(device: str, batch: int = 16) -> float:
    """Operations a second of training a ResNet-18 at 224 px."""
    model = network("torchvision/resnet18", num_classes=10, image_size=224).to(device)
    inputs = torch.randn(batch, 3, 224, 224, device=device)

    def step() -> None:
        model(inputs).sum().backward()

    one = TRAINING * operations_of("torchvision/resnet18", 224, 10) * batch
    return one / _seconds(step, device)


def _seconds(call: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """The quickest of a few calls, after one to warm up."""

    def timed() -> float:
        started = time.monotonic()
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - started

    timed()
    return min(timed() for _ in range(repeats))
