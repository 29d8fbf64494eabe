"""DM (Zhao & Bilen, WACV 2023): images whose mean features, of random networks, are those of real ones.

After the authors' code (VICO-UoE/DatasetCondensation, `main_DM.py`). Each iteration takes a network psi that
was never trained, its parameters fixed, and for every class c real images x_i, all synthetic ones s_j and one
DSA change A, the same for both:

    L = sum_c || mean_i psi(A(x_i)) - mean_j psi(A(s_j)) ||^2

psi is the flattened map before the classifier, (B, D); squares are summed over D. One step of SGD with
momentum on the pixels follows. They live in normalised space and are never clamped on the way: only the set
that is returned is, and rounded to 8 bits, once.

Cost: of a class and iteration, forward passes of `batch_real` images and forward and backward ones of `ipc`.
On one CPU core, of CIFAR-10 at IPC 10: `DM.small` takes minutes, `DM.paper` days; an hour or so of a GPU.

What differs from the authors' code. A class's loss goes backward as soon as it is there, and one step follows
those of all classes: the same gradient in less memory, as their readme proposes. Networks, real batches and
changes are drawn from the seed, the iteration and the label instead of the clock, so a class's images do not
depend on those that are made beside it. Networks with batch statistics, whose batches the authors mix of all
classes, are refused. They save float images, some of which cannot be shown; these are 8 bits. They take one
step more than `iterations` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from igd_lib.baselines.pixels import (
    SAVE_SECONDS,
    SMALL,
    at_hand,
    check_finite,
    depth_for,
    fresh_network,
    generator_of,
    load_state,
    of_some_classes,
    run_of,
    selected,
    stored,
)
from igd_lib.data.augment import normalise, to_unit
from igd_lib.data.datasets import DataSpec, Triple, spec_of
from igd_lib.data.dsa import Params, Strategy, apply, draw, dsa
from igd_lib.data.images import ImageData
from igd_lib.tools import files
from igd_lib.tools.progress import Pace, progress, resumable

INITIAL, NETWORK, BATCH = range(3)  # what a draw is for


@dataclass(frozen=True)
class DM:
    """How DM optimises; the defaults are the authors' for CIFAR-10 up to IPC 50."""

    network: str = "convnet3"  # without batch statistics
    iterations: int = 20_000
    lr: float = 1.0  # of the pixels, in normalised space
    momentum: float = 0.5
    batch_real: int = 256  # a class and iteration; all images of a smaller class
    augmentation: str = "color_crop_cutout_flip_scale_rotate"  # DSA's families, of which a call takes one
    init: Literal["real", "noise"] = "real"  # random real images, or N(0, 1) in normalised space
    mean: Triple = (0.4914, 0.4822, 0.4465)  # of [0, 1] images
    std: Triple = (0.2023, 0.1994, 0.2010)

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_real < 1:
            raise ValueError(
                f"iterations and batch_real are at least 1, got {self.iterations} and {self.batch_real}"
            )
        if self.lr <= 0 or not 0 <= self.momentum < 1:
            raise ValueError(f"lr > 0 and 0 <= momentum < 1, got {self.lr} and {self.momentum}")
        if self.init not in ("real", "noise"):
            raise ValueError(f"init is 'real' or 'noise', got {self.init!r}")
        dsa(self.augmentation)  # refuses unknown families

    @property
    def strategy(self) -> Strategy:
        return dsa(self.augmentation)

    @classmethod
    def paper(cls, dataset: str | DataSpec, ipc: int) -> DM:
        """The authors' own for small images; for photographs, which they have none of, our reading.

        Their readme: lr 1, for CIFAR-10 from IPC 100 on 10. Their ConvNet is the deeper the larger images
        are, down to a map of about 4 x 4. IGD does not say how DM was run at 224 and 256 px: here it is the
        same method with a ConvNet of that depth, 128 real images a class and 5,000 iterations.
        """
        spec = spec_of(dataset)
        lr = 10.0 if spec.name == "cifar-10" and ipc >= 100 else 1.0
        own = cls(f"convnet{depth_for(spec.image_size)}", lr=lr, mean=spec.mean, std=spec.std)
        return own if spec.image_size <= SMALL else replace(own, iterations=5000, batch_real=128)

    @classmethod
    def small(cls, ipc: int = 10) -> DM:
        """Shortened for CIFAR-10 on a CPU: half the network's width, a fourth of the real images, 1/40 of the
        iterations.
        """
        return replace(cls.paper("cifar-10", ipc), network="convnet3-w64", iterations=500, batch_real=64)


def dm(
    data: ImageData,
    ipc: int,
    settings: DM | None = None,  # None: `DM()`
    *,
    labels: Sequence[int] | None = None,  # the classes to make; None: all
    seed: int = 0,
    device: str = "cpu",
    state: str | Path | None = None,  # a file from which an interrupted run goes on; its caller deletes it
) -> ImageData:
    """`ipc` images a class, class after class, uint8 in the data's size, under the data's labels and classes.

    A class's images depend on the settings, the data, seed and label alone. The state is written at most once
    a minute: images and momenta. Raises ValueError for labels that the data do not have, an IPC above what a
    class has, a network with batch statistics, a state of other settings; FloatingPointError on a loss that
    is not finite.
    """
    run = _Run(data, ipc, settings or DM(), labels=labels, seed=seed, device=device, state=state)
    run.load()
    run.optimise()
    return run.found()


def matching_loss(features: Callable[[Tensor], Tensor], real: Tensor, synthetic: Tensor) -> Tensor:
    """|| mean psi(real) - mean psi(synthetic) ||^2, a scalar; no gradient to the real side.

    features: psi, of images (B, 3, H, H) to (B, D).
    """
    with torch.no_grad():
        target = features(real).mean(0)
    return (target - features(synthetic).mean(0)).square().sum()


def feature_network(
    name: str, *, classes: int, image_size: int, device: str, seed: Sequence[int]
) -> nn.Module:
    """A fresh network that returns what its classifier would get, (B, D); its parameters are fixed.

    Of a ConvNet the flattened map, of a ResNet the mean over it. Raises ValueError as `fresh_network`.
    """
    model = fresh_network(name, classes=classes, image_size=image_size, device=device, seed=seed)
    model.register_module("classifier", nn.Identity())
    return model.requires_grad_(False)


class _Run:
    """The images of some classes as they are optimised."""

    def __init__(
        self,
        data: ImageData,
        ipc: int,
        settings: DM,
        *,
        labels: Sequence[int] | None,
        seed: int,
        device: str,
        state: str | Path | None,
    ):
        self.data, self.ipc, self.settings, self.seed, self.device = data, ipc, settings, seed, device
        self.labels = selected(data, labels, ipc)
        self.state, self.pace = Path(state) if state else None, Pace(SAVE_SECONDS)
        self._network(0)  # refused before anything is read
        self.real = at_hand(of_some_classes(data, self.labels), device)
        self.images = nn.ParameterList([self._initial(label) for label in self.labels])  # normalised
        self.optimizer = torch.optim.SGD(self.images.parameters(), lr=settings.lr, momentum=settings.momentum)
        self.done = self.saved = 0  # iterations

    def _network(self, iteration: int) -> nn.Module:
        return feature_network(
            self.settings.network,
            classes=len(self.data.classes),
            image_size=self.data.image_size,
            device=self.device,
            seed=(self.seed, iteration, 0, NETWORK),
        )

    def _initial(self, label: int) -> Tensor:
        generator, side = generator_of(self.seed, 0, label, INITIAL), self.data.image_size
        if self.settings.init == "noise":
            return torch.randn(self.ipc, 3, side, side, generator=generator).to(self.device)
        return self._draw(label, self.ipc, generator)

    def _draw(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        """Random real images of a class, normalised, each once."""
        indices = self.real.class_indices(label)
        chosen = indices[torch.randperm(len(indices), generator=generator)[:count]]
        pixels = to_unit(self.real.fetch(chosen).to(self.device))
        return normalise(pixels, self.settings.mean, self.settings.std)

    def _batch(self, iteration: int, label: int) -> tuple[Tensor, Params]:
        """A class's real images of an iteration, and what is done to them and to the synthetic ones."""
        generator = generator_of(self.seed, iteration, label, BATCH)
        real = self._draw(label, self.settings.batch_real, generator)
        side = self.data.image_size
        return real, draw(self.settings.strategy, len(real), side, generator, per_sample=False)

    def optimise(self) -> None:
        """Go on to the last iteration."""
        todo = range(self.done, self.settings.iterations)
        with resumable(lambda: self.kept):
            for iteration in progress(todo, "DM, iteration", done=self.done):
                self._step(iteration)
                self.done = iteration + 1
                if self.state is not None and self.pace.due and self.done < self.settings.iterations:
                    self._save()

    def _step(self, iteration: int) -> None:
        """One network, all classes, one step."""
        features = self._network(iteration)
        self.optimizer.zero_grad()
        for label, images in zip(self.labels, self.images, strict=True):
            real, params = self._batch(iteration, label)
            loss = matching_loss(features, apply(real, params), apply(images, params))
            where = f"iteration {iteration + 1}, class {self.data.classes[label]!r}"
            check_finite(loss, "DM", where, f"lower lr ({self.settings.lr})").backward()
        self.optimizer.step()

    def found(self) -> ImageData:
        """The set: [0, 1] pixels in 8 bits."""
        space = self.settings.mean, self.settings.std
        mean, std = (torch.tensor(v, device=self.device).reshape(-1, 1, 1) for v in space)
        plain = [images.detach() * std + mean for images in self.images]
        return stored(self.data, f"DM, ipc {self.ipc}, seed {self.seed}", plain, self.labels, "DM")

    # --- what is kept

    @property
    def about(self) -> dict[str, Any]:
        """What names the run in its state."""
        return run_of(self.data, self.labels, self.ipc, self.seed, self.settings)

    @property
    def kept(self) -> str:
        """What an interruption leaves, in words."""
        if self.state is None:
            return "nothing of DM's images is kept without a state file"
        return f"{self.saved} of {self.settings.iterations} iterations of DM are in {self.state}"

    def load(self) -> None:
        note = load_state(self.state, self.about, self.optimizer, images=self.images)
        self.done = self.saved = note["step"]

    def _save(self) -> None:
        assert self.state is not None  # asked with one alone
        with self.pace.saving():
            note = {"about": self.about}
            files.save_training(self.state, self.done, self.optimizer, note=note, images=self.images)
        self.saved = self.done
