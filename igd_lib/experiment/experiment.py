"""An experiment: data, models and settings at one scale, and its methods' sets, kept in the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor

from igd_lib.baselines.img2img import Backbone
from igd_lib.baselines.minimax import ShardedSampling, fill_by_shard
from igd_lib.config import STANDARD, TABLE_12_IPCS, Fidelity, nearest_ipc
from igd_lib.data.datasets import DATASETS, DataSpec
from igd_lib.data.images import ImageData, load, missing
from igd_lib.data.resizing import needed
from igd_lib.distillation import Wanted, chunked
from igd_lib.experiment import plan
from igd_lib.experiment.artefacts import Artefact
from igd_lib.experiment.artefacts import artefact as known
from igd_lib.experiment.methods import SAMPLED, Method, chosen
from igd_lib.experiment.models import Data, Models, PaperModels, RehearsalModels, StandInModels
from igd_lib.experiment.parameters import SCALES
from igd_lib.experiment.pieces import (
    STAND_INS_ALONE,
    Piece,
    has_paper_scale,
    missing_for_paper,
    pieces,
    replaced,
)
from igd_lib.experiment.registry import BASELINES, GUIDES
from igd_lib.experiment.run import AUTO, Run, split_names
from igd_lib.experiment.scales import (
    STAND_INS,
    Scale,
    paper_scale,
    rehearsal_scale,
    small_scale,
    smoke_scale,
    stand_in_of,
)
from igd_lib.experiment.surrogates import Surrogates
from igd_lib.models import standin
from igd_lib.models.dit import class_ids
from igd_lib.protocols import PROTOCOLS, Protocol
from igd_lib.sampling import Sampling
from igd_lib.sets.store import DistilledSet
from igd_lib.surrogate import Checkpoints
from igd_lib.teachers import Teacher
from igd_lib.tools import cluster, keys
from igd_lib.tools.machine import ray_cluster, reuse_memory, work_dir, work_in
from igd_lib.tools.progress import progress
from igd_lib.tools.version import VERSION

Images = ImageData | DistilledSet
TOGETHER = 50  # classes whose gradients are held at a time
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

    def of_families(self, families: Collection[str]) -> Sets:
        """The sets of some families of methods alone."""
        found = {cell: images for cell, images in self.cells.items() if cell[0].family in families}
        return Sets(self.ipc, found)

    @property
    def methods(self) -> list[Method]:
        """Each method once, in order."""
        return list(dict.fromkeys(method for method, _ in self.cells))

    @property
    def shown_seed(self) -> int:
        """The generation seed whose images are shown: 0 where it is there, else the first."""
        seeds = [seed for _, seed in self.cells]
        return 0 if 0 in seeds else seeds[0]

    def of_seed(self, seed: int) -> dict[Method, Images]:
        """Every method's set of one generation seed."""
        return {method: images for (method, own), images in self.cells.items() if own == seed}


@dataclass(frozen=True)
class Experiment:
    """Data, models and settings at one scale."""

    artefact: str  # the notebook that its rows are of
    run: Run
    scale: Scale
    models: Models
    surrogates: Surrogates
    train: ImageData
    test: ImageData
    label_ids: tuple[int, ...]  # the diffusion model's, in label order
    spec: DataSpec
    banner: str  # Markdown, shown first
    ending: str = ""  # Markdown, shown last

    @property
    def device(self) -> str:
        return str(self.models.pipe._execution_device)

    @property
    def latent_values(self) -> int:
        """How many values a latent has: gamma goes with it."""
        config = self.models.pipe.transformer.config
        return config.in_channels * config.sample_size**2

    @property
    def ipc(self) -> int:
        """Images a class."""
        return self.scale.limit(self.run)[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The generation seeds."""
        return self.scale.limit(self.run)[1]

    @property
    def networks(self) -> list[str]:
        """What is trained on every set."""
        return self.names(self.run.networks)

    @property
    def network(self) -> str:
        """The network, where the notebook trains one. Raises ValueError for several."""
        if len(self.networks) != 1:
            raise ValueError(f"{self.artefact} trains one network, got {', '.join(self.networks)}")
        return self.networks[0]

    def names(self, text: str) -> list[str]:
        """Comma-separated names of networks; "auto": those of the notebook at this scale."""
        own = known(self.artefact)
        usual = own.networks if self.scale.papers else own.small_networks
        return split_names(usual if text == AUTO else text)

    def title(self, *networks: str) -> str:
        """What figures of it are called: "fashion-mnist, IPC 10, convnet3, small"."""
        return ", ".join([self.train.name, f"IPC {self.ipc}", *networks, self.scale.name])

    def describe(self, *more: str) -> str:
        """Its settings in a line."""
        scale, networks = self.scale, self.networks
        parts = [str(scale.guidance), f"{scale.num_steps} steps", f"protocol {scale.protocol.name}"]
        parts += [f"networks {', '.join(networks)}"] if networks else []
        parts += [f"precision {self.run.precision}"] if self.run.precision != "float32" else []
        return "; ".join([*parts, *more])

    # --- an `Outline`

    @property
    def minimax_missing(self) -> str:
        return self.models.minimax_missing

    @property
    def renderer_missing(self) -> str:
        return self.models.renderer_missing

    @property
    def has_fixed_checkpoints(self) -> bool:
        return self.surrogates.fixed is not None

    @property
    def number_of_classes(self) -> int:
        return len(self.train.classes)

    def choices(self, thresholds: Sequence[float]) -> pd.DataFrame:
        return self.surrogates.choices(thresholds)

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
        """What gives a protocol's soft labels, None where it asks for no teacher."""
        return self.any_teacher() if self.scale.protocol.labels == "soft" else None

    @cached_property
    def early_networks(self) -> list[Teacher]:
        """The surrogate early in its training, as classifiers."""
        return self.surrogates.early()

    def recovery_networks(self, count: int) -> list[Teacher]:
        """Up to `count` networks whose batch statistics images are recovered from, the first one SRe2L's."""
        return self.models.recovery_networks(self._data, count)

    def renderer(self) -> Backbone:
        """What makes new images of given ones. Raises FileNotFoundError without one."""
        return self.models.renderer(self._data)

    @property
    def _data(self) -> Data:
        return Data(self.train, self.test, self.label_ids, self.spec.names, self.scale)

    # --- sets

    def sets(
        self, methods: Sequence[Method], ipc: int | None = None, seeds: int | Sequence[int] | None = None
    ) -> Sets:
        """The sets of the rows that the run asks for; the noise of a seed is the same for every method.

        ipc and seeds (how many, or which): the run's, unless given.

        Where the run works on some classes only, the process ends here (SystemExit 0, which papermill takes
        for a finished notebook) unless the others are there already: it says how many images are missing.
        """
        ipc = self.ipc if ipc is None else ipc
        numbers = self.seeds if seeds is None else range(seeds) if isinstance(seeds, int) else seeds
        rows = self._within_reach(chosen(methods, self.run.methods), ipc, numbers)
        cells = [(row, seed) for row in rows for seed in numbers]
        # Once a row: its key is made of the digests of all its weights.
        sampling = {row: self.sampling(row) for row in rows if row.family == SAMPLED}
        sampled = {
            (row, seed): self._wanted(sampling[row], seed, ipc) for row, seed in cells if row in sampling
        }
        labels = self.run.labels(self.number_of_classes)
        # Classes outermost: their gradients, which are large, are read once for all sets.
        for part in self._parts(labels):
            for wanted, folder in progress(list(sampled.values()), "sets", every=20):
                self._fill(wanted, folder, part)
        found = {cell: DistilledSet(folder) for cell, (_, folder) in sampled.items()}
        if labels is not None:
            end_if_lacking(found.values())
        for one in found.values():
            _report_version(one)
        return Sets(ipc, {cell: found.get(cell) or self.set(*cell, ipc) for cell in cells})

    def _within_reach(self, rows: Sequence[Method], ipc: int, seeds: Sequence[int]) -> list[Method]:
        """At "small" without the rows that take long and are not there yet, unless they are asked for."""
        if self.scale.name != "small" or self.run.methods != AUTO:
            return list(rows)
        left_out = {}
        for row in rows:
            own = BASELINES.get(row.family)
            if own and own.minutes and (lacking := [s for s in seeds if not own.is_made(self, ipc, s)]):
                left_out[row] = own.shared_minutes + len(lacking) * own.minutes(self, ipc)
        if left_out:
            named = ", ".join(f"{row.label} (about {time:.0f} minutes)" for row, time in left_out.items())
            print(f"left out: {named}; `-p methods all` makes them", flush=True)
        return [row for row in rows if row not in left_out]

    def set(self, method: Method, seed: int, ipc: int) -> Images:
        """A method's images for one generation seed: sampled, resumed, or made by another baseline."""
        if method.family != SAMPLED:
            return BASELINES[method.family].make(self, ipc, seed)
        found = self._fill(*self._wanted(self.sampling(method), seed, ipc))
        _report_version(found)
        return found

    def distilled(self, method: Method, folder: str | Path, seed: int = 0) -> DistilledSet:
        """A sampled method's set in a folder of one's own, at the run's IPC; an interrupted one goes on.

        Raises ValueError for a method that is not sampled, and as `distillation.distill`.
        """
        if method.family != SAMPLED:
            raise ValueError(f"{method.label} is not sampled by a diffusion model")
        wanted, _ = self._wanted(self.sampling(method), seed, self.ipc)
        return self._fill(wanted, Path(folder))

    def seconds_an_image(self, method: Method, seed: int) -> float:
        """What sampling an image takes on this machine now: two of each of ten classes at most, one a class
        side by side, whether a guide remembers or not; nothing of them is kept.
        """
        labels = range(min(10, self.number_of_classes))
        wanted, _ = self._wanted(self.sampling(method), seed, 2)
        with tempfile.TemporaryDirectory() as folder:
            found = fill_by_shard(wanted, Path(folder) / "set", only=labels, batch=len(labels))
            return found.seconds / (2 * len(labels))

    def _wanted(self, sampling: Sampling, seed: int, ipc: int) -> tuple[Wanted, Path]:
        """A sampled set that is to be, and its folder."""
        every = list(range(self.number_of_classes))
        wanted = Wanted(sampling, self.train, ipc, seed, every, list(self.label_ids))
        return wanted, work_dir() / "set" / f"{keys.key('set', wanted.settings)}-seed{seed}"

    def _parts(self, labels: Sequence[int] | None) -> list[list[int]]:
        """The classes to work on, as many at a time as there are class gradients in memory."""
        every = list(range(self.number_of_classes)) if labels is None else list(labels)
        return chunked(every, TOGETHER)

    def _fill(self, wanted: Wanted, folder: Path, part: Sequence[int] | None = None) -> DistilledSet:
        """Sample what is missing; notebooks that run side by side share sets, and wait for each other."""
        return fill_by_shard(wanted, folder, only=part, batch=self.run.batch, wait=True, ray=ray_cluster())

    def sampling(self, method: Method) -> Sampling:
        """How a method's images are sampled."""
        scale, fidelity = self.scale, method.fidelity or self.scale.fidelity
        checkpoints = gradients = None
        if method.influenced:
            checkpoints, gradients = self._guiding(method, fidelity)
        shards = self.models.minimax_shards if method.backbone == "minimax" else None
        make = Sampling if shards is None else partial(ShardedSampling, shards=shards)
        own_pipe = method.backbone == "dit" or shards is not None  # a shard's model is loaded when it is due
        return make(
            pipe=self.models.pipe if own_pipe else self.models.minimax,
            precision=self.run.precision,
            resize=needed(scale.output_resize, self.models.pipe.image_size, self.train.image_size),
            guidance=method.guidance and method.guidance.for_latents(self.latent_values),
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
        return [replace(self, test=images_of(few_classes(spec, self.scale.classes), "test", self.scale))]

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


def end_if_lacking(sets: Iterable[DistilledSet]) -> None:
    """End the notebook where images are missing: other runs are to sample the other classes."""
    found = list(sets)
    lacking, total = sum(one.lacking() for one in found), sum(len(one.selected) * one.ipc for one in found)
    if lacking:
        print(
            f"{lacking} of {total} images of these {len(found)} sets are not there yet: run the other "
            "classes, then once without `classes` for the evaluation",
            flush=True,
        )
        raise SystemExit(0)


# --- making one


def prepare(
    artefact: str,
    dataset: str | None,  # None: the stand-in's own, which has no paper scale
    scale: str = "auto",
    *,
    run: Run | None = None,  # what the notebook's parameters ask for
    fidelity: Fidelity = STANDARD,
    labels: Literal["hard", "soft"] | None = None,  # of the evaluation; None: the notebook's own
    threshold: float = 0.7,
) -> Experiment:
    """The experiment of a notebook for `dataset` at `scale`.

    "auto" is "paper" where all that the notebook needs is usable on this machine, else "small" on a
    stand-in.
    "paper" raises FileNotFoundError naming every missing piece and how to get it; "rehearsal" only where the
    data, the DiT or its autoencoder are missing.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is one of {', '.join(SCALES)}, got {scale!r}")
    run = run or Run()
    stand_in = stand_in_of(dataset if dataset in STAND_INS_ALONE else run.stand_in, scale)
    dataset = dataset or STAND_INS[stand_in].dataset
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(sorted(DATASETS))}")
    asked = _Asked(artefact, dataset, run, fidelity, labels or known(artefact).labels)
    scale = _resolved(scale, asked)
    get_ready(scale)
    if scale in ("paper", "rehearsal"):
        made = _paper(asked, rehearsal=scale == "rehearsal")
    else:
        make = smoke_scale if scale == "smoke" else small_scale
        own = make(dataset, stand_in, fidelity=fidelity, ipc=run.ipc, labels=asked.labels)
        made = _on_stand_in(asked, stand_in, own)
    return _with_threshold(_with_named_protocol(made), threshold)


def get_ready(scale: str) -> None:
    """Prepare this process for an experiment at a scale."""
    disable_progress_bar()  # of loading models: not worth a line in a notebook
    if not torch.cuda.is_available():
        reuse_memory()
    work_in("rehearsal" if scale == "rehearsal" else "")
    if where := ray_cluster():  # once, for all its sets
        cluster.connect(where)


def _with_threshold(made: Experiment, threshold: float) -> Experiment:
    if threshold == made.scale.threshold:
        return made
    surrogates = made.surrogates.with_threshold(threshold)
    return replace(made, scale=surrogates.scale, surrogates=surrogates)


def _with_named_protocol(made: Experiment) -> Experiment:
    """Evaluated under the protocol that the run names."""
    name = made.run.protocol
    return made if name == AUTO else made.with_protocol(made.scale.cut(PROTOCOLS[name]))


@dataclass(frozen=True)
class _Asked:
    """What an experiment is asked for."""

    artefact: str
    dataset: str
    run: Run
    fidelity: Fidelity
    labels: Literal["hard", "soft"]

    @property
    def needs(self) -> Artefact:
        """The notebook, with the labels asked for."""
        return replace(known(self.artefact), labels=self.labels)

    @cached_property
    def pieces(self) -> list[Piece]:
        """What the paper's scale needs for it, looked at once."""
        return pieces(self.dataset, self.needs, self.fidelity)

    def lacking(self) -> list[str]:
        return missing_for_paper(self.dataset, self.needs, self.fidelity)


def _resolved(scale: str, asked: _Asked) -> str:
    """The scale that "auto" means here. Raises FileNotFoundError for one that cannot be had."""
    if scale in ("smoke", "small"):
        return scale
    if scale == "rehearsal" and has_paper_scale(asked.dataset, asked.needs):
        lacking = [line for piece in asked.pieces if piece.blocks_rehearsal for line in piece.problems]
    else:
        lacking = asked.lacking()
    if scale == "auto":
        return "small" if lacking else "paper"
    if lacking:
        raise FileNotFoundError(f"scale={scale!r} lacks:\n" + "\n".join(f"- {line}" for line in lacking))
    return scale


def _paper(asked: _Asked, *, rehearsal: bool) -> Experiment:
    """The paper's data and models; in a rehearsal little of them, with something for what is missing."""
    dataset, fidelity = asked.dataset, asked.fidelity
    device, spec = "cuda" if torch.cuda.is_available() else "cpu", DATASETS[dataset]
    models = (RehearsalModels if rehearsal else PaperModels)(dataset, fidelity, device)
    scale = paper_scale(
        dataset,
        fidelity=fidelity,
        ipc=asked.run.ipc,
        labels=asked.labels,
        num_classes=len(spec.classes),
        image_size=spec.image_size,
    )
    if not spec.label_ids and models.pipe.image_size != spec.image_size:  # DiT-XL/2, tuned for smaller images
        scale = replace(scale, output_resize="bilinear")
    else:
        models.pipe.check_images_of(spec.name, spec.image_size)  # before a surrogate is trained for hours
    scale = rehearsal_scale(scale) if rehearsal else scale
    spec = few_classes(spec, scale.classes)
    train, test = images_of(spec, "train", scale), images_of(spec, "test", scale)
    own = range(len(train.classes)) if scale.classes else None  # of a model that was tuned for the data
    ids = tuple(class_ids(models.pipe.transformer, len(train.classes), spec.label_ids or own))
    surrogates = Surrogates(scale, train, str(models.pipe._execution_device))
    whole = plan.of(asked.artefact, dataset, asked.run)
    first = _about_rehearsal(asked, scale) if rehearsal else whole.text
    banner, ending = f"{_about_paper(asked, scale, models)}\n\n{first}", whole.text if rehearsal else ""
    made = Experiment(
        asked.artefact, asked.run, scale, models, surrogates, train, test, ids, spec, banner, ending
    )
    if "teacher" in asked.needs.needs:
        models.fetch()
    return made


def _about_paper(asked: _Asked, scale: Scale, models: PaperModels) -> str:
    """The scale, data and models in a sentence."""
    ipc = asked.run.ipc
    source = "Table 12" if scale.from_table_12 else "not from Table 12, which has none for it"
    if scale.from_table_12 and ipc not in TABLE_12_IPCS:
        source += f" at IPC {nearest_ipc(ipc)}, for it has no IPC {ipc}"
    text = (
        f"**Scale: {scale.name}.** {asked.dataset}, {models.dit} (CC-BY-NC 4.0) and {asked.fidelity.vae}; "
        f"k and gamma {source}."
    )
    if scale.output_resize is not None:
        size = models.pipe.image_size
        text += f" Its images of {size} px are resized ({scale.output_resize}) before surrogate and storage."
    if models.minimax_missing:
        text += f" Without the rows on the Minimax backbone: {models.minimax_missing}."
    return text


def _about_rehearsal(asked: _Asked, scale: Scale) -> str:
    """What a rehearsal is, and what stands in for what."""
    assert scale.images is not None
    cut = (
        f"The paper's code on {scale.classes} classes, {scale.images[0]} images of each and "
        f"{scale.num_steps} steps: it shows that everything works with your data and models, "
        "**and its numbers mean nothing.** The plan of the real run is at the end."
    )
    return "\n\n".join([cut, *replaced(asked.pieces)])


def images_of(spec: DataSpec, split: str, scale: Scale) -> ImageData:
    """A split's images, or as many of them as the scale takes."""
    data = load(spec, split, check_sizes=scale.images is None)
    if scale.classes is not None:
        data = data.of_labels(range(scale.classes))
    return data if scale.images is None else data.first(scale.images[split == "test"])


def few_classes(spec: DataSpec, count: int | None) -> DataSpec:
    """The first classes of a data set in class folders, so that the others are not looked through."""
    if count is None or spec.layout != "image-folder":
        return spec
    return replace(
        spec,
        classes=spec.classes[:count],
        label_ids=spec.label_ids[:count],
        titles=spec.titles[:count],
        sizes=(None, None),
        subset=True,
    )


def _on_stand_in(asked: _Asked, stand_in: str, scale: Scale) -> Experiment:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = standin.data_of(standin.STANDINS[stand_in])
    try:
        train, test = load(spec, "train"), load(spec, "test")
    except FileNotFoundError as error:
        others = ", ".join(f"`-p stand_in {name}`" for name in STAND_INS if name != stand_in)
        raise FileNotFoundError(f"{error}; or take other images: {others}") from error
    if scale.test_images is not None:
        test = test.first(scale.test_images)
    if not scale.figures_mean_something:
        test = test.per_class(20, seed=0)
    ids = spec.label_ids or tuple(range(len(train.classes)))
    surrogates = Surrogates(scale, train, str(torch.device(device)))
    models = StandInModels(stand_in, train, ids, surrogates, scale.minimax, device)
    banner = _about_stand_in(asked, scale, spec)
    return Experiment(asked.artefact, asked.run, scale, models, surrogates, train, test, ids, spec, banner)


def _about_stand_in(asked: _Asked, scale: Scale, spec: DataSpec) -> str:
    """The scale, and what is missing for the paper's."""
    banner = f"**Scale: {scale.name}.** "
    if scale.figures_mean_something:
        banner += f"The embedded stand-in: real {spec.name} images, a tiny DiT and autoencoder."
    else:
        banner += "A seconds-long run of the stand-in that only shows that everything works; "
        banner += "its numbers mean nothing."
    if not has_paper_scale(scale.dataset, asked.needs):
        return banner
    own = scale.dataset == spec.name
    banner += " The paper's data, but not its models" if own else f" These are not {scale.dataset} results"
    if lacking := asked.lacking():
        return "\n- ".join([f"{banner}, for which this machine lacks:\n", *lacking])
    return f"{banner}: what the paper's scale needs is on this machine (`-p scale paper`)."
