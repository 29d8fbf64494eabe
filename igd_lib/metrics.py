"""How alike two sets of images are, and what a set's images are worth: Tables 5 and 11, Figure 3.

Distances between sets are taken in a feature space. The paper's is Inception-V3's, the only one whose Fréchet distance
is called FID; any network can stand in for it, under its own name.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from igd_lib import files
from igd_lib.augment import centre, normalise, resize
from igd_lib.config import cache_dir
from igd_lib.data import ImageData, to_float
from igd_lib.distill import DistilledSet, in_memory
from igd_lib.guidance import influence_loss
from igd_lib.models import ConvNet, ResNet
from igd_lib.progress import progress
from igd_lib.surrogate import Checkpoints

ROWS = 10_000  # features that are held in double precision at a time
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"  # Apache-2.0
INCEPTION_FILES = (INCEPTION_URL.rsplit("/", 1)[1], "pt_inception-2015-12-05-6726825d.pth")  # the second is pytorch-fid's name of the same file
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


# --- feature spaces


@dataclass(frozen=True)
class Extractor:
    """A frozen network as a feature map: uint8 images (B, 3, H, W) to float32 features (B, `dimension`) on the CPU.

    Raises ValueError for other images or features, FloatingPointError for features that are not finite.
    """

    name: str
    dimension: int
    compute: Callable[[Tensor], Tensor]
    is_inception: bool = False  # set by `inception` alone: whether the Fréchet distance is FID

    @property
    def space(self) -> str:
        """What a distance in it is said to be over."""
        return self.name if self.is_inception else f"{self.name} features"

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        with torch.no_grad():
            found = self.compute(images).float().cpu()
        if found.shape != (len(images), self.dimension):
            raise ValueError(
                f"{self.name} gives features {tuple(found.shape)} of images {tuple(images.shape)}, not ({len(images)}, {self.dimension}); "
                "pass the image size that it was built for"
            )
        if not found.isfinite().all():
            raise FloatingPointError(f"{self.name}: features that are not finite; check its weights and normalisation")
        return found


def network_extractor(
    model: nn.Module, name: str, *, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3, image_size: int = 0, crop: int = 0
) -> Extractor:
    """The penultimate features of `model`, as it is now: what its last linear layer sees.

    model: this project's ConvNet or ResNet, or a timm network. mean, std: of [0, 1] images, as in the protocol it was
    trained under; image_size: px that images are resized to, then crop: px of the centre cut out (0: as they are). The
    model is copied, so it may be trained on. Raises TypeError for another kind of network.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    device = next(model.parameters()).device
    if isinstance(model, (ConvNet, ResNet)):
        dimension, model.classifier = model.classifier.in_features, nn.Identity()
        penultimate: Callable[[Tensor], Tensor] = model
    elif hasattr(model, "forward_head") and hasattr(model, "forward_features"):
        dimension = getattr(model, "head_hidden_size", model.num_features)

        def penultimate(inputs: Tensor) -> Tensor:
            return model.forward_head(model.forward_features(inputs), pre_logits=True)
    else:
        raise TypeError(f"penultimate features are known for ConvNet, ResNet and timm networks, not for {type(model).__name__}")

    def compute(images: Tensor) -> Tensor:
        pixels = resize(images.to(device), image_size)
        return penultimate(normalise(centre(pixels, crop) if crop else pixels, tuple(mean), tuple(std)))

    return Extractor(name, dimension, compute)


def inception(*, weights: str | Path | None = None, device: str | None = None, antialias: bool = True) -> Extractor:
    """Inception-V3's 2,048 pool features, the space of FID, through torchmetrics and torch-fidelity.

    weights: the file if it is not in one of the places that `missing_for_inception` names; nothing is downloaded.
    antialias: torchmetrics' resizing to 299 px; False is the original TensorFlow code's. Raises FileNotFoundError
    naming every missing piece and how to get it, ValueError for a file of other bytes than the published ones.
    """
    if lines := missing_for_inception(weights):
        raise FileNotFoundError("FID lacks:\n" + "\n".join(f"- {line}" for line in lines))
    path = _inception_file(weights)
    if files.sha256(path) != INCEPTION_SHA256:
        raise ValueError(f"{path} is damaged or another file: its SHA-256 is not {INCEPTION_SHA256}; download {INCEPTION_URL}")
    from torchmetrics.image.fid import NoTrainInceptionV3

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _tensors_only():
        model = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias).to(device).requires_grad_(False)
    return Extractor("Inception-V3 pool", 2048, lambda images: model(images.to(device)), is_inception=True)


def missing_for_inception(weights: str | Path | None = None) -> list[str]:
    """What `inception` still needs on this machine, a line a piece with how to get it; empty if nothing."""
    lines = []
    if importlib.util.find_spec("torch_fidelity") is None:
        lines.append("the package torch-fidelity, which holds FID's Inception-V3: pip install torch-fidelity")
    if _inception_file(weights) is None:
        place = Path(weights) if weights is not None else _inception_places()[0]
        lines.append(f"its weights (96 MB): curl -L --create-dirs -o {place} {INCEPTION_URL}; or on another machine, and copy the file there")
    return lines


def _inception_places() -> list[Path]:
    """Where the weights may lie: under `$IGD_CACHE/models`, or in torch.hub's cache."""
    return [folder / name for folder in (cache_dir() / "models", Path(torch.hub.get_dir()) / "checkpoints") for name in INCEPTION_FILES]


def _inception_file(weights: str | Path | None) -> Path | None:
    return next((path for path in ([Path(weights)] if weights is not None else _inception_places()) if path.is_file()), None)


@contextmanager
def _tensors_only() -> Iterator[None]:
    """torch.load refuses anything but tensors, whatever its caller asks: torch-fidelity asks for full unpickling."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def features(extractor: Extractor, data: ImageData | DistilledSet, *, batch_size: int = 250) -> Tensor:
    """Every image's features, float32 (N, D), in the set's order. Raises ValueError for an empty set."""
    data = in_memory(data)
    if len(data) == 0:
        raise ValueError(f"{data.name} ({data.split}) has no images to take features of")
    found = torch.empty(len(data), extractor.dimension)
    for indices in progress(torch.arange(len(data)).split(batch_size), "features, batch"):
        found[indices] = extractor(data.fetch(indices))
    return found


def _check(least: int = 1, **sets: Tensor) -> None:
    """Each set is (N, D) finite features of at least `least` points, D the same."""
    for name, points in sets.items():
        if points.ndim != 2 or not points.is_floating_point():
            raise ValueError(f"{name}: features are floating point (N, D), got {points.dtype} {tuple(points.shape)}")
        if len(points) < least:
            raise ValueError(f"{name} has {len(points)} points; at least {least} are needed")
        if not points.isfinite().all():
            raise FloatingPointError(f"{name}: features that are not finite")
    if len({points.shape[1] for points in sets.values()}) > 1:
        raise ValueError(f"features of different spaces: {', '.join(f'{name} (N, {points.shape[1]})' for name, points in sets.items())}")


# --- Fréchet distance


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution of a set of features, in double precision: mean (D,), and root (R, D) with covariance root^T root."""

    mean: Tensor
    root: Tensor
    count: int


def gaussian(points: Tensor) -> Gaussian:
    """Mean and covariance (N - 1) of features (N, D); worth keeping for a large set that many are compared with."""
    _check(2, features=points)
    count, dimension = points.shape
    mean = torch.stack([part.double().sum(0) for part in points.split(ROWS)]).sum(0) / count
    root = mean.new_empty(0, dimension)
    for part in points.split(ROWS):  # QR block by block: covariances are never formed, which would halve the digits
        root = torch.linalg.qr(torch.cat([root, part.double() - mean]), mode="r").R
    return Gaussian(mean, root / (count - 1) ** 0.5, count)


def frechet_distance(real: Tensor | Gaussian, fake: Tensor | Gaussian) -> float:
    """||m - n||^2 + Tr(S + T - 2 (S T)^(1/2)) of two sets' means and covariances (FID's formula, Heusel et al. 2017).

    real, fake: features (N, D), or their `gaussian`. With N < D a covariance is rank deficient and the value biased
    upwards, the more the fewer the points: compare sets of equal size only, and say N beside the value. Raises
    ValueError for fewer than two points or another D, FloatingPointError for features that are not finite.
    """
    one, two = (points if isinstance(points, Gaussian) else gaussian(points) for points in (real, fake))
    if len(one.mean) != len(two.mean):
        raise ValueError(f"features of different spaces: D is {len(one.mean)} for the real and {len(two.mean)} for the fake set")
    # With S = A^T A and T = B^T B, Tr((S T)^(1/2)) is the sum of A B^T's singular values: no root of a singular product.
    shared = torch.linalg.svdvals(one.root @ two.root.T).sum()
    value = (one.mean - two.mean).square().sum() + one.root.square().sum() + two.root.square().sum() - 2 * shared
    return max(value.item(), 0.0)  # rounding takes equal sets a little below 0


def distance_name(extractor: Extractor) -> str:
    """What to call the Fréchet distance: FID in Inception-V3's space alone."""
    return "FID" if extractor.is_inception else f"FD over {extractor.space}"


# --- coverage


def nearest_distances(points: Tensor, others: Tensor) -> Tensor:
    """Each point's Euclidean distance to the nearest of `others`, float64 (N,), without an N x M matrix in memory."""
    from sklearn.neighbors import NearestNeighbors

    _check(points=points, others=others)
    index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(others.cpu().numpy())
    found = []
    for part in points.split(ROWS):
        nearest = others[torch.from_numpy(index.kneighbors(part.cpu().numpy(), return_distance=False)[:, 0]).to(others.device)]
        found.append((part.double() - nearest.double()).norm(dim=1).cpu())  # exact: the search's own distances cancel
    return torch.cat(found)


def coverage(real: Tensor, fake: Tensor, threshold: float, *, exclude: Tensor | None = None) -> float:
    """The share, in percent, of real points with a point of the distilled set within `threshold` (Table 11, Section A.8).

    real (N, D), fake (M, D): features; within: at a Euclidean distance of at most `threshold`. The paper's example is
    300 in Inception-V3's space and it does not say of which distance; read as a squared one it is 17.3 here. It means
    nothing in another space: see `coverage_threshold`. exclude: indices into `real` that do not count, so that
    images which Random selected do not cover themselves; the paper leaves them out for every method. Raises ValueError for a
    negative threshold, or when nothing is left.
    """
    if not threshold >= 0:
        raise ValueError(f"the threshold is a distance of at least 0, got {threshold}")
    if exclude is not None:
        counts = torch.ones(len(real), dtype=torch.bool)
        counts[exclude] = False
        real = real[counts.to(real.device)]
    return 100 * (nearest_distances(real, fake) <= threshold).double().mean().item()


def coverage_threshold(real: Tensor, other: Tensor, *, quantile: float = 0.5) -> float:
    """The `quantile` (the median by default) of real points' distances to the nearest point of another real draw.

    A rule for any feature space: with `other` (M, D) drawn at random from the real data, of the distilled sets' size and
    without the points in `real` (N, D), a Random set covers about that share, and the others are read against it (in
    Table 11 Random covers 72.1 %). Raises ValueError for a quantile outside [0, 1].
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile is in [0, 1], got {quantile}")
    return nearest_distances(real, other).quantile(quantile).item()


# --- Wasserstein distance


def wasserstein(
    real: Tensor, fake: Tensor, *, p: float = 1.0, regularisation: float | None = None, max_points: int = 5000, seed: int = 0
) -> float:
    """The p-Wasserstein distance of two sets of features under the Euclidean distance, in the features' unit (Figure 3).

    W_p = (min over plans of the mean of ||x - y||^p)^(1/p), every point of a set with equal weight; exact, or with
    `regularisation` (in the unit of ||x - y||^p) the cost of Sinkhorn's entropic plan, which is larger. The paper does
    not say which it uses; p = 1 is ours. A set of more than `max_points` is cut to a random draw of so many (seeded);
    few points overestimate the distance, so compare sets of equal size. Raises RuntimeError without convergence.
    """
    import ot

    _check(real=real, fake=fake)
    if p < 1 or (regularisation is not None and not regularisation > 0) or max_points < 1:
        raise ValueError(f"p >= 1, regularisation > 0 (or None) and max_points >= 1, got {p}, {regularisation} and {max_points}")
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for points in (real, fake):
        kept = torch.randperm(len(points), generator=generator)[:max_points] if len(points) > max_points else torch.arange(len(points))
        drawn.append(points[kept.to(points.device)].cpu().double())
    cost = torch.cdist(*drawn) ** p
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # POT only warns where it stops early
        try:
            mean = float(ot.solve(cost.numpy(), reg=regularisation, reg_type="entropy").value_linear)
        except UserWarning as warning:
            hint = "pass a smaller max_points" if regularisation is None else f"raise regularisation ({regularisation}), or None for the exact distance"
            raise RuntimeError(f"the transport plan did not converge ({warning}); {hint}") from warning
    return max(mean, 0.0) ** (1 / p)


# --- a map of sets


def joint_tsne(points: Mapping[str, Tensor], *, perplexity: float = 30.0, seed: int = 0) -> pd.DataFrame:
    """t-SNE of several sets of features (N, D) in one fit (Figure 3), so that their places compare: columns set, x, y.

    Raises ValueError for fewer points in all than three times the perplexity.
    """
    from sklearn.manifold import TSNE

    _check(**points)
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

    gradients: the checkpoints' class gradients, (E, C, P) or a function of the label that gives (E, P), asked once a
    class. device: where to compute, by default where the checkpoints are. Checkpoints count by their learning rates.
    """
    data = in_memory(data)
    if isinstance(gradients, Tensor) and gradients.shape[1] != len(data.classes):
        raise ValueError(f"class gradients of {gradients.shape[1]} classes for a set of {len(data.classes)}; they belong to another data set")
    device = torch.device(device) if device is not None else next(iter(checkpoints.states[0].values())).device
    checkpoints = checkpoints.to(device)
    losses = torch.empty(len(data))
    for label in data.labels.unique().tolist():
        own = (gradients[:, label] if isinstance(gradients, Tensor) else gradients(label)).to(device)
        for indices in data.class_indices(label).split(batch_size):
            images, targets = to_float(data.fetch(indices)).to(device), torch.full((len(indices),), label, device=device)
            with torch.no_grad():
                found = influence_loss(images, targets, checkpoints, own[:, None].expand(-1, len(indices), -1), weights=checkpoints.weights)
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
        raise ValueError(f"predictions and labels are (N,), got {tuple(predictions.shape)} and {tuple(labels.shape)}")
    for name, values in (("predictions", predictions), ("labels", labels)):
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(f"{name} are 0 ... {num_classes - 1}, got {values.min().item()} ... {values.max().item()}")
    right = labels[predictions == labels].bincount(minlength=num_classes)
    return 100 * right.double() / labels.bincount(minlength=num_classes)
