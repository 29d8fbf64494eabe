"""An experiment at one scale: data, models and settings, and the steps that notebooks take from sets to rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor
from torchvision.models import ResNet18_Weights

from igd_lib import files, metrics, results, standin
from igd_lib.baselines.rded import rded
from igd_lib.config import RDED_SOFT, Fidelity, Guidance, Protocol, cache_dir, fixed_checkpoints, ray_cluster
from igd_lib.data import ImageData, from_tensors, load
from igd_lib.datasets import DATASETS
from igd_lib.distill import DistilledSet, distill, in_memory
from igd_lib.evaluate import Teacher, evaluate_all, fingerprint
from igd_lib.methods import Method
from igd_lib.minimax import Minimax, finetune
from igd_lib.models import network
from igd_lib.progress import progress
from igd_lib.sampler import IGDPipeline
from igd_lib.surrogate import (
    Checkpoints,
    ClassGradients,
    class_gradients,
    kept,
    regular_checkpoints,
    similarities_along,
    similarity_matrices,
    train_surrogate,
)

Sets = Mapping[tuple[str, int], Any]  # (method's name, generation seed): ImageData or DistilledSet


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
    minimax_recipe: Minimax = field(default_factory=Minimax)
    minimax_guidance: Guidance = field(default_factory=Guidance)
    classes: list[int] | None = None
    checkpoints: Checkpoints | None = None  # the retained ones, after `fit_surrogate`
    gradients: Callable[[int], Tensor] | None = None  # of the retained ones: (E, P) of a class

    @property
    def device(self) -> str:
        return str(self.pipe._execution_device)

    def limit(self, ipc: int, seeds: int) -> tuple[int, int]:
        """IPC and number of seeds to run: what was asked for, at most 2 and 2 at "smoke"."""
        return (min(ipc, 2), min(seeds, 2)) if self.scale == "smoke" else (ipc, seeds)

    def networks(self, names: str, *, paper: str, small: str = "convnet3") -> list[str]:
        """The networks to train on every set, from comma-separated `names`; "auto": the paper's at "paper", `small` elsewhere."""
        chosen = (paper if self.scale == "paper" else small) if names == "auto" else names
        return [name.strip() for name in chosen.split(",")]

    def grid_values(self, ks: str, gammas: str) -> tuple[list[float], list[float]]:
        """k and gamma (the paper's, for 4,096 latent values) to search, from comma-separated numbers; "auto": 0 and the setting in use.

        Two of each at most at "smoke".
        """
        own = (self.guidance.k, self.guidance.gamma * 4096 / self.latent_values)
        k, gamma = ([0.0, value] if text == "auto" else [float(part) for part in text.split(",")] for text, value in zip((ks, gammas), own, strict=True))
        return (k[-2:], gamma[-2:]) if self.scale == "smoke" else (k, gamma)

    @property
    def latent_values(self) -> int:
        """How many values a latent has: gamma goes with it."""
        return self.pipe.transformer.config.in_channels * self.pipe.transformer.config.sample_size**2

    def trajectory(self, surrogate: str | None = None) -> Checkpoints:
        """A surrogate's training trajectory (by default the experiment's), trained once and then read from `$IGD_CACHE/surrogates`."""
        name = surrogate or self.surrogate_name
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = network(name, num_classes=len(self.train.classes), image_size=self.train.image_size)
        options = dict(self.surrogate_options)
        count = options.pop("train_images", None)
        data = self.train.per_class(count, seed=0) if count else self.train
        return train_surrogate(model.to(self.device), data, folder=self._surrogate_folder(surrogate=name), **options)

    def _surrogate_folder(self, *parts: object, surrogate: str) -> Path:
        settings = [self.train.name, surrogate, self.surrogate_options, str(self.device)]
        return cache_dir() / "surrogates" / results.settings_hash(settings) / "-".join(str(part) for part in parts)

    def fit_surrogate(self) -> Checkpoints:
        """Train the surrogate and keep the checkpoints that `fidelity` asks for: a fixed list, or Algorithm 2's choice."""
        self.checkpoints, self.gradients = self.guides(self.fidelity)
        return self.checkpoints

    def teacher(self) -> Teacher | None:
        """What gives soft labels, None where the protocol's labels are hard.

        At "paper" torchvision's ResNet-18 of ImageNet-1K, the logits of the data set's classes alone; on a stand-in the
        surrogate's last checkpoint.
        """
        return None if self.protocol.labels == "hard" else self._teacher()

    def _teacher(self) -> Teacher:
        if self.scale == "paper":
            return imagenet_teacher(self.train.classes, self.label_ids)
        model, epoch = self._last_checkpoint()
        origin = f"the surrogate's trajectory, epoch {epoch:g}"
        least = 0.0 if self.scale == "smoke" else 50.0
        return Teacher(model, self.surrogate_name, origin, self.train.classes, (0.5,) * 3, (0.5,) * 3, least)

    def _last_checkpoint(self) -> tuple[torch.nn.Module, float]:
        """A copy of the surrogate as its training ended, and its epoch."""
        trajectory = self.trajectory()
        model = copy.deepcopy(trajectory.model)
        model.load_state_dict(trajectory.states[-1])
        return model, trajectory.epochs[-1]

    def class_gradients(self, images: int | None, surrogate: str | None = None) -> ClassGradients:
        """The whole trajectory's class gradients (E, P) by label, over each class's first `images` images, kept on disk."""
        name = surrogate or self.surrogate_name
        return ClassGradients(self.trajectory(name), self.train, self._surrogate_folder("gradients", images, surrogate=name), images)

    def similarity_matrices(self, images: int | None, surrogate: str | None = None) -> dict[str, Tensor]:
        """Algorithm 2's similarities of all checkpoints, (E, E), in both readings; made once, then read from disk."""
        name = surrogate or self.surrogate_name
        path = self._surrogate_folder("similarities", f"{images}.safetensors", surrogate=name)
        if not path.is_file():
            gradients: Callable[[int], Tensor] = self.class_gradients(images, name)
            if self.scale == "paper":  # all checkpoints of all classes can take hundreds of gigabytes: not kept
                trajectory = self.trajectory(name)
                gradients = lambda label: class_gradients(trajectory, self.train.of_class(label, images), label)  # noqa: E731
            files.save_tensors(path, similarity_matrices(gradients, len(self.train.classes)))
        return files.load_tensors(path)[0]

    def similarities(self) -> dict[str, list[float]]:
        """Algorithm 2's similarity to the last kept checkpoint, along the trajectory, in both readings."""
        readings = (("mean of per-class cosines (released)", "per_class"), ("cosine of the mean gradient (paper)", "mean"))
        matrices = self.similarity_matrices(self.fidelity.gradient_images)
        return {label: similarities_along(matrices[kind], self.threshold) for label, kind in readings}

    def choices(self, thresholds: Sequence[float]) -> pd.DataFrame:
        """What Algorithm 2 keeps (indices and epochs) by similarity and threshold, and as many at regular intervals."""
        epochs, rows = self.trajectory().epochs, []
        for kind, matrix in sorted(self.similarity_matrices(self.fidelity.gradient_images).items(), reverse=True):
            for threshold in thresholds:
                keep = kept(similarities_along(matrix, threshold), threshold)
                regular = regular_checkpoints(len(epochs) - 1, len(keep)) if len(keep) > 1 else [0]
                rows.append((kind, threshold, keep, [round(epochs[index], 2) for index in keep], regular))
        return pd.DataFrame(rows, columns=["similarity", "threshold", "kept", "epochs", "regular"])

    def guides(
        self, fidelity: Fidelity, keep: Sequence[int] | None = None, surrogate: str | None = None
    ) -> tuple[Checkpoints, Callable[[int], Tensor]]:
        """The checkpoints to guide with, `keep` or what `fidelity` chooses, and their class gradients (E, P) by label."""
        name, images = surrogate or self.surrogate_name, fidelity.gradient_images
        trajectory = self.trajectory(name)
        fixed = fixed_checkpoints(self.dataset, name) if self.scale == "paper" and fidelity.checkpoints == "fixed" else None
        if keep is None and fixed is not None:
            keep = [trajectory.epochs.index(epoch) for epoch in fixed]
        if keep is None:
            keep = kept(similarities_along(self.similarity_matrices(images, name)[fidelity.similarity], self.threshold), self.threshold)
        checkpoints = trajectory.keep(keep)
        if self.scale != "paper":  # what the filter has made and kept: a few classes, a small network, in memory
            whole = self.class_gradients(images, name)
            gradients = torch.stack([whole(label)[list(keep)] for label in range(len(self.train.classes))], dim=1).to(self.device)
            return checkpoints, lambda label: gradients[:, label]
        folder = self._surrogate_folder("gradients", images, *(f"{epoch:g}" for epoch in checkpoints.epochs), surrogate=name)
        return checkpoints, ClassGradients(checkpoints, self.train, folder, images)

    def distilled(self, method: Method, ipc: int, seed: int) -> ImageData | DistilledSet:
        """The method's images for one generation seed: sampled, resumed from disk, or taken from the real ones."""
        if method.real == "random":
            return self.train.per_class(ipc, seed)
        if method.real == "rded":
            return self._rded(ipc, seed)
        pipe, checkpoints, gradients, options = self.sampling(method)
        # Everything but the method's name: sets are shared between notebooks.
        weights = [files.digest(state) for state in (pipe.transformer.state_dict(), pipe.vae.state_dict(), *(checkpoints.states if checkpoints else []))]
        settings = [self.train.name, self.scale, method.guidance, method.cfg_scale, ipc, options["num_steps"], options["fidelity"], self.classes, weights]
        settings += [dict(method.shortcuts)] if method.shortcuts else []
        return distill(
            pipe, self.train, ipc=ipc, guidance=method.guidance, checkpoints=checkpoints, gradients=gradients,
            out_dir=cache_dir() / "runs" / f"{results.settings_hash(settings)}-seed{seed}", seed=seed,
            classes=self.classes, label_ids=self.label_ids, wait=True, ray=ray_cluster(), **options,  # notebooks that run side by side share sets
        )  # fmt: skip

    def sampling(self, method: Method) -> tuple[IGDPipeline, Checkpoints | None, Callable[[int], Tensor] | None, dict[str, Any]]:
        """What a method samples with: pipeline, checkpoints, class gradients (E, P) by label, and `sample_igd`'s options."""
        pipe = self.pipe if method.backbone == "dit" else self.minimax_pipe
        fidelity, checkpoints, gradients = method.fidelity or self.fidelity, None, None
        if method.influenced:
            if self.checkpoints is None:
                self.fit_surrogate()
            checkpoints, gradients = self.checkpoints, self.gradients
            choice = [(f.checkpoints, f.similarity, f.gradient_images) for f in (fidelity, self.fidelity)]
            if method.keep is not None or method.surrogate is not None or choice[0] != choice[1]:
                checkpoints, gradients = self.guides(fidelity, method.keep, method.surrogate)
        options = dict(cfg_scale=method.cfg_scale, num_steps=method.num_steps or self.num_steps, fidelity=fidelity, **method.shortcuts)
        if options.get("guidance_decoder") == "tiny":
            options["guidance_decoder"] = self.tiny_decoder()
        return pipe, checkpoints, gradients, options

    def _rded(self, ipc: int, seed: int) -> ImageData:
        """RDED's images by the teacher of the soft-label protocol; selected once, then read from `$IGD_CACHE/rded`."""
        teacher, candidates = self._teacher(), 300 if self.scale != "smoke" else 10
        settings = [self.train.name, self.train.split, self.scale, self.surrogate_options, teacher.architecture, teacher.weights, ipc, seed]
        path = cache_dir() / "rded" / f"{results.settings_hash(settings)}.safetensors"
        if not path.is_file():
            made = rded(self.train, teacher, ipc, candidates=candidates, seed=seed, device=self.device)
            files.save_tensors(path, {"images": made.fetch(torch.arange(len(made))), "labels": made.labels}, split=made.split)
        tensors, note = files.load_tensors(path)
        return from_tensors(self.train.name, note["split"], self.train.classes, tensors["images"], tensors["labels"])

    @property
    def minimax_missing(self) -> str:
        """Why there is no Minimax backbone here, and how to make it; empty where there is one or it is quickly made."""
        folder = cache_dir() / "models" / f"Minimax-{self.dataset}"
        if self.scale != "paper" or folder.is_dir():
            return ""
        return f"no Minimax model in {folder}: accelerate launch -m igd_lib.minimax {self.dataset} {folder}, or convert its checkpoint (igd_lib.weights)"

    @cached_property
    def minimax_pipe(self) -> IGDPipeline:
        """The Minimax-tuned backbone: a folder at "paper"; on a stand-in fine-tuned once, then read from `$IGD_CACHE`."""
        if self.minimax_missing:
            raise FileNotFoundError(self.minimax_missing)
        folder = cache_dir() / "models" / f"Minimax-{self.dataset}"
        if self.scale != "paper":
            folder = cache_dir() / "minimax" / results.settings_hash([self.train.name, self.minimax_recipe, files.digest(self.pipe.transformer.state_dict())])
            with files.locked(folder, "a fine-tuning", wait=True):  # of a notebook that runs beside this one
                finetune(self.pipe, self.train, folder, recipe=self.minimax_recipe, label_ids=self.label_ids)
        return IGDPipeline.from_pretrained(folder, vae=self.pipe.vae).to(self.device)

    def all_sets(self, ipc: int, seeds: int, methods: Sequence[Method]) -> dict[tuple[str, int], ImageData | DistilledSet]:
        """Every method's set for generation seeds 0 ... seeds - 1; the noise is the same for every method."""
        cells = [(method, seed) for method in methods for seed in range(seeds)]
        return {(method.name, seed): self.distilled(method, ipc, seed) for method, seed in progress(cells, "sets", every=20)}

    def row(self, method: str, ipc: int, seed: int, metric: str, value: float, *, seconds: float = 0.0, network: str = "", device: str = "") -> results.Row:
        """A result row that carries this experiment's scale and settings."""
        settings = [self.guidance, self.fidelity, self.num_steps, self.best_cfg, self.protocol, self.surrogate_options, self.threshold]
        backbone = "minimax" if method.startswith("Minimax") else "dit"
        return results.Row(
            self.artefact, self.train.name, method, backbone, ipc, self.surrogate_name, network, self.protocol.name, seed, metric,
            float(value), self.scale, seconds, device or self.device, results.git_revision(), results.settings_hash(settings),
        )  # fmt: skip

    def influence_rows(self, sets: Sets, ipc: int) -> pd.DataFrame:
        """The mean influence loss (Eq. 7) of every set's finished images, a row a set."""
        rows = []
        for (method, seed), images in progress(list(sets.items()), "influence loss, set"):
            losses = metrics.influence_of_set(in_memory(images), self.checkpoints, self.gradients, device=self.device)
            rows.append(self.row(method, ipc, seed, "influence_loss", losses.mean()))
        return results.frame(rows)

    def latent_rows(self, sets: Sets, ipc: int, reference: str) -> pd.DataFrame:
        """Three rows a sampled set: `moved`, the mean relative distance of its final latents to `reference`'s on the same noise;
        `nearest`, the mean cosine of a latent to the nearest other of its class; `seconds` of sampling, in all.
        """
        rows = []
        for (method, seed), images in sets.items():
            moved, nearest = [], []
            for label in images.selected:
                own, plain = images.latents(label).flatten(1), sets[reference, seed].latents(label).flatten(1)
                moved.append((own - plain).norm(dim=1) / plain.norm(dim=1))
                nearest.append(metrics.nearest_cosine(own))
            values = {"moved": torch.cat(moved).mean(), "nearest": torch.cat(nearest).mean(), "seconds": images.seconds}
            values = {metric: value for metric, value in values.items() if ipc > 1 or metric != "nearest"}  # one image has no other
            rows += [self.row(method, ipc, seed, metric, value) for metric, value in values.items()]
        return results.frame(rows)

    def distribution_rows(self, sets: Sets, ipc: int, *, images: int = 500) -> pd.DataFrame:
        """Fréchet distance, coverage and Wasserstein distance of every set to `images` real training ones a class (Table 11).

        In the features of Inception-V3 at "paper", of the surrogate's last checkpoint on a stand-in; every metric's name says
        which. Coverage's threshold in Inception's space is the paper's 300, read as a squared distance; elsewhere the median
        distance of a real image to its nearest in another real draw of `ipc` a class. Neither that draw nor images that a
        Random set selected are in the reference.
        """
        extractor = self.extractor()
        drawn = self.train.per_class(min(images + ipc, len(self.train) // len(self.train.classes)), seed=99)
        order = torch.cat([drawn.class_indices(label)[:ipc] for label in range(len(drawn.classes))])
        rest = torch.cat([drawn.class_indices(label)[ipc:] for label in range(len(drawn.classes))])
        selected = [data for data in sets.values() if isinstance(data, ImageData)]  # Random's images do not cover themselves
        taken = {image.numpy().tobytes() for data in selected for image in data.fetch(torch.arange(len(data)))}
        rest = rest[torch.tensor([image.numpy().tobytes() not in taken for image in drawn.fetch(rest)])]
        real, other = (metrics.features(extractor, drawn.subset(indices)) for indices in (rest, order))
        threshold = 300**0.5 if extractor.is_inception else metrics.coverage_threshold(real, other)
        spread, rows = metrics.gaussian(real), []
        for (method, seed), own in progress(list(sets.items()), "distances, set"):
            fake = metrics.features(extractor, in_memory(own))
            values = {
                metrics.distance_name(extractor): metrics.frechet_distance(spread, fake),
                f"coverage over {extractor.space}": metrics.coverage(real, fake, threshold),
                f"Wasserstein over {extractor.space}": metrics.wasserstein(real, fake),
            }
            rows += [self.row(method, ipc, seed, metric, value) for metric, value in values.items()]
        return results.frame(rows)

    def map_of_sets(self, sets: Sets, ipc: int, label: int, *, images: int = 300) -> tuple[pd.DataFrame, pd.DataFrame]:
        """One class of every set (seed 0) and `images` real training ones of it: a joint t-SNE, and result rows of Wasserstein distances.

        In the features that `distribution_rows` measures in.
        """
        extractor = self.extractor()

        def points(data: ImageData) -> Tensor:
            return metrics.features(extractor, data.subset(data.class_indices(label)[:images]))

        real = points(self.train)
        own = {method: points(in_memory(found)) for (method, seed), found in sets.items() if seed == 0}
        rows = [self.row(method, ipc, 0, f"Wasserstein over {extractor.space}", metrics.wasserstein(real, found)) for method, found in own.items()]
        places = metrics.joint_tsne({"real": real, **own}, perplexity=min(30.0, (len(real) + sum(map(len, own.values()))) // 3))
        return places.assign(**{"class": self.train.classes[label]}), results.frame(rows)

    def tiny_decoder(self) -> AutoencoderTiny:
        """The guidance decoder: TAESD's folder at "paper", the stand-in's own elsewhere. Raises FileNotFoundError without it."""
        if self.scale != "paper":
            return standin.tiny_decoder(self.train.name).to(self.device)
        folder = cache_dir() / "models" / "taesd"
        if not folder.is_dir():
            raise FileNotFoundError(f"no guidance decoder in {folder}: copy TAESD's folder there (hf download madebyollin/taesd --local-dir {folder})")
        return AutoencoderTiny.from_pretrained(folder).to(self.device).eval()

    def extractor(self) -> metrics.Extractor:
        """The features that distances are measured in: Inception-V3's at "paper", the surrogate's last checkpoint's on a stand-in."""
        if self.scale == "paper":
            return metrics.inception(device=self.device)
        return metrics.network_extractor(self._last_checkpoint()[0], self.surrogate_name)

    def accuracy_rows(self, sets: Sets, ipc: int, networks: str | Sequence[str]) -> pd.DataFrame:
        """Accuracies of networks trained on every set (training seed = generation seed), five rows a set and network:
        `top1` as the protocol reports it, `top1_last`, `top1_best`, `top5_last`, `top5_best`. Finished cells are read from disk.
        """
        names, teacher, rows = [networks] if isinstance(networks, str) else networks, self.teacher(), []
        for (method, seed), images in progress(list(sets.items()), "evaluate, set", every=20):
            data = in_memory(images)
            settings = [self.protocol, fingerprint(data), self.test.name, self.test.split, len(self.test), teacher and teacher.weights, self.device]
            scores = evaluate_all(
                data, self.test, networks=names, seeds=[seed], protocol=self.protocol, teacher=teacher, device=self.device,
                folder=cache_dir() / "scores" / results.settings_hash(settings), ray=ray_cluster() if len(names) > 1 else False,
            )  # fmt: skip
            for score in scores:
                values = {"top1": score.reported, "top1_last": score.last, "top1_best": score.best, "top5_last": score.last_top5, "top5_best": score.best_top5}
                shared = dict(seconds=score.seconds, network=score.network, device=f"{self.device}, {score.precision}")  # precision depends on the processor
                rows += [self.row(method, ipc, seed, metric, value, **shared) for metric, value in values.items()]
        return results.frame(rows)

    def all_rows(self, sets: Sets, ipc: int, network: str, reference: str) -> pd.DataFrame:
        """Accuracies, influence loss and the three of `latent_rows` of every sampled set."""
        return pd.concat([self.accuracy_rows(sets, ipc, network), self.influence_rows(sets, ipc), self.latent_rows(sets, ipc, reference)], ignore_index=True)

    def save(self, *frames: pd.DataFrame, folder: str = "") -> None:
        """Store rows, one JSON file each, under `$IGD_CACHE/results`, and as `rows.csv` in `folder` if given."""
        rows = pd.concat(frames, ignore_index=True)
        for record in rows.to_dict("records"):
            results.append(cache_dir() / "results", results.Row(**record))
        if folder:
            files.write(Path(folder) / "rows.csv", rows.to_csv(index=False, lineterminator="\n"))

    def keep_images(self, pictures: Mapping[str, Tensor], titles: Sequence[str], title: str, folder: str) -> None:
        """Write what `plotting.gallery` shows as pixels, `folder/images.png`, and its words beside them, if a folder is given."""
        if folder:
            grid = torch.cat([torch.cat(list(row), dim=2) for row in pictures.values()], dim=1)
            files.write(Path(folder) / "images.png", lambda path: Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path, format="PNG"))
            words = pd.DataFrame([(row, title, *titles) for row in pictures], columns=["row", "title", *map(str, range(len(titles)))])
            self.keep_table(words, folder, "images")

    def keep_table(self, table: pd.DataFrame, folder: str, name: str) -> None:
        """Write a table that is no result row (coordinates, curves), with its origin, as `folder/NAME.csv` if a folder is given."""
        if folder:
            origin = dict(dataset=self.train.name, scale=self.scale, git_revision=results.git_revision())
            files.write(Path(folder) / f"{name}.csv", table.assign(**origin).to_csv(index=False, lineterminator="\n"))

    def gallery_rows(self, sets: Sets, columns: int) -> dict[str, Tensor]:
        """Two rows a class, without and with guidance, by "CLASS, METHOD": uint8 (columns, 3, H, W), the first images."""
        found = {}
        for label in self.classes or range(len(self.train.classes)):
            for method, images in self.images_of(sets, label, seeds=1, first=columns).items():
                found[f"{self.train.classes[label]}, {method}"] = images
        return found

    def across_classes(self, sets: Sets, classes: int = 10) -> dict[str, Tensor]:
        """Per method, uint8 (n, 3, H, W): the first image of each of the first classes, seed 0."""
        labels = (self.classes or list(range(len(self.train.classes))))[:classes]
        once = {cell: in_memory(images) for cell, images in sets.items() if cell[1] == 0}
        parts = [self.images_of(once, label, seeds=1) for label in labels]
        return {method: torch.cat([part[method] for part in parts]) for method in parts[0]}

    def images_of(self, sets: Sets, label: int, seeds: int, first: int = 1) -> dict[str, Tensor]:
        """Per method, uint8 (n, 3, H, W): one class's first `first` images of each seed, in the same order for every method."""
        found: dict[str, list[Tensor]] = {}
        for (method, seed), images in sets.items():
            if seed < seeds:
                found.setdefault(method, []).append(in_memory(images).of_class(label, first))
        return {method: torch.cat(parts) for method, parts in found.items()}


    def on_validation(self) -> Experiment:
        """The same with the validation split of the training data in place of the test images: for choosing settings.

        At "paper" the last tenth of each class's training images, which the surrogate has seen too.
        """
        spec = DATASETS[self.train.name]
        held = load(replace(spec, holdout=spec.holdout or 0.1), "validation")
        count = len(self.test) // len(self.test.classes)
        return replace(self, test=held.first(count) if self.scale != "paper" else held)


def imagenet_teacher(classes: Sequence[str], label_ids: Sequence[int]) -> Teacher:
    """torchvision's ResNet-18 of ImageNet-1K (RDED's teacher), reduced to the logits of `classes` at `label_ids`.

    Its file is checked against the hash in its name and read as weights only. Raises FileNotFoundError where it can
    neither be found nor downloaded.
    """
    weights = ResNet18_Weights.IMAGENET1K_V1
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise FileNotFoundError(f"the teacher's weights could not be had ({error}); download {weights.url} to {place}") from error
    model = network("timm/resnet18", num_classes=1000, image_size=224)
    model.load_state_dict(state)
    ids = torch.tensor(list(label_ids))
    model.fc.weight, model.fc.bias = (torch.nn.Parameter(value.detach()[ids]) for value in (model.fc.weight, model.fc.bias))
    return Teacher(model, "resnet18", weights.url.rsplit("/", 1)[-1], tuple(classes), RDED_SOFT.mean, RDED_SOFT.std)
