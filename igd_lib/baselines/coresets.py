"""Coresets: real images that a rule chooses by what trained networks see of them, class by class.

What a network sees of an image is the input of its last linear layer (its features) and its logits. Features
are taken as they are, without normalising their length. Of equally good images the first in the data is
taken; apart from that no choice depends on the order of images.

Sources: herding, Welling (ICML 2009), as iCaRL has it (Rebuffi et al., CVPR 2017); k-centre, Sener and
Savarese (ICLR 2018); EL2N, Paul et al. (NeurIPS 2021). Their code is not used here: scikit-learn has k-means
and distances, the rest is a line or two each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics.pairwise import euclidean_distances
from torch import Tensor

from igd_lib.data.images import ImageData
from igd_lib.models.networks import last_linear, outputs
from igd_lib.protocols import SMALL_HARD, Protocol
from igd_lib.teachers import Teacher, check_teacher, test_inputs
from igd_lib.tools.progress import progress

End = Literal["hardest", "easiest"]


# --- the rules: each gives k positions, int64 (k,), of n images; the best first


def herding(features: Tensor, k: int) -> Tensor:
    """The k of features (n, D) whose mean follows the mean of all: each next one brings it closest.

    x_t = argmin_x || mean - (x_1 + ... + x_{t-1} + x) / t ||, without replacement. The first is the image
    nearest to the mean; fewer images are the first of more. n D operations an image.
    """
    points = _points(features, k)
    lengths, mean = (points**2).sum(1), points.mean(0)
    chosen: list[int] = []
    total = np.zeros_like(mean)
    for count in range(1, k + 1):
        # The distance to count * mean - total, squared, less what all images have in common.
        gaps = lengths - 2 * points @ (count * mean - total)
        gaps[chosen] = np.inf
        chosen.append(int(gaps.argmin()))
        total += points[chosen[-1]]
    return torch.tensor(chosen)


def k_centre(features: Tensor, k: int) -> Tensor:
    """Of features (n, D) greedily the one farthest from those that are chosen, so that none is left far away.

    The largest distance of an image to the nearest chosen one is at most twice the least possible. The paper
    begins with labelled images; here the first centre is the image nearest to the mean, so that nothing is
    drawn. Fewer images are the first of more. n D operations an image.
    """
    points = _points(features, k)
    chosen = [int(_distances(points, points.mean(0)).argmin())]
    nearest = _distances(points, points[chosen[0]])
    while len(chosen) < k:
        nearest[chosen] = -1.0  # copies of a chosen image come last, and none is taken twice
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _distances(points, points[chosen[-1]]))
    return torch.tensor(chosen)


def medoid(features: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """Of features (n, D) the ones nearest to the k centres that k-means finds, the largest cluster first.

    k-means begins with k-means++ by `seed`. Where two centres have the same nearest image, the pairing with
    the least sum of distances is taken; in a cluster of two either is nearest, and rounding decides.
    """
    points = _points(features, k)
    # In an order of their own, so that what k-means draws does not depend on the data's.
    order = _distances(points, points.mean(0)).argsort(kind="stable")
    found = KMeans(k, n_init=1, random_state=seed).fit(points[order])
    _, nearest = linear_sum_assignment(euclidean_distances(found.cluster_centers_, points[order]))
    sizes = np.bincount(found.labels_, minlength=k)
    return torch.from_numpy(order[nearest[(-sizes).argsort(kind="stable")]])


def el2n(logits: Tensor, labels: Tensor, k: int, *, end: End = "hardest") -> Tensor:
    """The k images with the largest error, by `el2n_scores`; end="easiest": with the smallest.

    The paper prunes a large set by leaving the easiest out, and so does the default. It is not meant for a
    few images a class: there the hardest are mostly mislabelled or odd, and the easiest are better (Sorscher
    et al., NeurIPS 2022).
    """
    return _extreme(el2n_scores(logits, labels), k, highest=end == "hardest")


def confidence(logits: Tensor, labels: Tensor, k: int, *, end: End = "easiest") -> Tensor:
    """The k images whose class the networks are surest of, by `confidences`; end="hardest": least sure of."""
    return _extreme(confidences(logits, labels), k, highest=end == "easiest")


def el2n_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """EL2N (n,): || softmax(logits) - one-hot label ||_2, the mean over m networks of logits (m, n, C).

    (n, C) is one network. The paper takes ten, each after a tenth of its training.
    """
    found = logits.double().softmax(-1)
    wanted = torch.nn.functional.one_hot(labels, found.shape[-1])
    return (found - wanted).norm(dim=-1).reshape(-1, len(labels)).mean(0)


def confidences(logits: Tensor, labels: Tensor) -> Tensor:
    """The probability (n,) of an image's own class, the mean over m networks of logits (m, n, C).

    (n, C) is one network.
    """
    found = logits.double().softmax(-1)
    return found[..., torch.arange(len(labels)), labels].reshape(-1, len(labels)).mean(0)


def _extreme(scores: Tensor, k: int, *, highest: bool) -> Tensor:
    """The positions of the k highest or lowest scores (n,), the outermost first."""
    _check_count(k, len(scores))
    return scores.argsort(descending=highest, stable=True)[:k]


def _points(features: Tensor, k: int) -> np.ndarray:
    """Features (n, D) in double precision, as many as are asked for at least."""
    _check_count(k, len(features))
    return features.double().numpy()


def _distances(points: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(n,): of points (n, D) to a place (D,)."""
    return euclidean_distances(points, place[None])[:, 0]


def _check_count(k: int, count: int) -> None:
    if not 1 <= k <= count:
        raise ValueError(f"{k} of {count} images cannot be chosen; ask for 1 ... {count}")


# --- by name, over a data set


@dataclass(frozen=True)
class View:
    """What networks see of n images of one class."""

    features: Tensor  # (n, D): of several networks side by side
    logits: Tensor  # (networks, n, C)
    labels: Tensor  # (n,)


# Each chooses k images of a view; the seed is k-means'.
RULES: Mapping[str, Callable[[View, int, int], Tensor]] = {
    "herding": lambda seen, k, seed: herding(seen.features, k),
    "k-centre": lambda seen, k, seed: k_centre(seen.features, k),
    "medoid": lambda seen, k, seed: medoid(seen.features, k, seed=seed),
    "el2n": lambda seen, k, seed: el2n(seen.logits, seen.labels, k),
    "el2n-easiest": lambda seen, k, seed: el2n(seen.logits, seen.labels, k, end="easiest"),
    "confidence": lambda seen, k, seed: confidence(seen.logits, seen.labels, k),
    "confidence-hardest": lambda seen, k, seed: confidence(seen.logits, seen.labels, k, end="hardest"),
}
RANDOM = "random"  # needs no network
NAMES = (RANDOM, *RULES)  # of all choices of real images


def coreset(
    data: ImageData,
    networks: Teacher | Sequence[Teacher],  # several for EL2N's mean
    ipc: int,
    rule: str,  # RANDOM, or one of RULES
    *,
    seed: int = 0,  # of what is drawn: the random images, the start of k-means
    device: str = "cpu",
) -> ImageData:
    """`ipc` real images a class, chosen by a rule, class after class, bit by bit those of `data`.

    The networks see every image of `data` whole and unchanged: that is what it costs, a pass forward each. A
    class's images depend on no other class. Raises ValueError for an unknown rule, another class order than
    the networks', networks that are not as good as they should be (`check_teacher`), or too few images.
    """
    if rule == RANDOM:
        return data.per_class(ipc, seed)
    made = chooser(data, networks, ipc, [rule], seed=seed, device=device)
    labels = progress(range(len(data.classes)), "coreset, class")
    return chosen(data, rule, ipc, [made(label)[rule] for label in labels])


def chosen(data: ImageData, rule: str, ipc: int, positions: Sequence[Tensor]) -> ImageData:
    """The set that a rule has chosen, from its images' positions in `data` by class."""
    return data.subset(torch.cat(list(positions)), f"{data.split}, {rule}, {ipc} a class")


@dataclass(frozen=True)
class Chooser:
    """Who chooses: by rule the positions (ipc,) in `data` of a label's images, where it is called.

    One look at a class serves all rules.
    """

    data: ImageData
    networks: tuple[Teacher, ...]
    ipc: int
    rules: tuple[str, ...]
    seed: int
    device: str

    def __call__(self, label: int) -> dict[str, Tensor]:
        places = self.data.class_indices(label)
        seen = view(self.data.subset(places), self.networks, self.device)
        return {rule: places[RULES[rule](seen, self.ipc, self.seed)] for rule in self.rules}


def chooser(
    data: ImageData,
    networks: Teacher | Sequence[Teacher],
    ipc: int,
    rules: Sequence[str],
    *,
    seed: int = 0,
    device: str = "cpu",
) -> Chooser:
    """What `coreset` asks for each class: rules and counts checked, then the networks. Raises alike."""
    if unknown := [rule for rule in rules if rule not in RULES]:
        raise ValueError(f"no rule {unknown[0]!r}; there are {', '.join(NAMES)}")
    counts = data.labels.bincount(minlength=len(data.classes)).tolist()
    for name, count in zip(data.classes, counts, strict=True):
        if not 1 <= ipc <= count:
            raise ValueError(
                f"ipc={ipc}, but class {name!r} of {data.name} has {count} images in {data.split!r}; take "
                f"1 ... {min(counts)}"
            )
    given = [networks] if isinstance(networks, Teacher) else list(networks)
    own = tuple(replace(one, model=one.model.to(device).eval()) for one in given)
    for one in own:
        last_linear(one.model)  # raises for a network whose features are not known
        check_teacher(one, data, _as_it_is(one, data))
    return Chooser(data, own, ipc, tuple(rules), seed, device)


def _as_it_is(network: Teacher, data: ImageData) -> Protocol:
    """How a network sees the data's images: as they are."""
    return replace(SMALL_HARD, image_size=data.image_size, mean=network.mean, std=network.std)


@torch.no_grad()
def view(data: ImageData, networks: Sequence[Teacher], device: str = "cpu") -> View:
    """What networks see of every image, in order. Raises FloatingPointError where it is not finite."""
    features, logits = [], []
    for one in networks:
        parts = [outputs(one.model, inputs) for inputs in test_inputs(data, _as_it_is(one, data), device)]
        features.append(torch.cat([part.float().cpu() for part, _ in parts]))
        logits.append(torch.cat([part.float().cpu() for _, part in parts]))
        if not (features[-1].isfinite().all() and logits[-1].isfinite().all()):
            raise FloatingPointError(
                f"{one.architecture} ({one.weights}) gives features that are not finite; check its weights "
                "and normalisation"
            )
    return View(torch.cat(features, 1), torch.stack(logits), data.labels)
