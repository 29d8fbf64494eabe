"""Points of the plane as the smallest images: 2 channels of one pixel, for the lesson in two dimensions.

A denoiser and an autoencoder with the interfaces of `DiTTransformer2DModel` and `AutoencoderKL`, so that all
of the method takes them as it takes those; a classifier; and the denoiser's training.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from igd_lib.data.images import ImageData, to_float
from igd_lib.tools.progress import progress

FREQUENCIES = 32  # of the timestep's embedding
DROPPED = 0.1  # share of the labels that training replaces by the null class, as DiT's does


def from_points(name: str, split: str, classes: tuple[str, ...], points: Tensor, labels: Tensor) -> ImageData:
    """Points (N, 2) of the square [-1, 1] x [-1, 1] as float images (N, 2, 1, 1); `to_points` goes back."""
    pixels = (points.float().reshape(-1, 2, 1, 1) + 1) / 2
    return ImageData(name, split, classes, labels.long(), 1, lambda indices: pixels[indices])


def to_points(data: ImageData, label: int | None = None) -> Tensor:
    """The points (N, 2) of such images, of one class or all."""
    indices = torch.arange(len(data)) if label is None else data.class_indices(label)
    return to_float(data.fetch(indices)).flatten(1)


class PointTransformer(nn.Module):
    """eps(z_t, t, c) for points: residual layers that see timestep and class, as DiT's blocks do.

    A class more than there are is the null class of classifier-free guidance.
    """

    frequencies: Tensor

    def __init__(self, num_classes: int, width: int = 96, depth: int = 2):
        super().__init__()
        self.config = SimpleNamespace(num_embeds_ada_norm=num_classes, in_channels=2, sample_size=1)
        self.time = nn.Linear(2 * FREQUENCIES, width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.first = nn.Linear(2, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 2)
        exponents = torch.arange(FREQUENCIES) / FREQUENCIES
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * exponents))

    @property
    def dtype(self) -> torch.dtype:
        return self.last.weight.dtype

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        """hidden_states (B, 2, 1, 1), timestep and class_labels (B,); `.sample` is the noise (B, 2, 1, 1)."""
        angles = timestep[:, None].to(self.dtype) * self.frequencies
        told = self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.label(class_labels)
        x, told = self.first(hidden_states.flatten(1)), F.silu(told)
        for layer in self.hidden:
            x = x + layer(F.silu(x + told))
        return SimpleNamespace(sample=self.last(F.silu(x)).reshape(hidden_states.shape))


class PointAutoencoder(nn.Module):
    """The identity: a latent is the point itself, times the scaling factor that gives it unit variance."""

    def __init__(self, scaling_factor: float, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        self.config = SimpleNamespace(scaling_factor=scaling_factor)

    @classmethod
    def of(cls, data: ImageData) -> PointAutoencoder:
        """With the factor that gives the latents of some points unit variance."""
        return cls(1 / to_points(data).std().item())

    def encode(self, points: Tensor) -> Tensor:
        """Latents (N, 2, 1, 1), scaled as the transformer's, of points (N, 2)."""
        return points.reshape(-1, 2, 1, 1) * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Any:
        """`.sample` is the points of latents that are not scaled, as they are."""
        return SimpleNamespace(sample=latents)


def classifier(num_classes: int, width: int, seed: int) -> nn.Sequential:
    """A freshly initialised network 2 - width - width - classes for points (B, 2, 1, 1).

    Its activation is smooth (tanh), so that the gradient of an influence loss is too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = [nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))


def train_denoiser(
    data: ImageData,
    autoencoder: PointAutoencoder,
    alphas_cumprod: Tensor,  # (T,): the scheduler's
    *,
    steps: int,
    batch_size: int = 256,
    lr: float = 5e-3,  # the largest of a one-cycle schedule
    seed: int = 0,
) -> PointTransformer:
    """Learn to predict the noise in points, by DDPM's loss || eps - eps(z_t, t, c) ||^2."""
    generator = torch.Generator().manual_seed(seed)
    classes = len(data.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PointTransformer(classes)
    latents = autoencoder.encode(to_points(data))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in progress(range(steps), "diffusion model, step"):
        chosen = torch.randint(len(data), (batch_size,), generator=generator)
        t = torch.randint(len(alphas_cumprod), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < DROPPED
        labels = data.labels[chosen].masked_fill(dropped, classes)
        eps = torch.randn(batch_size, 2, 1, 1, generator=generator)
        alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * latents[chosen] + (1 - alpha_bar).sqrt() * eps
        loss = F.mse_loss(model(noisy, t, labels).sample, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()
