"""ZCA whitening: against a decomposition in float64, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from igd_lib.data import zca


def correlated(count: int, seed: int = 0) -> torch.Tensor:
    """uint8 (count, 3, 4, 4): smooth noise, whose neighbouring pixels go together."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 2, 2, generator=generator)
    fine = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return (255 * (0.8 * smooth + 0.2 * fine)).to(torch.uint8)


def reference(images: torch.Tensor, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and mean by a singular value decomposition in float64."""
    flat = images.numpy().reshape(len(images), -1).astype(np.float64) / 255
    mean = flat.mean(0)
    covariance = (flat - mean).T @ (flat - mean) / (len(flat) - 1)
    u, s, _ = np.linalg.svd(covariance)
    return u @ np.diag(1 / np.sqrt(s + eps)) @ u.T, mean


@pytest.mark.parametrize("count", [200, 20])  # more images than values, and fewer
@pytest.mark.parametrize("eps", [0.1, 0.001])
def test_it_is_the_decomposition_in_float64(count, eps, monkeypatch):
    monkeypatch.setattr(zca, "PART", 7)  # whatever it takes at a time
    images, others = correlated(count), correlated(5, seed=1)
    found = zca.fit(images, eps)
    matrix, mean = reference(images, eps)
    expected = (others.numpy().reshape(5, -1) / 255.0 - mean) @ matrix
    assert np.abs(found(others / 255).numpy().reshape(5, -1) - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(matrix).max() > 2 and found.matrix.dtype == torch.float32


def test_whitened_values_hardly_go_together():
    """Of the covariance's eigenvalues S, S / (S + eps) are left."""
    images = correlated(300)
    flat = zca.fit(images, 0.001)(images / 255).flatten(1).double()
    left = np.linalg.eigvalsh(np.cov(flat.T.numpy()))
    before = np.linalg.eigvalsh(np.cov((images / 255).flatten(1).double().T.numpy()))
    assert np.abs(left - before / (before + 0.001)).max() < 1e-3
    assert before[-1] / before[0] > 50 and left[-1] / left[0] < 2


def test_it_goes_back_whatever_the_range():
    images = correlated(50)
    whitening = zca.fit(images)
    pixels = torch.randn(4, 3, 4, 4) * 3
    assert (whitening.inverse(whitening(pixels)) - pixels).abs().max() < 1e-5
    assert (whitening(pixels) - pixels).abs().max() > 1


def test_floats_are_pixels_already():
    images = correlated(50)
    assert torch.equal(zca.fit(images / 255).matrix, zca.fit(images).matrix)


def test_what_does_not_fit_is_refused():
    whitening = zca.fit(correlated(10))
    with pytest.raises(ValueError, match=r"of 48 values an image, got \(3, 5, 5\); give images of the size"):
        whitening(torch.rand(2, 3, 5, 5))
    with pytest.raises(ValueError, match="two images and a positive eps"):
        zca.fit(correlated(1))
    with pytest.raises(ValueError, match="two images and a positive eps"):
        zca.fit(correlated(5), eps=0.0)
