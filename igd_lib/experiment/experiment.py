"""An experiment: data, models and settings at one scale, and its methods' sets, kept in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor

from igd_lib.config import STANDARD, TABLE_12_IPCS, Fidelity, nearest_ipc
from igd_lib.data.datasets import DATASETS, DataSpec
from igd_lib.data.images import ImageData, load, missing
from igd_lib.distillation import Wanted, fill
from igd_lib.experiment.methods import SAMPLED, Method
from igd_lib.experiment.models import Models, PaperModels, StandInModels
from igd_lib.experiment.parameters import SCALES
from igd_lib.experiment.plan import missing_for_paper
from igd_lib.experiment.registry import BASELINES, GUIDES
from igd_lib.experiment.scales import STAND_INS, TEST_IMAGES, Scale, paper_scale, small_scale, smoke_scale
from igd_lib.experiment.surrogates import Surrogates
from igd_lib.protocols import Protocol
from igd_lib.sampling import Sampling
from igd_lib.sets.store import DistilledSet
from igd_lib.surrogate import Checkpoints
from igd_lib.teachers import Teacher
from igd_lib.tools import cluster, keys
from igd_lib.tools.machine import cache_dir, ray_cluster, reuse_memory
from igd_lib.tools.progress import progress
from igd_lib.tools.version import VERSION

Images = ImageData | DistilledSet
_reported: set[str] = set()  # sets of another version that have been named in this process


@dataclass(frozen=True)
class Sets:
    """The sets of several methods and generation seeds at one IPC, by (method, seed)."""

    ipc: int
    cells: dict[tuple[Method, int], Images]

    def __getitem__(self, cell: tuple[Method, int]) -> Images:
        return self.cells[cell]

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[tuple[Method, int, Images]]:
        return iter((method, seed, images) for (method, seed), images in self.cells.items())

    def distilled(self, method: Method, seed: int) -> DistilledSet:
        """A sampled set. Raises TypeError for a method that is not sampled."""
        found = self.cells[method, seed]
        if not isinstance(found, DistilledSet):
            raise TypeError(f"{method.label} is not sampled: it has no latents")
        return found

    def sampled(self) -> Iterator[tuple[Method, int, DistilledSet]]:
        """The sampled sets; raises TypeError at the first that is not."""
        return ((method, seed, self.distilled(method, seed)) for method, seed in self.cells)

    @property
    def methods(self) -> list[Method]:
        """Each method once, in order."""
        return list(dict.fromkeys(method for method, _ in self.cells))

    def of_seed(self, seed: int) -> dict[Method, Images]:
        """Every method's set of one generation seed."""
        return {method: images for (method, own), images in self.cells.items() if own == seed}


@dataclass(frozen=True)
class Experiment:
    """Data, models and settings at one scale."""

    artefact: str  # the notebook that its rows are of
    scale: Scale
    models: Models
    surrogates: Surrogates
    train: ImageData
    test: ImageData
    label_ids: tuple[int, ...]  # the diffusion model's, in label order
    spec: DataSpec
    banner: str  # Markdown, shown first

    @property
    def device(self) -> str:
        return str(self.models.pipe._execution_device)

    @property
    def candidates(self) -> int:
        return self.scale.candidates

    @property
    def latent_values(self) -> int:
        """How many values a latent has: gamma goes with it."""
        config = self.models.pipe.transformer.config
        return config.in_channels * config.sample_size**2

    def title(self, ipc: int, *networks: str) -> str:
        """What figures of it are called: "fashion-mnist, IPC 10, convnet3, small"."""
        return ", ".join([self.train.name, f"IPC {ipc}", *networks, self.scale.name])

    def describe(self, *more: str) -> str:
        """Its settings in a line."""
        scale = self.scale
        parts = (str(scale.guidance), f"{scale.num_steps} steps", f"protocol {scale.protocol.name}", *more)
        return "; ".join(parts)

    def networks(self, names: str, *, paper: str, small: str = "convnet3") -> list[str]:
        """From comma-separated `names`; "auto": the paper's at its scale, `small` on a stand-in."""
        chosen = (paper if self.scale.papers else small) if names == "auto" else names
        return [name.strip() for name in chosen.split(",")]

    # --- what guides, and what gives soft labels

    @cached_property
    def retained(self) -> tuple[Checkpoints, Callable[[int], Tensor]]:
        """The checkpoints that the scale's fidelity asks for, and their class gradients (E, P) by label."""
        return self.surrogates.retained()

    @property
    def checkpoints(self) -> Checkpoints:
        """The retained ones."""
        return self.retained[0]

    def any_teacher(self) -> Teacher:
        """What gives soft labels here, whether or not the protocol has them."""
        return self.models.teacher(self.train.classes, self.label_ids)

    def teacher(self) -> Teacher | None:
        """What gives soft labels, None where the protocol's labels are hard."""
        return None if self.scale.protocol.labels == "hard" else self.any_teacher()

    # --- sets

    def sets(self, methods: Sequence[Method], ipc: int, seeds: int) -> Sets:
        """Every method's set for generation seeds 0 ... seeds - 1; the noise is the same for every method."""
        cells = [(method, seed) for method in methods for seed in range(seeds)]
        return Sets(ipc, {cell: self.set(*cell, ipc) for cell in progress(cells, "sets", every=20)})

    def set(self, method: Method, seed: int, ipc: int) -> Images:
        """A method's images for one generation seed: sampled, resumed, or made by another baseline."""
        if method.family != SAMPLED:
            return BASELINES[method.family].make(self, ipc, seed)
        every = list(range(len(self.train.classes)))
        wanted = Wanted(self.sampling(method), self.train, ipc, seed, every, list(self.label_ids))
        folder = cache_dir() / "set" / f"{keys.key('set', wanted.settings)}-seed{seed}"
        # Notebooks that run side by side share sets: one waits for the other.
        found = fill(wanted, folder, wait=True, ray=ray_cluster())
        _report_version(found)
        return found

    def sampling(self, method: Method) -> Sampling:
        """How a method's images are sampled."""
        scale, fidelity = self.scale, method.fidelity or self.scale.fidelity
        checkpoints = gradients = None
        if method.influenced:
            checkpoints, gradients = self._guiding(method, fidelity)
        guidance = method.guidance and method.guidance.for_latents(self.latent_values)
        return Sampling(
            pipe=self.models.pipe if method.backbone == "dit" else self.models.minimax,
            guidance=guidance,
            others=[GUIDES[name].make(self) for name in method.guides],
            checkpoints=checkpoints,
            gradients=gradients,
            cfg_scale=method.cfg_scale,
            num_steps=method.num_steps or scale.num_steps,
            fidelity=fidelity,
            shortcuts=method.shortcuts,
            guidance_decoder=self.models.tiny_decoder if method.tiny_decoder else None,
        )

    def _guiding(self, method: Method, fidelity: Fidelity) -> tuple[Checkpoints, Callable[[int], Tensor]]:
        """The checkpoints that guide a method, and their class gradients."""
        surrogates = self.surrogates.of(fidelity)
        plain = method.selection is None and method.surrogate is None
        if plain and surrogates.scale.guiding == self.scale.guiding:
            return self.retained
        return surrogates.retained(method.selection.keep if method.selection else None, method.surrogate)

    def with_protocol(self, protocol: Protocol) -> Experiment:
        """The same, evaluated in another way."""
        return replace(self, scale=replace(self.scale, protocol=protocol))

    def on_fastai(self) -> list[Experiment]:
        """The same tested on fastai's images of these classes, another division of the same ones.

        Empty where fastai has none of this data set, or its folder is not there.
        """
        name = f"fastai-{self.spec.name}2"
        if name not in DATASETS or missing(name):
            return []
        ids = self.spec.label_ids
        spec = replace(DATASETS[name], classes=self.spec.classes, label_ids=ids, titles=self.spec.titles)
        return [replace(self, test=load(spec, "test"))]

    def on_validation(self) -> Experiment:
        """The same with the training data's validation split as test images: for choosing settings.

        Where the data set holds none out, the last tenth of each class's training images, which the surrogate
        has seen too.
        """
        held = load(replace(self.spec, holdout=self.spec.holdout or 0.1), "validation")
        count = len(self.test) // len(self.test.classes)
        return replace(self, test=held if self.scale.papers else held.first(count))


def _report_version(found: DistilledSet) -> None:
    """Say once that a set was made by another version of the package."""
    made = found.manifest.get("versions", {}).get("igd_lib")
    if made != VERSION and str(found.path) not in _reported:
        _reported.add(str(found.path))
        print(f"{found.path} was made by igd_lib {made} ({found.revision}), this is {VERSION}", flush=True)


# --- making one


def prepare(
    artefact: str,
    dataset: str,
    scale: str = "auto",
    *,
    fidelity: Fidelity = STANDARD,
    ipc: int = 10,
    labels: str = "hard",
    stand_in: str = "fashion-mnist",
    threshold: float = 0.7,
) -> Experiment:
    """The experiment of a notebook for `dataset` at `scale`, evaluated with "hard" or "soft" labels.

    "auto" is "paper" where the paper's data and models are on this machine, else "small" on
    `stand_in`. "paper" raises FileNotFoundError naming every missing piece and how to get it.
    """
    disable_progress_bar()  # of loading models: not worth a line in a notebook
    if not torch.cuda.is_available():
        reuse_memory()
    if scale not in SCALES:
        raise ValueError(f"scale is one of {', '.join(SCALES)}, got {scale!r}")
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(sorted(DATASETS))}")
    lacking = missing_for_paper(dataset, fidelity)
    if scale == "paper" and lacking:
        raise FileNotFoundError("scale='paper' lacks:\n" + "\n".join(f"- {line}" for line in lacking))
    if where := ray_cluster():  # once, for all its sets
        cluster.connect(where)
    if scale == "paper" or (scale == "auto" and not lacking):
        made = _paper(artefact, dataset, fidelity, ipc, labels)
    else:
        make = smoke_scale if scale == "smoke" else small_scale
        made = _on_stand_in(artefact, stand_in, make(dataset, stand_in, fidelity=fidelity, labels=labels))
    return _with_threshold(made, threshold)


def _with_threshold(made: Experiment, threshold: float) -> Experiment:
    if threshold == made.scale.threshold:
        return made
    surrogates = made.surrogates.with_threshold(threshold)
    return replace(made, scale=surrogates.scale, surrogates=surrogates)


def _paper(artefact: str, dataset: str, fidelity: Fidelity, ipc: int, labels: str) -> Experiment:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = PaperModels(dataset, fidelity, device)
    train, test, spec = load(dataset, "train"), load(dataset, "test"), DATASETS[dataset]
    models.pipe.check_images_of(train.name, train.image_size)  # before a surrogate is trained for hours
    scale = paper_scale(
        dataset,
        fidelity=fidelity,
        ipc=ipc,
        labels=labels,
        num_classes=len(train.classes),
        image_size=train.image_size,
    )
    source = "Table 12" if scale.from_table_12 else "not from Table 12, which has none for it"
    if scale.from_table_12 and ipc not in TABLE_12_IPCS:
        source += f" at IPC {nearest_ipc(ipc)}, for it has no IPC {ipc}"
    banner = (
        f"**Scale: paper.** {dataset}, {models.dit} (CC-BY-NC 4.0) and {fidelity.vae}; k and gamma {source}."
    )
    if models.minimax_missing:
        banner += f" Without the rows on the Minimax backbone: {models.minimax_missing}."
    ids = spec.label_ids or tuple(range(len(train.classes)))
    surrogates = Surrogates(scale, train, str(models.pipe._execution_device))
    return Experiment(artefact, scale, models, surrogates, train, test, ids, spec, banner)


def _on_stand_in(artefact: str, stand_in: str, scale: Scale) -> Experiment:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = DATASETS[STAND_INS[stand_in].dataset]
    train, test = load(spec, "train"), load(spec, "test").first(TEST_IMAGES[stand_in])
    if not scale.figures_mean_something:
        test = test.per_class(20, seed=0)
    ids = spec.label_ids or tuple(range(len(train.classes)))
    surrogates = Surrogates(scale, train, str(torch.device(device)))
    models = StandInModels(stand_in, train, ids, surrogates, scale.minimax, device)
    banner = f"**Scale: {scale.name}.** "
    if scale.figures_mean_something:
        banner += f"The embedded stand-in: real {spec.name} images, a tiny DiT and autoencoder."
    else:
        banner += "A seconds-long run of the stand-in that only shows that everything works; "
        banner += "its numbers mean nothing."
    if scale.dataset != spec.name:
        banner += (
            f" These are not {scale.dataset} results: the paper's data or models are not on this machine."
        )
    return Experiment(artefact, scale, models, surrogates, train, test, ids, spec, banner)
