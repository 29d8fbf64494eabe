"""How to guide, and each known difference between the paper and its released code (`Fidelity`).

All of them are frozen dataclasses that check their values when made, so that a wrong setting stops
a run before it starts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from igd_lib.tools.locks import say_once

Solver = Literal["ddpm", "ddim", "dpmsolver++", "unipc", "configured"]


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
            raise ValueError(
                f"guided_range is (A, B) with 0 <= A <= B, got ({low}, {high}); did you swap them?"
            )
        if self.k < 0 or self.gamma < 0:
            raise ValueError(f"k and gamma are at least 0, got k={self.k}, gamma={self.gamma}")

    def covers(self, number: int) -> bool:
        """Whether the step of this number is guided.

        T-1 first, 0 last; with `Fidelity.range_counts_from=1`, T ... 1.
        """
        return self.guided_range[0] <= number <= self.guided_range[1]

    def for_latents(self, dimension: int) -> Guidance:
        """The same guidance for latents of `dimension` values instead of the paper's 4096."""
        return Guidance(self.k, self.gamma * dimension / 4096, self.guided_range)


@dataclass(frozen=True)
class Augment:
    """What a surrogate's training images go through, in this order; the defaults are the released code's [C].

    The values are those of the hard-label protocols (`Protocol`), without their CutMix.
    """

    crop_scale: tuple[float, float] = (0.5, 1.0)  # RandomResizedCrop's share of the area
    flip: bool = True
    jitter: float = 0.4  # brightness, contrast, saturation; 0 for images without colour
    lighting: float = 0.1  # sd of the PCA lighting noise; 0 for images without colour


AUGMENTATION = Augment()


@dataclass(frozen=True)
class Fidelity:
    """Each known difference between the paper and its released code, one field each.

    The defaults, `STANDARD`, are the paper's method with the released code's settings; `RELEASED` is the
    released code to the letter, `PAPER` the text to the letter. Sources: [P] the paper, [O] the released
    code, [C] a public copy of parts of it, [D] DiT's code, which [O] samples with. Not here because they have
    names elsewhere: the training protocol, optimiser and which accuracy is reported (`Protocol`), how real
    images are resized (`DataSpec`), and the generation seed (`distill`).
    """

    # [O] DDPM; [P] DDIM, Table 10: DPM-Solver++; configured: the pipeline's own
    solver: Solver = "ddpm"
    # [D] 0 ... 999 with both ends; [P] 50 of 1000, not said which
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    # [D] 10000^(-i/128); diffusers' port of the model: 10000^(-i/127)
    timestep_frequencies: Literal["original", "diffusers"] = "original"
    cfg_channels: int | None = 3  # [D] CFG mixes the first 3 latent channels; [P] all (None)
    # the last step's number in guided_range: [O, C] 0; [P] Algorithm 1 counts T ... 1
    range_counts_from: Literal[0, 1] = 0
    rho_factor: float = 0.0015  # [C] rho_t times 0.0015; [P] Eq. 9 has no factor (1.0)
    # rho_t's eps: [C] after CFG; [P] the conditional prediction
    eps: Literal["conditional", "combined"] = "combined"
    # G_I: [P] of the sample; [C] of the mean cross-entropy over it and a second latent (`SecondChain`)
    second_chain: bool = False
    # added to the denominator of G_I's and G_D's cosines: [C] 1e-6; [P] nothing
    cosine_floor: float = 1e-6
    # [C] once a checkpoint; [P] once. The same sum, in another order of additions
    backward: Literal["once", "per_checkpoint"] = "once"
    # decoded images cut to [-1, 1] before the surrogate; [C] not; [P] does not say
    clamp_images: bool = False
    memory_size: int | None = 64  # [O, C] G_D against the last 64 latents of a class; [P] all (None)
    gradient_images: int | None = 200  # [O] class gradient over the first 200 images; [P] all (None)
    # Algorithm 2's gradients: [O] over 80 random images of the first 500 of a class; [P] all (None)
    filter_images: tuple[int, int] | None = (80, 500)
    # [O] fixed lists where it has one (`fixed_checkpoints`); [P] Algorithm 2
    checkpoints: Literal["fixed", "similarity"] = "fixed"
    # Algorithm 2: [O] mean of per-class cosines; [P] cosine of the mean gradient
    similarity: Literal["mean", "per_class"] = "per_class"
    # training (`surrogate_training`): [C] other rates for over 100 classes; [P] lr 0.01
    surrogate: Literal["released", "paper"] = "released"
    # the surrogate sees [C] crops, flips and colour changes (`AUGMENTATION`); [P] does not say
    surrogate_augmentation: bool = True
    vae: str = "stabilityai/sd-vae-ft-mse"  # [O]; [P] "from Stable Diffusion", not said which

    def __post_init__(self) -> None:
        for name in ("cfg_channels", "memory_size", "gradient_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Fidelity.{name} is at least 1, or None for all, got {value}")
        if self.filter_images is not None:
            object.__setattr__(self, "filter_images", tuple(self.filter_images))  # JSON's are lists
            if not 1 <= self.filter_images[0] <= self.filter_images[1]:
                raise ValueError(
                    "Fidelity.filter_images is (how many, of the first how many), or None for all, got "
                    f"{self.filter_images}"
                )
        if self.cosine_floor < 0:
            raise ValueError(f"Fidelity.cosine_floor is at least 0, got {self.cosine_floor}")
        for field in fields(self):  # the Literals, checked: a misspelt choice must not pass for another
            allowed = get_args(get_type_hints(type(self))[field.name])
            if (
                get_origin(get_type_hints(type(self))[field.name]) is Literal
                and getattr(self, field.name) not in allowed
            ):
                raise ValueError(
                    f"Fidelity.{field.name} is one of {allowed}, got {getattr(self, field.name)!r}"
                )


STANDARD = Fidelity()
RELEASED = replace(STANDARD, second_chain=True, backward="per_checkpoint")
PAPER = Fidelity(
    solver="ddim",
    timestep_spacing="leading",
    cfg_channels=None,
    range_counts_from=1,
    rho_factor=1.0,
    eps="conditional",
    cosine_floor=0.0,
    memory_size=None,
    gradient_images=None,
    filter_images=None,
    checkpoints="similarity",
    similarity="mean",
    surrogate="paper",
    surrogate_augmentation=False,
)


def flips(fidelity: Fidelity = STANDARD, towards: Fidelity = PAPER) -> dict[str, Fidelity]:
    """`fidelity` with one field changed at a time, by "field=value".

    Those in which `towards` differs, and second_chain and clamp_images.
    """
    changes = {
        field.name: getattr(towards, field.name)
        for field in fields(fidelity)
        if getattr(fidelity, field.name) != getattr(towards, field.name)
    }
    changes |= {"second_chain": not fidelity.second_chain, "clamp_images": not fidelity.clamp_images}
    return {f"{name}={value}": replace(fidelity, **{name: value}) for name, value in changes.items()}


# The released code's epochs, by (data set, surrogate). Its list for ImageNet-1K ends with 52, beyond the
# paper's 50 epochs. Those of resnet18 are keyed "resnet" in its scripts, which mean ResNet-10 wherever they
# say a depth; that they belong to Table 4's ResNet-18 is our inference.
_FIXED = {
    ("imagenette", "convnet6"): (0, 2, 11, 40),
    ("imagewoof", "convnet6"): (0, 5, 16, 40),
    ("imagenet", "convnet6"): (0, 5, 18, 52),
    ("imagenette", "resnetap10"): (0, 6, 16, 39),
    ("imagewoof", "resnetap10"): (0, 6, 16, 39),
    ("imagenette", "resnet18"): (0, 8, 27),
    ("imagewoof", "resnet18"): (0, 16, 33),
}
# Its lists for surrogates that were trained with CutMix too: longer than 50 epochs.
_FIXED_WITH_CUTMIX = {
    ("imagewoof", "convnet6"): (0, 10, 26, 60),
    ("imagewoof", "convnet4"): (1, 4, 13, 27, 57),
}


def fixed_checkpoints(dataset: str, surrogate: str, *, cutmix: bool = False) -> tuple[int, ...] | None:
    """The epochs that the released code keeps, or None where it has no list.

    cutmix: of a surrogate that was trained with CutMix, which the paper's tables do not use.
    """
    return (_FIXED_WITH_CUTMIX if cutmix else _FIXED).get((dataset, surrogate))


def surrogate_training(fidelity: Fidelity, num_classes: int) -> dict[str, Any]:
    """`train_surrogate`'s options at the paper's scale.

    The paper says 50 epochs at a rate of 0.01; momentum 0.9, weight decay, batch size and augmentation are
    the released code's, which takes other values for more than 100 classes. Keeps all 53 checkpoints where
    its list needs them.
    """
    many = num_classes > 100 and fidelity.surrogate == "released"
    epochs = 52 if many and fidelity.checkpoints == "fixed" else 50
    return dict(
        epochs=epochs,
        lr=0.1 if many else 0.01,
        momentum=0.9,
        weight_decay=1e-4 if many else 5e-4,
        batch_size=128 if many else 64,
        augment=AUGMENTATION if fidelity.surrogate_augmentation else None,
    )


# Table 12: (k, gamma) by IPC 10, 50, 100.
_TABLE_12 = {
    ("imagenette", "dit"): ((5, 50), (5, 120), (5, 120)),
    ("imagewoof", "dit"): ((5, 50), (5, 120), (5, 120)),
    ("imagenet", "dit"): ((5, 120), (5, 120), (5, 120)),
    ("imagenette", "minimax"): ((15, 10), (15, 10), (15, 10)),
    ("imagewoof", "minimax"): ((10, 50), (10, 100), (10, 100)),
    ("imagenet", "minimax"): ((10, 100), (10, 100), (10, 100)),
}


TABLE_12_IPCS = (10, 50, 100)


def nearest_ipc(ipc: int) -> int:
    """Table 12's IPC whose settings another one takes: the largest not above it, else the smallest."""
    return max((known for known in TABLE_12_IPCS if known <= ipc), default=TABLE_12_IPCS[0])


def preset(dataset: str, backbone: str = "dit", ipc: int = 10) -> Guidance:
    """The guidance of Table 12; another IPC than the paper's takes `nearest_ipc`'s, which is said once.

    backbone: "dit" or "minimax". Raises KeyError for a data set without a preset.
    """
    if (dataset, backbone) not in _TABLE_12:
        known = ", ".join(sorted({name for name, _ in _TABLE_12}))
        raise KeyError(
            f"no preset for {dataset!r} with {backbone!r} (known: {known}); see Guidance for the ranges "
            "to search"
        )
    if ipc not in TABLE_12_IPCS:
        known = ", ".join(map(str, TABLE_12_IPCS))
        say_once(
            f"the paper's Table 12 has no IPC {ipc}, but {known}: k and gamma are IPC {nearest_ipc(ipc)}'s"
        )
    k, gamma = _TABLE_12[dataset, backbone][TABLE_12_IPCS.index(nearest_ipc(ipc))]
    return Guidance(float(k), float(gamma))
