"""How alike two sets of images are, and what a set's images are worth: Tables 5 and 11, Figure 3.

Distances between sets are taken in a feature space. The paper's is Inception-V3's, the only one whose Fréchet
distance is called FID; any network can stand in for it, under its own name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from igd_lib.analysis.features import Extractor
from igd_lib.data.images import ImageData, to_float
from igd_lib.guidance import influence_loss
from igd_lib.sets.store import DistilledSet, in_memory
from igd_lib.surrogate import Checkpoints

ROWS = 10_000  # features that are held in double precision at a time


def _check(sets: Mapping[str, Tensor], least: int = 1) -> None:
    """Each set is (N, D) finite features of at least `least` points, D the same."""
    for name, points in sets.items():
        if points.ndim != 2 or not points.is_floating_point():
            raise ValueError(
                f"{name}: features are floating point (N, D), got {points.dtype} {tuple(points.shape)}"
            )
        if len(points) < least:
            raise ValueError(f"{name} has {len(points)} points; at least {least} are needed")
        if not points.isfinite().all():
            raise FloatingPointError(f"{name}: features that are not finite")
    if len({points.shape[1] for points in sets.values()}) > 1:
        raise ValueError(
            "features of different spaces: "
            f"{', '.join(f'{name} (N, {points.shape[1]})' for name, points in sets.items())}"
        )


# --- Fréchet distance


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution of features, in float64: mean (D,), root (R, D), covariance root^T root."""

    mean: Tensor
    root: Tensor
    count: int


def gaussian(points: Tensor) -> Gaussian:
    """Mean and covariance (N - 1) of features (N, D); worth keeping for a large set compared often."""
    _check({"features": points}, 2)
    count, dimension = points.shape
    mean = torch.stack([part.double().sum(0) for part in points.split(ROWS)]).sum(0) / count
    root = mean.new_empty(0, dimension)
    # QR block by block: covariances are never formed, which would halve the digits.
    for part in points.split(ROWS):
        root = torch.linalg.qr(torch.cat([root, part.double() - mean]), mode="r").R
    return Gaussian(mean, root / (count - 1) ** 0.5, count)


def frechet_distance(real: Tensor | Gaussian, fake: Tensor | Gaussian) -> float:
    """FID's formula of two sets' means and covariances (Heusel et al. 2017).

    ||m - n||^2 + Tr(S + T - 2 (S T)^(1/2)), for means m, n and covariances S, T.

    real, fake: features (N, D), or their `gaussian`. With N < D a covariance is rank deficient and the value
    biased upwards, the more the fewer the points: compare sets of equal size only, and say N beside the
    value. Raises ValueError for fewer than two points or another D, FloatingPointError for features that are
    not finite.
    """
    one, two = (points if isinstance(points, Gaussian) else gaussian(points) for points in (real, fake))
    if len(one.mean) != len(two.mean):
        raise ValueError(
            f"features of different spaces: D is {len(one.mean)} for the real and {len(two.mean)} for the "
            "fake set"
        )
    # S = A^T A, T = B^T B: Tr((S T)^(1/2)) is the sum of A B^T's singular values, no root of a singular S T.
    shared = torch.linalg.svdvals(one.root @ two.root.T).sum()
    value = (
        (one.mean - two.mean).square().sum() + one.root.square().sum() + two.root.square().sum() - 2 * shared
    )
    return max(value.item(), 0.0)  # rounding takes equal sets a little below 0


def distance_name(extractor: Extractor) -> str:
    """What to call the Fréchet distance: FID in Inception-V3's space alone."""
    return "FID" if extractor.is_inception else f"FD over {extractor.space}"


# --- coverage


def nearest_distances(points: Tensor, others: Tensor) -> Tensor:
    """Distance of each point to the nearest of `others`, float64 (N,).

    Euclidean, without an N x M matrix in memory.
    """
    from sklearn.neighbors import NearestNeighbors

    _check({"points": points, "others": others})
    index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(others.cpu().numpy())
    found = []
    for part in points.split(ROWS):
        nearest = others[
            torch.from_numpy(index.kneighbors(part.cpu().numpy(), return_distance=False)[:, 0]).to(
                others.device
            )
        ]
        # Exact: the search's own distances cancel.
        found.append((part.double() - nearest.double()).norm(dim=1).cpu())
    return torch.cat(found)


def coverage(real: Tensor, fake: Tensor, threshold: float, *, exclude: Tensor | None = None) -> float:
    """Percent of real points with a distilled one within `threshold` (Table 11, Section A.8).

    real (N, D), fake (M, D): features; within: at a Euclidean distance of at most `threshold`. The paper's
    example is 300 in Inception-V3's space and it does not say of which distance; read as a squared one it is
    17.3 here. It means nothing in another space: see `coverage_threshold`. exclude: indices into `real` that
    do not count, so that images which Random selected do not cover themselves; the paper leaves them out for
    every method. Raises ValueError for a negative threshold, or when nothing is left.
    """
    if not threshold >= 0:
        raise ValueError(f"the threshold is a distance of at least 0, got {threshold}")
    if exclude is not None:
        counts = torch.ones(len(real), dtype=torch.bool)
        counts[exclude] = False
        real = real[counts.to(real.device)]
    return 100 * (nearest_distances(real, fake) <= threshold).double().mean().item()


def coverage_threshold(real: Tensor, other: Tensor, *, quantile: float = 0.5) -> float:
    """The `quantile` (default: median) of real points' distances to the nearest of another real draw.

    A rule for any feature space: with `other` (M, D) drawn at random from the real data, of the distilled
    sets' size and without the points in `real` (N, D), a Random set covers about that share, and the others
    are read against it (in Table 11 Random covers 72.1 %). Raises ValueError for a quantile outside [0, 1].
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile is in [0, 1], got {quantile}")
    return nearest_distances(real, other).quantile(quantile).item()


# --- Wasserstein distance


def wasserstein(
    real: Tensor,
    fake: Tensor,
    *,
    p: float = 1.0,
    regularisation: float | None = None,
    max_points: int = 5000,
    seed: int = 0,
) -> float:
    """The p-Wasserstein distance of two sets of features, Euclidean, in the features' unit (Figure 3).

    W_p = (min over plans of the mean of ||x - y||^p)^(1/p), every point of a set with equal weight; exact, or
    with `regularisation` (in the unit of ||x - y||^p) the cost of Sinkhorn's entropic plan, which is larger.
    The paper does not say which it uses; p = 1 is ours. A set of more than `max_points` is cut to a random
    draw of so many (seeded); few points overestimate the distance, so compare sets of equal size. Raises
    RuntimeError without convergence.
    """
    import ot

    _check({"real": real, "fake": fake})
    if p < 1 or (regularisation is not None and not regularisation > 0) or max_points < 1:
        raise ValueError(
            f"p >= 1, regularisation > 0 (or None) and max_points >= 1, got {p}, {regularisation} and "
            f"{max_points}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for points in (real, fake):
        kept = (
            torch.randperm(len(points), generator=generator)[:max_points]
            if len(points) > max_points
            else torch.arange(len(points))
        )
        drawn.append(points[kept.to(points.device)].cpu().double())
    cost = torch.cdist(drawn[0], drawn[1]) ** p
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # POT only warns where it stops early
        try:
            mean = float(ot.solve(cost.numpy(), reg=regularisation, reg_type="entropy").value_linear)
        except UserWarning as warning:
            hint = (
                "pass a smaller max_points"
                if regularisation is None
                else f"raise regularisation ({regularisation}), or None for the exact distance"
            )
            raise RuntimeError(f"the transport plan did not converge ({warning}); {hint}") from warning
    return max(mean, 0.0) ** (1 / p)


# --- a map of sets


def joint_tsne(points: Mapping[str, Tensor], *, perplexity: float = 30.0, seed: int = 0) -> pd.DataFrame:
    """t-SNE of several sets of features (N, D) in one fit, so that places compare (Figure 3).

    Columns set, x, y.

    Raises ValueError for fewer points in all than three times the perplexity.
    """
    from sklearn.manifold import TSNE

    _check(points)
    whole = torch.cat(list(points.values())).float().cpu().numpy()
    if len(whole) < 3 * perplexity:
        raise ValueError(f"{len(whole)} points are too few for a perplexity of {perplexity:g}")
    places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(whole)
    names = [name for name, own in points.items() for _ in range(len(own))]
    return pd.DataFrame({"set": names, "x": places[:, 0].round(3), "y": places[:, 1].round(3)})


# --- a set's images


def influence_of_set(
    data: ImageData | DistilledSet,
    checkpoints: Checkpoints,
    gradients: Tensor | Callable[[int], Tensor],
    *,
    device: str | torch.device | None = None,
    batch_size: int = 50,
) -> Tensor:
    """The influence loss (Eq. 7) of every image of a set against its class, float32 (N,) in the set's order.

    gradients: the checkpoints' class gradients, (E, C, P) or a function of the label that gives (E, P), asked
    once a class. device: where to compute, by default where the checkpoints are. Checkpoints count by their
    learning rates.
    """
    data = in_memory(data)
    if isinstance(gradients, Tensor) and gradients.shape[1] != len(data.classes):
        raise ValueError(
            f"class gradients of {gradients.shape[1]} classes for a set of {len(data.classes)}; they "
            "belong to another data set"
        )
    device = torch.device(device) if device is not None else next(iter(checkpoints.states[0].values())).device
    checkpoints = checkpoints.to(str(device))
    losses = torch.empty(len(data))
    for label in data.labels.unique().tolist():
        own = (gradients[:, label] if isinstance(gradients, Tensor) else gradients(label)).to(device)
        for indices in data.class_indices(label).split(batch_size):
            images, targets = (
                to_float(data.fetch(indices)).to(device),
                torch.full((len(indices),), label, device=device),
            )
            with torch.no_grad():
                found = influence_loss(
                    images,
                    targets,
                    checkpoints,
                    own[:, None].expand(-1, len(indices), -1),
                    weights=checkpoints.weights,
                )
            losses[indices] = found.float().cpu()
    return losses


def nearest_cosine(vectors: Tensor) -> Tensor:
    """Each vector's cosine to the most similar other one, (N,): how alike a class's latents or features are.

    vectors: (N, ...), flattened. NaN for a vector without another.
    """
    unit = F.normalize(vectors.flatten(1), dim=1)
    if len(unit) < 2:
        return unit.new_full((len(unit),), float("nan"))
    return (unit @ unit.T).fill_diagonal_(-float("inf")).amax(1)


def per_class_accuracy(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Top-1 of each class in percent, float64 (C,); NaN for a class without images.

    predictions, labels: (N,) in 0 ... C - 1. Raises ValueError for other shapes or labels.
    """
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise ValueError(
            f"predictions and labels are (N,), got {tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
    for name, values in (("predictions", predictions), ("labels", labels)):
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(
                f"{name} are 0 ... {num_classes - 1}, got {values.min().item()} ... {values.max().item()}"
            )
    right = labels[predictions == labels].bincount(minlength=num_classes)
    return 100 * right.double() / labels.bincount(minlength=num_classes)
