"""Floating-point operations, counted on shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from igd_lib.models.networks import network

TRAINING = 3  # forward passes that a pass forward and back costs
TO_PIXELS = 2  # ... with fixed parameters, back to the images alone
# The gradient, by an image, of a cosine with a gradient by the weights: counted for ConvNet-3 and ConvNet-6
# at one image (torch's counter counts the groups of several images' convolutions too often).
SECOND_ORDER = 7.8


@cache
def operations_of(name: str, image_size: int, classes: int) -> float:
    """Of a network's pass forward over one image; counted on shapes alone."""
    with torch.device("meta"):
        model = network(name, num_classes=classes, image_size=image_size).eval()
        return counted(lambda: model(torch.empty(1, 3, image_size, image_size)))


def counted(call: Callable[[], Any]) -> float:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return float(counter.get_total_flops())
