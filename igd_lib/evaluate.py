"""Train a network from scratch on a distilled set, test it on real data, under a named protocol."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from igd_lib import cluster, files
from igd_lib.augment import augment, centre, cutmix, normalise, resize
from igd_lib.config import Protocol, has_bfloat16
from igd_lib.data import ImageData
from igd_lib.distill import DistilledSet, in_memory
from igd_lib.models import network as make_network

CHECKPOINT_SECONDS = 60.0  # at most one training state is written in so much time


@dataclass(frozen=True)
class Score:
    """Accuracies in percent, the best and the last of those measured; `reported` is the top-1 that the protocol's tables show."""

    last: float  # top-1
    best: float  # top-1, the highest during training: chosen on test data, as the papers do
    last_top5: float
    best_top5: float  # of the epoch of the best top-1
    best_epoch: int
    epochs: int
    seconds: float
    precision: str  # "bfloat16" where the forward pass was autocast, else "float32"
    protocol: str
    network: str
    seed: int
    reported: float


@dataclass(frozen=True)
class Teacher:
    """What gives soft labels: a trained network and everything that says which one it is."""

    model: nn.Module
    architecture: str  # e.g. "resnet18"
    weights: str  # where they come from: a file's sha256, a published name
    classes: tuple[str, ...]  # logit i is classes[i]
    mean: tuple[float, float, float]  # what it was trained with, of [0, 1] images
    std: tuple[float, float, float]
    least: float = 50.0  # percent of real images that it must get right before it labels anything


def check_teacher(teacher: Teacher, dataset: ImageData, protocol: Protocol, *, images: int = 200) -> float:
    """Top-1 (percent) of the teacher on `images` real ones spread over `dataset`, after its classes were compared.

    Raises ValueError for other classes, another order or number of logits, or a top-1 below `teacher.least`: a wrong
    teacher trains a network to chance without any other sign.
    """
    check_class_order(teacher.classes, dataset.classes, ("teacher", "data"))
    few = dataset.subset(torch.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().long())
    logits = predict(teacher.model, few, replace(protocol, mean=teacher.mean, std=teacher.std))
    if logits.shape[1] != len(dataset.classes):
        raise ValueError(f"the teacher {teacher.architecture} ({teacher.weights}) has {logits.shape[1]} logits for {len(dataset.classes)} classes")
    top1 = topk(logits, few.labels, 1)
    if top1 < teacher.least:
        raise ValueError(
            f"the teacher {teacher.architecture} ({teacher.weights}) gets {top1:.1f} % of {len(few)} real images of {dataset.name}, "
            f"below {teacher.least:.0f} %: wrong weights, class order or normalisation? Set its `least` if it is meant to be this weak"
        )
    return top1


def evaluate(
    distilled: DistilledSet | ImageData,
    dataset: ImageData,
    *,
    network: str,
    protocol: Protocol,
    seed: int,
    teacher: Teacher | None = None,
    device: str | None = None,
    mixed_precision: bool | None = None,
    folder: str | Path | None = None,
) -> Score:
    """Train `network` on `distilled` under `protocol`, test on `dataset`; both best and last accuracy.

    teacher: for soft labels (checked by `check_teacher`). mixed_precision: bfloat16 autocast; by default where the
    processor multiplies bfloat16 natively. folder: where the training state and the score are kept, so that an
    interrupted run goes on after its last state and a finished one is read; a folder of other settings is refused.
    Raises ValueError when the two class orders differ (naming the first difference) or a teacher is missing, and
    FloatingPointError on a non-finite loss.
    """
    train = in_memory(distilled)
    check_class_order(train.classes, dataset.classes)
    if (protocol.labels == "soft") != (teacher is not None):
        raise ValueError(f"protocol {protocol.name!r} has {protocol.labels} labels: {'it needs' if teacher is None else 'it takes no'} teacher")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bfloat16" if (has_bfloat16(device) if mixed_precision is None else mixed_precision) else "float32"
    if teacher is not None:
        teacher = replace(teacher, model=teacher.model.to(device).eval())
        check_teacher(teacher, dataset, protocol)
    if folder is None:
        return _run(train, dataset, network, protocol, seed, teacher, device, precision, None)
    settings = {
        "network": network, "protocol": asdict(protocol), "seed": seed, "precision": precision, "device": torch.device(device).type,
        "train": [train.name, train.split, len(train), fingerprint(train)], "test": [dataset.name, dataset.split, len(dataset)],
        "classes": list(train.classes), "teacher": teacher and [teacher.architecture, teacher.weights],
    }  # fmt: skip
    folder = Path(folder)
    if (score := _finished(folder, settings)) is None:
        score = _run(train, dataset, network, protocol, seed, teacher, device, precision, folder / "training.safetensors")
        files.write(folder / "score.json", json.dumps(asdict(score), sort_keys=True) + "\n")
        (folder / "training.safetensors").unlink(missing_ok=True)
    return score


def evaluate_all(
    distilled: DistilledSet | ImageData,
    dataset: ImageData,
    *,
    networks: Sequence[str],
    seeds: Sequence[int],
    folder: str | Path | None = None,
    ray: bool | str = False,
    workers: int | None = None,
    **options: Any,
) -> list[Score]:
    """`evaluate` for every network and training seed of a set, its images read once; folder gets a folder a cell.

    ray, workers: cells as tasks of a Ray cluster, as in `distill`.
    """
    cells = [(name, seed) for name in networks for seed in seeds]
    shared = _Cells(in_memory(distilled), dataset, folder, options)
    if not ray:
        return [shared.run(cell) for cell in cells]
    with cluster.cluster(ray) as connected:
        return cluster.run_all(connected, _Cells.run, shared, cells, workers=workers, label="evaluate, cells")


@dataclass(frozen=True)
class _Cells:
    """What the cells of a table have in common."""

    train: ImageData
    test: ImageData
    folder: str | Path | None
    options: dict[str, Any]

    def run(self, cell: tuple[str, int]) -> Score:
        name, seed = cell
        own = Path(self.folder) / f"{name.replace('/', '-')}-{seed}" if self.folder is not None else None
        return evaluate(self.train, self.test, network=name, seed=seed, folder=own, **self.options)


@torch.random.fork_rng()
def _run(train, dataset, network, protocol, seed, teacher, device, precision, state) -> Score:
    """The training loop. Initialisation, dropout and the like draw from the global generators: seeded here, restored afterwards."""
    torch.manual_seed(seed)
    started, before = time.monotonic(), 0.0
    classes = len(dataset.classes)
    cell = protocol.training(network, max(1, round(len(train) / len(train.labels.unique()))), classes)
    model = make_network(network, num_classes=classes, image_size=protocol.image_size).to(device)
    if torch.device(device).type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, protocol, lr=cell.lr, weight_decay=cell.weight_decay)
    tests = protocol.tests(cell.epochs)
    train, dataset = resident(train, device), resident(dataset, device)
    found = {"last": 0.0, "last_top5": 0.0, "best": -1.0, "best_top5": 0.0, "best_epoch": 0}
    done = 0
    if state is not None and state.is_file():
        note = files.load_training(state, optimizer, generator=generator, model=model)
        done, before, found = note["step"], note["seconds"], note["found"]
        _set_global_state(note["global"], device)
    saved = time.monotonic()
    for epoch in range(done + 1, cell.epochs + 1):
        factor = schedule(protocol, epoch - 1, cell.epochs)
        for group in optimizer.param_groups:
            group["lr"] = cell.lr * factor
        model.train()
        total = torch.zeros((), device=device)
        for images, labels in train.batches(cell.batch_size, generator):
            pixels = resize(images.to(device), protocol.image_size if protocol.train_resize is None else protocol.train_resize)
            labels = labels.to(device)
            pixels, other, share = cutmix(augment(pixels, protocol, generator), labels, protocol.cutmix, generator)
            with _autocast(device, precision):
                logits = model(normalise(pixels, protocol.mean, protocol.std)).float()
                if teacher is not None:
                    with torch.no_grad():
                        target = teacher.model(normalise(pixels, teacher.mean, teacher.std)).float()
            if teacher is not None:
                loss = soft_label_loss(logits, target, protocol.temperature)
            else:
                loss = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, other)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        if not torch.isfinite(total):
            raise FloatingPointError(f"{network}: the loss is {total.item()} in epoch {epoch} of {cell.epochs}; lower lr ({cell.lr}) in the protocol")
        if epoch in tests:
            with _autocast(device, precision):
                found["last"], found["last_top5"] = accuracy(model, dataset, protocol)
            if found["last"] > found["best"]:
                found |= {"best": found["last"], "best_top5": found["last_top5"], "best_epoch": epoch}
        if state is not None and epoch < cell.epochs and time.monotonic() - saved >= CHECKPOINT_SECONDS:
            note = {"seconds": before + time.monotonic() - started, "found": found, "global": _global_state(device)}
            files.save_training(state, epoch, optimizer, generator=generator, note=note, model=model)
            saved = time.monotonic()
    return Score(
        **found, epochs=cell.epochs, seconds=before + time.monotonic() - started, precision=precision, protocol=protocol.name,
        network=network, seed=seed, reported=found[protocol.reported],
    )  # fmt: skip


def _finished(folder: Path, settings: dict[str, Any]) -> Score | None:
    """The score of a finished run of these settings; refuses a folder of others, and notes the settings of a new one."""
    files.same_settings(folder / "settings.json", settings, "an evaluation")
    score = folder / "score.json"
    try:
        return Score(**json.loads(score.read_text())) if score.is_file() else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{score} is damaged ({error}); delete its folder and run again") from error


def _global_state(device: str) -> dict[str, list[int]]:
    """The global generators' states, as lists of bytes."""
    found = {"cpu": torch.get_rng_state().tolist()}
    return found | {"cuda": torch.cuda.get_rng_state(device).tolist()} if torch.device(device).type == "cuda" else found


def _set_global_state(state: dict[str, list[int]], device: str) -> None:
    torch.set_rng_state(torch.tensor(state["cpu"], dtype=torch.uint8))
    if "cuda" in state:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)


def _autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def fingerprint(data: ImageData) -> str:
    """Twelve hex digits of a set's pixels and labels, by which a score is known to belong to it."""
    digest = hashlib.sha256(data.labels.numpy().tobytes())
    for images, _ in data.batches(500):
        digest.update(images.numpy().tobytes())
    return digest.hexdigest()[:12]


def resident(data: ImageData, device: str) -> ImageData:
    """`data` with its pixels on a GPU where they take at most a quarter of its free memory; else as it is."""
    if torch.device(device).type != "cuda" or 3 * data.image_size**2 * len(data) > torch.cuda.mem_get_info(device)[0] // 4:
        return data
    pixels = torch.cat([images.to(device) for images, _ in data.batches(500)])
    return replace(data, fetch=lambda indices: pixels[indices.to(device)])


def check_class_order(ours: tuple[str, ...], theirs: tuple[str, ...], names: tuple[str, str] = ("distilled set", "test set")) -> None:
    """Raise ValueError at the first label whose class differs."""
    for label, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            raise ValueError(f"class orders differ: label {label} is {a!r} in the {names[0]} and {b!r} in the {names[1]}")
    if len(ours) != len(theirs):
        raise ValueError(f"class orders differ: {len(ours)} classes in the {names[0]}, {len(theirs)} in the {names[1]}")


def make_optimizer(model: nn.Module, protocol: Protocol, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW or SGD, with decay on every parameter or on weight matrices and kernels alone."""
    matrices = [p for name, p in model.named_parameters() if protocol.decay == "all" or (p.ndim > 1 and "weight" in name)]
    known = {id(p) for p in matrices}
    groups = [{"params": matrices}, {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if protocol.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=protocol.betas, weight_decay=weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=protocol.momentum, weight_decay=weight_decay)


def schedule(protocol: Protocol, epoch: int, epochs: int) -> float:
    """The factor of the learning rate in an epoch counted from 0: falls at the milestones, or by half a cosine down to one half."""
    if protocol.schedule == "half-cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs / 2))
    return protocol.lr_decay ** sum(epoch >= int(epochs * share) for share in protocol.milestones)


def soft_label_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of the two softmaxes at a temperature, averaged over the batch, without a factor T^2 (RDED)."""
    return F.kl_div((logits / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="batchmean")


def accuracy(model: nn.Module, dataset: ImageData, protocol: Protocol) -> tuple[float, float]:
    """Top-1 and top-5 in percent (top-C with fewer than five classes)."""
    logits = predict(model, dataset, protocol)
    return topk(logits, dataset.labels, 1), topk(logits, dataset.labels, min(5, logits.shape[1]))


def topk(logits: Tensor, labels: Tensor, k: int) -> float:
    """The share, in percent, of labels (N,) among the k highest of logits (N, C)."""
    return 100 * (logits.topk(k, dim=1).indices == labels[:, None]).any(1).double().mean().item()


@torch.no_grad()
def predict(model: nn.Module, dataset: ImageData, protocol: Protocol, batch_size: int = 250) -> Tensor:
    """The logits of every image, float32 (N, C) on the CPU; the model is left in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model(inputs).float().cpu() for inputs in test_inputs(dataset, protocol, device, batch_size)])


def test_inputs(dataset: ImageData, protocol: Protocol, device: torch.device | str, batch_size: int = 250) -> Iterator[Tensor]:
    """What a network sees of every image in a test: resized, its centre cut out, normalised."""
    for images, _ in dataset.batches(batch_size):
        pixels = resize(images.to(device), protocol.test_resize or protocol.image_size)
        yield normalise(centre(pixels, protocol.image_size), protocol.mean, protocol.std)


test_inputs.__test__ = False  # for pytest, which collects imported names
