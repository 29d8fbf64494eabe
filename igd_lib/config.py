"""Every setting with a name: data set specs, guidance, fidelity, protocols, presets, and paths.

All of them are frozen dataclasses that check their values when made, so that a wrong setting stops
a run before it starts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


def data_dir() -> Path:
    """Where data sets live: `$IGD_DATA`, else `~/.cache/igd/data`."""
    return Path(os.environ.get("IGD_DATA") or cache_dir() / "data").expanduser()


def cache_dir() -> Path:
    """Where weights, distilled images and caches live: `$IGD_CACHE`, else `~/.cache/igd`."""
    return Path(os.environ.get("IGD_CACHE") or "~/.cache/igd").expanduser()


@dataclass(frozen=True)
class DataSpec:
    """What has to be known about a data set before any image is read."""

    name: str
    classes: tuple[str, ...]  # in label order: class i has label i; empty means the sorted class folders
    label_ids: tuple[int, ...]  # the diffusion model's class ids, in the same order; empty means 0..C-1
    image_size: int  # pixels a side
    holdout: float = 0.0  # share of each class's training images kept out as the validation split
    folder: str = ""  # below `$IGD_DATA`; empty means `name`


FASHION_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

DATASETS = {
    spec.name: spec
    for spec in (
        DataSpec("fashion-mnist", FASHION_CLASSES, tuple(range(10)), 32, holdout=1 / 6),
        DataSpec("imagenet", (), tuple(range(1000)), 256),
    )
}


@dataclass(frozen=True)
class Guidance:
    """How strongly and when to guide (Eq. 9, Algorithm 1).

    k: scale of the influence guidance; gamma: scale of the deviation guidance; guided_range: (A, B),
    guided where A <= i <= B for the respaced step index i = T-1 ... 0, so (30, 45) is 16 of 50 steps.
    For other data sets the paper advises k in [1, 50] and gamma in [10, 200] at 4 x 32 x 32 latents,
    starting low for small IPC (A.10). gamma acts through the gradient of a cosine, which shrinks like
    1 / ||z||: for latents of d values, scale it by d / 4096 (`for_latents`).
    """

    k: float = 5.0
    gamma: float = 120.0
    guided_range: tuple[int, int] = (30, 45)

    def __post_init__(self) -> None:
        object.__setattr__(self, "guided_range", tuple(self.guided_range))
        low, high = self.guided_range
        if not 0 <= low <= high:
            raise ValueError(f"guided_range is (A, B) with 0 <= A <= B, got ({low}, {high}); did you swap them?")
        if self.k < 0 or self.gamma < 0:
            raise ValueError(f"k and gamma are at least 0, got k={self.k}, gamma={self.gamma}")

    def covers(self, index: int) -> bool:
        """Whether the step with respaced index `index` (T-1 first, 0 last) is guided."""
        return self.guided_range[0] <= index <= self.guided_range[1]

    def for_latents(self, dimension: int) -> Guidance:
        """The same guidance for latents of `dimension` values instead of the paper's 4096."""
        return Guidance(self.k, self.gamma * dimension / 4096, self.guided_range)


@dataclass(frozen=True)
class Fidelity:
    """Each known difference between the paper and its released code, one field each.

    The defaults are the released code's; `PAPER` is the paper read to the letter.
    """

    solver: Literal["ddpm", "ddim", "configured"] = "ddpm"  # paper: DDIM; released: DDPM; configured: the pipeline's own
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"  # released: 0 ... 999, both ends
    cfg_channels: int | None = 3  # latent channels that CFG mixes; None = all (paper); DiT's code: the first 3
    rho_factor: float = 0.0015  # released: rho_t times 0.0015; the paper's Eq. 9 has no factor (1.0)
    eps: Literal["conditional", "combined"] = "combined"  # rho_t's eps: conditional (paper) or after CFG (released)
    both_halves: bool = False  # released: G_I averaged over both CFG halves, decoded; paper: the sample alone
    memory_size: int | None = 64  # released: FIFO of the last 64 latents of a class; None = all (paper)
    gradient_images: int | None = 200  # released: class gradient over the first 200 images; None = all (paper)
    similarity: Literal["mean", "per_class"] = "per_class"  # Algorithm 2: cosine of the mean gradient (paper) or mean of per-class cosines

    def __post_init__(self) -> None:
        for field in ("cfg_channels", "memory_size", "gradient_images"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"Fidelity.{field} is at least 1, or None for all, got {value}")


RELEASED = Fidelity()
PAPER = Fidelity(
    solver="ddim",
    timestep_spacing="leading",
    cfg_channels=None,
    rho_factor=1.0,
    eps="conditional",
    memory_size=None,
    gradient_images=None,
    similarity="mean",
)


@dataclass(frozen=True)
class Protocol:
    """How a network is trained from scratch on a distilled set and tested on real data (hard labels).

    The fields are those of Minimax's evaluation code, which the paper follows.
    """

    name: str
    image_size: int  # px; training and test images are resized to it
    mean: tuple[float, float, float]  # of [0, 1] images
    std: tuple[float, float, float]
    optimizer: Literal["adamw", "sgd"]
    lr: float
    weight_decay: float
    momentum: float = 0.9  # sgd only
    batch_size: int = 64
    epochs: int | None = None  # None: by IPC
    epochs_by_ipc: tuple[tuple[float, int], ...] = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500), (float("inf"), 300))
    milestones: tuple[float, ...] = (2 / 3, 5 / 6)  # shares of the epochs after which lr falls
    lr_decay: float = 0.2
    crop_scale: tuple[float, float] = (0.5, 1.0)  # RandomResizedCrop
    flip: bool = True
    jitter: float = 0.4  # brightness, contrast, saturation
    lighting: float = 0.1  # sd of the PCA lighting noise
    cutmix: float = 1.0  # Beta(a, a) every batch; 0 = off
    evaluations: int = 100  # about so many tests during training
    reported: Literal["best", "last"] = "best"  # which top-1 the protocol's tables show

    def epochs_for(self, ipc: int, num_classes: int) -> int:
        """Training epochs: `epochs`, or by IPC, two thirds of that (rounded down to hundreds) at 100 classes."""
        if self.epochs is not None:
            return self.epochs
        epochs = next(count for limit, count in self.epochs_by_ipc if ipc <= limit)
        if num_classes != 100:
            return epochs
        return epochs * 2 // 3 // 100 * 100 or epochs * 2 // 3


_HALF = (0.5, 0.5, 0.5)
IGD_HARD = Protocol("igd-hard", 256, _HALF, _HALF, "adamw", 1e-3, 0.01)
# For the stand-ins: IGD_HARD's training, shorter, without the colour changes that grey images do not have.
SMALL_HARD = Protocol(
    "small-hard", 32, _HALF, _HALF, "adamw", 1e-3, 0.01, epochs_by_ipc=((10, 50), (float("inf"), 30)),
    jitter=0.0, lighting=0.0, evaluations=1, reported="last",
)  # fmt: skip
PROTOCOLS = {protocol.name: protocol for protocol in (IGD_HARD, SMALL_HARD)}

# Table 12: (k, gamma) by IPC 10, 50, 100.
_TABLE_12 = {
    ("imagenette", "dit"): ((5, 50), (5, 120), (5, 120)),
    ("imagewoof", "dit"): ((5, 50), (5, 120), (5, 120)),
    ("imagenet", "dit"): ((5, 120), (5, 120), (5, 120)),
    ("imagenette", "minimax"): ((15, 10), (15, 10), (15, 10)),
    ("imagewoof", "minimax"): ((10, 50), (10, 100), (10, 100)),
    ("imagenet", "minimax"): ((10, 100), (10, 100), (10, 100)),
}


def preset(dataset: str, backbone: str = "dit", ipc: int = 10) -> Guidance:
    """The guidance of Table 12, or of the stand-in's validation run; other IPCs take the nearest row below.

    backbone: "dit" or "minimax". Raises KeyError for a data set without a preset.
    """
    if (dataset, backbone) not in _TABLE_12:
        known = ", ".join(sorted({name for name, _ in _TABLE_12}))
        raise KeyError(f"no preset for {dataset!r} with {backbone!r} (known: {known}); see Guidance for the ranges to search")
    k, gamma = _TABLE_12[dataset, backbone][0 if ipc < 50 else 1 if ipc < 100 else 2]
    return Guidance(float(k), float(gamma))
