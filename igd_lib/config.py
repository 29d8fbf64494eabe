"""Every setting with a name: guidance, fidelity, protocols, presets, and paths.

All of them are frozen dataclasses that check their values when made, so that a wrong setting stops
a run before it starts.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch


def data_dir() -> Path:
    """Where data sets live: `$IGD_DATA`, else `~/.cache/igd/data`."""
    return Path(os.environ.get("IGD_DATA") or cache_dir() / "data").expanduser()


def cache_dir() -> Path:
    """Where weights, distilled images and caches live: `$IGD_CACHE`, else `~/.cache/igd`."""
    return Path(os.environ.get("IGD_CACHE") or "~/.cache/igd").expanduser()


def ray_cluster() -> bool | str:
    """Where notebooks sample and train, `$IGD_RAY`: unset or "0" here, "1" a local Ray cluster, else a cluster's address."""
    given = os.environ.get("IGD_RAY", "0")
    return {"": False, "0": False, "1": True}.get(given, given)


def reuse_memory() -> None:
    """On Linux with glibc: let this process keep the memory that it frees, for its own next use.

    By default the allocator hands every large tensor back at once, and the system fills each new one with zeros, page by
    page: up to 40 % of a ConvNet-3's training step on a CPU. Results do not change; the process stays as large as it once was.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every libc has it
    if mallopt is not None:
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, in bytes
            mallopt(parameter, value)


def has_bfloat16(device: str) -> bool:
    """Whether the device has bfloat16 matrix products, which make training two to three times as fast."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


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

    def covers(self, number: int) -> bool:
        """Whether the step of this number (T-1 first, 0 last; with `Fidelity.range_counts_from=1`, T ... 1) is guided."""
        return self.guided_range[0] <= number <= self.guided_range[1]

    def for_latents(self, dimension: int) -> Guidance:
        """The same guidance for latents of `dimension` values instead of the paper's 4096."""
        return Guidance(self.k, self.gamma * dimension / 4096, self.guided_range)


@dataclass(frozen=True)
class Fidelity:
    """Each known difference between the paper and its released code, one field each.

    The defaults are the released code's; `PAPER` is the paper read to the letter. Sources: [P] the paper,
    [O] the released code, [C] a later public copy of parts of it, [D] DiT's code, which [O] samples with.
    Not here because they have names elsewhere: the training protocol, optimiser and which accuracy is
    reported (`Protocol`), and the generation seed (`distill`).
    """

    solver: Literal["ddpm", "ddim", "dpmsolver++", "unipc", "configured"] = "ddpm"  # [O] DDPM; [P] DDIM, Table 10: DPM-Solver++; configured: the pipeline's own
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"  # [D] 0 ... 999 with both ends; [P] 50 of 1000, not said which
    timestep_frequencies: Literal["original", "diffusers"] = "original"  # [D] 10000^(-i/128); diffusers' port of the model: 10000^(-i/127)
    cfg_channels: int | None = 3  # [D] CFG mixes the first 3 latent channels; [P] all (None)
    range_counts_from: Literal[0, 1] = 0  # the last step's number in guided_range: [O, C] 0; [P] Algorithm 1 counts T ... 1
    rho_factor: float = 0.0015  # [C] rho_t times 0.0015; [P] Eq. 9 has no factor (1.0)
    eps: Literal["conditional", "combined"] = "combined"  # rho_t's eps: [C] after CFG; [P] the conditional prediction
    both_halves: bool = False  # [C] G_I averaged over both CFG halves, decoded (True); [P] the sample alone
    backward: Literal["once", "per_checkpoint"] = "once"  # [C] once a checkpoint; [P] once. The same result, so the quick one
    clamp_images: bool = False  # decoded images cut to [-1, 1] before the surrogate; [C] not; [P] does not say
    memory_size: int | None = 64  # [O, C] G_D against the last 64 latents of a class; [P] all (None)
    gradient_images: int | None = 200  # [O] class gradient over the first 200 images; [P] all (None)
    checkpoints: Literal["fixed", "similarity"] = "fixed"  # [O] fixed lists where it has one (`fixed_checkpoints`); [P] Algorithm 2
    similarity: Literal["mean", "per_class"] = "per_class"  # Algorithm 2: [O] mean of per-class cosines; [P] cosine of the mean gradient
    surrogate: Literal["released", "paper"] = "released"  # training (`surrogate_training`): [C] other rates for over 100 classes; [P] lr 0.01
    vae: str = "stabilityai/sd-vae-ft-mse"  # [O]; [P] "from Stable Diffusion", not said which

    def __post_init__(self) -> None:
        for field in ("cfg_channels", "memory_size", "gradient_images"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"Fidelity.{field} is at least 1, or None for all, got {value}")
        for field in fields(self):  # the Literals, checked: a misspelt choice must not pass for another
            allowed = get_args(get_type_hints(type(self))[field.name])
            if get_origin(get_type_hints(type(self))[field.name]) is Literal and getattr(self, field.name) not in allowed:
                raise ValueError(f"Fidelity.{field.name} is one of {allowed}, got {getattr(self, field.name)!r}")


RELEASED = Fidelity()  # but for `both_halves`, off because it doubles the guidance's price: replace(RELEASED, both_halves=True) is all of it
PAPER = Fidelity(
    solver="ddim",
    timestep_spacing="leading",
    cfg_channels=None,
    range_counts_from=1,
    rho_factor=1.0,
    eps="conditional",
    memory_size=None,
    gradient_images=None,
    checkpoints="similarity",
    similarity="mean",
    surrogate="paper",
)



def flips(fidelity: Fidelity = RELEASED, towards: Fidelity = PAPER) -> dict[str, Fidelity]:
    """`fidelity` with one field changed at a time, by "field=value": those in which `towards` differs, and both_halves and clamp_images."""
    changes = {field.name: getattr(towards, field.name) for field in fields(fidelity) if getattr(fidelity, field.name) != getattr(towards, field.name)}
    changes |= {"both_halves": not fidelity.both_halves, "clamp_images": not fidelity.clamp_images}
    return {f"{name}={value}": replace(fidelity, **{name: value}) for name, value in changes.items()}


# The released code's epochs, by (data set, surrogate). Its list for ImageNet-1K ends with 52, beyond the paper's 50 epochs.
_FIXED = {
    ("imagenette", "convnet6"): (0, 2, 11, 40),
    ("imagewoof", "convnet6"): (0, 5, 16, 40),
    ("imagenet", "convnet6"): (0, 5, 18, 52),
    ("imagenette", "resnetap10"): (0, 6, 16, 39),
    ("imagewoof", "resnetap10"): (0, 6, 16, 39),
    ("imagenette", "resnet18"): (0, 8, 27),
    ("imagewoof", "resnet18"): (0, 16, 33),
}


def fixed_checkpoints(dataset: str, surrogate: str) -> tuple[int, ...] | None:
    """The epochs that the released code keeps, or None where it has no list."""
    return _FIXED.get((dataset, surrogate))


def surrogate_training(fidelity: Fidelity, num_classes: int) -> dict[str, float]:
    """`train_surrogate`'s options at the paper's scale.

    The paper says 50 epochs at a rate of 0.01; momentum 0.9, weight decay and batch size are the released
    code's, which takes other values for more than 100 classes. Keeps all 53 checkpoints where its list needs them.
    """
    many = num_classes > 100 and fidelity.surrogate == "released"
    epochs = 52 if many and fidelity.checkpoints == "fixed" else 50
    return dict(epochs=epochs, lr=0.1 if many else 0.01, momentum=0.9, weight_decay=1e-4 if many else 5e-4, batch_size=128 if many else 64)


@dataclass(frozen=True)
class Training:
    """What a protocol comes to for one cell: a network, a number of classes and images a class."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Protocol:
    """How a network is trained from scratch on a distilled set and tested on real data.

    Hard labels: Minimax's evaluation code and IGD's variant of it; soft labels: RDED's. Where a field has a
    default, it is the hard-label protocols' value or "off".
    """

    name: str
    image_size: int  # px; what the network sees
    mean: tuple[float, float, float]  # of [0, 1] images
    std: tuple[float, float, float]
    optimizer: Literal["adamw", "sgd"]
    lr: float
    weight_decay: float
    labels: Literal["hard", "soft"] = "hard"  # soft: a teacher's, made on the mixed batch as it is trained on
    # optimiser
    lr_by_network: tuple[tuple[str, float], ...] = ()  # the first whose name the network's begins with, else lr
    momentum: float = 0.9  # sgd only
    betas: tuple[float, float] = (0.9, 0.999)  # adamw only
    decay: Literal["all", "matrices"] = "all"  # matrices: only weights of more than one dimension decay
    over_100_classes: tuple[float, float, int] | None = None  # lr, weight decay, least batch size there
    # batches and epochs
    batch_size: int = 64
    batch_by_ipc: tuple[tuple[float, int], ...] = ()  # batch sizes up to an IPC, instead of batch_size
    batch_doubled_for: tuple[int, ...] = ()  # numbers of classes
    epochs: int | None = None  # None: by IPC
    epochs_by_ipc: tuple[tuple[float, int], ...] = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500), (float("inf"), 300))
    # schedule
    schedule: Literal["multistep", "half-cosine"] = "multistep"  # half-cosine: 0.5 (1 + cos(pi e / 2E)), from 1 to 0.5
    milestones: tuple[float, ...] = (2 / 3, 5 / 6)  # multistep: shares of the epochs after which lr falls
    lr_decay: float = 0.2
    # augmentation, in this order
    train_resize: int | None = None  # px before the random crop; None: image_size. 0: as stored
    patch_factor: int = 1  # strips a side that are shuffled (RDED's images are grids of patches); 1 = off
    crop_scale: tuple[float, float] = (0.5, 1.0)  # RandomResizedCrop
    flip: bool = True
    jitter: float = 0.4  # brightness, contrast, saturation
    lighting: float = 0.1  # sd of the PCA lighting noise
    cutmix: float = 1.0  # Beta(a, a) every batch; 0 = off
    temperature: float = 20.0  # soft labels: of teacher and student, without a factor T^2
    # tests
    test_resize: int | None = None  # px of the shorter side before the centre crop to image_size; None: image_size
    evaluations: int = 100  # about so many tests, evenly spread ...
    test_every: int | None = None  # ... or one every so many epochs
    test_after: float = 0.0  # and none in this first share of the epochs
    reported: Literal["best", "last"] = "best"  # which top-1 the protocol's tables show
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the authors' own runs

    def epochs_for(self, ipc: int, num_classes: int) -> int:
        """Training epochs: `epochs`, or by IPC, two thirds of that (rounded down to hundreds) at 100 classes."""
        if self.epochs is not None:
            return self.epochs
        epochs = next(count for limit, count in self.epochs_by_ipc if ipc <= limit)
        if num_classes != 100:
            return epochs
        return epochs * 2 // 3 // 100 * 100 or epochs * 2 // 3

    def training(self, network: str, ipc: int, num_classes: int) -> Training:
        """Epochs, batch size, rate and decay of one cell."""
        lr, weight_decay, batch = self.lr, self.weight_decay, self.batch_size
        if self.batch_by_ipc:
            batch = next(size for limit, size in self.batch_by_ipc if ipc <= limit)
        if num_classes in self.batch_doubled_for:
            batch *= 2
        if self.over_100_classes is not None and num_classes > 100:
            lr, weight_decay, least = self.over_100_classes
            batch = max(batch, least)
        own = network.removeprefix("timm/")
        lr = next((rate for prefix, rate in self.lr_by_network if own.startswith(prefix)), lr)
        return Training(self.epochs_for(ipc, num_classes), min(batch, ipc * num_classes), lr, weight_decay)

    def tests(self, epochs: int) -> list[int]:
        """After which epochs (counted from 1) the network is tested; the last is always one."""
        if self.test_every is not None:
            found = set(range(self.test_every, epochs + 1, self.test_every))
        else:
            count = min(self.evaluations, epochs)
            found = {round(epochs * (i + 1) / count) for i in range(count)}
        return sorted({epoch for epoch in found if epoch - 1 > self.test_after * epochs or self.test_after == 0} | {epochs})


_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Minimax's evaluation code, and what IGD's released code changes in it. Its script is silent on how the paper's tables were made.
MINIMAX_HARD = Protocol(
    "minimax-hard", 224, _IMAGENET_MEAN, _IMAGENET_STD, "sgd", 0.01, 5e-4, over_100_classes=(0.1, 1e-4, 128), seeds=(0,),
)  # fmt: skip
IGD_HARD = Protocol("igd-hard", 256, _HALF, _HALF, "adamw", 1e-3, 0.01)
# RDED's validation, for Tables 2 and 3. Its images are factor x factor grids, its crops take 1 / factor of the area at least; images that
# are no grids have factor 1 and so are never cropped (`rded_soft`). IPC 100 is unset there: ours is IPC 50's batch.
RDED_SOFT = Protocol(
    "rded-soft", 224, _IMAGENET_MEAN, _IMAGENET_STD, "adamw", 1e-3, 0.01, labels="soft", decay="matrices",
    lr_by_network=(("efficientnet_b0", 2e-3), ("mobilenetv2", 2.5e-3), ("swinv2_tiny", 1e-4)),
    batch_by_ipc=((1, 10), (10, 50), (float("inf"), 100)), batch_doubled_for=(100, 1000), epochs=300, schedule="half-cosine",
    train_resize=0, patch_factor=2, crop_scale=(0.5, 1.0), jitter=0.0, lighting=0.0, test_resize=256, test_every=10, test_after=0.8, seeds=(42,),
)  # fmt: skip
# For the stand-ins: IGD_HARD's and RDED_SOFT's training, shorter, without the colour changes that grey images do not have.
SMALL_HARD = Protocol(
    "small-hard", 32, _HALF, _HALF, "adamw", 1e-3, 0.01, epochs_by_ipc=((10, 50), (float("inf"), 30)),
    jitter=0.0, lighting=0.0, evaluations=1, reported="last",
)  # fmt: skip
SMALL_SOFT = replace(
    RDED_SOFT, name="small-soft", image_size=32, mean=_HALF, std=_HALF, epochs=None, epochs_by_ipc=((10, 50), (float("inf"), 30)),
    test_resize=None, test_every=None, evaluations=1, reported="last",
)  # fmt: skip
PROTOCOLS = {protocol.name: protocol for protocol in (MINIMAX_HARD, IGD_HARD, RDED_SOFT, SMALL_HARD, SMALL_SOFT)}


def rded_soft(protocol: Protocol, factor: int) -> Protocol:
    """A soft-label protocol for images of `factor` x `factor` patches: strips to shuffle, and the least share of a crop."""
    if factor < 1:
        raise ValueError(f"factor is at least 1, got {factor}")
    return replace(protocol, patch_factor=factor, crop_scale=(1 / factor, 1.0))

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
