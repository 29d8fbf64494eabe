"""A set whose images, labels and rate were learned, in one safetensors file.

    images    float32 (N, 3, H, H), pixels of [0, 1] that may leave it; or uint8
    labels    int64 (N,), the classes that the images are of
    targets   float32 (N, classes), soft labels, where it has any
    zca.matrix, zca.mean    float32 (D, D), (D,), the whitening, where it has one: 38 MB at 32 px

Name, split, classes and the learned rate are metadata.
"""

from __future__ import annotations

from pathlib import Path

import torch

from igd_lib.data.images import ImageData, learned
from igd_lib.data.zca import ZCA
from igd_lib.tools import files
from igd_lib.tools.version import git_revision

FILE = "set.safetensors"  # where a method's set that is made in one piece lies in its folder


def save(path: str | Path, data: ImageData) -> Path:
    """Write a set that is in memory, atomically; `load` gives it back to the bit."""
    tensors = {"images": data.fetch(torch.arange(len(data))), "labels": data.labels}
    if data.targets is not None:
        tensors["targets"] = data.targets
    if data.whitening is not None:
        tensors |= {"zca.matrix": data.whitening.matrix, "zca.mean": data.whitening.mean}
    about = {"name": data.name, "split": data.split, "classes": list(data.classes), "lr": data.lr}
    return files.save_tensors(path, tensors, **about, revision=git_revision())


def load(path: str | Path) -> ImageData:
    """Read what `save` wrote. Raises FileNotFoundError, or ValueError naming a damaged file."""
    tensors, about = files.load_tensors(path)
    try:
        images, labels = tensors["images"], tensors["labels"]
        whitening = ZCA(tensors["zca.matrix"], tensors["zca.mean"]) if "zca.matrix" in tensors else None
        base = ImageData(
            about["name"],
            about["split"],
            tuple(about["classes"]),
            labels,
            images.shape[-1],
            lambda indices: images[indices],
        )
        return learned(base, images, tensors.get("targets"), lr=about["lr"], whitening=whitening)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no learned set ({error!r}); delete it and run again") from error
