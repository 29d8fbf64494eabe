"""Train a network from scratch on a distilled set, test it on real data, under a named protocol."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from igd_lib.data.augment import augment, cutmix, mixup, normalise, to_unit
from igd_lib.data.dsa import apply, draw
from igd_lib.data.images import ImageData, Pass
from igd_lib.models.networks import keep_outputs
from igd_lib.models.networks import network as make_network
from igd_lib.protocols import Protocol
from igd_lib.sets.store import DistilledSet, in_memory
from igd_lib.teachers import Teacher, accuracy, check_class_order, check_teacher, seen_by
from igd_lib.tools import cluster, files, keys
from igd_lib.tools.machine import has_bfloat16, tf32
from igd_lib.tools.progress import Pace, progress, resumable

CHECKPOINT_SECONDS = 60.0  # at most one training state is written in so much time


@dataclass(frozen=True)
class Score:
    """Best and last accuracy measured, in percent; `reported`: the top-1 of the protocol's tables."""

    last: float  # top-1
    best: float  # top-1, the highest during training: chosen on test data, as the papers do
    last_top5: float
    best_top5: float  # of the epoch of the best top-1
    best_epoch: int
    epochs: int
    seconds: float
    # Of its products: "bfloat16" (autocast), "tf32" (a GPU's, where `Protocol.tf32` has them) or "float32"
    precision: str
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
    teacher: Teacher | None = None,  # for soft labels
    device: str | None = None,
    mixed_precision: bool | None = None,  # bfloat16 autocast; None: as the protocol has it
    folder: str | Path | None = None,  # where the training state and the score are kept
) -> Score:
    """Train `network` on `distilled` under `protocol`, test on `dataset`; both best and last accuracy.

    Images of another size than the protocol's are made from their originals where they have any. With a
    `folder`, an interrupted run goes on after its last state, a finished one is read, one that is under way
    in another process is waited for, and a folder of other settings is refused. The teacher is checked first
    (`check_teacher`). Raises ValueError when the two class orders differ (naming the first difference) or a
    teacher is missing, and FloatingPointError on a non-finite loss.
    """
    cell = Cell.of(distilled, dataset, network, protocol, seed, teacher, device, mixed_precision).checked()
    return train_network(cell)[1] if folder is None else _scored(cell, Path(folder))


def _scored(cell: Cell, folder: Path) -> Score:
    """The score of a cell, from its folder or trained for it."""
    state = folder / "training.safetensors"
    if (score := _finished(folder, cell.settings)) is not None:
        return score
    with files.locked(folder, f"an evaluation of {cell.network}", wait=True):
        if (score := _finished(folder, cell.settings)) is None:  # nor by another process meanwhile
            _, score = train_network(cell, state)
            files.write(folder / "score.json", json.dumps(asdict(score), sort_keys=True) + "\n")
            state.unlink(missing_ok=True)
    return score


@dataclass(frozen=True)
class Cell:
    """One evaluation: what is trained on what, how, and what it is tested on."""

    train: ImageData
    test: ImageData
    network: str
    protocol: Protocol
    seed: int
    teacher: Teacher | None
    device: str
    precision: str

    @classmethod
    def of(
        cls,
        distilled: DistilledSet | ImageData,
        dataset: ImageData,
        network: str,
        protocol: Protocol,
        seed: int,
        teacher: Teacher | None = None,
        device: str | None = None,
        mixed_precision: bool | None = None,
    ) -> Cell:
        """The cell of `evaluate`'s arguments, its images at the protocol's sizes.

        Raises ValueError for other class orders, or a teacher too many or too few.
        """
        if (protocol.labels == "soft") != (teacher is not None):
            needs = "it needs" if teacher is None else "it takes no"
            raise ValueError(f"protocol {protocol.name!r} has {protocol.labels} labels: {needs} teacher")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        precision = _precision(device, protocol, mixed_precision)
        train, test = at_sizes(distilled, dataset, protocol)
        if protocol.labels == "own" and train.targets is None:
            raise ValueError(
                f"protocol {protocol.name!r} trains on a set's own soft labels, and {train.split!r} has "
                'none; give a set that has, or replace(protocol, labels="hard")'
            )
        return cls(train, test, network, protocol, seed, teacher, device, precision)

    def checked(self) -> Cell:
        """Itself, its teacher on its device and checked, where it has one."""
        if self.teacher is None:
            return self
        teacher = replace(self.teacher, model=self.teacher.model.to(self.device).eval())
        check_teacher(teacher, self.test, self.protocol)
        return replace(self, teacher=teacher)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What names the evaluation on disk.

        Its precision too, since a cache may be shared by machines that differ in it.
        """
        about = self.about
        return about | {
            "train": [*about["train"], fingerprint(self.train)],
            "teacher": self.teacher and [self.teacher.architecture, self.teacher.weights],
        }

    @property
    def about(self) -> dict[str, Any]:
        """Its settings without the pixels' fingerprint and the teacher."""
        train, test = self.train, self.test
        return {
            "network": self.network,
            "protocol": asdict(self.protocol),
            "seed": self.seed,
            "precision": self.precision,
            "device": torch.device(self.device).type,
            "train": [train.name, train.split, len(train)],
            "test": [test.name, test.split, len(test)],
            "classes": list(train.classes),
        }


def evaluate_all(
    distilled: DistilledSet | ImageData,
    dataset: ImageData,
    *,
    networks: Sequence[str],
    seeds: Sequence[int],
    **options: Any,  # `evaluate_sets`'
) -> list[Score]:
    """`evaluate` for every network and training seed of a set, its images read once."""
    cells = [(0, name, seed) for name in networks for seed in seeds]
    return evaluate_sets([distilled], dataset, cells, **options)


def evaluate_sets(
    sets: Sequence[DistilledSet | ImageData],
    dataset: ImageData,
    cells: Sequence[tuple[int, str, int]],  # each a set's number, a network and a training seed
    *,
    protocol: Protocol,
    folder: str | Path | None = None,  # gets a folder a cell, named by its key
    ray: bool | str = False,  # all cells that are missing as tasks of a Ray cluster, as in `distill`
    workers: int | None = None,
    **options: Any,  # `evaluate`'s other ones
) -> list[Score]:
    """`evaluate` for cells of several sets, in their order; consecutive cells of a set read it once."""
    test = dataset.at(protocol.test_resize or protocol.image_size)
    shared = _Shared(sets, test, folder, options | {"protocol": protocol})
    label = "evaluate, cell"
    if not ray:
        return [shared.run(cell) for cell in progress(cells, label, every=20)]
    there = shared.finished(cells)
    missing = [cell for cell in cells if cell not in there]
    if missing:
        with cluster.cluster(ray) as connected:
            work, own = _Shared.run, replace(shared)  # without the images that were read here
            made = cluster.run_all(connected, work, own, missing, workers=workers, label=label)
        there |= dict(zip(missing, made, strict=True))
    return [there[cell] for cell in cells]


@dataclass(frozen=True)
class _Shared:
    """What the cells of a table have in common."""

    sets: Sequence[DistilledSet | ImageData]
    test: ImageData
    folder: str | Path | None
    options: dict[str, Any]
    _read: dict[int, ImageData] = field(default_factory=dict, init=False)  # the set that was asked for last

    def cell(self, cell: tuple[int, str, int]) -> Cell:
        number, name, seed = cell
        if number not in self._read:
            self._read.clear()
            self._read[number], _ = at_sizes(self.sets[number], self.test, self.options["protocol"])
        return Cell.of(self._read[number], self.test, network=name, seed=seed, **self.options)

    def run(self, cell: tuple[int, str, int]) -> Score:
        own = self.cell(cell).checked()
        return train_network(own)[1] if self.folder is None else _scored(own, self._folder(own))

    def finished(self, cells: Sequence[tuple[int, str, int]]) -> dict[tuple[int, str, int], Score]:
        """The scores that are on disk; none where the device of their keys is not on this machine."""
        on_gpu = torch.device(self.options.get("device") or "cpu").type == "cuda"
        if self.folder is None or (on_gpu and not torch.cuda.is_available()):
            return {}
        owns = ((cell, self.cell(cell)) for cell in cells)
        scores = {cell: _finished(self._folder(own), own.settings) for cell, own in owns}
        return {cell: score for cell, score in scores.items() if score is not None}

    def _folder(self, own: Cell) -> Path:
        return Path(self.folder or "") / keys.key("evaluation", own.settings)


def at_sizes(
    distilled: DistilledSet | ImageData, dataset: ImageData, protocol: Protocol
) -> tuple[ImageData, ImageData]:
    """Training and test images at the sides that the protocol resizes them to.

    Raises ValueError at the first label whose class differs.
    """
    train = in_memory(distilled)
    check_class_order(train.classes, dataset.classes)
    side = protocol.image_size if protocol.train_resize is None else protocol.train_resize
    test = replace(dataset.at(protocol.test_resize or protocol.image_size), whitening=train.whitening)
    return train.at(side) if side else train, test


def train_network(cell: Cell, state: Path | None = None) -> tuple[nn.Module, Score]:
    """The network of a cell as its training ends, and its score.

    With a `state` file an interrupted training goes on from there. Initialisation, dropout and the like draw
    from the global generators: seeded here, restored afterwards, as is what the GPU's products are made in.
    Raises FloatingPointError on a non-finite loss.
    """
    with torch.random.fork_rng(), tf32(cell.device, cell.protocol.tf32):
        torch.manual_seed(cell.seed)
        run = _Training(cell, state)
        return run.model, _trained(run)


def _trained(run: _Training) -> Score:
    """Train to the end, from the state on that is on disk if there is one."""
    cell, last = run.cell, run.plan.epochs
    run.load()
    epochs, label = range(run.done + 1, last + 1), f"{cell.network}, epoch"
    with resumable(lambda: run.kept):
        for epoch in progress(epochs, label, every=20, done=run.done, delay=20):
            total = run.epoch(epoch)
            if not torch.isfinite(total):
                where = f"the loss is {total.item()} in epoch {epoch} of {last}"
                raise FloatingPointError(f"{cell.network}: {where}; lower lr ({run.plan.lr}) in the protocol")
            if epoch in run.tests:
                run.test(epoch)
            run.done = epoch
            if epoch < last:
                run.save_in_time()
    return Score(
        **run.found,
        epochs=run.plan.epochs,
        seconds=run.seconds,
        precision=cell.precision,
        protocol=cell.protocol.name,
        network=cell.network,
        seed=cell.seed,
        reported=run.found[cell.protocol.reported],
    )


class _Training:
    """A network in training: its optimiser, its generator, and the accuracies found so far."""

    def __init__(self, cell: Cell, state: Path | None = None):
        self.cell, self.started, self.before = cell, time.monotonic(), 0.0
        self.state, self.pace = state, Pace(CHECKPOINT_SECONDS)
        protocol, classes = cell.protocol, len(cell.test.classes)
        ipc = max(1, round(len(cell.train) / len(cell.train.labels.unique())))
        self.plan = protocol.training(cell.network, ipc, classes)
        if protocol.own_lr and cell.train.lr is not None:
            self.plan = replace(self.plan, lr=cell.train.lr)
        made_for = max(classes, protocol.made_for or 0)
        model = make_network(cell.network, num_classes=made_for, image_size=protocol.image_size)
        if made_for != classes:
            keep_outputs(model, made_for, classes)
        model = model.to(cell.device)
        if torch.device(cell.device).type == "cuda":
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        self.generator = torch.Generator().manual_seed(cell.seed)
        # Nothing but running statistics notices a pass without gradient.
        self.double = protocol.double_pass and any(isinstance(m, _BatchNorm) for m in model.modules())
        self.optimizer = make_optimizer(model, protocol, lr=self.plan.lr, weight_decay=self.plan.weight_decay)
        self.tests = protocol.tests(self.plan.epochs)
        self.train, self.held = resident(cell.train, cell.device), resident(cell.test, cell.device)
        if protocol.labels == "own" and cell.train.targets is not None:
            # Shares of all classes in place of one class: cross-entropy takes either.
            self.train = replace(self.train, labels=cell.train.targets)
        self.seen = seen_by(cell.train, protocol, cell.device)
        self.changes = protocol.changes
        self.found: dict[str, Any] = {
            "last": 0.0,
            "last_top5": 0.0,
            "best": -1.0,
            "best_top5": 0.0,
            "best_epoch": 0,
        }
        self.done = self.saved = 0  # whole epochs
        self.within: Pass | None = None  # where it is in the next one, ...
        self.total = torch.zeros((), device=cell.device)  # ... and the sum of its losses so far

    @property
    def seconds(self) -> float:
        """Time spent, in this process and in those that were interrupted."""
        return self.before + time.monotonic() - self.started

    def epoch(self, epoch: int) -> Tensor:
        """Train one epoch, counted from 1; the sum of the batches' losses."""
        factor = schedule(self.cell.protocol, epoch - 1, self.plan.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr * factor
        self.model.train()
        if self.within is None:
            self.within, self.total = Pass.begin(self.generator), torch.zeros_like(self.total)
        for images, labels in self.within.batches(self.train, self.plan.batch_size, self.generator):
            loss = self.loss(images, labels.to(self.cell.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.total += loss.detach()
            self.save_in_time()
        self.within = None
        return self.total

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of one augmented and mixed batch."""
        protocol, teacher = self.cell.protocol, self.cell.teacher
        plain = augment(to_unit(images.to(self.cell.device)), protocol, self.generator)
        if self.changes is None:
            mixed, other, share = self.mix(plain, labels)
            inputs = self.seen(mixed)
        else:
            mixed = self.seen(plain)
            drawn = draw(self.changes, len(mixed), mixed.shape[-1], self.generator, per_sample=True)
            inputs, other, share = self.mix(apply(mixed, drawn), labels)
        with _autocast(self.cell.device, self.cell.precision):
            with torch.no_grad():
                if self.double:  # RDED's CutMix has written into the batch by then, its mixup has not
                    self.model(self.seen(plain) if protocol.mixup else inputs)
                if teacher is not None:
                    target = teacher.model(normalise(mixed, teacher.mean, teacher.std)).float()
            logits = self.model(inputs).float()
        if teacher is not None:
            if protocol.soft_loss == "mse+ce":
                return logit_loss(logits, target, labels, protocol.hard_weight)
            return soft_label_loss(logits, target, protocol.temperature)
        return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, other)

    def mix(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
        """A batch mixed with itself: (images, second labels, share of the first)."""
        protocol, generator = self.cell.protocol, self.generator
        if protocol.mixup:
            return mixup(pixels, labels, protocol.mixup, generator)
        if float(torch.rand((), generator=generator)) >= protocol.cutmix_probability:
            return pixels, labels, 1.0
        return cutmix(pixels, labels, protocol.cutmix, generator)

    def test(self, epoch: int) -> None:
        """Measure accuracies; the best top-1 is kept beside the last."""
        with _autocast(self.cell.device, self.cell.precision):
            self.found["last"], self.found["last_top5"] = accuracy(self.model, self.held, self.cell.protocol)
        if self.found["last"] > self.found["best"]:
            self.found |= {
                "best": self.found["last"],
                "best_top5": self.found["last_top5"],
                "best_epoch": epoch,
            }

    @property
    def kept(self) -> str:
        """What an interruption leaves, in words."""
        if self.state is None:
            return "nothing of an evaluation is kept without a folder"
        network, last = self.cell.network, self.plan.epochs
        return f"{self.saved} of {last} epochs of {network} are in {self.state.parent}"

    def load(self) -> None:
        """Go on where `save` left off, if it did."""
        if self.state is None or not self.state.is_file():
            return
        note = files.load_training(self.state, self.optimizer, generator=self.generator, model=self.model)
        self.before, self.found = note["seconds"], note["found"]
        self.done = self.saved = note["step"]
        self.within = Pass.of(note)
        self.total = torch.full_like(self.total, note.get("total", 0.0))
        _set_global_state(note["global"], self.cell.device)

    def save_in_time(self) -> None:
        """Save once in CHECKPOINT_SECONDS, within an epoch too, since one can take longer."""
        if self.state is None or not self.pace.due:
            return
        within = self.within.note | {"total": self.total.item()} if self.within else {}
        note = {"seconds": self.seconds, "found": self.found, "global": _global_state(self.cell.device)}
        with self.pace.saving():
            files.save_training(
                self.state,
                self.done,
                self.optimizer,
                generator=self.generator,
                note=note | within,
                model=self.model,
            )
        self.saved = self.done


def _finished(folder: Path, settings: dict[str, Any]) -> Score | None:
    """The score of a finished run of these settings; refuses a folder of others, notes a new one's."""
    keys.claim(folder / "settings.json", "evaluation", settings, "an evaluation")
    score = folder / "score.json"
    try:
        return Score(**json.loads(score.read_text())) if score.is_file() else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{score} is damaged ({error}); delete its folder and run again") from error


def _global_state(device: str) -> dict[str, list[int]]:
    """The global generators' states, as lists of bytes."""
    found = {"cpu": torch.get_rng_state().tolist()}
    return (
        found | {"cuda": torch.cuda.get_rng_state(device).tolist()}
        if torch.device(device).type == "cuda"
        else found
    )


def _set_global_state(state: dict[str, list[int]], device: str) -> None:
    torch.set_rng_state(torch.tensor(state["cpu"], dtype=torch.uint8))
    if "cuda" in state:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)


def _precision(device: str, protocol: Protocol, mixed: bool | None) -> str:
    """What products are made in there: see `Score.precision`."""
    if (protocol.mixed_precision and has_bfloat16(device)) if mixed is None else mixed:
        return "bfloat16"
    has_tf32 = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "tf32" if has_tf32 and protocol.tf32 != "off" else "float32"


def _autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def fingerprint(data: ImageData) -> str:
    """Twelve hex digits of a set's pixels and labels, by which a score is known to belong to it."""
    digest = hashlib.sha256(data.labels.numpy().tobytes())
    for images, _ in data.batches(500):
        digest.update(images.numpy().tobytes())
    for learned in (data.targets, None if data.whitening is None else data.whitening.matrix):
        if learned is not None:
            digest.update(learned.numpy().tobytes())
    if data.lr is not None:
        digest.update(repr(data.lr).encode())
    return digest.hexdigest()[:12]


def resident(data: ImageData, device: str) -> ImageData:
    """`data` with its pixels on a GPU where they take at most a quarter of its free memory; else as it is."""
    if (
        torch.device(device).type != "cuda"
        or 3 * data.image_size**2 * len(data) > torch.cuda.mem_get_info(device)[0] // 4
    ):
        return data
    pixels = torch.cat([images.to(device) for images, _ in data.batches(500)])
    return replace(data, fetch=lambda indices: pixels[indices.to(device)], slow=False)


def make_optimizer(
    model: nn.Module, protocol: Protocol, *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW or SGD, with decay on every parameter or on weight matrices and kernels alone."""
    matrices = [
        p
        for name, p in model.named_parameters()
        if protocol.decay == "all" or (p.ndim > 1 and "weight" in name)
    ]
    known = {id(p) for p in matrices}
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if protocol.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=protocol.betas, weight_decay=weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=protocol.momentum, weight_decay=weight_decay)


def schedule(protocol: Protocol, epoch: int, epochs: int) -> float:
    """The learning rate's factor in an epoch from 0: falls at milestones, or by a cosine to 0 or one half."""
    if protocol.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if protocol.schedule == "half-cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs / 2))
    return protocol.lr_decay ** sum(epoch >= int(epochs * share) for share in protocol.milestones)


def soft_label_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of softmaxes at a temperature, batch mean, without a factor T^2 (RDED)."""
    return F.kl_div(
        (logits / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="batchmean"
    )


def logit_loss(logits: Tensor, teacher: Tensor, labels: Tensor, hard_weight: float) -> Tensor:
    """Mean squared error of the logits (B, C), plus `hard_weight` times the cross-entropy to labels (B,).

    G-VBSM's: the teacher's logits are of the mixed images, `labels` of the images before they were mixed.
    """
    return F.mse_loss(logits, teacher) + hard_weight * F.cross_entropy(logits, labels)
