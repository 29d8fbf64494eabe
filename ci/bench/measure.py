"""Seconds, counted arithmetic and memory of a function."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def peak_gib(device: str) -> float:
    """The most memory this process has used: the GPU's where there is one, else its resident size."""
    used = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return used / 2**30


def timed(run: Callable[[], Any], device: str, repeats: int) -> float:
    """The median of `repeats` runs in seconds; whoever calls has warmed up."""
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def counted(run: Callable[[], Any]) -> float:
    """Floating-point operations (two a multiply-add), by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on this machine."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    a @ a
    return 2 * size**3 / timed(lambda: a @ a, device, 5)
