"""Anchors of a class: the latents that MGD3's guidance draws images to, and controls for them.

MGD3 (Chan-Santiago et al., ICML 2025) takes the centres of k-means with k = IPC on the flattened latents of a
class: the autoencoder's means, times its scaling factor. Latents and anchors are kept in the cache class by
class (about 21 MB a class of ImageNet), so a machine encodes the real images once for all IPCs and rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import AutoencoderKL
from sklearn.cluster import KMeans
from sklearn.metrics.pairwise import euclidean_distances
from torch import Tensor
from torch.nn import functional as F

from igd_lib.data.images import ImageData, to_float
from igd_lib.tools import files, keys
from igd_lib.tools.progress import progress, resumable

Rule = Literal["k-means", "nearest", "random", "pooled", "shuffled"]
ENCODED = 50  # images that go through the autoencoder side by side
POOLED = 4  # latents are averaged to a quarter of their side: 32 x 32 to 8 x 8


# --- the rules: k anchors (k, C, h, w) of latents (n, C, h, w); those of the largest clusters first


def k_means(latents: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """The centres of k-means on flattened latents: MGD3's modes."""
    return _means(latents, _clusters(latents.flatten(1), k, seed), k)


def nearest(latents: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """The real latent that is nearest to each of the centres; two centres may share one."""
    centres, points = k_means(latents, k, seed=seed), latents.flatten(1).double().numpy()
    distances = euclidean_distances(centres.flatten(1).double().numpy(), points)
    return latents[torch.from_numpy(distances.argmin(1))]


def random(latents: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """Real latents drawn at random, none twice."""
    _check_count(k, len(latents))
    return latents[torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))[:k]]


def pooled(latents: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """The mean latent of each cluster that k-means finds in latents averaged to a quarter of their side."""
    side = max(1, latents.shape[-1] // POOLED)
    return _means(latents, _clusters(F.adaptive_avg_pool2d(latents, side).flatten(1), k, seed), k)


RULES: Mapping[str, Callable[..., Tensor]] = {
    "k-means": k_means,
    "nearest": nearest,
    "random": random,
    "pooled": pooled,
    "shuffled": k_means,  # of another class
}


def _clusters(points: Tensor, k: int, seed: int) -> Tensor:
    """The cluster of each point (n, D), the largest cluster being 0."""
    _check_count(k, len(points))
    found = KMeans(k, n_init=1, random_state=seed).fit(points.double().numpy()).labels_
    sizes = np.bincount(found, minlength=k)
    if not sizes.all():
        raise ValueError(f"{len(points)} images have fewer than {k} different latents; lower ipc")
    ranks = np.empty(k, dtype=np.int64)
    ranks[(-sizes).argsort(kind="stable")] = np.arange(k)
    return torch.from_numpy(ranks[found])


def _means(latents: Tensor, clusters: Tensor, k: int) -> Tensor:
    means = [latents[clusters == number].double().mean(0) for number in range(k)]
    return torch.stack(means).to(latents.dtype)


def _check_count(k: int, count: int) -> None:
    if not 1 <= k <= count:
        raise ValueError(f"{k} anchors of a class with {count} real images; ask for 1 ... {count}")


# --- of a data set, kept in the cache


@dataclass(frozen=True)
class RealLatents:
    """The scaled latents of a data set's images, by label: the autoencoder's means, of images of its size."""

    data: ImageData
    vae: AutoencoderKL
    image_size: int  # of the diffusion model, in pixels

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides them."""
        data = {"data": self.data.name, "split": self.data.split, "images": len(self.data)}
        size = {"image_size": self.image_size, "resize": self.data.resize}
        return data | size | {"vae": files.digest(self.vae.state_dict()), "dtype": str(self.vae.dtype)}

    @cached_property
    def folder(self) -> Path:
        return keys.folder("latents", self.settings)

    def __call__(self, label: int) -> Tensor:
        """float32 (n, C, h, w) of a class in file order, from the cache or encoded for it."""
        return _kept("latents", self.settings, self._path(label), lambda: self._encoded(label))

    def keep(self, labels: Sequence[int]) -> None:
        """See to it that classes are in the cache; an interrupted run goes on with the next class."""
        lacking = [label for label in labels if not self._path(label).is_file()]
        with resumable(lambda: f"latents of finished classes are in {self.folder}"):
            for label in progress(lacking, "real latents, class"):
                self(label)

    @cached_property
    def _resized(self) -> ImageData:
        return self.data.at(self.image_size)

    @torch.no_grad()
    def _encoded(self, label: int) -> Tensor:
        data, vae, name = self._resized, self.vae, self.data.classes[label]
        indices, found = data.class_indices(label), []
        if not len(indices):
            raise ValueError(f"class {name!r} of {self.data.name} has no images in {self.data.split!r}")
        for part in indices.split(ENCODED):
            images = to_float(data.fetch(part)).to(vae.device, vae.dtype)
            found.append(vae.encode(images).latent_dist.mean.float().cpu() * vae.config.scaling_factor)
        latents = torch.cat(found)
        if not torch.isfinite(latents).all():
            kind = f"the autoencoder is in {vae.dtype}; take float32 or bfloat16"
            raise ValueError(f"latents of class {name!r} of {self.data.name} are not finite: {kind}")
        return latents

    def _path(self, label: int) -> Path:
        return self.folder / f"{label:05d}.safetensors"


@dataclass(frozen=True)
class Anchors:
    """`ipc` anchors of each class by a rule, from the cache or made for it; image j's is number j.

    "shuffled" gives a class the k-means centres of the next one in the data's order, the last that of the
    first. Raises ValueError for an unknown rule, and for "shuffled" with one class alone.
    """

    latents: RealLatents
    ipc: int
    rule: Rule = "k-means"
    seed: int = 0
    _read: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"anchors are by one of {', '.join(get_args(Rule))}, got {self.rule!r}")
        if self.rule == "shuffled" and len(self.latents.data.classes) < 2:
            raise ValueError("shuffled anchors are another class's, and there is one class alone")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides them, digests included."""
        return {"rule": self._own_rule, "ipc": self.ipc, "seed": self.seed, "latents": self.latents.settings}

    @property
    def _own_rule(self) -> str:
        return "k-means" if self.rule == "shuffled" else self.rule  # the same ones, of another class

    def __call__(self, label: int) -> Tensor:
        """float32 (ipc, C, h, w) of a class."""
        if label not in self._read:
            self._read[label] = self._of(self.source(label))
        return self._read[label]

    def source(self, label: int) -> int:
        """The class whose latents the anchors of a class are."""
        return (label + 1) % len(self.latents.data.classes) if self.rule == "shuffled" else label

    def keep(self, labels: Sequence[int]) -> None:
        """See to it that classes are in the cache, with the latents that they are of."""
        own = [self.source(label) for label in labels]
        lacking = [label for label in own if not self._path(label).is_file()]
        self.latents.keep(lacking)
        for label in progress(lacking, "anchors, class"):
            self._of(label)

    def _of(self, label: int) -> Tensor:
        def made() -> Tensor:
            return RULES[self.rule](self.latents(label), self.ipc, seed=self.seed)

        return _kept("anchors", self.settings, self._path(label), made)

    def _path(self, label: int) -> Path:
        return keys.folder("anchors", self.settings) / f"{label:05d}.safetensors"


def _kept(kind: str, settings: Mapping[str, Any], path: Path, make: Callable[[], Tensor]) -> Tensor:
    """A class's tensor of a kind of work, from its file or made for it, once however many runs want it."""
    if not path.is_file():
        keys.claim(path.parent / "manifest.json", kind, settings, kind)
        what = f"a run that makes {kind} of class {path.stem}"
        with files.locked(path.parent, what, wait=True, name=f".{path.stem}.lock"):
            if not path.is_file():
                files.save_tensors(path, {kind: make()})
    return files.load_tensors(path)[0][kind]
