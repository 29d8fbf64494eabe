"""`igd plan`: what a notebook would do at the paper's scale, what it needs, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import pandas as pd
import torch

from igd_lib import memory
from igd_lib.baselines.coresets import NAMES
from igd_lib.config import STANDARD, fixed_checkpoints
from igd_lib.data.datasets import DATASETS, IMAGENET_CLASSES
from igd_lib.experiment import comparisons, costs
from igd_lib.experiment.artefacts import ARTEFACTS, Artefact, artefact
from igd_lib.experiment.methods import Method, chosen
from igd_lib.experiment.outline import Outline
from igd_lib.experiment.pieces import (
    Piece,
    minimax_problems,
    own_teacher_file,
    pieces,
    stable_diffusion,
)
from igd_lib.experiment.run import AUTO, OPTIONS, SHARED, Options, Run, split_names
from igd_lib.experiment.scales import Scale, paper_scale
from igd_lib.models.shapes import dit_xl_2, sd_vae
from igd_lib.protocols import PROTOCOLS, labellings
from igd_lib.sampling import Precision
from igd_lib.tools import files
from igd_lib.tools.keys import settings_hash
from igd_lib.tools.machine import cache_dir, free_disk, ram
from igd_lib.tools.version import VERSION

GIB = 2**30
AT_ONCE = 50  # guided images side by side at most
# Where the machine to plan for is another one: a third of an RTX 4090's bfloat16 peak, and what small
# networks reach of it. TFLOP/s.
ASSUMED = (50.0, 20.0)


@dataclass(frozen=True)
class Machine:
    """What a plan is for."""

    name: str
    memory: float  # bytes free on its GPU
    sampling: float  # operations a second of the diffusion model
    training: float  # ... of small networks


@dataclass(frozen=True)
class _Planned:
    """An `Outline` before anything is loaded."""

    scale: Scale
    minimax_missing: str
    renderer_missing: str
    has_fixed_checkpoints: bool
    number_of_classes: int

    def choices(self, thresholds: Sequence[float]) -> pd.DataFrame:
        """As many different choices as there may be; which, Algorithm 2 will say."""
        kinds = ("mean", "per_class")
        rows: list[tuple[object, ...]] = [
            (kind, threshold, [0, number + 1], [], [0, number + 11])
            for kind in kinds
            for number, threshold in enumerate(thresholds)
        ]
        return pd.DataFrame(rows, columns=["similarity", "threshold", "kept", "epochs", "regular"])


def _grid(outline: Outline, options: Options) -> list[Method]:
    return comparisons.grid(outline, *outline.scale.grid_values(options.ks, options.gammas))


def _sensitivity(outline: Outline, options: Options) -> list[Method]:
    ks = "0,10,30,100" if options.ks == AUTO else options.ks
    gammas = "0,120,480,960" if options.gammas == AUTO else options.gammas
    return comparisons.sensitivity(outline, *outline.scale.grid_values(ks, gammas), options.backbone)


def _early_stage(outline: Outline, options: Options) -> list[Method]:
    ks = "10,30,100" if options.ks == AUTO else options.ks
    return comparisons.early_stage(outline, outline.scale.grid_values(ks, AUTO)[0])


def _paper_vs_code(outline: Outline, options: Options) -> list[Method]:
    cfgs = comparisons.CFGS if options.cfgs == AUTO else options.cfgs
    rows = [
        *comparisons.by_cfg(outline, comparisons.cfg_scales(cfgs), options.backbone),
        *comparisons.flipped_unguided(outline, 10, options.backbone),
        *comparisons.flipped(outline, 10, options.backbone),
        *comparisons.disputed(outline, options.backbone),
    ]
    sampled: dict[Method, Method] = {}
    for row in rows:  # "DiT, cfg 4" and "DiT" are one set
        sampled.setdefault(replace(row, varies=()), row)
    return list(sampled.values())


def _architectures(outline: Outline, options: Options) -> list[Method]:
    names = artefact("04").networks if options.surrogates == AUTO else options.surrogates
    return comparisons.surrogates(outline, split_names(names))


def _baselines(outline: Outline, _: Options) -> list[Method]:
    return comparisons.baselines(outline)


ROWS: Mapping[str, Callable[[Outline, Options], list[Method]]] = {
    "01": lambda outline, options: comparisons.table(outline, 1),
    "02": lambda outline, options: [],
    "03": lambda outline, options: comparisons.table(outline, 2),
    "04": _architectures,
    "05": lambda outline, options: comparisons.ablation(outline),
    "06": lambda outline, options: comparisons.selections(outline, comparisons.THRESHOLDS, options.backbone),
    "07": lambda outline, options: comparisons.table(outline, 7),
    "08": lambda outline, options: comparisons.table(outline, 8),
    "09": lambda outline, options: comparisons.table(outline, 9),
    "10": lambda outline, options: comparisons.solvers(outline),
    "12": _grid,
    "13": _paper_vs_code,
    "14": lambda outline, options: comparisons.shortcuts(outline),
    "15": lambda outline, options: comparisons.guides(outline),
    "16": lambda outline, options: comparisons.coresets(outline),
    "22": _early_stage,
    "24": lambda outline, options: comparisons.sampled(outline),
    "25": lambda outline, options: list(comparisons.plain_and_guided(outline, "dit")),
    "26": _sensitivity,
    "27": lambda outline, options: list(comparisons.plain_and_guided(outline, options.backbone)),
}  # others: `comparisons.baselines`
WITH_LABELLINGS = ("16_coresets",)  # whose sets train networks with labels of every kind


@dataclass(frozen=True)
class Plan:
    """A notebook at the paper's scale on a machine."""

    name: str
    run: Run
    machine: Machine
    pieces: Sequence[Piece]
    work: costs.Work
    footprint: memory.Footprint  # of a guided step, in bytes

    @cached_property
    def stages(self) -> list[costs.Stage]:
        return costs.stages(self.work)

    @property
    def hours(self) -> float:
        """Of one GPU, in all."""
        return sum(self._hours(stage) for stage in self.stages)

    def _hours(self, stage: costs.Stage) -> float:
        speed = self.machine.sampling if stage.samples else self.machine.training
        return stage.operations / speed / 3600

    @property
    def batch(self) -> int:
        """Images side by side in a guided step; 0 where not even one fits."""
        room = int(memory.HEADROOM * self.machine.memory)
        return self.run.batch or min(AT_ONCE, self.footprint.batch(room))

    @property
    def ram(self) -> float:
        """Bytes: the largest set in memory while networks are trained on it, beside torch and its buffers."""
        return 3 * GIB + 1.5 * self.work.set_images * 3 * self.work.image_size**2

    @property
    def disk(self) -> float:
        """Bytes of sets, checkpoints and class gradients."""
        work = self.work
        each = costs.PNG * 3 * work.image_size**2 + costs.LATENT
        sets = len(work.sampled) * work.seeds * work.set_images * each
        parameters = costs.parameters_of(work.scale.surrogate, work.image_size, work.classes)
        checkpoints = (work.scale.training.epochs + 1 + costs.CHECKPOINTS * work.classes) * parameters * 4.0
        return sets + len(work.surrogates) * checkpoints

    @property
    def files(self) -> int:
        return 2 * len(self.work.sampled) * self.work.seeds * self.work.set_images

    def record(self) -> dict[str, object]:
        """What a script may want of it; bytes, and hours of one GPU."""
        return {
            "notebook": self.name,
            "dataset": self.work.scale.dataset,
            "ipc": self.work.ipc,
            "seeds": self.work.seeds,
            "rows": [row.label for row in self.work.rows],
            "pieces": [asdict(piece) | {"blocks": piece.blocks} for piece in self.pieces],
            "stages": [{"stage": one.name, "hours": self._hours(one)} for one in self.stages],
            "hours": self.hours,
            "machine": asdict(self.machine),
            "images_side_by_side": self.batch,
            "memory": self.ram,
            "disk": self.disk,
            "files": self.files,
        }

    @property
    def text(self) -> str:
        """All of it as Markdown."""
        return "\n\n".join([self._title, self._needed, self._stages, self._machine, self._reused])

    @property
    def _title(self) -> str:
        work = self.work
        rows = "; ".join(row.label for row in work.rows)
        what = f"{len(work.rows)} rows ({rows}), {work.seeds} seeds" if work.rows else "the surrogate alone"
        return f"**Plan of `{self.name}`** at IPC {work.ipc}, scale paper: {what}."

    @property
    def _needed(self) -> str:
        lines = [
            f"| {piece.name} | {piece.where or 'not found'} | {_state(piece)} |" for piece in self.pieces
        ]
        return "\n".join(["| needed | where | |", "|---|---|---|", *lines])

    @property
    def _stages(self) -> str:
        lines = [
            f"| {one.name} | {one.what} | {figure(one.operations / 1e15)} | {figure(self._hours(one))} |"
            for one in self.stages
        ]
        head = ["| stage | work | PFLOP | GPU-hours |", "|---|---|---|---|"]
        return "\n".join([*head, *lines, f"| **in all** | | | **{figure(self.hours)}** |"])

    @property
    def _machine(self) -> str:
        own, free = self.machine, free_disk(cache_dir())
        batch = f"{self.batch} images side by side" if self.batch else "not even one image fits"
        sampling, training = own.sampling / 1e12, own.training / 1e12
        step = f"{self.footprint.fixed / GIB:.1f} GiB and {self.footprint.image / GIB:.2f} an image"
        return "\n".join(
            [
                f"- {own.name}: {sampling:.3g} TFLOP/s of sampling, {training:.3g} of training",
                f"- GPU memory of a guided step in {self.run.precision}: {step}; "
                f"{own.memory / GIB:.0f} GiB free: {batch}",
                f"- memory of the machine: about {self.ram / GIB:.0f} GiB ({ram() / GIB:.0f} there)",
                f"- disk: about {self.disk / GIB:,.1f} GiB in {self.files:,} files ({free / GIB:,.0f} free)",
            ]
        )

    @property
    def _reused(self) -> str:
        """What lies in the cache of this data set and IPC."""
        done, begun = sets_on_disk(self.work.scale.dataset, self.work.ipc)
        return (
            f"On disk: {done} finished and {begun} unfinished sets of {self.work.scale.dataset} at IPC "
            f"{self.work.ipc}; those of the same settings are read or gone on with."
        )


def _state(piece: Piece) -> str:
    """Whether a piece is usable, and what to do where it is not."""
    if piece.is_usable:
        return "usable"
    without = " (without it, its rows are left out)" if piece.kind == "row" else ""
    lines = (line.removeprefix(f"{piece.name}: ").replace("|", "/") for line in piece.problems)
    return f"**{'; '.join(lines)}**{without}"


def figure(value: float) -> str:
    """A number of two digits or more: 0.23, 77, 1,400."""
    if value >= 100:
        return f"{float(f'{value:.2g}'):,.0f}"
    return f"{value:.2g}"


def of(name: str, dataset: str, run: Run, machine: Machine | None = None) -> Plan:
    """The plan of a notebook for a data set; machine: None for this one.

    Raises ValueError for a notebook without a paper scale.
    """
    about, spec = artefact(name), DATASETS[dataset]
    if not about.paper:
        raise ValueError(f"{name} has no paper scale: it runs on a stand-in")
    scale = paper_scale(
        dataset,
        fidelity=STANDARD,
        ipc=run.ipc,
        labels=about.labels,
        num_classes=len(spec.classes),
        image_size=spec.image_size,
    )
    if run.protocol != AUTO:
        scale = replace(scale, protocol=PROTOCOLS[run.protocol])
    work = _work(name, about, scale, run)
    surrogate = memory.Surrogate(scale.surrogate, len(spec.classes), costs.CHECKPOINTS)
    footprint = guided_step(surrogate, run.precision)
    return Plan(name, run, machine or this_machine(run.precision), pieces(dataset, about), work, footprint)


def guided_step(surrogate: memory.Surrogate, precision: Precision) -> memory.Footprint:
    """Of DiT-XL/2 and its autoencoder, by configuration: half a minute, then read from the cache."""
    about = asdict(surrogate) | {"precision": precision, "versions": [VERSION, torch.__version__]}
    path = cache_dir() / "footprints" / f"{settings_hash(about)}.json"
    if not path.is_file():
        files.write(path, json.dumps(about | {"found": asdict(_dry_run(surrogate, precision))}) + "\n")
    return memory.Footprint(**json.loads(path.read_text())["found"])


def _dry_run(surrogate: memory.Surrogate, precision: Precision) -> memory.Footprint:
    with torch.device("meta"):
        models = memory.Models(dict(dit_xl_2().config), dict(sd_vae().config))
    return memory.guided_step(models, surrogate, precision=precision)


def asked(notebook: str, given: Mapping[str, str]) -> tuple[str, str, Run]:
    """A notebook's name, data set and run, from its name or number and parameters as a command line has them.

    Raises ValueError for an unknown notebook, data set or parameter.
    """
    names = [known for known in ARTEFACTS if known == notebook or known.split("_")[0] == notebook]
    if not names:
        raise ValueError(f"no notebook {notebook!r}; there are {', '.join(ARTEFACTS)}")
    known, without_cost = (*SHARED, *OPTIONS, "dataset"), ("scale", "save_to")
    if unknown := [name for name in given if name not in (*known, *without_cost)]:
        raise ValueError(f"unknown parameter {unknown[0]!r}; known: {', '.join(known)}")
    numbers = {name: _whole(name, given[name]) for name in ("ipc", "batch") if name in given}
    dataset = given.get("dataset", ARTEFACTS[names[0]].dataset)
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(sorted(DATASETS))}")
    return names[0], dataset, Run.of({**given, **numbers})


def _whole(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"{name} is a whole number, got {text!r}")
    return int(text)


def _work(name: str, about: Artefact, scale: Scale, run: Run) -> costs.Work:
    spec = DATASETS[scale.dataset]
    fixed = fixed_checkpoints(scale.dataset, scale.surrogate) is not None
    missing = "; ".join(minimax_problems(scale.dataset))
    outline = _Planned(scale, missing, "; ".join(stable_diffusion().problems), fixed, len(spec.classes))
    rows = chosen(ROWS.get(name[:2], _baselines)(outline, run.options), run.methods)
    networks = split_names(about.networks if run.networks == AUTO else run.networks)
    protocols = tuple(labellings(scale.protocol).values()) if name in WITH_LABELLINGS else ()
    validated = [row for row in rows if row.family in NAMES] if protocols else []
    images = tuple(size or 1000 * len(spec.classes) for size in spec.sizes)
    return costs.Work(
        scale,
        rows,
        run.ipc,
        len(run.generation_seeds),
        networks if rows else [],
        len(spec.classes),
        (images[0], images[1]),
        spec.image_size,
        spec.classes == IMAGENET_CLASSES or own_teacher_file(scale.dataset) is not None,
        protocols,
        validated,
    )


def this_machine(precision: str) -> Machine:
    """The machine that this runs on, its speed timed in a few seconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "this machine's CPU"
    return Machine(
        f"{name}, timed just now",
        memory.free(device),
        costs.sampling_speed(device, precision),
        costs.training_speed(device),
    )


def other_machine(gib: float, tflops: Sequence[float] = ASSUMED) -> Machine:
    """A card with so many GiB; TFLOP/s of sampling and training as assumed, or as given."""
    sampling, training = (value * 1e12 for value in tflops)
    return Machine(f"a card with {gib:g} GiB (speed assumed)", 0.95 * gib * GIB, sampling, training)


def sets_on_disk(dataset: str, ipc: int) -> tuple[int, int]:
    """How many finished and unfinished sets of a data set and IPC are in the cache."""
    done = begun = 0
    for path in (cache_dir() / "set").glob("*/manifest.json"):
        try:
            manifest = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if (manifest.get("dataset"), manifest.get("ipc")) != (dataset, ipc):
            continue
        wanted = ipc * len(manifest.get("selected", ()))
        there = sum(1 for _ in (path.parent / "latents").glob("*/*.safetensors"))
        done, begun = done + (there >= wanted), begun + (there < wanted)
    return done, begun
