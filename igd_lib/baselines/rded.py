"""RDED (Sun et al., CVPR 2024): the real patches that a teacher is surest of, set together to images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from igd_lib.data.augment import normalise
from igd_lib.data.images import ImageData, from_tensors
from igd_lib.teachers import Teacher, check_class_order
from igd_lib.tools.progress import progress

BATCH = 250  # patches a teacher sees at a time


def rded(
    data: ImageData,
    teacher: Teacher,
    ipc: int,
    *,
    factor: int = 2,
    candidates: int = 300,
    crops: int = 5,
    seed: int = 0,
    device: str = "cpu",
) -> ImageData:
    """`ipc` images a class, class after class, each a grid of factor x factor patches.

    For `rded_soft(protocol, factor)`.

    Of every class `candidates` images are drawn, of each `crops` square patches (8 to 100 % of the area,
    scaled to 1 / factor of the side). A patch's score is the teacher's cross-entropy on it, in the middle of
    a black frame of the image's size (black: zero after normalisation); an image's best patch stands for it,
    and the ipc x factor^2 best images are taken, the best `ipc` of them to the first cell of each image, the
    next to the second. Candidates are raised to as many images as are needed. Raises ValueError for other
    class orders, sides that `factor` does not divide, or too few images.
    """
    check_class_order(teacher.classes, data.classes, ("teacher", "data"))
    size, needed = data.image_size, ipc * factor**2
    if factor < 1 or size % factor:
        raise ValueError(f"factor divides the image's side ({size}), got {factor}")
    smallest = int(data.labels.bincount(minlength=len(data.classes)).min())
    if needed > smallest:
        raise ValueError(
            f"ipc {ipc} with factor {factor} needs {needed} images a class, the smallest class has {smallest}"
        )
    drawn = data.per_class(min(max(candidates, needed), smallest), seed)
    model = teacher.model.to(device).eval()
    found = []
    with torch.random.fork_rng(devices=[]):  # torchvision's crops draw from the global generator
        torch.manual_seed(seed)
        for label in progress(range(len(data.classes)), "RDED, class"):
            patches = _patches(drawn.of_class(label), size // factor, crops)
            scores = _cross_entropy(teacher, model, patches.flatten(0, 1), label, size, device).reshape(
                patches.shape[:2]
            )
            best = scores.argmin(1)
            order = scores.gather(1, best[:, None])[:, 0].argsort(stable=True)[:needed]
            found.append(grid(patches[order, best[order]], factor))
    labels = torch.arange(len(data.classes)).repeat_interleave(ipc)
    return from_tensors(
        data.name, f"RDED, ipc {ipc}, factor {factor}, seed {seed}", data.classes, torch.cat(found), labels
    )


def _patches(images: Tensor, side: int, crops: int) -> Tensor:
    """uint8 (n, crops, 3, side, side): random squares of every image."""
    rows = []
    for image in images:
        boxes = [
            RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[1.0, 1.0]) for _ in range(crops)
        ]
        rows.append(
            torch.stack([TF.resized_crop(image, *box, size=[side, side], antialias=True) for box in boxes])
        )
    return torch.stack(rows)


@torch.no_grad()
def _cross_entropy(
    teacher: Teacher, model: torch.nn.Module, patches: Tensor, label: int, size: int, device: str
) -> Tensor:
    """(n,): the teacher's loss on every patch, padded with zeros to `size` after normalisation."""
    edge = size - patches.shape[-1]
    pad, losses = (edge // 2, edge - edge // 2) * 2, []
    for part in patches.split(BATCH):
        logits = model(
            F.pad(normalise(part.to(device).float() / 255, teacher.mean, teacher.std), pad)
        ).float()
        losses.append(
            F.cross_entropy(logits, torch.full((len(part),), label, device=device), reduction="none").cpu()
        )
    return torch.cat(losses)


def grid(patches: Tensor, factor: int) -> Tensor:
    """(n, C, factor s, factor s) of (n factor^2, C, s, s): cell c, by rows, of image i is patch c n + i."""
    count = len(patches) // factor**2
    cells = patches.reshape(factor, factor, count, *patches.shape[1:])  # row, column, image, C, s, s
    return cells.permute(2, 3, 0, 4, 1, 5).reshape(
        count, patches.shape[1], factor * patches.shape[-2], factor * patches.shape[-1]
    )
