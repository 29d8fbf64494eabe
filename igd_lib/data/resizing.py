"""How a diffusion model's images come to the data's size, where it makes others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

Filter = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class OutputResize:
    """Decoded images to `size` px a side, antialiased as torchvision's Resize of tensors; differentiable."""

    size: int
    filter: Filter = "bilinear"

    def __post_init__(self) -> None:
        if self.filter not in get_args(Filter):
            raise ValueError(f"a resize is one of {', '.join(get_args(Filter))}, got {self.filter!r}")
        if self.size < 1:
            raise ValueError(f"an image's side is at least 1 px, got {self.size}")

    def __call__(self, images: Tensor) -> Tensor:
        """Float images (B, 3, H, W) of any range to (B, 3, size, size), beyond it at most by bicubic."""
        return F.interpolate(images, size=(self.size, self.size), mode=self.filter, antialias=True)


def needed(declared: Filter | None, made: int, wanted: int) -> OutputResize | None:
    """The resize from `made` to `wanted` px a side: None where none is declared or needed."""
    return OutputResize(wanted, declared) if declared is not None and made != wanted else None
