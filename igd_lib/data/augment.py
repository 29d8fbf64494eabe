"""The protocols' augmentation, a draw a sample, on the device: from stored pixels to the network's input."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


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


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, H) to float [0, 1] with sides of `size` px (0: as stored)."""
    pixels = images.float() / 255
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
    """Patch shuffle, random resized crop, flip, colour jitter and PCA lighting.

    (B, 3, H, H) in [0, 1] to `protocol.image_size`.
    """
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape or (count,)).uniform_(low, high, generator=generator).to(device)

    if protocol.patch_factor > 1:
        pixels = shuffle_patches(pixels, protocol.patch_factor, generator)
    # RandomResizedCrop: area share in crop_scale, aspect ratio log-uniform in [3/4, 4/3].
    area, ratio = uniform(*protocol.crop_scale), uniform(-0.28768, 0.28768).exp()
    # Neither side longer than the image's, at the drawn area.
    ratio = torch.minimum(torch.maximum(ratio, area), 1 / area)
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    mirror = (
        torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if protocol.flip else torch.ones(count, device=device)
    )
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([width * mirror, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(theta, [count, 3, protocol.image_size, protocol.image_size], align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    if protocol.jitter:
        pixels = _jitter(pixels, protocol.jitter, uniform, torch.randperm(3, generator=generator).tolist())
    if protocol.lighting:
        noise = torch.randn((count, 3), generator=generator).to(device) * protocol.lighting
        pixels = pixels + ((noise * _EIGENVALUES.to(device)) @ _EIGENVECTORS.to(device).T).reshape(
            count, 3, 1, 1
        )
    return pixels


def shuffle_patches(pixels: Tensor, factor: int, generator: torch.Generator) -> Tensor:
    """RDED's patch shuffle: `factor` vertical strips in random order, then horizontal; anew for each image.

    The last strip takes what does not divide evenly. Raises ValueError where an image has fewer pixels than
    strips.
    """
    size = pixels.shape[-1]
    if size < factor:
        raise ValueError(f"cannot cut {size} px into {factor} strips")
    edges = [size // factor * i for i in range(factor)] + [size]
    strips = [torch.arange(start, end) for start, end in zip(edges, edges[1:], strict=False)]

    def orders() -> Tensor:  # (B, size): where each row or column comes from
        return torch.stack(
            [
                torch.cat([strips[i] for i in torch.randperm(factor, generator=generator).tolist()])
                for _ in pixels
            ]
        ).to(pixels.device)

    columns, rows = orders(), orders()
    pixels = pixels.gather(3, columns[:, None, None, :].expand_as(pixels))
    return pixels.gather(2, rows[:, None, :, None].expand_as(pixels))


# ImageNet's RGB principal components, as used since AlexNet.
_EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


def _jitter(pixels: Tensor, strength: float, uniform, order: list[int]) -> Tensor:
    """Brightness, contrast and saturation by factors in [1 - strength, 1 + strength], in random order."""

    def grey(x: Tensor) -> Tensor:
        return (x * torch.tensor([0.299, 0.587, 0.114], device=x.device).reshape(1, 3, 1, 1)).sum(
            1, keepdim=True
        )

    for kind in order:
        factor = uniform(1 - strength, 1 + strength).reshape(-1, 1, 1, 1)
        base = (torch.zeros_like(pixels), grey(pixels).mean((1, 2, 3), keepdim=True), grey(pixels))[kind]
        pixels = (base + factor * (pixels - base)).clamp(0, 1)
    return pixels


def cutmix(
    inputs: Tensor, labels: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """CutMix: (mixed inputs, second labels, share of the first), the share recomputed by the box's area."""
    if alpha == 0:
        return inputs, labels, 1.0
    draw = int(torch.randint(2**62, (1,), generator=generator))
    beta = float(np.random.default_rng(draw).beta(alpha, alpha))
    order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    height, width = inputs.shape[-2:]
    side = (1 - beta) ** 0.5
    cy, cx = (int(torch.randint(size, (1,), generator=generator)) for size in (height, width))
    top, bottom = max(0, cy - int(height * side) // 2), min(height, cy + int(height * side) // 2)
    left, right = max(0, cx - int(width * side) // 2), min(width, cx + int(width * side) // 2)
    mixed = inputs.clone()
    mixed[:, :, top:bottom, left:right] = inputs[order, :, top:bottom, left:right]
    return mixed, labels[order], 1 - (bottom - top) * (right - left) / (height * width)
