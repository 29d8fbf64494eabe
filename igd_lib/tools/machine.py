"""The machine a run finds itself on: where its files live, its memory, what its processor can do."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # not on this system
    resource = None  # type: ignore[assignment]

USUAL_FILES = 512  # what a process has open besides


def data_dir() -> Path:
    """Where data sets live: `$IGD_DATA`, else `~/.cache/igd/data`."""
    return Path(os.environ.get("IGD_DATA") or cache_dir() / "data").expanduser()


def cache_dir() -> Path:
    """Where weights, distilled images and caches live: `$IGD_CACHE`, else `~/.cache/igd`."""
    return Path(os.environ.get("IGD_CACHE") or "~/.cache/igd").expanduser()


_part = ""  # of the cache, for work


def work_dir() -> Path:
    """Where work is kept: the cache, or the part of it that `work_in` chose."""
    return cache_dir() / _part


def work_in(part: str) -> None:
    """From now on this process keeps its work in that folder of the cache; "": in the cache itself."""
    global _part
    _part = part


def ray_cluster() -> bool | str:
    """Where notebooks sample and train, `$IGD_RAY`.

    Unset, 0, false, no or off: here; 1, true, yes or on: a local Ray cluster; else a cluster's address.
    Raises ValueError for what is none of these.
    """
    given = os.environ.get("IGD_RAY", "").strip()
    if given.casefold() in ("", "0", "false", "no", "off"):
        return False
    if given.casefold() in ("1", "true", "yes", "on"):
        return True
    if given not in ("auto", "local") and not re.fullmatch(
        r"(ray://)?[^\s/:]+:\d{1,5}|\[[^\s/]+\]:\d{1,5}", given
    ):
        raise ValueError(
            "IGD_RAY is 0, 1 (a local cluster), auto or the address of a cluster's head, HOST:PORT, got "
            f"{given!r}"
        )
    return given


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(there).free


def reuse_memory() -> None:
    """On Linux with glibc: let this process keep the memory that it frees, for its own next use.

    By default the allocator hands every large tensor back at once, and the system fills each new one with
    zeros, page by page: up to 40 % of a ConvNet-3's training step on a CPU. Results do not change; the
    process stays as large as it once was.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every libc has it
    if mallopt is not None:
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, in bytes.
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            mallopt(parameter, value)


SHARED_BY = 1  # processes of one piece of work on this machine at most, as Ray's workers are


def ram() -> int:
    """Bytes of this machine's memory, or of those its container may have: this process's equal part."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or "max"
            found = min(found, int(Path(limit).read_text()))
    return found // SHARED_BY


def allow_open_files(count: int) -> None:
    """Let this process have `count` more files open, such as locks, as far as the system permits."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + USUAL_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def has_bfloat16(device: str) -> bool:
    """Whether the device has bfloat16 matrix products, which make training two to three times as fast."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def tf32(device: str, where: str) -> Iterator[None]:
    """TF32 on a GPU in "all" products, in "convolutions" or "off"; afterwards where it was before."""
    if torch.device(device).type != "cuda":
        yield
        return
    # Written through the older switches too: the older and the newer must agree wherever one is read.
    products: Any = torch.backends.cuda.matmul
    layers: Any = torch.backends.cudnn
    before = products.fp32_precision, layers.conv.fp32_precision, layers.rnn.fp32_precision
    products.allow_tf32, layers.allow_tf32 = where == "all", where != "off"
    try:
        yield
    finally:
        products.allow_tf32, layers.allow_tf32 = before[0] == "tf32", before[1] == "tf32"
        products.fp32_precision, layers.conv.fp32_precision, layers.rnn.fp32_precision = before
