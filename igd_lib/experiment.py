"""What every notebook shares: checked parameters, the scale, data and models, and the methods compared.

A notebook asks for a data set at a scale and gets an `Experiment`: at "paper" the paper's data,
models and settings; at "small" the stand-in, real but small; at "smoke" the stand-in cut to seconds.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from diffusers import AutoencoderKL
from diffusers.utils.logging import disable_progress_bar
from scipy import stats
from torch import Tensor

from igd_lib import files, results, standin
from igd_lib.config import (
    DATASETS,
    IGD_HARD,
    RELEASED,
    SMALL_HARD,
    Fidelity,
    Guidance,
    Protocol,
    cache_dir,
    data_dir,
    fixed_checkpoints,
    flips,
    preset,
    surrogate_training,
)
from igd_lib.data import ImageData, load, to_float
from igd_lib.distill import DistilledSet, distill
from igd_lib.evaluate import Score, evaluate
from igd_lib.guidance import influence_loss
from igd_lib.models import network
from igd_lib.progress import progress
from igd_lib.sampler import IGDPipeline
from igd_lib.surrogate import (
    Checkpoints,
    ClassGradients,
    checkpoint_similarities,
    epoch_gradients,
    regular_checkpoints,
    select_checkpoints,
    train_surrogate,
)
from igd_lib.weights import match_original

PAPER_REPORTED = Path(__file__).parents[1] / "paper_figures" / "data" / "paper_reported.csv"
SCALES = ("auto", "smoke", "small", "paper")
DIT = ("facebook/DiT-XL-2-256", "eab87f77abd5aef071a632f08807fbaab0b704d0")  # CC-BY-NC 4.0
SD_VAE = ("stabilityai/sd-vae-ft-mse", "31f26fdeee1355a5c34592e401dd41e45d25a493")


def read_parameters(namespace: Mapping[str, Any], **types: type) -> SimpleNamespace:
    """A notebook's parameters from its globals, checked: every name known, every value of its type.

    papermill adds misspelt names without a word; any other plain value among the globals is therefore
    an error here. An int passes for a float. Raises NameError or TypeError with the nearest known name.
    """
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    for name, value in namespace.items():
        if name.startswith("_") or name in types or name in ("In", "Out") or not isinstance(value, plain):
            continue
        close = difflib.get_close_matches(name, types, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(types)}"
        raise NameError(f"unknown notebook parameter {name!r}; {hint}")
    found = {}
    for name, kind in types.items():
        if name not in namespace:
            raise NameError(f"the notebook's parameters cell lacks {name!r}")
        value = namespace[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise TypeError(f"notebook parameter {name!r} is {kind.__name__}, got {value!r} ({type(value).__name__})")
        found[name] = value
    if found.get("scale", "auto") not in SCALES:
        raise ValueError(f"scale is one of {', '.join(SCALES)}, got {found['scale']!r}")
    for name in ("ipc", "seeds"):
        if found.get(name, 1) < 1:
            raise ValueError(f"{name} is at least 1, got {found[name]}")
    return SimpleNamespace(**found)


@dataclass(frozen=True)
class Method:
    """One row of a comparison: `guidance=None` is vanilla sampling; `cfg_scale=None` means real images.

    fidelity, num_steps and keep (checkpoints, as indices into the trajectory) are the experiment's unless given.
    """

    name: str
    guidance: Guidance | None = None
    cfg_scale: float | None = 4.0
    fidelity: Fidelity | None = None
    num_steps: int | None = None
    keep: tuple[int, ...] | None = None

    @property
    def influenced(self) -> bool:
        return self.guidance is not None and self.guidance.k > 0


@dataclass
class Experiment:
    """Data, models and settings at one scale, and the steps that notebooks take with them."""

    artefact: str
    dataset: str
    scale: str  # resolved: "smoke", "small" or "paper"
    pipe: IGDPipeline
    train: ImageData
    test: ImageData
    label_ids: tuple[int, ...]
    surrogate_name: str
    surrogate_options: dict[str, Any]
    threshold: float
    fidelity: Fidelity
    guidance: Guidance
    best_cfg: float
    protocol: Protocol
    num_steps: int
    banner: str  # Markdown, shown first
    classes: list[int] | None = None
    checkpoints: Checkpoints | None = None  # the retained ones, after `fit_surrogate`
    gradients: Callable[[int], Tensor] | None = None  # of the retained ones: (E, P) of a class

    @property
    def device(self) -> str:
        return str(self.pipe._execution_device)

    def methods(self) -> list[Method]:
        """Random, DiT at cfg 4, DiT at its best cfg, deviation guidance alone, and DiT-IGD."""
        return [
            Method("Random", cfg_scale=None),
            Method("DiT"),
            Method("DiT, best cfg", cfg_scale=self.best_cfg),
            Method("DiT + G_D", replace(self.guidance, k=0.0)),
            Method("DiT-IGD", self.guidance),
        ]

    def ablation(self) -> list[Method]:
        """Table 5's rows: neither guidance, each alone, both; and vanilla sampling at its best cfg."""
        return [
            Method("DiT"),
            Method("DiT, best cfg", cfg_scale=self.best_cfg),
            Method("DiT + G_I", replace(self.guidance, gamma=0.0)),
            Method("DiT + G_D", replace(self.guidance, k=0.0)),
            Method("DiT-IGD", self.guidance),
        ]

    def solvers(self) -> list[Method]:
        """Table 10's rows: DiT and DiT-IGD by DDIM and by DPM-Solver++ with 20 steps and guided range (12, 18)."""
        ddim = replace(self.fidelity, solver="ddim")
        dpm = dict(fidelity=replace(self.fidelity, solver="dpmsolver++"), num_steps=20 if self.scale != "smoke" else self.num_steps)
        short = replace(self.guidance, guided_range=(12, 18)) if self.scale != "smoke" else self.guidance
        return [
            Method(f"DiT, DDIM {self.num_steps}", fidelity=ddim),
            Method(f"DiT-IGD, DDIM {self.num_steps}", self.guidance, fidelity=ddim),
            Method("DiT, DPM-Solver++ 20", **dpm),
            Method("DiT-IGD, DPM-Solver++ 20", short, **dpm),
        ]

    def limit(self, ipc: int, seeds: int) -> tuple[int, int]:
        """IPC and number of seeds to run: what was asked for, at most 2 and 2 at "smoke"."""
        return (min(ipc, 2), min(seeds, 2)) if self.scale == "smoke" else (ipc, seeds)

    def test_network(self, name: str) -> str:
        """`name`, or for "auto" the network of the paper's table, ConvNet-3 on the stand-in."""
        return name if name != "auto" else "resnet18" if self.scale == "paper" else "convnet3"

    def trajectory(self) -> Checkpoints:
        """The surrogate's training trajectory, trained once and then read from `$IGD_CACHE/surrogates`."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = network(self.surrogate_name, num_classes=len(self.train.classes), image_size=self.train.image_size)
        options = dict(self.surrogate_options)
        count = options.pop("train_images", None)
        data = self.train.per_class(count, seed=0) if count else self.train
        return train_surrogate(model.to(self.device), data, folder=self._surrogate_folder(), **options)

    def _surrogate_folder(self, *parts: object) -> Path:
        settings = [self.train.name, self.surrogate_name, self.surrogate_options, str(self.device)]
        return cache_dir() / "surrogates" / results.settings_hash(settings) / "-".join(str(part) for part in parts)

    def fit_surrogate(self) -> Checkpoints:
        """Train the surrogate and keep the checkpoints that `fidelity` asks for: a fixed list, or Algorithm 2's choice."""
        self.checkpoints, self.gradients = self.guides(self.fidelity)
        return self.checkpoints

    def whole_gradients(self, images: int | None) -> Tensor:
        """(E, C, P) of the whole trajectory over each class's first `images` images; for small data only."""
        whole = ClassGradients(self.trajectory(), self.train, self._surrogate_folder("gradients", images), images)
        labels = progress(range(len(self.train.classes)), "class gradients, class")
        return torch.stack([whole(label) for label in labels], dim=1).to(self.device)

    def gradients_in_turn(self, images: int | None) -> Tensor | Iterator[Tensor]:
        """What Algorithm 2 walks along: the whole trajectory's gradients, or at "paper" one (C, P) after the other, made as it goes."""
        return epoch_gradients(self.trajectory(), self.train, images=images) if self.scale == "paper" else self.whole_gradients(images)

    def similarities(self) -> dict[str, list[float]]:
        """Algorithm 2's similarity to the last kept checkpoint, along the trajectory, in both readings."""
        return {
            label: checkpoint_similarities(self.gradients_in_turn(self.fidelity.gradient_images), threshold=self.threshold, similarity=kind)
            for label, kind in (("mean of per-class cosines (released)", "per_class"), ("cosine of the mean gradient (paper)", "mean"))
        }

    def flipped(self) -> list[Method]:
        """DiT-IGD as released, and with one field of `Fidelity` changed towards the paper at a time.

        Away from the paper's scale without the fields that cannot matter there (they concern DiT's weights, fixed
        lists, many classes, or more images than are drawn), and with 1,000 images for "all": those the surrogate saw.
        """
        found = {}
        for name, fidelity in flips(self.fidelity).items():
            if self.scale != "paper" and name.split("=")[0] in ("checkpoints", "surrogate", "vae", "timestep_frequencies", "memory_size"):
                continue
            if self.scale != "paper" and name.startswith("gradient_images"):
                name, fidelity = "gradient_images=1000", replace(fidelity, gradient_images=1000 if self.scale == "small" else 20)
            found[name] = fidelity
        return [Method("DiT-IGD", self.guidance), *(Method(name, self.guidance, fidelity=fidelity) for name, fidelity in found.items())]

    def by_cfg(self, cfgs: Sequence[float]) -> list[Method]:
        """DiT, G_D alone and DiT-IGD, each at each cfg."""
        kinds = (("DiT", None), ("DiT + G_D", replace(self.guidance, k=0.0)), ("DiT-IGD", self.guidance))
        return [Method(f"{name}, cfg {cfg:g}", guidance, cfg_scale=cfg) for name, guidance in kinds for cfg in cfgs]

    def selections(self, thresholds: Sequence[float]) -> list[Method]:
        """Table 6's rows: DiT, and DiT-IGD with Algorithm 2's checkpoints by threshold and with as many at regular intervals."""
        chosen = self.choices(thresholds)
        found = {}
        for entry in chosen[chosen.similarity == self.fidelity.similarity].itertuples():
            found[tuple(entry.kept)] = Method(f"threshold {entry.threshold} ({len(entry.kept)})", self.guidance, keep=tuple(entry.kept))
            found.setdefault(tuple(entry.regular), Method(f"regular ({len(entry.regular)})", self.guidance, keep=tuple(entry.regular)))
        return [Method("DiT"), *found.values()]

    def choices(self, thresholds: Sequence[float]) -> pd.DataFrame:
        """What Algorithm 2 keeps (indices and epochs) by similarity and threshold, and as many at regular intervals."""
        epochs, rows = self.trajectory().epochs, []
        for kind in ("per_class", "mean"):
            for threshold in thresholds:
                kept = select_checkpoints(self.gradients_in_turn(self.fidelity.gradient_images), threshold=threshold, similarity=kind)
                regular = regular_checkpoints(len(epochs) - 1, len(kept)) if len(kept) > 1 else [0]
                rows.append((kind, threshold, kept, [round(epochs[index], 2) for index in kept], regular))
        return pd.DataFrame(rows, columns=["similarity", "threshold", "kept", "epochs", "regular"])

    def guides(self, fidelity: Fidelity, keep: Sequence[int] | None = None) -> tuple[Checkpoints, Callable[[int], Tensor]]:
        """The checkpoints to guide with, `keep` or what `fidelity` chooses, and their class gradients (E, P) by label."""
        trajectory, images = self.trajectory(), fidelity.gradient_images
        fixed = fixed_checkpoints(self.dataset, self.surrogate_name) if self.scale == "paper" and fidelity.checkpoints == "fixed" else None
        if self.scale != "paper":
            gradients = self.whole_gradients(images)
            chosen = keep or select_checkpoints(gradients, threshold=self.threshold, similarity=fidelity.similarity)
            return trajectory.keep(chosen), lambda label: gradients[list(chosen), label]
        if keep is None and fixed is not None:
            keep = [trajectory.epochs.index(epoch) for epoch in fixed]
        if keep is None:
            keep = select_checkpoints(self.gradients_in_turn(images), threshold=self.threshold, similarity=fidelity.similarity)
        kept = trajectory.keep(keep)
        folder = self._surrogate_folder("gradients", images, *(f"{epoch:g}" for epoch in kept.epochs))
        return kept, ClassGradients(kept, self.train, folder, images)

    def distilled(self, method: Method, ipc: int, seed: int) -> ImageData | DistilledSet:
        """The method's images for one generation seed: sampled, resumed from disk, or a random draw."""
        if method.cfg_scale is None:
            return self.train.per_class(ipc, seed)
        fidelity, num_steps, checkpoints, gradients = method.fidelity or self.fidelity, method.num_steps or self.num_steps, None, None
        if method.influenced:
            if self.checkpoints is None:
                self.fit_surrogate()
            checkpoints, gradients = self.checkpoints, self.gradients
            choice = [(f.checkpoints, f.similarity, f.gradient_images) for f in (fidelity, self.fidelity)]
            if method.keep is not None or choice[0] != choice[1]:
                checkpoints, gradients = self.guides(fidelity, method.keep)
        # Everything but the method's name: sets are shared between notebooks.
        weights = [self.pipe.transformer.state_dict(), self.pipe.vae.state_dict(), *(checkpoints.states if checkpoints else [])]
        sums = [f"{sum(value.double().abs().sum().item() for value in state.values()):.6g}" for state in weights]
        settings = [self.train.name, self.scale, method.guidance, method.cfg_scale, ipc, num_steps, fidelity, self.classes, sums]
        return distill(
            self.pipe, self.train, ipc=ipc, guidance=method.guidance, checkpoints=checkpoints, gradients=gradients,
            out_dir=cache_dir() / "runs" / f"{results.settings_hash(settings)}-seed{seed}", seed=seed,
            classes=self.classes, label_ids=self.label_ids, cfg_scale=method.cfg_scale, num_steps=num_steps, fidelity=fidelity,
        )  # fmt: skip

    def all_sets(self, ipc: int, seeds: int, methods: Sequence[Method] | None = None) -> dict[tuple[str, int], ImageData | DistilledSet]:
        """Every method's set for generation seeds 0 ... seeds - 1; the noise is the same for every method."""
        cells = [(method, seed) for method in methods or self.methods() for seed in range(seeds)]
        return {(method.name, seed): self.distilled(method, ipc, seed) for method, seed in progress(cells, "sets", every=20)}

    def row(self, method: str, ipc: int, seed: int, metric: str, value: float, seconds: float = 0.0, network: str = "") -> results.Row:
        """A result row that carries this experiment's scale and settings."""
        settings = [self.guidance, self.fidelity, self.num_steps, self.best_cfg, self.protocol, self.surrogate_options, self.threshold]
        return results.Row(
            self.artefact, self.train.name, method, "dit", ipc, self.surrogate_name, network, self.protocol.name, seed, metric,
            value, self.scale, seconds, self.device, results.settings_hash(settings),
        )  # fmt: skip

    def influence_rows(self, sets: Mapping[tuple[str, int], Any], ipc: int) -> pd.DataFrame:
        """The mean influence loss (Eq. 7) of every sampled set's finished images, a row a set."""
        rows = []
        for (method, seed), images in progress(list(sets.items()), "influence loss, set"):
            data = _loaded(images)
            losses = []
            with torch.no_grad():
                for pictures, labels in data.batches(50):
                    inputs, own = to_float(pictures).to(self.device), {label: self.gradients(label) for label in labels.unique().tolist()}
                    gradients = torch.stack([own[label] for label in labels.tolist()], dim=1).to(self.device)
                    losses.append(influence_loss(inputs, labels.to(self.device), self.checkpoints, gradients, weights=self.checkpoints.weights))
            rows.append(self.row(method, ipc, seed, "influence_loss", torch.cat(losses).mean().item()))
        return results.frame(rows)

    def latent_rows(self, sets: Mapping[tuple[str, int], Any], ipc: int, reference: str) -> pd.DataFrame:
        """Three rows a sampled set: `moved`, the mean relative distance of its final latents to `reference`'s on the same noise;
        `nearest`, the mean cosine of a latent to the nearest other of its class; `seconds` of sampling, in all.
        """
        rows = []
        for (method, seed), images in sets.items():
            moved, nearest = [], []
            for label in images.selected:
                own, plain = images.latents(label).flatten(1), sets[reference, seed].latents(label).flatten(1)
                moved.append(((own - plain).norm(dim=1) / plain.norm(dim=1)).mean())
                cosines = torch.cosine_similarity(own[:, None], own[None], dim=2).fill_diagonal_(-1)
                nearest.append(cosines.max(1).values.mean())
            for metric, value in (("moved", torch.stack(moved).mean().item()), ("nearest", torch.stack(nearest).mean().item()), ("seconds", images.seconds)):
                rows.append(self.row(method, ipc, seed, metric, value))
        return results.frame(rows)

    def accuracy_rows(self, sets: Mapping[tuple[str, int], Any], ipc: int, network: str) -> pd.DataFrame:
        """Top-1 of a network trained on every set (training seed = generation seed), a row a set."""
        rows = []  # the device names the precision too: it depends on the processor
        for (method, seed), images in progress(list(sets.items()), "evaluate, set", every=20):
            score: Score = evaluate(images, self.test, network=network, protocol=self.protocol, seed=seed, device=self.device)
            row = self.row(method, ipc, seed, "top1", score.reported, score.seconds, network)
            rows.append(replace(row, device=f"{row.device}, {score.precision}"))
        return results.frame(rows)

    def all_rows(self, sets: Mapping[tuple[str, int], Any], ipc: int, network: str, reference: str) -> pd.DataFrame:
        """Accuracy, influence loss and the three of `latent_rows`: five rows a sampled set."""
        return pd.concat([self.accuracy_rows(sets, ipc, network), self.influence_rows(sets, ipc), self.latent_rows(sets, ipc, reference)], ignore_index=True)

    def save(self, *frames: pd.DataFrame, folder: str = "") -> None:
        """Store rows, one JSON file each, under `$IGD_CACHE/results`, and as `rows.csv` in `folder` if given."""
        rows = pd.concat(frames, ignore_index=True)
        for record in rows.to_dict("records"):
            results.append(cache_dir() / "results", results.Row(**record))
        if folder:
            files.write(Path(folder) / "rows.csv", rows.to_csv(index=False))

    def across_classes(self, sets: Mapping[tuple[str, int], Any], classes: int = 10) -> dict[str, Tensor]:
        """Per method, uint8 (n, 3, H, W): the first image of each of the first classes, seed 0."""
        labels = (self.classes or list(range(len(self.train.classes))))[:classes]
        once = {cell: _loaded(images) for cell, images in sets.items() if cell[1] == 0}
        parts = [self.images_of(once, label, seeds=1) for label in labels]
        return {method: torch.cat([part[method] for part in parts]) for method in parts[0]}

    def images_of(self, sets: Mapping[tuple[str, int], Any], label: int, seeds: int, first: int = 1) -> dict[str, Tensor]:
        """Per method, uint8 (n, 3, H, W): one class's first `first` images of each seed, in the same order for every method."""
        found: dict[str, list[Tensor]] = {}
        for (method, seed), images in sets.items():
            if seed < seeds:
                found.setdefault(method, []).append(_loaded(images).of_class(label, first))
        return {method: torch.cat(parts) for method, parts in found.items()}


def _loaded(images: ImageData | DistilledSet) -> ImageData:
    """A set's images in memory, whichever way it was made."""
    return images.data() if isinstance(images, DistilledSet) else images


def prepare(artefact: str, dataset: str, scale: str = "auto", *, fidelity: Fidelity = RELEASED, ipc: int = 10, stand_in: str = "fashion-mnist") -> Experiment:
    """Data, models and settings for `dataset` at `scale`.

    "auto" is "paper" where the paper's data and models are on this machine, else "small" on
    `stand_in`. "paper" raises FileNotFoundError naming every missing piece and how to get it.
    """
    disable_progress_bar()  # of loading models: not worth a line in a notebook
    if scale not in SCALES:
        raise ValueError(f"scale is one of {', '.join(SCALES)}, got {scale!r}")
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(sorted(DATASETS))}")
    missing = missing_for_paper(dataset, fidelity)
    if scale == "paper" and missing:
        raise FileNotFoundError("scale='paper' lacks:\n" + "\n".join(f"- {line}" for line in missing))
    if scale == "paper" or (scale == "auto" and not missing):
        return _paper(artefact, dataset, fidelity, ipc)
    return _small(artefact, dataset, stand_in, fidelity, "small" if scale == "auto" else scale, ipc)


def missing_for_paper(dataset: str, fidelity: Fidelity = RELEASED) -> list[str]:
    """What the paper's scale still needs on this machine, a line a piece with how to get it; empty if nothing."""
    lines = []
    if dataset in standin.STANDINS:
        return [f"{dataset} is a stand-in's data set and has no paper scale; use scale='small'"]
    if dataset not in DATASETS:
        return [f"unknown data set {dataset!r}"]
    folder = data_dir() / (DATASETS[dataset].folder or dataset)
    if not ((folder / "train").is_dir() and any((folder / name).is_dir() for name in ("test", "val"))):
        lines.append(f"the images of {dataset}: put them into {folder}/train and {folder}/val, one folder a class (set IGD_DATA to change the place)")
    for repository, revision in (DIT, _vae(fidelity)):
        if _model_folder(repository, revision) is None:
            download = f"hf download {repository} --revision {revision}, or " if revision else ""
            lines.append(f"the weights {repository}: {download}copy the folder to {cache_dir() / 'models' / repository.split('/')[-1]}")
    if not torch.cuda.is_available() and not os.environ.get("IGD_ALLOW_CPU"):
        lines.append("a CUDA GPU: none was found (set IGD_ALLOW_CPU=1 to run the paper's scale on a CPU all the same, very slowly)")
    return lines


def _vae(fidelity: Fidelity) -> tuple[str, str | None]:
    """The autoencoder and its pinned revision; one without a pin is taken from a local folder only."""
    return SD_VAE if fidelity.vae == SD_VAE[0] else (fidelity.vae, None)


def _model_folder(repository: str, revision: str | None) -> Path | None:
    """A model's folder under `$IGD_CACHE/models`, or in the Hugging Face cache at the pinned revision."""
    own = cache_dir() / "models" / repository.split("/")[-1]
    if own.is_dir() or revision is None:
        return own if own.is_dir() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _paper(artefact: str, dataset: str, fidelity: Fidelity, ipc: int) -> Experiment:
    spec = DATASETS[dataset]
    vae = AutoencoderKL.from_pretrained(_model_folder(*_vae(fidelity)))
    pipe = IGDPipeline.from_pretrained(_model_folder(*DIT), vae=vae).to("cuda" if torch.cuda.is_available() else "cpu")
    if fidelity.timestep_frequencies == "original":
        match_original(pipe.transformer)
    return Experiment(
        artefact, dataset, "paper", pipe, load(dataset, "train"), load(dataset, "test"), spec.label_ids, "convnet6",
        surrogate_training(fidelity, len(spec.label_ids)), 0.7, fidelity, preset(dataset, "dit", ipc), 1.5, IGD_HARD, 50,
        f"**Scale: paper.** {dataset}, {DIT[0]} (CC-BY-NC 4.0) and {fidelity.vae}.",
    )  # fmt: skip


def _small(artefact: str, dataset: str, stand_in: str, fidelity: Fidelity, scale: str, ipc: int) -> Experiment:
    spec = DATASETS[standin.STANDINS[stand_in].dataset]
    pipe = IGDPipeline.from_pretrained(standin.path(stand_in)).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    dimension = pipe.transformer.config.in_channels * pipe.transformer.config.sample_size**2
    train, test = load(spec, "train"), load(spec, "test")
    asked = "" if dataset == spec.name else f" These are not {dataset} results: the paper's data or models are not on this machine."
    small = STAND_IN_SETTINGS[stand_in]
    test = test.first(small.test_images)
    guidance = small.guidance.for_latents(dimension)
    protocol, num_steps, options = small.protocol, small.num_steps, dict(small.surrogate)
    if scale == "smoke":
        protocol, num_steps = replace(protocol, epochs=2, evaluations=1), 10
        guidance = replace(guidance, guided_range=(6, 7))
        options |= {"epochs": 1, "train_images": 20, "saves_in_first_epoch": 2}
        fidelity = replace(fidelity, gradient_images=10)
        test = test.per_class(20, seed=0)
    banner = {
        "small": f"**Scale: small.** The embedded stand-in: real {spec.name} images, a tiny DiT and autoencoder.{asked}",
        "smoke": f"**Scale: smoke.** A seconds-long run of the stand-in that only shows that everything works; its numbers mean nothing.{asked}",
    }[scale]
    return Experiment(
        artefact, dataset, scale, pipe, train, test, spec.label_ids, small.surrogate_name, options, 0.7, fidelity, guidance,
        small.best_cfg, protocol, num_steps, banner,
    )  # fmt: skip


@dataclass(frozen=True)
class StandInSettings:
    """Settings of one stand-in, chosen on its validation split; gamma is the paper's, per 4096 latent values."""

    guidance: Guidance
    best_cfg: float
    surrogate_name: str
    surrogate: Mapping[str, Any]
    protocol: Protocol
    num_steps: int
    test_images: int  # a class: the first of the test split, fixed


STAND_IN_SETTINGS = {
    "fashion-mnist": StandInSettings(
        guidance=Guidance(30.0, 480.0, (15, 22)),
        best_cfg=1.5,
        surrogate_name="convnet3",
        surrogate=dict(epochs=2, train_images=1000, saves_in_first_epoch=6),
        protocol=SMALL_HARD,
        num_steps=25,
        test_images=200,
    ),
}


def accuracy_table(rows: pd.DataFrame, influence: pd.DataFrame | None = None) -> pd.DataFrame:
    """Method, top-1 mean, sd and n, and the mean influence loss where given, rounded for showing."""
    table = results.summary(rows).round({"mean": 1, "sd": 1}).rename(columns={"mean": "top-1 (%)"})
    if influence is not None:
        table["influence loss"] = table.method.map(influence.groupby("method")["value"].mean()).round(4)
    return table


def wide_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a method: top-1 mean, sd and n, and the mean of every other metric."""
    table = accuracy_table(rows[rows.metric == "top1"]).set_index("method")
    others = rows[rows.metric != "top1"].pivot_table(index="method", columns="metric", values="value", aggfunc="mean", sort=False)
    return table.join(others.round(4)).reset_index()


def mean_difference(rows: pd.DataFrame, method: str, reference: str) -> float:
    """The mean paired difference between two methods."""
    return results.paired(rows, method, reference).mean()


def verdict(table: pd.DataFrame) -> str:
    """Each difference in words: a gain or a loss where a paired t-test at 5 % says so, else no clear difference."""
    lines = []
    for entry in table.itertuples():
        error = entry.sd / entry.n**0.5
        clear = entry.n > 1 and abs(entry.mean) > stats.t.ppf(0.975, entry.n - 1) * error
        word = ("gain" if entry.mean > 0 else "loss") if clear else "no clear difference"
        lines.append(f"{entry.difference}: {entry.mean:+.1f} points, sd {entry.sd:.1f} over n = {entry.n} pairs: {word}")
    return "\n".join(lines)


def beside_paper(rows: pd.DataFrame, *, table: int, ipc: int) -> pd.DataFrame:
    """Our mean and sd beside the paper's, one row a method of either; empty where one side has none."""
    reported = pd.read_csv(PAPER_REPORTED)
    reported = reported[(reported.table == table) & (reported.ipc == ipc)].set_index("method")
    ours = results.summary(rows).set_index("method")
    label = f"ours, {rows.dataset.iloc[0]}, {rows.scale.iloc[0]}"
    methods = list(dict.fromkeys([*reported.index, *ours.index]))
    return pd.DataFrame(
        {
            "paper": [_plus_minus(reported, method, "value") for method in methods],
            label: [_plus_minus(ours, method, "mean") for method in methods],
            "n": [str(ours.n[method]) if method in ours.index else "" for method in methods],
        },
        index=pd.Index(methods, name="method"),
    )


def _plus_minus(table: pd.DataFrame, method: str, column: str) -> str:
    return f"{table[column][method]:.1f} ± {table.sd[method]:.1f}" if method in table.index else ""


def differences(rows: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Paired differences between methods, rounded for showing."""
    return results.comparison(rows, pairs).round(4)
