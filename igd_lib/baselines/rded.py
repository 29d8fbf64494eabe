"""RDED (Sun et al., CVPR 2024): the real patches that a teacher is surest of, set together to images."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import to_tensor
from torchvision.transforms.v2 import functional as TF

from igd_lib.data.augment import normalise
from igd_lib.data.images import THREADS, ImageData, from_tensors
from igd_lib.protocols import RDED_SOFT
from igd_lib.teachers import Teacher, check_class_order, check_teacher
from igd_lib.tools.progress import progress

BATCH = 250  # patches a teacher sees at a time
SMALL = 64  # px a side: up to there images are no photographs, and RDED makes no grids of them


@dataclass(frozen=True)
class Grids:
    """What RDED's images are; the defaults are those of its scripts for ImageNet and its parts."""

    size: int = 224  # px a side
    factor: int = 2  # patches a side
    candidates: int = 300  # images drawn of a class
    crops: int = 5  # of each (one of the two scripts for ImageNet-1K has 1)
    jpeg_quality: int | None = 75  # in which they are stored, as PIL's default has it; None: without loss

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= self.size or self.crops < 1:
            raise ValueError(
                f"factor is 1 ... the image's side ({self.size}), crops at least 1, got {self.factor} and "
                f"{self.crops}"
            )
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 95:
            raise ValueError(f"jpeg_quality is 1 ... 95 or None, got {self.jpeg_quality}")


def grids_of(image_size: int, candidates: int = 300) -> Grids:
    """RDED's own by the data: 224 px of 2 x 2 patches; of CIFAR and Tiny-ImageNet one patch, in their size.

    JPEG for these too: its code stores all alike.
    """
    if image_size <= SMALL:
        return Grids(image_size, factor=1, candidates=candidates)
    return Grids(candidates=candidates)


def rded(
    data: ImageData,
    teacher: Teacher,
    ipc: int,
    *,
    size: int | None = None,  # px; None: the data's
    factor: int = 2,
    candidates: int = 300,
    crops: int = 5,
    jpeg_quality: int | None = 75,
    seed: int = 0,
    device: str = "cpu",
) -> ImageData:
    """`ipc` images a class of `size` px, class after class, each a grid of factor x factor patches.

    For `rded_soft(protocol, factor)`; `Grids` says what the settings are.

    Of every class `candidates` images are drawn, of each whole original `crops` square patches (8 to 100 % of
    the area, scaled to 1 / factor of the side). A patch's score is the teacher's cross-entropy on it, in the
    middle of a black frame of the image's size (black: zero after normalisation); an image's best patch
    stands for it, and the ipc x factor^2 best images are taken, the best `ipc` of them to the first cell of
    each image, the next to the second. Candidates are raised to as many images as are needed. A class's
    patches depend on seed and label alone. The teacher is checked first. Raises ValueError for a wrong
    teacher (`check_teacher`), settings out of their ranges, or too few images.
    """
    wanted = Grids(size or data.image_size, factor, candidates, crops, jpeg_quality)
    chosen = selection(data, teacher, ipc, wanted, seed=seed, device=device)
    classes = len(data.classes)
    images = torch.empty(classes * ipc, 3, wanted.size, wanted.size, dtype=torch.uint8)
    for label in progress(range(classes), "RDED, class"):
        images[label * ipc : (label + 1) * ipc] = chosen(label)
    labels = torch.arange(classes).repeat_interleave(ipc)
    return from_tensors(data.name, split_of(ipc, factor, seed), data.classes, images, labels)


def split_of(ipc: int, factor: int, seed: int) -> str:
    """What the images call themselves."""
    return f"RDED, ipc {ipc}, factor {factor}, seed {seed}"


@dataclass(frozen=True)
class Selection:
    """Who chooses images of what: a label's images, uint8 (ipc, 3, size, size), where it is called."""

    drawn: ImageData  # the candidates
    teacher: Teacher
    ipc: int
    grids: Grids
    seed: int
    device: str

    def to(self, device: str) -> Selection:
        """The same with the teacher on a device."""
        return replace(self, teacher=_on(self.teacher, device), device=device)

    def __call__(self, label: int) -> Tensor:
        grids = self.grids
        with torch.random.fork_rng(devices=[]):  # torchvision's crops draw from the global generator
            torch.manual_seed(self.seed * 1_000_003 + label)
            best = _best(self, label)
        images = _stored(grid(best, grids.factor, grids.size), self.teacher)
        return images if grids.jpeg_quality is None else through_jpeg(images, grids.jpeg_quality)


def selection(
    data: ImageData, teacher: Teacher, ipc: int, grids: Grids, *, seed: int, device: str
) -> Selection:
    """What `rded` asks for each class: candidates drawn, the teacher checked. Raises ValueError alike."""
    check_class_order(teacher.classes, data.classes, ("teacher", "data"))
    needed = ipc * grids.factor**2
    smallest = int(data.labels.bincount(minlength=len(data.classes)).min())
    if needed > smallest:
        raise ValueError(
            f"ipc {ipc} with factor {grids.factor} needs {needed} images a class, the smallest class has "
            f"{smallest}"
        )
    teacher = _on(teacher, device)
    # As RDED tests: 256 px before the centre's 224.
    test = replace(RDED_SOFT, image_size=grids.size, test_resize=max(grids.size, grids.size // 7 * 8))
    check_teacher(teacher, data, test)
    drawn = data.per_class(min(max(grids.candidates, needed), smallest), seed)
    return Selection(drawn, teacher, ipc, grids, seed, device)


def _on(teacher: Teacher, device: str) -> Teacher:
    return replace(teacher, model=teacher.model.to(device).eval())


def _best(chosen: Selection, label: int) -> Tensor:
    """float (ipc factor^2, 3, s, s), normalised, the surest first: each the best patch of an image."""
    grids, teacher = chosen.grids, chosen.teacher
    side, indices = grids.size // grids.factor, chosen.drawn.class_indices(label)
    patches = torch.empty(len(indices), grids.crops, 3, side, side)
    for own, image in zip(patches, _originals(chosen.drawn, indices), strict=True):
        own.copy_(normalise(_patches(image, side, grids.crops), teacher.mean, teacher.std))
    scores = _cross_entropy(teacher, patches.flatten(0, 1), label, grids.size, chosen.device)
    scores = scores.reshape(patches.shape[:2])
    best = scores.argmin(1)
    order = scores.gather(1, best[:, None])[:, 0].argsort(stable=True)[: chosen.ipc * grids.factor**2]
    return patches[order, best[order]]


def _originals(data: ImageData, indices: Tensor) -> Iterator[Tensor]:
    """float [0, 1] (3, H, W) each: images as they are stored, of any shape, decoded several at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        for few in indices.split(4 * THREADS):  # no more than these are held decoded
            for image in pool.map(data.photograph, few.tolist()):
                yield to_tensor(image)


def _patches(image: Tensor, side: int, crops: int) -> Tensor:
    """float (crops, 3, side, side): random squares of an image (3, H, W)."""
    boxes = [RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[1.0, 1.0]) for _ in range(crops)]
    return torch.stack([TF.resized_crop(image, *box, size=[side, side], antialias=True) for box in boxes])


@torch.no_grad()
def _cross_entropy(teacher: Teacher, patches: Tensor, label: int, size: int, device: str) -> Tensor:
    """(n,): the teacher's loss on every normalised patch, padded with zeros to `size`."""
    edge = size - patches.shape[-1]
    pad, losses = (edge // 2, edge - edge // 2) * 2, []
    for part in patches.split(BATCH):
        inputs = F.pad(part.to(device), pad)
        target = torch.full((len(part),), label, device=device)
        losses.append(F.cross_entropy(teacher.model(inputs).float(), target, reduction="none").cpu())
    return torch.cat(losses)


def _stored(images: Tensor, teacher: Teacher) -> Tensor:
    """Normalised images as uint8: by RDED's arithmetic, whose rounding shows, for it truncates."""
    inverse = tuple(1 / value for value in teacher.std)
    plain = normalise(normalise(images, (0.0,) * 3, inverse), tuple(-m for m in teacher.mean), (1.0,) * 3)
    return plain.mul(255).to(torch.uint8)


def grid(patches: Tensor, factor: int, size: int | None = None) -> Tensor:
    """(n, C, size, size) of (n factor^2, C, s, s): cell c, by rows, of image i is patch c n + i.

    Where `factor` does not divide `size` (by default factor s), the first cells of a row and of a column are
    a pixel longer, their patches stretched to them by repeating pixels.
    """
    size = size or factor * patches.shape[-1]
    cells = patches.reshape(factor, factor, -1, *patches.shape[1:])  # row, column, image, C, s, s
    sides = [size // factor + (index < size % factor) for index in range(factor)]
    rows = [
        torch.cat(
            [F.interpolate(cells[row, column], size=(sides[row], sides[column])) for column in range(factor)],
            dim=3,
        )
        for row in range(factor)
    ]
    return torch.cat(rows, dim=2)


def through_jpeg(images: Tensor, quality: int) -> Tensor:
    """uint8 (n, 3, H, W) as they come back from JPEG files of PIL's `quality`, colours at half the sides."""
    found = torch.empty_like(images)
    for out, image in zip(found, images, strict=True):
        file = io.BytesIO()
        TF.to_pil_image(image).save(file, "JPEG", quality=quality)
        with Image.open(file) as stored:
            out.copy_(TF.pil_to_tensor(stored))
    return found
