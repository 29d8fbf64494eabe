"""DSA (Zhao & Bilen, ICML 2021): random changes of images that gradients pass through.

After the code of DSA and DM (VICO-UoE/DatasetCondensation, `DiffAugment`) and of IDC
(snu-mllab/Efficient-Dataset-Condensation, `DiffAug`), which compose the same changes in two ways: `dsa` and
`diffaug`. They act on normalised images (B, C, H, H), so what is padded or cut out is 0, the data's mean
colour. With u drawn uniformly from [0, 1):

    color   brightness x + (u - 0.5); saturation m_c + 2u (x - m_c), m_c a pixel's mean over its channels;
            contrast m + (u + 0.5) (x - m), m an image's mean; in this order
    crop    a shift by up to 1/8 of the side, in whole px, drawn for each axis; zeros come in
    cutout  a square of half the side is set to zero, its centre anywhere in the image
    flip    left to right, of half the draws
    scale   each axis by a factor of its own, 1/1.2 + u (1.2 - 1/1.2): bilinear, zeros outside
    rotate  by up to 15 degrees, likewise

Parameters are drawn once (`draw`) and applied as often as wanted (`apply`): to real and synthetic images
alike ("siamese") with one set of them for all images, or with a set for each image of one batch. The authors'
code sets the global generator's seed before every draw instead; here a generator of one's own is the only one
that moves, and the distribution is the same. All changes are linear in the image, but for brightness, which
is affine: derivatives of any order pass. A call costs little beside a network's pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Family = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]
Operation = Literal["brightness", "saturation", "contrast", "crop", "cutout", "flip", "scale", "rotate"]
FAMILIES: tuple[Family, ...] = get_args(Family)

SHIFT = 0.125  # of a crop, at most: a share of the side
HOLE = 0.5  # of a cutout: a share of the side
ZOOM = 1.2  # of a scaling, at most; 1 / 1.2 at least
ANGLE = math.radians(15)  # of a rotation, at most


@dataclass(frozen=True)
class Strategy:
    """Which families a call applies: `first`, in order, then one of `one_of`, then `last`.

    The one is drawn uniformly, for all images of a call alike. Raises ValueError for an unknown family.
    """

    first: tuple[Family, ...] = ()
    one_of: tuple[Family, ...] = ()
    last: tuple[Family, ...] = ()

    def __post_init__(self) -> None:
        for name in (*self.first, *self.one_of, *self.last):
            if name not in FAMILIES:
                raise ValueError(
                    f"unknown augmentation {name!r}; known: {', '.join(FAMILIES)}, joined by underscores"
                )


def dsa(names: str = "_".join(FAMILIES)) -> Strategy:
    """DSA's and DM's way: one family a call, of those named ("color_crop"; "": none).

    The authors leave "flip" out on digits.
    """
    return Strategy(one_of=_named(names))


def diffaug(names: str = "color_crop_cutout") -> Strategy:
    """IDC's way: flip, colour, one of the others, cutout, as far as they are named."""
    named = _named(names)
    first: tuple[Family, ...] = ("flip", "color")
    last: tuple[Family, ...] = ("cutout",)
    rest = tuple(name for name in named if name not in (*first, *last))
    return Strategy(
        tuple(name for name in first if name in named), rest, tuple(name for name in last if name in named)
    )


def _named(names: str) -> tuple[Family, ...]:
    return tuple(names.split("_")) if names else ()  # type: ignore[arg-type]  # checked by Strategy


@dataclass(frozen=True)
class Change:
    """An operation and its parameters, (n, 1) or (n, 2): of each image, or with n = 1 of all."""

    operation: Operation
    values: Tensor


Params = tuple[Change, ...]  # in the order of application


def draw(
    strategy: Strategy,
    batch: int,  # images; of no account unless per_sample
    size: int,  # px a side
    generator: torch.Generator,  # on the CPU
    *,
    per_sample: bool,  # a set of parameters for each image; False: one for all ("siamese")
) -> Params:
    """Draw what `apply` does. A generator's state gives the same parameters on every device."""
    count, one = batch if per_sample else 1, strategy.one_of
    chosen = (one[int(torch.randint(len(one), (), generator=generator))],) if one else ()
    return tuple(
        Change(operation, _OPERATIONS[operation][0](count, size, generator))
        for family in (*strategy.first, *chosen, *strategy.last)
        for operation in _PARTS.get(family, (family,))
    )


def apply(images: Tensor, params: Params) -> Tensor:
    """Normalised images (B, C, H, H) after every change; their device, shape and dtype stay."""
    for change in params:
        images = _OPERATIONS[change.operation][1](images, change.values.to(images.device))
    return images


# --- draws: (count, 1) or (count, 2), float64 or whole numbers


def _uniform(low: float, high: float, columns: int = 1) -> Callable[[int, int, torch.Generator], Tensor]:
    def drawn(count: int, size: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(count, columns, generator=generator, dtype=torch.float64)
        return low + (high - low) * u

    return drawn


def _shifts(count: int, size: int, generator: torch.Generator) -> Tensor:
    most = int(size * SHIFT + 0.5)
    return torch.randint(-most, most + 1, (count, 2), generator=generator)


def _centres(count: int, size: int, generator: torch.Generator) -> Tensor:
    """A hole of even length may be centred on the border behind the last pixel too."""
    return torch.randint(0, size + 1 - _hole(size) % 2, (count, 2), generator=generator)


def _hole(size: int) -> int:
    return int(size * HOLE + 0.5)


# --- changes: images (B, C, H, H) by values (n, 1) or (n, 2) with n = 1 or B


def _each(values: Tensor, images: Tensor) -> Tensor:
    """(n, 1) as factors of images."""
    return values.to(images.dtype)[:, :, None, None]


def _brightness(images: Tensor, shift: Tensor) -> Tensor:
    return images + _each(shift, images)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    mean = images.mean(1, keepdim=True)
    return mean + _each(factor, images) * (images - mean)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + _each(factor, images) * (images - mean)


def _crop(images: Tensor, shifts: Tensor) -> Tensor:
    """Pixel (i, j) is that at (i, j) + shift, zero outside."""
    count, channels, side, _ = images.shape
    places = torch.arange(1, side + 1, device=images.device)  # in images with a border of one zero
    rows, columns = ((places + shift[:, None]).clamp(0, side + 1) for shift in shifts.unbind(1))
    found = F.pad(images, (1, 1, 1, 1))
    found = found.gather(2, rows[:, None, :, None].expand(count, channels, side, side + 2))
    return found.gather(3, columns[:, None, None, :].expand(count, channels, side, side))


def _cutout(images: Tensor, centres: Tensor) -> Tensor:
    side = images.shape[-1]
    length, places = _hole(side), torch.arange(side, device=images.device)
    first = centres[:, :, None] - length // 2
    inside = (places >= first) & (places < first + length)  # (n, 2, side)
    hole = inside[:, 0, :, None] & inside[:, 1, None, :]
    return images.masked_fill(hole[:, None], 0.0)


def _flip(images: Tensor, u: Tensor) -> Tensor:
    return torch.where(u[:, :, None, None] < 0.5, images.flip(3), images)


def _scale(images: Tensor, factors: Tensor) -> Tensor:
    return _affine(images, torch.diag_embed(factors))


def _rotate(images: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle[:, 0].cos(), angle[:, 0].sin()
    return _affine(images, torch.stack([cos, -sin, sin, cos], 1).unflatten(1, (2, 2)))


def _affine(images: Tensor, matrices: Tensor) -> Tensor:
    """What lies at M p, of coordinates p in [-1, 1] from the centre; matrices M (n, 2, 2), x before y."""
    theta = F.pad(matrices.to(images.dtype), (0, 1)).expand(len(images), 2, 3)
    places = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, "bilinear", "zeros", align_corners=False)


Draw = Callable[[int, int, torch.Generator], Tensor]  # of how many, for how many px a side
Apply = Callable[[Tensor, Tensor], Tensor]
_PARTS: dict[Family, tuple[Operation, ...]] = {"color": ("brightness", "saturation", "contrast")}
_OPERATIONS: dict[str, tuple[Draw, Apply]] = {
    "brightness": (_uniform(-0.5, 0.5), _brightness),
    "saturation": (_uniform(0.0, 2.0), _saturation),
    "contrast": (_uniform(0.5, 1.5), _contrast),
    "crop": (_shifts, _crop),
    "cutout": (_centres, _cutout),
    "flip": (_uniform(0.0, 1.0), _flip),
    "scale": (_uniform(1 / ZOOM, ZOOM, columns=2), _scale),
    "rotate": (_uniform(-ANGLE, ANGLE), _rotate),
}
