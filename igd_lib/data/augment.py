"""The protocols' augmentation, drawn a sample, on the device: from pixels to the network's input.

What is drawn and what it does are apart, so that each can be compared with the code that it follows:
torchvision's RandomResizedCrop, and the colour changes of Minimax's evaluation code.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DRAWS = 10  # of a crop, before the whole image is taken
RATIO = 4 / 3  # a crop's sides: at most so unequal
# ImageNet's RGB principal components, as used since AlexNet.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
LUMA = (0.299, 0.587, 0.114)  # a grey image's shares of red, green and blue


class Augmentation(Protocol):
    """What `augment` reads of a training protocol (`igd_lib.protocols.Protocol`)."""

    @property
    def image_size(self) -> int: ...

    @property
    def patch_factor(self) -> int: ...

    @property
    def crop_scale(self) -> tuple[float, float]: ...

    @property
    def flip(self) -> bool: ...

    @property
    def jitter(self) -> float: ...

    @property
    def lighting(self) -> float: ...


def to_unit(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [0, 1]; float pixels, which are of [0, 1] already, as they are."""
    return images.float() if images.is_floating_point() else images.float() / 255


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 or float (B, 3, H, H) to float [0, 1] with sides of `size` px (0: as stored)."""
    pixels = to_unit(images)
    return (
        pixels
        if size in (0, pixels.shape[-1])
        else F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    )


def centre(pixels: Tensor, size: int) -> Tensor:
    """The central (size, size) of (B, 3, H, H)."""
    edge = (pixels.shape[-1] - size) // 2
    return pixels[..., edge : edge + size, edge : edge + size]


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[0, 1] pixels to zero mean and unit deviation, channel by channel."""
    shift, scale = (torch.tensor(values, device=pixels.device).reshape(-1, 1, 1) for values in (mean, std))
    return (pixels - shift) / scale


def augment(pixels: Tensor, protocol: Augmentation, generator: torch.Generator) -> Tensor:
    """Patch shuffle, random resized crop, flip, colour jitter and PCA lighting, drawn for each image.

    (B, 3, H, H) in [0, 1] to `protocol.image_size`. Colours are not clamped, so they may leave [0, 1].
    """
    count, device = len(pixels), pixels.device
    if protocol.patch_factor > 1:
        pixels = shuffle_patches(pixels, protocol.patch_factor, generator)
    if protocol.crop_scale != (1.0, 1.0) or pixels.shape[-1] != protocol.image_size:
        boxes = crop_boxes(count, pixels.shape[-1], protocol.crop_scale, generator)
        pixels = resized_crop(pixels, boxes.to(device), protocol.image_size)
    if protocol.flip:
        mirrored = (torch.rand(count, generator=generator) < 0.5).to(device)
        pixels = torch.where(mirrored.reshape(-1, 1, 1, 1), pixels.flip(3), pixels)
    if protocol.jitter:
        factors = 1 + protocol.jitter * (2 * torch.rand(count, 3, generator=generator) - 1)
        order = torch.rand(count, 3, generator=generator).argsort(dim=1)
        pixels = change_colours(pixels, factors.to(device), order.to(device))
    if protocol.lighting:
        pixels = light(pixels, protocol.lighting * torch.randn(count, 3, generator=generator).to(device))
    return pixels


# --- crops


def crop_boxes(
    count: int, side: int, scale: tuple[float, float], generator: torch.Generator
) -> Tensor:  # int64 (count, 4): top, left, height, width, px
    """Boxes as torchvision's RandomResizedCrop draws them in square images of `side` px.

    A share of the area in `scale` and a log-uniform ratio of the sides, rounded to px, drawn anew where it
    does not fit, the whole image after ten draws; then uniform offsets.
    """
    area, ratio, y, x = torch.rand(4, DRAWS, count, generator=generator, dtype=torch.float64)
    area = side**2 * (scale[0] + (scale[1] - scale[0]) * area)
    ratio = torch.exp(math.log(RATIO) * (2 * ratio - 1))
    width, height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    first = fits.long().argmax(0, keepdim=True)  # the first that fits; the first of all where none does
    height, width = (torch.where(fits, length, side).gather(0, first)[0] for length in (height, width))
    top, left = ((share[0] * (side - length + 1)).long() for share, length in ((y, height), (x, width)))
    return torch.stack([top, left, height, width], dim=1)


def resized_crop(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Each image's box (B, 4: top, left, height, width, px) at `size` px: bilinear, antialiased.

    (B, 3, H, W) to (B, 3, size, size): torchvision's `resized_crop` of tensors, for all images at once.
    """
    top, left, height, width = boxes.unbind(1)
    rows = _interpolation(pixels.shape[-2], top, height, size, pixels.dtype)
    columns = _interpolation(pixels.shape[-1], left, width, size, pixels.dtype)
    narrow = pixels.flatten(1, 2) @ columns.mT  # one product an image
    return rows[:, None] @ narrow.unflatten(1, pixels.shape[1:3])


def _interpolation(side: int, start: Tensor, length: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, size, side): what each of `side` px weighs in each of `size`, which span `length` from `start` on.

    A triangle about the output pixel's centre, half as wide as the larger of the two pixels' pitches; nothing
    outside the box; weights sum to one.
    """
    start, length = (value.double().reshape(-1, 1, 1) for value in (start, length))
    pitch = length / size
    centres = start + pitch * (torch.arange(size, device=start.device)[:, None] + 0.5)
    places = torch.arange(side, device=start.device) + 0.5
    weights = (1 - (places - centres).abs() / pitch.clamp(min=1)).clamp(min=0)
    weights = weights * ((places > start) & (places < start + length))
    return (weights / weights.sum(2, keepdim=True)).to(dtype)


def shuffle_patches(pixels: Tensor, factor: int, generator: torch.Generator) -> Tensor:
    """RDED's patch shuffle: `factor` vertical strips in random order, then horizontal; anew for each image.

    (B, 3, H, H) to sides of H rounded down to a multiple of `factor`: what does not divide evenly is dropped.
    Raises ValueError where an image has fewer pixels than strips.
    """
    width = pixels.shape[-1] // factor  # px of a strip
    if width == 0:
        raise ValueError(f"cannot cut {pixels.shape[-1]} px into {factor} strips")

    def places() -> Tensor:  # (B, side): where each row or column comes from
        order = torch.rand(len(pixels), factor, generator=generator).argsort(dim=1)
        return (order[:, :, None] * width + torch.arange(width)).flatten(1).to(pixels.device)

    columns, rows = places(), places()
    side = factor * width
    pixels = pixels.gather(3, columns[:, None, None, :].expand(-1, *pixels.shape[1:3], side))
    return pixels.gather(2, rows[:, None, :, None].expand(-1, pixels.shape[1], side, side))


# --- colours


def change_colours(pixels: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast and saturation times `factors` (B, 3), in each image's own `order` (B, 3).

    Each draws an image (3, H, W) towards, or away from, black, its mean grey, or itself in grey; nothing is
    clamped (Minimax's `ColorJitter`). An image of three equal channels keeps them equal.
    """
    luma = torch.tensor(LUMA, device=pixels.device, dtype=pixels.dtype).reshape(3, 1, 1)
    for kind in order.unbind(1):
        grey = (pixels * luma).sum(1, keepdim=True)
        bases = torch.stack([torch.zeros_like(grey), grey.mean((2, 3), keepdim=True).expand_as(grey), grey])
        base = bases[kind, torch.arange(len(pixels), device=pixels.device)]
        factor = factors.gather(1, kind[:, None]).to(pixels.dtype).reshape(-1, 1, 1, 1)
        pixels = base + factor * (pixels - base)
    return pixels


def light(pixels: Tensor, strengths: Tensor) -> Tensor:
    """PCA lighting: `strengths` (B, 3) of ImageNet's principal components, times their eigenvalues."""
    values, vectors = (
        torch.tensor(found, device=pixels.device, dtype=pixels.dtype) for found in (EIGENVALUES, EIGENVECTORS)
    )
    shift = (vectors * (strengths.to(pixels.dtype) * values)[:, None]).sum(2)
    return pixels + shift[:, :, None, None]


# --- mixing


def cutmix(
    inputs: Tensor, labels: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """CutMix: (mixed inputs, second labels, share of the first), the share recomputed by the box's area."""
    if alpha == 0:
        return inputs, labels, 1.0
    beta, order = _partners(inputs, alpha, generator)
    height, width = inputs.shape[-2:]
    side = (1 - beta) ** 0.5
    cy, cx = (int(torch.randint(size, (1,), generator=generator)) for size in (height, width))
    top, bottom = max(0, cy - int(height * side) // 2), min(height, cy + int(height * side) // 2)
    left, right = max(0, cx - int(width * side) // 2), min(width, cx + int(width * side) // 2)
    mixed = inputs.clone()
    mixed[:, :, top:bottom, left:right] = inputs[order, :, top:bottom, left:right]
    return mixed, labels[order], 1 - (bottom - top) * (right - left) / (height * width)


def mixup(
    inputs: Tensor, labels: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """mixup: (mixed inputs, second labels, share of the first), the share drawn from Beta(alpha, alpha)."""
    share, order = _partners(inputs, alpha, generator)
    return share * inputs + (1 - share) * inputs[order], labels[order], share


def _partners(inputs: Tensor, alpha: float, generator: torch.Generator) -> tuple[float, Tensor]:
    """A draw from Beta(alpha, alpha), and which image each is mixed with, (B,)."""
    draw = int(torch.randint(2**62, (1,), generator=generator))
    beta = float(np.random.default_rng(draw).beta(alpha, alpha))
    return beta, torch.randperm(len(inputs), generator=generator).to(inputs.device)
