"""Expert trajectories that DATM matches: what networks trained on real images pass through, epoch by epoch.

After DATM (Guo et al., ICLR 2024; NUS-HPC-AI-Lab/DATM, `buffer/buffer_FTD.py`), which trains its experts with
the flat-trajectory optimiser of FTD (Du et al., CVPR 2023): GSAM (Zhuang et al., ICLR 2022), adaptive. At
parameters w, with g the gradient of a batch's cross-entropy,

    e = rho w^2 g / ||w g||          the ascent (adaptive: an entry moves as its square)
    h = gradient at w + e            of the same batch, augmented alike
    d = h - alpha (g - <g, h> h / ||h||^2)
    w <- w - lr d                    SGD without momentum or decay

Images are whitened by ZCA, fitted on all that are given, and augmented by DSA, drawn for each image. A
network's parameters are one flat vector here, kept after every epoch (the first: as initialised): a file each
in a folder an expert, which says with its generator's state where an interrupted expert goes on. Experts are
independent of each other, and several processes make one each.

Cost: two passes a batch. At the authors' settings (100 experts of 100 epochs of 50,000 images by a ConvNet-3
of 320,000 parameters) 10,000 epochs, of some seconds each on a GPU, and 13 GB. Memory: the whitened images in
float32, 0.6 GB of CIFAR's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from igd_lib.data import zca
from igd_lib.data.augment import normalise, to_unit
from igd_lib.data.dsa import apply, draw, dsa
from igd_lib.data.images import ImageData
from igd_lib.data.zca import ZCA
from igd_lib.models.networks import network as make_network
from igd_lib.tools import cluster, files
from igd_lib.tools.progress import progress, resumable

TINY = 1e-12  # added to norms that are divided by, as the authors have it


@dataclass(frozen=True)
class Experts:
    """How experts are trained; the defaults are DATM's for CIFAR-10 and CIFAR-100."""

    network: str = "convnet3"
    count: int = 100
    epochs: int = 100
    lr: float = 0.01
    batch_size: int = 256
    rho: float = 0.01  # GSAM's: the length of the ascent
    alpha: float = 0.3  # and the share of the gradient's part across it that is taken off
    augmentation: str = "color_crop_cutout_flip_scale_rotate"  # DSA's families
    images: int | None = None  # a class, the first in file order; None: all
    whiten: bool = True  # by ZCA; False: mean and deviation of each channel
    eps: float = 0.1  # ZCA's
    mean: tuple[float, float, float] = (
        0.4914,
        0.4822,
        0.4465,
    )  # of [0, 1] images, where they are not whitened
    std: tuple[float, float, float] = (0.2023, 0.1994, 0.2010)
    seed: int = 0  # of all experts: sets of different seeds are matched to the same ones

    def __post_init__(self) -> None:
        if min(self.count, self.epochs, self.batch_size, 1 if self.images is None else self.images) < 1:
            raise ValueError("count, epochs, batch_size and images of experts are at least 1")
        if self.lr <= 0 or self.rho < 0 or self.eps <= 0:
            raise ValueError(
                f"lr and eps are positive and rho not negative, got {self.lr}, {self.eps}, {self.rho}"
            )
        dsa(self.augmentation)


# --- networks as functions of one flat vector


@dataclass(frozen=True)
class Flat:
    """A network as a function of its parameters, flattened to one vector in their order."""

    model: nn.Module

    @classmethod
    def of(cls, name: str, classes: int, image_size: int, seed: int = 0) -> Flat:
        """A network by its name, initialised from a seed.

        Raises ValueError for one that keeps running statistics, which are no parameters.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make_network(name, num_classes=classes, image_size=image_size)
        if any(True for _ in model.buffers()):
            raise ValueError(
                f"{name} keeps running statistics, which no trajectory has; take convnet3 or its like"
            )
        return cls(model)

    @property
    def parameters(self) -> Tensor:
        """The vector of its present parameters, (P,)."""
        return torch.cat([value.detach().reshape(-1) for value in self.model.parameters()])

    def __call__(self, parameters: Tensor, inputs: Tensor) -> Tensor:
        """Logits (B, classes); gradients of any order pass through both."""
        return functional_call(self.model, self.named(parameters), (inputs,))

    def named(self, parameters: Tensor) -> dict[str, Tensor]:
        """Views of the vector by the parameters' names."""
        named = list(self.model.named_parameters())
        parts = parameters.split([value.numel() for _, value in named])
        return {name: part.view(value.shape) for (name, value), part in zip(named, parts, strict=True)}


def gsam_direction(gradient: Callable[[Tensor], Tensor], w: Tensor, rho: float, alpha: float) -> Tensor:
    """The direction d that adaptive GSAM steps against at w, (P,); `gradient` gives a batch's at any w.

    See the module. (The authors take norms over all parameters together, as here.)
    """
    g = gradient(w)
    h = gradient(w + w.square() * g * (rho / ((w * g).norm() + TINY)))
    cosine = (g @ h) / (h.norm() * g.norm() + TINY)
    across = g - cosine * g.norm() * h / (h.norm() + TINY)
    return h - alpha * across


# --- what networks see


@dataclass(frozen=True)
class View:
    """How networks see images: whitened, or normalised channel by channel; and back."""

    whitening: ZCA | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 or float [0, 1] (B, 3, H, H) to a network's input."""
        pixels = to_unit(images)
        return normalise(pixels, self.mean, self.std) if self.whitening is None else self.whitening(pixels)

    def pixels(self, inputs: Tensor) -> Tensor:
        """Back to float [0, 1], not clamped."""
        if self.whitening is not None:
            return self.whitening.inverse(inputs)
        mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (self.mean, self.std))
        return inputs * std + mean


# --- a folder of experts


@dataclass(frozen=True)
class Trajectories:
    """The experts of a data set in a folder: NUMBER/EPOCH.safetensors, epoch 0 as initialised.

    Raises ValueError where the folder's experts are of other settings.
    """

    data: ImageData
    recipe: Experts
    folder: Path
    device: str = "cpu"

    def __post_init__(self) -> None:
        path, settings = self.folder / "settings.json", self.settings
        if not path.is_file():
            files.write(path, json.dumps(settings, indent=2) + "\n")
        try:
            found = files.difference(json.loads(path.read_text()), json.loads(json.dumps(settings)))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete its folder and run again") from error
        if found:
            raise ValueError(f"{self.folder} holds experts of other settings: {found}; choose another folder")

    @property
    def settings(self) -> dict[str, Any]:
        """What the experts depend on."""
        data = [self.data.name, self.data.split, len(self.data), list(self.data.classes)]
        return asdict(self.recipe) | {"data": data}

    def to(self, device: str) -> Trajectories:
        return replace(self, device=device)

    # --- what they are trained on

    @cached_property
    def images(self) -> ImageData:
        """The images that experts learn from."""
        return self.data if self.recipe.images is None else self.data.first(self.recipe.images)

    @cached_property
    def view(self) -> View:
        """How they see images; a whitening is fitted once, on all of the data, and kept in the folder."""
        recipe, path = self.recipe, self.folder / "zca.safetensors"
        if not recipe.whiten:
            return View(None, recipe.mean, recipe.std)
        if not path.is_file():
            with files.locked(self.folder, "a run that fits the whitening", wait=True):
                if not path.is_file():
                    fitted = zca.fit(self.data.fetch(torch.arange(len(self.data))), recipe.eps)
                    files.save_tensors(path, {"matrix": fitted.matrix, "mean": fitted.mean})
        return View(ZCA(**files.load_tensors(path)[0]), recipe.mean, recipe.std)

    @cached_property
    def inputs(self) -> Tensor:
        """float32 (N, 3, H, H): all images as networks see them, on the device."""
        parts = [self.view(images) for images, _ in self.images.batches(zca.PART)]
        return torch.cat(parts).to(self.device)

    @cached_property
    def network(self) -> Flat:
        return self._initialised(0)

    def _initialised(self, number: int) -> Flat:
        classes, seed = len(self.data.classes), self.recipe.seed * 1_000_003 + number
        flat = Flat.of(self.recipe.network, classes, self.data.image_size, seed)
        flat.model.to(self.device)
        return flat

    # --- training

    def state(self, number: int, epoch: int) -> Tensor:
        """An expert's parameters after an epoch, (P,), on the device; of epoch -1 its last ones."""
        path = self._path(number, epoch if epoch >= 0 else self.recipe.epochs + 1 + epoch)
        return files.load_tensors(path)[0]["parameters"].to(self.device)

    def lacking(self) -> list[int]:
        """The experts that are not finished."""
        return [number for number in range(self.recipe.count) if not self._is_done(number)]

    def train(self, *, ray: bool | str = False) -> None:
        """Train the experts that lack, here or as tasks of a Ray cluster.

        One that another process is training is left to it, and waited for at the end. Raises
        FloatingPointError where parameters are not finite.
        """
        lacking = self.lacking()
        if ray and lacking:
            with cluster.cluster(ray) as connected:
                cluster.run_all(
                    connected, Trajectories.train_one, self.to("cpu"), lacking, label="DATM, expert"
                )
            return
        with resumable(
            lambda: (
                f"{self.recipe.count - len(self.lacking())} of {self.recipe.count} experts are in "
                f"{self.folder}, and others' epochs"
            )
        ):
            busy = [number for number in lacking if not self.train_one(number, wait=False)]
            for number in busy:
                self.train_one(number)

    def train_one(self, number: int, wait: bool = True) -> bool:
        """Train an expert if it lacks, from its last epoch on.

        False where another process is at it, unless waited for.
        """
        folder = self._path(number, 0).parent
        try:
            with files.locked(folder, f"a run that trains expert {number}", wait=wait):
                if not self._is_done(number):
                    self._train(number)
        except BlockingIOError:
            return False
        return True

    def _train(self, number: int) -> None:
        recipe, flat, inputs = self.recipe, self._initialised(number), self.inputs
        labels, generator = self.images.labels.to(self.device), torch.Generator()
        generator.manual_seed(recipe.seed * 1_000_003 + number)
        done = self._epochs(number)
        if done < 0:
            w, done = flat.parameters, 0
            self._save(number, 0, w, generator)
        else:
            w = self.state(number, done)
            generator.set_state(files.load_tensors(self._path(number, done))[0]["generator"])
        label = f"DATM, expert {number + 1} of {recipe.count}, epoch"
        for epoch in progress(range(done + 1, recipe.epochs + 1), label, every=20, done=done, delay=20):
            w = expert_epoch(flat, w, inputs, labels, recipe, generator)
            if not w.isfinite().all():
                raise FloatingPointError(
                    f"expert {number}: its parameters are not finite after epoch {epoch}; lower lr "
                    f"({recipe.lr}) or rho ({recipe.rho})"
                )
            self._save(number, epoch, w, generator)

    def _save(self, number: int, epoch: int, w: Tensor, generator: torch.Generator) -> None:
        files.save_tensors(self._path(number, epoch), {"parameters": w, "generator": generator.get_state()})

    def _epochs(self, number: int) -> int:
        """The last epoch whose parameters are there, without a gap; -1: not even the first ones."""
        epoch = -1
        while self._path(number, epoch + 1).is_file():
            epoch += 1
        return epoch

    def _is_done(self, number: int) -> bool:
        return self._path(number, self.recipe.epochs).is_file()

    def _path(self, number: int, epoch: int) -> Path:
        return self.folder / f"{number:05d}" / f"{epoch:05d}.safetensors"


def expert_epoch(
    flat: Flat, w: Tensor, inputs: Tensor, labels: Tensor, recipe: Experts, generator: torch.Generator
) -> Tensor:
    """Parameters (P,) after an epoch from w on inputs (N, 3, H, H) with labels (N,), in a drawn order."""
    strategy, side = dsa(recipe.augmentation), inputs.shape[-1]
    for indices in torch.randperm(len(inputs), generator=generator).split(recipe.batch_size):
        indices = indices.to(inputs.device)
        x = apply(inputs[indices], draw(strategy, len(indices), side, generator, per_sample=True))
        gradient = partial(batch_gradient, flat, x, labels[indices])
        w = w - recipe.lr * gsam_direction(gradient, w, recipe.rho, recipe.alpha)
    return w


def batch_gradient(flat: Flat, inputs: Tensor, labels: Tensor, w: Tensor) -> Tensor:
    """The gradient of a batch's mean cross-entropy at w, (P,)."""
    w = w.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(flat(w, inputs), labels), w)
    return gradient
