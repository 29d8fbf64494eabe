"""Images that are recovered from trained networks: what SRe2L and G-VBSM have in common.

Noise is optimised until a network takes it for its class and what enters the network's layers has, over a
batch of it, the statistics that it has over real images.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from igd_lib.baselines.rded import through_jpeg
from igd_lib.data.augment import crop_boxes, resized_crop
from igd_lib.data.images import ImageData, from_tensors
from igd_lib.protocols import RDED_SOFT
from igd_lib.teacher_training import STAND_IN_TEACHER
from igd_lib.teachers import Teacher, check_teacher
from igd_lib.tools import files
from igd_lib.tools.progress import Pace, progress, resumable

CHECKPOINT_SECONDS = 60.0  # at most one state is written in so much time
BETAS, EPSILON = (0.5, 0.9), 1e-8  # Adam's, of both methods

# For 32 px on two CPU cores: three networks of different shape with batch statistics, and their training in a
# few minutes, on so many images a class. Rate, batches and epochs are G-VBSM's for CIFAR-10: few, since what
# was trained for long is harder to invert. SRe2L has the first of the networks.
SMALL_NETWORKS = ("convnet3-bn-w64", "resnet10-bn-w16", "separable4-w32")
SMALL_IMAGES = 2000
SMALL_TRAINING = replace(
    STAND_IN_TEACHER,
    name="recovery-network-small",
    batch_size=64,
    epochs=5,
    schedule="cosine",
    crop_scale=(0.7, 1.0),
)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Views:
    """What a network sees of a batch in an iteration: one draw for all its images, in this order."""

    crop_scale: tuple[float, float] | None = None  # a box of so much of the area, resized; None: off
    pad: int = 0  # px of zeros all around, of which a window of the image's size is cut
    flip: bool = False  # left to right, every other time
    roll: int = 0  # by 0 ... so many px, down and to the right; what leaves comes in again

    def __post_init__(self) -> None:
        low, high = self.crop_scale or (1.0, 1.0)
        if not 0 < low <= high <= 1 or self.pad < 0 or self.roll < 0:
            raise ValueError(
                f"crop_scale is two shares of the area in 0 ... 1, the smaller first, or None; pad and roll "
                f"are at least 0 px; got {self.crop_scale}, {self.pad} and {self.roll}"
            )


ROLLED = Views(roll=4)  # SRe2L's of CIFAR
CROPPED = Views(crop_scale=(0.08, 1.0), flip=True, roll=32)  # of photographs, of both methods


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What both methods have to be told."""

    size: int  # px a side
    batch: int  # images that are optimised together
    iterations: int
    lr: float  # of Adam, in normalised pixels; falls to zero by a cosine
    statistics_weight: float = 0.01
    first_layer: float = 10.0  # times as much as the others counts the first
    views: Views
    jpeg_quality: int | None = 75  # in which images are stored (75: PIL's default); None: without loss

    def __post_init__(self) -> None:
        if min(self.size, self.batch, self.iterations) < 1:
            raise ValueError(
                f"size, batch and iterations are at least 1, got {self.size}, {self.batch} and "
                f"{self.iterations}"
            )
        if self.lr <= 0 or min(self.statistics_weight, self.first_layer) < 0:
            raise ValueError(
                f"lr is above 0, statistics_weight and first_layer at least 0, got {self.lr}, "
                f"{self.statistics_weight} and {self.first_layer}"
            )
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 95:
            raise ValueError(f"jpeg_quality is 1 ... 95 or None, got {self.jpeg_quality}")


# --- what a network sees, and what enters its layers


def view(images: Tensor, views: Views, generator: torch.Generator, *, each: bool = False) -> Tensor:
    """(B, 3, H, H) as a network sees it; with `each`, boxes, windows and flips are drawn for each image."""
    count, side, device = len(images) if each else 1, images.shape[-1], images.device
    if views.crop_scale is not None:
        boxes = crop_boxes(count, side, views.crop_scale, generator)
        images = resized_crop(images, boxes.to(device), side)
    if views.pad:
        corners = torch.randint(2 * views.pad + 1, (count, 2), generator=generator)
        windows = torch.cat([corners, torch.full((count, 2), side)], dim=1)
        images = resized_crop(F.pad(images, [views.pad] * 4), windows.to(device), side)
    if views.flip:
        mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(mirrored.to(device), images.flip(3), images)
    if views.roll:
        down, right = torch.randint(views.roll + 1, (2,), generator=generator).tolist()
        images = images.roll((down, right), dims=(2, 3))
    return images


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel of (B, C, H, W), over images and positions."""
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean, variance


@contextmanager
def measured(
    layers: Mapping[int, nn.Module], measure: Callable[[int, Tensor], Found]
) -> Iterator[dict[int, Found]]:
    """What `measure(number, input)` finds of the last input of each layer, by its number."""
    found: dict[int, Found] = {}

    def hook(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: found.__setitem__(number, measure(number, given[0]))

    handles = [layer.register_forward_pre_hook(hook(number)) for number, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def layers_of(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[int, nn.Module]:
    """The layers of some kinds, numbered as the network lists them; those without running statistics not."""
    every = (module for module in model.modules() if isinstance(module, kinds))
    kept = (m for m in every if not isinstance(m, nn.BatchNorm2d) or m.running_mean is not None)
    return dict(enumerate(kept))


def frozen(teacher: Teacher, device: str) -> nn.Module:
    """A copy of its network for gradients of images alone; the teacher's own stays as it is."""
    return copy.deepcopy(teacher.model).to(device).eval().requires_grad_(False)


def check_knows(teacher: Teacher, data: ImageData, size: int) -> None:
    """Raise ValueError for a network of other classes, or one that does not know the data at that size."""
    check_teacher(teacher, data, replace(RDED_SOFT, image_size=size, test_resize=max(size, size // 7 * 8)))


# --- optimisation


class Images(nn.Module):
    """A batch in optimisation: (B, 3, H, H), normalised."""

    def __init__(self, noise: Tensor):
        super().__init__()
        self.pixels = nn.Parameter(noise)


Loss = Callable[[int, Tensor, torch.Generator], Tensor]  # of an iteration, the images, for all that is drawn


class Run:
    """A batch's optimisation, from noise or from where it was left; `models` are saved and read with it."""

    def __init__(
        self,
        count: int,
        settings: Recovery,
        teacher: Teacher,  # whose normalisation the images have
        seed: int,
        device: str,
        state: Path | None = None,
        **models: nn.Module,
    ):
        self.settings, self.state = settings, state
        self.generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, 3, settings.size, settings.size, generator=self.generator)
        self.images = Images(noise.to(device))
        self.models: dict[str, Any] = {"images": self.images, **models}
        self.optimizer = torch.optim.Adam(self.images.parameters(), lr=settings.lr, betas=BETAS, eps=EPSILON)
        self.mean, self.std = (
            torch.tensor(values, device=device).reshape(3, 1, 1) for values in (teacher.mean, teacher.std)
        )
        self.done = self.saved = 0
        self.pace = Pace(CHECKPOINT_SECONDS)

    def optimise(self, loss: Loss, what: str) -> Tensor:
        """uint8 (B, 3, H, H): the images after the last iteration.

        Raises FloatingPointError on a non-finite loss.
        """
        self.load()
        last = self.settings.iterations
        with resumable(lambda: self.kept):
            label = f"{what}, iteration"
            for iteration in progress(range(self.done, last), label, every=30, done=self.done, delay=20):
                self.step(loss, iteration)
                self.save_in_time()
        return self.finished()

    def step(self, loss: Loss, iteration: int) -> None:
        """One step of Adam; then each channel is clamped to what [0, 1] is after normalisation."""
        settings, pixels = self.settings, self.images.pixels
        rate = 0.5 * (1 + math.cos(math.pi * iteration / settings.iterations)) * settings.lr
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        found = loss(iteration, pixels, self.generator)
        if not torch.isfinite(found):
            raise FloatingPointError(
                f"the loss is {found.item()} in iteration {iteration + 1} of {settings.iterations}; lower lr "
                f"({settings.lr}) or statistics_weight ({settings.statistics_weight}) in the settings"
            )
        self.optimizer.zero_grad()
        found.backward()
        self.optimizer.step()
        with torch.no_grad():
            pixels.copy_(pixels.clamp(-self.mean / self.std, (1 - self.mean) / self.std))
        self.done = iteration + 1

    @torch.no_grad()
    def finished(self) -> Tensor:
        """The images as they are stored: truncated to 8 bits, then through JPEG if the settings have it."""
        plain = (self.images.pixels * self.std + self.mean).clamp(0, 1).mul(255).to(torch.uint8).cpu()
        quality = self.settings.jpeg_quality
        return plain if quality is None else through_jpeg(plain, quality)

    @property
    def kept(self) -> str:
        """What an interruption leaves, in words."""
        if self.state is None:
            return "nothing of a batch is kept without a state's folder"
        return f"{self.saved} of {self.settings.iterations} iterations are in {self.state}"

    def load(self) -> None:
        """Go on where `save_in_time` left off, if it did."""
        if self.state is not None and self.state.is_file():
            note = files.load_training(self.state, self.optimizer, generator=self.generator, **self.models)
            self.done = self.saved = note["step"]

    def save_in_time(self) -> None:
        """Save once in CHECKPOINT_SECONDS."""
        if self.state is None or not self.pace.due:
            return
        with self.pace.saving():
            files.save_training(
                self.state, self.done, self.optimizer, generator=self.generator, **self.models
            )
        self.saved = self.done


def seed_of(seed: int, number: int) -> int:
    """What the draws of a batch are seeded with."""
    return seed * 1_000_003 + number


# --- a set in batches

Part = tuple[tuple[int, int], ...]  # a batch: the label of each image, and which of its class's images it is


@dataclass(frozen=True)
class Batches:
    """A set's images in batches, each kept as it is done: a file each in `folder`, else in memory.

    A folder that was begun for another set or with other settings (`about`) is refused.
    """

    name: str  # of the data set
    split: str
    classes: tuple[str, ...]
    ipc: int
    size: int
    parts: tuple[Part, ...]
    about: Mapping[str, Any]
    folder: Path | None = None
    _memory: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False, compare=False)

    def claim(self) -> None:
        """Note the settings in the folder. Raises ValueError where others are noted there."""
        if self.folder is None:
            return
        path, wanted = self.folder / "settings.json", json.loads(json.dumps(self.about))
        if not path.is_file():
            files.write(path, json.dumps(wanted, indent=2) + "\n")
            return
        try:
            found = files.difference(json.loads(path.read_text()), wanted)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete its folder and run again") from error
        if found:
            raise ValueError(
                f"{self.folder} holds the state of other settings: {found}; choose another folder, or delete "
                "this one"
            )

    def lacking(self) -> list[int]:
        """The numbers of the batches that are not done."""
        return [number for number in range(len(self.parts)) if not self._is_done(number)]

    def labels(self, number: int) -> Tensor:
        """int64 (B,)."""
        return torch.tensor([label for label, _ in self.parts[number]])

    def training(self, number: int) -> Path | None:
        """Where the state of an unfinished batch is."""
        return self.folder and self.folder / f"training-{number:05d}.safetensors"

    def keep(self, make: Callable[[int], Mapping[str, Tensor]], number: int) -> None:
        """Make a batch ("images" and what else is to be kept of it) unless it is done.

        One that another process is making is waited for.
        """
        if self.folder is None:
            if number not in self._memory:
                self._memory[number] = dict(make(number))
            return
        with files.locked(self.folder, f"a run of batch {number}", wait=True, name=f".{number:05d}.lock"):
            if not self._is_done(number):
                files.save_tensors(self._path(number), make(number))
            (self.folder / f"training-{number:05d}.safetensors").unlink(missing_ok=True)

    def made(self, number: int) -> dict[str, Tensor]:
        """Everything that was kept of a batch."""
        if number in self._memory:
            return self._memory[number]
        return files.load_tensors(self._path(number))[0]

    def of_class(self, label: int) -> Tensor:
        """uint8 (ipc, 3, H, H): a class's images, in their order, from the batches that they are in."""
        images = torch.empty(self.ipc, 3, self.size, self.size, dtype=torch.uint8)
        for number, part in enumerate(self.parts):
            own = [(place, index) for place, (other, index) in enumerate(part) if other == label]
            if own:
                self._read(number, own, images)
        return images

    def all(self) -> ImageData:
        """The whole set in memory, class after class."""
        count = len(self.classes)
        images = torch.cat([self.of_class(label) for label in range(count)])
        labels = torch.arange(count).repeat_interleave(self.ipc)
        return from_tensors(self.name, self.split, self.classes, images, labels)

    def _read(self, number: int, own: Sequence[tuple[int, int]], images: Tensor) -> None:
        """A batch's images at the places `own` (place, index) into `images`."""
        if number in self._memory:
            for place, index in own:
                images[index] = self._memory[number]["images"][place]
            return
        path = self._path(number)
        try:
            with safe_open(path, "pt") as file:
                found = file.get_slice("images")
                for place, index in own:
                    images[index] = found[place : place + 1][0]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error

    def _is_done(self, number: int) -> bool:
        return number in self._memory if self.folder is None else self._path(number).is_file()

    def _path(self, number: int) -> Path:
        return (self.folder or Path()) / f"batch-{number:05d}.safetensors"


def by_index(classes: int, ipc: int, batch: int) -> tuple[Part, ...]:
    """Batches of one image of each of `batch` classes in a row, an index of the IPC after the other.

    Where there are fewer classes than that, as many indices share a batch as go into it.
    """
    together = max(1, batch // classes)
    parts = []
    for first in range(0, ipc, together):
        indices = range(first, min(first + together, ipc))
        images = [(label, index) for index in indices for label in range(classes)]
        parts += [tuple(images[start : start + batch]) for start in range(0, len(images), batch)]
    return tuple(parts)


def by_class(classes: int, ipc: int, batch: int) -> tuple[Part, ...]:
    """Batches of all images of as many whole classes as go into one. ValueError where not one does."""
    if ipc > batch:
        raise ValueError(
            f"all images of a class are optimised together: ipc {ipc} needs batches of at least {ipc}, not "
            f"{batch}; raise batch in the settings"
        )
    step = batch // ipc
    return tuple(
        tuple((label, index) for label in range(first, min(first + step, classes)) for index in range(ipc))
        for first in range(0, classes, step)
    )
