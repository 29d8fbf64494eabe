"""Feature spaces that distances between sets are taken in: Inception-V3's, the paper's, and any network's."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from igd_lib.data.augment import centre, normalise, resize
from igd_lib.data.images import ImageData
from igd_lib.models.networks import last_linear
from igd_lib.sets.store import DistilledSet, in_memory
from igd_lib.tools import files
from igd_lib.tools.machine import cache_dir
from igd_lib.tools.progress import progress

# Apache-2.0
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
# The second is pytorch-fid's name of the same file.
INCEPTION_FILES = (INCEPTION_URL.rsplit("/", 1)[1], "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass(frozen=True)
class Extractor:
    """A frozen network as features: uint8 images (B, 3, H, W) to float32 (B, `dimension`) on the CPU.

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
                f"{self.name} gives features {tuple(found.shape)} of images {tuple(images.shape)}, not "
                f"({len(images)}, {self.dimension}); "
                "pass the image size that it was built for"
            )
        if not found.isfinite().all():
            raise FloatingPointError(
                f"{self.name}: features that are not finite; check its weights and normalisation"
            )
        return found


def network_extractor(
    model: nn.Module,
    name: str,
    *,
    mean: Sequence[float] = (0.5,) * 3,
    std: Sequence[float] = (0.5,) * 3,
    image_size: int = 0,
    crop: int = 0,
) -> Extractor:
    """The penultimate features of `model`, as it is now: what its last linear layer sees.

    model: one that `networks.last_linear` knows. mean, std: of [0, 1] images, as in the protocol it was
    trained under; image_size: px that images are resized to, then crop: px of the centre cut out (0: as they
    are). The model is copied, so it may be trained on. Raises TypeError for another kind of network.
    """
    own = copy.deepcopy(model).eval().requires_grad_(False)
    device, last = next(own.parameters()).device, last_linear(own)
    last.forward = nn.Identity().forward  # type: ignore[method-assign]

    def compute(images: Tensor) -> Tensor:
        pixels = resize(images.to(device), image_size)
        return own(normalise(centre(pixels, crop) if crop else pixels, tuple(mean), tuple(std)))

    return Extractor(name, last.in_features, compute)


def inception(
    *, weights: str | Path | None = None, device: str | None = None, antialias: bool = True
) -> Extractor:
    """Inception-V3's 2,048 pool features, the space of FID, through torchmetrics and torch-fidelity.

    weights: the file if it is not in one of the places that `missing_for_inception` names; nothing is
    downloaded. antialias: torchmetrics' resizing to 299 px; False is the original TensorFlow code's. Raises
    FileNotFoundError naming every missing piece and how to get it, ValueError for a file of other bytes than
    the published ones.
    """
    if lines := missing_for_inception(weights):
        raise FileNotFoundError("FID lacks:\n" + "\n".join(f"- {line}" for line in lines))
    if lines := problems_of_inception(weights):
        raise ValueError(lines[0])
    path = _inception_file(weights)
    from torchmetrics.image.fid import NoTrainInceptionV3

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _tensors_only():
        model = (
            NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias)
            .to(device)
            .requires_grad_(False)
        )
    return Extractor("Inception-V3 pool", 2048, lambda images: model(images.to(device)), is_inception=True)


def missing_for_inception(weights: str | Path | None = None) -> list[str]:
    """What `inception` still needs on this machine, a line a piece with how to get it; empty if nothing."""
    lines = []
    if importlib.util.find_spec("torch_fidelity") is None:
        lines.append("the package torch-fidelity, which holds FID's Inception-V3: pip install torch-fidelity")
    if _inception_file(weights) is None:
        place = Path(weights) if weights is not None else _inception_places()[0]
        lines.append(
            f"its weights (96 MB): curl -L --create-dirs -o {place} {INCEPTION_URL}; or on another "
            "machine, and copy the file there"
        )
    return lines


def problems_of_inception(weights: str | Path | None = None) -> list[str]:
    """What keeps `inception` from loading, a line a problem: what is missing, and a file of other bytes."""
    lines, path = missing_for_inception(weights), _inception_file(weights)
    if path is not None and files.sha256(path) != INCEPTION_SHA256:
        lines.append(
            f"{path} is damaged or another file: its SHA-256 is not {INCEPTION_SHA256}; delete it and "
            f"download {INCEPTION_URL}"
        )
    return lines


def _inception_places() -> list[Path]:
    """Where the weights may lie: under `$IGD_CACHE/models`, or in torch.hub's cache."""
    return [
        folder / name
        for folder in (cache_dir() / "models", Path(torch.hub.get_dir()) / "checkpoints")
        for name in INCEPTION_FILES
    ]


def _inception_file(weights: str | Path | None) -> Path | None:
    return next(
        (
            path
            for path in ([Path(weights)] if weights is not None else _inception_places())
            if path.is_file()
        ),
        None,
    )


@contextmanager
def _tensors_only() -> Iterator[None]:
    """torch.load refuses anything but tensors, though torch-fidelity asks it for full unpickling."""
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
