"""Train a network from scratch on a distilled set, test it on real data: the hard-label protocols."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from igd_lib.config import Protocol
from igd_lib.data import ImageData
from igd_lib.distill import DistilledSet
from igd_lib.models import network as make_network


@dataclass(frozen=True)
class Score:
    """Top-1 accuracies in percent; `reported` is the one the protocol's tables show."""

    last: float
    best: float
    best_epoch: int
    epochs: int
    seconds: float
    precision: str  # "bfloat16" where the forward pass was autocast, else "float32"
    protocol: str
    network: str
    seed: int
    reported: float


def evaluate(
    distilled: DistilledSet | ImageData,
    dataset: ImageData,
    *,
    network: str,
    protocol: Protocol,
    seed: int,
    device: str | None = None,
    mixed_precision: bool | None = None,
) -> Score:
    """Train `network` on `distilled` under `protocol`, test on `dataset`; both best and last top-1.

    mixed_precision: bfloat16 autocast; by default where the processor multiplies bfloat16 natively.
    Raises ValueError when the two class orders differ (naming the first difference) and
    FloatingPointError on a non-finite loss.
    """
    train = distilled.data() if isinstance(distilled, DistilledSet) else distilled
    check_class_order(train.classes, dataset.classes)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    mixed = has_bfloat16(device) if mixed_precision is None else mixed_precision
    started = time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_network(network, num_classes=len(dataset.classes), image_size=protocol.image_size).to(device)
    generator = torch.Generator().manual_seed(seed)
    ipc = max(1, round(len(train) / len(train.labels.unique())))
    epochs = protocol.epochs_for(ipc, len(dataset.classes))
    optimizer = make_optimizer(model, protocol)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(epochs * share) for share in protocol.milestones], protocol.lr_decay)
    count = min(protocol.evaluations, epochs)
    tests = {round(epochs * (i + 1) / count) for i in range(count)}
    best, best_epoch, last = -1.0, 0, 0.0
    for epoch in range(1, epochs + 1):
        model.train()
        for images, labels in train.batches(protocol.batch_size, generator):
            inputs = augment(_pixels(images, protocol.image_size, device), protocol, generator)
            inputs, other, share = cutmix(_normalise(inputs, protocol), labels.to(device), protocol.cutmix, generator)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed):
                logits = model(inputs).float()
            loss = share * F.cross_entropy(logits, labels.to(device)) + (1 - share) * F.cross_entropy(logits, other)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{network}: loss is {loss.item()} in epoch {epoch}; lower lr ({protocol.lr})")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if epoch in tests or epoch == epochs:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed):
                last = accuracy(model, dataset, protocol)
            if last > best:
                best, best_epoch = last, epoch
    seconds = time.monotonic() - started
    reported = best if protocol.reported == "best" else last
    return Score(last, best, best_epoch, epochs, seconds, "bfloat16" if mixed else "float32", protocol.name, network, seed, reported)


def has_bfloat16(device: str) -> bool:
    """Whether the device has bfloat16 matrix products, which make training two to three times as fast."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def check_class_order(ours: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    """Raise ValueError at the first label whose class differs."""
    for label, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            raise ValueError(f"class orders differ: label {label} is {a!r} in the distilled set and {b!r} in the test set")
    if len(ours) != len(theirs):
        raise ValueError(f"class orders differ: {len(ours)} classes in the distilled set, {len(theirs)} in the test set")


def make_optimizer(model: nn.Module, protocol: Protocol) -> torch.optim.Optimizer:
    """AdamW or SGD with the protocol's rate and decay."""
    if protocol.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=protocol.lr, weight_decay=protocol.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay)


@torch.no_grad()
def accuracy(model: nn.Module, dataset: ImageData, protocol: Protocol) -> float:
    """Top-1 in percent."""
    model.eval()
    return 100 * (predict(model, dataset, protocol) == dataset.labels).double().mean().item()


@torch.no_grad()
def predict(model: nn.Module, dataset: ImageData, protocol: Protocol, batch_size: int = 250) -> Tensor:
    """The most likely label of every image, (N,)."""
    device = next(model.parameters()).device
    found = [
        model(_normalise(_pixels(images, protocol.image_size, device), protocol)).argmax(1).cpu()
        for images, _ in dataset.batches(batch_size)
    ]
    return torch.cat(found)


def _pixels(images: Tensor, size: int, device: torch.device | str) -> Tensor:
    """uint8 to float [0, 1] at the protocol's size."""
    pixels = images.to(device).float() / 255
    return pixels if pixels.shape[-1] == size else F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)


def _normalise(pixels: Tensor, protocol: Protocol) -> Tensor:
    mean, std = (torch.tensor(values, device=pixels.device).reshape(3, 1, 1) for values in (protocol.mean, protocol.std))
    return (pixels - mean) / std


# --- augmentation, a draw a sample, on the device


def augment(pixels: Tensor, protocol: Protocol, generator: torch.Generator) -> Tensor:
    """Random resized crop, flip, colour jitter and PCA lighting on (B, 3, H, H) in [0, 1]."""
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape or (count,)).uniform_(low, high, generator=generator).to(device)

    # RandomResizedCrop: area share in crop_scale, aspect ratio log-uniform in [3/4, 4/3].
    area, ratio = uniform(*protocol.crop_scale), uniform(-0.28768, 0.28768).exp()
    ratio = torch.minimum(torch.maximum(ratio, area), 1 / area)  # neither side longer than the image's, at the drawn area
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if protocol.flip else torch.ones(count, device=device)
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([width * mirror, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    pixels = F.grid_sample(pixels, F.affine_grid(theta, list(pixels.shape), align_corners=False), padding_mode="border", align_corners=False)
    if protocol.jitter:
        pixels = _jitter(pixels, protocol.jitter, uniform, torch.randperm(3, generator=generator).tolist())
    if protocol.lighting:
        noise = torch.randn((count, 3), generator=generator).to(device) * protocol.lighting
        pixels = pixels + ((noise * _EIGENVALUES.to(device)) @ _EIGENVECTORS.to(device).T).reshape(count, 3, 1, 1)
    return pixels


# ImageNet's RGB principal components, as used since AlexNet.
_EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def _jitter(pixels: Tensor, strength: float, uniform, order: list[int]) -> Tensor:
    """Brightness, contrast and saturation, each by a factor in [1 - strength, 1 + strength], in random order."""

    def grey(x: Tensor) -> Tensor:
        return (x * torch.tensor([0.299, 0.587, 0.114], device=x.device).reshape(1, 3, 1, 1)).sum(1, keepdim=True)

    for kind in order:
        factor = uniform(1 - strength, 1 + strength).reshape(-1, 1, 1, 1)
        base = (torch.zeros_like(pixels), grey(pixels).mean((1, 2, 3), keepdim=True), grey(pixels))[kind]
        pixels = (base + factor * (pixels - base)).clamp(0, 1)
    return pixels


def cutmix(inputs: Tensor, labels: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """CutMix: (mixed inputs, the second labels, the share of the first), the share recomputed from the box's area."""
    if alpha == 0:
        return inputs, labels, 1.0
    draw = int(torch.randint(2**62, (1,), generator=generator))
    beta = float(np.random.default_rng(draw).beta(alpha, alpha))
    order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    height, width = inputs.shape[-2:]
    side = (1 - beta) ** 0.5
    cy, cx = (int(torch.randint(size, (1,), generator=generator)) for size in (height, width))
    top, bottom = max(0, cy - int(height * side) // 2), min(height, cy + int(height * side) // 2)
    left, right = max(0, cx - int(width * side) // 2), min(width, cx + int(width * side) // 2)
    mixed = inputs.clone()
    mixed[:, :, top:bottom, left:right] = inputs[order, :, top:bottom, left:right]
    return mixed, labels[order], 1 - (bottom - top) * (right - left) / (height * width)
