"""ZCA whitening of images: decorrelated pixels that still look like the image (Krizhevsky, 2009)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from igd_lib.data.augment import to_unit

PART = 1000  # images at a time


@dataclass(frozen=True)
class ZCA:
    """z = (x - mean) W of flattened [0, 1] images x, W = U (S + eps)^-1/2 U^T of their covariance U S U^T.

    W is symmetric and, for eps > 0, always has an inverse. Whitened images are what a network sees: they are
    not normalised besides.
    """

    matrix: Tensor  # W, float32 (D, D), D = 3 H H
    mean: Tensor  # float32 (D,)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, H) in [0, 1], whitened. Raises ValueError for images of another size."""
        return ((self._flat(pixels) - self.mean) @ self.matrix).reshape(pixels.shape)

    def inverse(self, whitened: Tensor) -> Tensor:
        """float32 (B, 3, H, H) in [0, 1], not clamped, of whitened images; in float64 between."""
        found = torch.linalg.solve(self.matrix.double(), self._flat(whitened).double(), left=False)
        return (found + self.mean.double()).float().reshape(whitened.shape)

    def to(self, device: torch.device | str) -> ZCA:
        return replace(self, matrix=self.matrix.to(device), mean=self.mean.to(device))

    def _flat(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        if flat.shape[1] != len(self.mean):
            raise ValueError(
                f"this whitening is of {len(self.mean)} values an image, got {tuple(images.shape[1:])}; give "
                "images of the size that it was fitted on"
            )
        return flat


def fit(images: Tensor, eps: float = 0.1) -> ZCA:
    """The whitening of images uint8 or float [0, 1] (N, 3, H, H), as kornia's `ZCAWhitening(eps)` has it.

    The covariance is divided by N - 1; sums are float64. At 32 px 10 s of a core, mostly the eigenvalues, and
    about 40 MB. Raises ValueError for fewer than two images or an eps that is not positive.
    """
    if len(images) < 2 or eps <= 0:
        raise ValueError(f"whitening takes two images and a positive eps, got {len(images)} and {eps}")
    total = torch.zeros(images[0].numel(), dtype=torch.float64)
    for part in images.split(PART):
        total += _pixels(part).double().sum(0)
    mean = (total / len(images)).float()
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in images.split(PART):
        centred = _pixels(part) - mean
        covariance += centred.T @ centred
    values, vectors = torch.linalg.eigh(covariance / (len(images) - 1))
    matrix = (vectors * (values.clamp(min=0) + eps).rsqrt()) @ vectors.T
    return ZCA(matrix.float(), mean)


def _pixels(images: Tensor) -> Tensor:
    """float32 (B, D) in [0, 1]."""
    return to_unit(images).flatten(1)
