"""What is measured of an experiment's sets, as result rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from igd_lib import memory
from igd_lib.analysis import features, metrics, results
from igd_lib.data.images import ImageData
from igd_lib.evaluation import Score, evaluate_sets, fingerprint
from igd_lib.experiment.experiment import Experiment, Images, Sets
from igd_lib.experiment.methods import Method
from igd_lib.experiment.registry import BASELINES
from igd_lib.protocols import IGD_HARD, MINIMAX_HARD, Protocol, labellings
from igd_lib.sets.store import DistilledSet, in_memory
from igd_lib.sets.terms import ORIGINS
from igd_lib.teachers import Teacher, check_teacher, labelled
from igd_lib.tools import cluster, files, keys
from igd_lib.tools.machine import ray_cluster, work_dir
from igd_lib.tools.progress import progress
from igd_lib.tools.version import git_revision


@dataclass(frozen=True)
class About:
    """What a row is of: one method's set of one seed."""

    experiment: Experiment
    method: Method
    seed: int
    images: Images
    ipc: int

    def row(
        self, metric: str, value: Any, *, seconds: float = 0.0, network: str = "", device: str = ""
    ) -> results.Row:
        """A result row with the experiment's scale and settings, and the revision that made the set."""
        experiment, scale = self.experiment, self.experiment.scale
        fields = self.method.columns(
            fidelity=scale.fidelity, num_steps=scale.num_steps, surrogate=scale.surrogate
        )
        return results.Row(
            artefact=experiment.artefact,
            dataset=experiment.test.name,
            ipc=self.ipc,
            network=network,
            protocol=scale.protocol.name,
            seed=self.seed,
            metric=metric,
            value=float(value),
            scale=scale.name,
            seconds=seconds,
            device=device or experiment.device,
            git_revision=_revision(self.images),
            settings_hash=keys.settings_hash(_settings(experiment)),
            **fields,
        )


def _revision(images: Images) -> str:
    """The revision of the code that made a set."""
    return (images.revision if isinstance(images, DistilledSet) else "") or git_revision()


def _settings(experiment: Experiment) -> dict[str, Any]:
    """The experiment's settings, which rows that are compared must share."""
    scale = experiment.scale
    names = (
        "guidance",
        "fidelity",
        "num_steps",
        "best_cfg",
        "protocol",
        "training",
        "train_images",
        "threshold",
    )
    return {name: getattr(scale, name) for name in names}


def _each(experiment: Experiment, sets: Sets, label: str, every: float = 10.0) -> Any:
    """Every set with what its rows are of, saying how far it is."""
    about = [About(experiment, method, seed, images, sets.ipc) for method, seed, images in sets]
    return progress(about, label, every=every)


def accuracy_rows(
    experiment: Experiment, sets: Sets, networks: str | Sequence[str] | None = None
) -> pd.DataFrame:
    """Accuracies of networks, by default the experiment's, trained on every set (training seed = generation
    seed), five rows a set and network: `top1` as the protocol reports it, `top1_last`, `top1_best`,
    `top5_last`, `top5_best`. Finished cells are read from disk.

    The protocol is the experiment's but for a method that has its own (`Baseline.protocol`).
    """
    names = [networks] if isinstance(networks, str) else list(networks or experiment.networks)
    own = [
        About(_evaluated(experiment, method), method, seed, images, sets.ipc) for method, seed, images in sets
    ]
    scores: dict[tuple[int, str], Score] = {}
    for protocol in dict.fromkeys(about.experiment.scale.protocol for about in own):
        alike = [number for number, about in enumerate(own) if about.experiment.scale.protocol == protocol]
        found = _scores([own[number] for number in alike], names)
        cells = [(number, name) for number in alike for name in names]
        scores |= dict(zip(cells, found, strict=True))
    where = ray_cluster()
    device = cluster.device(where, experiment.device) if where else experiment.device
    rows = []
    for number, about in enumerate(own):
        for name in names:
            rows += _rows_of(about, name, scores[number, name], device)
    return results.frame(rows)


def _evaluated(experiment: Experiment, method: Method) -> Experiment:
    """The experiment as the method's sets are evaluated in it."""
    own = BASELINES.get(method.family)
    if own is None or own.protocol is None:
        return experiment
    return experiment.with_protocol(own.protocol(experiment.scale))


def _scores(own: Sequence[About], networks: Sequence[str]) -> list[Score]:
    """Of sets that are evaluated alike, every network's, set after set."""
    experiment, where = own[0].experiment, ray_cluster()
    images: Sequence[Images] = [about.images for about in own]
    if experiment.scale.protocol.labels == "own":
        images = _with_labels(experiment, images)
    return evaluate_sets(
        images,
        experiment.test,
        [(number, name, about.seed) for number, about in enumerate(own) for name in networks],
        protocol=experiment.scale.protocol,
        teacher=experiment.teacher(),
        device=cluster.device(where, experiment.device) if where else experiment.device,
        folder=work_dir() / "evaluation",
        ray=where,
    )


def _rows_of(about: About, network: str, score: Score, device: str) -> list[results.Row]:
    """A score as rows."""
    values = {
        "top1": score.reported,
        "top1_last": score.last,
        "top1_best": score.best,
        "top5_last": score.last_top5,
        "top5_best": score.best_top5,
    }
    said = f"{device}, {score.precision}"  # precision depends on the processor
    return [
        about.row(metric, value, seconds=score.seconds, network=network, device=said)
        for metric, value in values.items()
    ]


def _with_labels(experiment: Experiment, sets: Sequence[Images]) -> Sequence[Images]:
    """Sets with soft labels of their own; those without any have the teacher's, which is checked first."""
    if all(isinstance(images, ImageData) and images.targets is not None for images in sets):
        return sets
    teacher, protocol = experiment.any_teacher(), experiment.scale.protocol
    check_teacher(teacher, experiment.test, protocol)
    return _Labelled(sets, teacher, protocol)


@dataclass(frozen=True)
class _Labelled(Sequence[Images]):
    """Sets and who labels them, which is done where a set is asked for."""

    sets: Sequence[Images]
    teacher: Teacher
    protocol: Protocol

    def __len__(self) -> int:
        return len(self.sets)

    def __getitem__(self, number: Any) -> Any:
        found = in_memory(self.sets[number])
        return found if found.targets is not None else labelled(found, self.teacher, self.protocol)


def labelled_rows(
    experiment: Experiment, sets: Sets, networks: str | Sequence[str] | None = None
) -> pd.DataFrame:
    """`accuracy_rows` of the same sets with labels of every kind (`protocols.labellings`), in equal steps."""
    networks = networks or experiment.networks
    ways = labellings(experiment.scale.protocol).values()
    rows = [accuracy_rows(experiment.with_protocol(protocol), sets, networks) for protocol in ways]
    return pd.concat(rows, ignore_index=True)


def validation_rows(experiment: Experiment, sets: Sets, networks: str | Sequence[str]) -> pd.DataFrame:
    """`labelled_rows` on validation images, as rows of an artefact of their own: to choose by."""
    held = replace(experiment.on_validation(), artefact=f"{experiment.artefact}_validation")
    return labelled_rows(held, sets, networks)


def readings(experiment: Experiment, networks: Sequence[str]) -> list[tuple[Experiment, list[str]]]:
    """The ways in which a set's accuracy may have been read: an experiment with each protocol and test set,
    and the networks to train.

    At the paper's scale both hard-label protocols, ResNet-10 beside ResNetAP-10 (the released scripts name
    either), and fastai's images where they are found. On a stand-in its own protocol with ten tests, so that
    the best accuracy can differ from the last.
    """
    experiment = replace(experiment, artefact=f"{experiment.artefact}_readings")
    if not experiment.scale.papers:
        own = experiment.scale.protocol
        ten = replace(own, name=f"{own.name}, ten tests", evaluations=10)
        return [(experiment.with_protocol(ten), list(networks))]
    names = [*networks, *(["resnet10"] if "resnetap10" in networks else [])]
    ways = [experiment.with_protocol(experiment.scale.cut(one)) for one in (IGD_HARD, MINIMAX_HARD)]
    return [(one, names) for one in [*ways, *experiment.on_fastai()]]


def reading_rows(experiment: Experiment, sets: Sets, networks: Sequence[str]) -> pd.DataFrame:
    """`accuracy_rows` of the same sets in every way of `readings`."""
    found = readings(experiment, networks)
    rows = [accuracy_rows(one, sets, names) for one, names in found]
    return pd.concat(rows, ignore_index=True)


def influence_rows(experiment: Experiment, sets: Sets) -> pd.DataFrame:
    """Mean influence loss (Eq. 7) of each set's finished images by the retained checkpoints, a row a set."""
    (checkpoints, gradients), rows = experiment.retained, []
    for about in _each(experiment, sets, "influence loss, set"):
        own = in_memory(about.images).at(experiment.train.image_size)  # RDED's have sides of their own
        losses = metrics.influence_of_set(own, checkpoints, gradients, device=experiment.device)
        rows.append(about.row("influence_loss", losses.mean()))
    return results.frame(rows)


def latent_rows(experiment: Experiment, sets: Sets, reference: Method) -> pd.DataFrame:
    """Two rows a sampled set: `moved`, the mean relative distance of its final latents to `reference`'s on
    the same noise, where there is that; `nearest`, the mean cosine of a latent to the nearest other of its
    class.
    """
    rows = []
    for method, seed, images in sets.sampled():
        values: dict[str, Any] = {}
        if reference in sets.methods:
            values["moved"] = _moved(images, sets.distilled(reference, seed))
        if sets.ipc > 1:  # one image has no other
            parts = [metrics.nearest_cosine(images.latents(label).flatten(1)) for label in images.selected]
            values["nearest"] = torch.cat(parts).mean()
        about = About(experiment, method, seed, images, sets.ipc)
        rows += [about.row(metric, value) for metric, value in values.items()]
    return results.frame(rows)


def _moved(images: DistilledSet, others: DistilledSet) -> Tensor:
    """The mean relative distance of a set's latents to another's."""
    found = []
    for label in images.selected:
        own, plain = images.latents(label).flatten(1), others.latents(label).flatten(1)
        found.append((own - plain).norm(dim=1) / plain.norm(dim=1))
    return torch.cat(found).mean()


def cost_rows(experiment: Experiment, sets: Sets) -> pd.DataFrame:
    """Two rows a sampled set of what an image of it costs: `seconds an image` and `MiB an image`.

    The time is the machine's, measured anew (`Experiment.seconds_an_image`): a set may have been sampled
    elsewhere, or in batches of another size. A seed is a round of all methods, so that what else the machine
    does for a while is not one method's; a first image warms it up. Memory is counted (`memory.by_image`), so
    that it is the same on every machine and for every set of a method; the models' weights, which all images
    share, are left out.
    """
    rows, known = [], {}
    rounds = sorted(sets.sampled(), key=lambda one: one[1])
    for method, seed, _ in rounds[:1]:
        experiment.seconds_an_image(method, seed)
    for method, seed, images in progress(rounds, "seconds, set"):
        if method not in known:
            known[method] = memory.by_image(experiment.sampling(method).for_set(sets.ipc)) / 2**20
        about = About(experiment, method, seed, images, sets.ipc)
        each = experiment.seconds_an_image(method, seed)
        rows += [about.row("seconds an image", each), about.row("MiB an image", known[method])]
    return results.frame(rows)


def redundancy_rows(experiment: Experiment, sets: Sets, network: str) -> pd.DataFrame:
    """`redundancy` of every set: top-1 (%) on half of its images of a network that was trained on the others.

    After LGD: the more one half of each class's images says of the other, the less that adds. Every second
    image is a half; the mean of both directions. Noise and images of a wrong class are not redundant either.
    Hard labels, the protocol's settings, the last accuracy, training seed = generation seed. One image a
    class has no halves: then there are no rows.
    """
    if sets.ipc < 2:
        return results.frame([])
    hard = experiment.with_protocol(labellings(experiment.scale.protocol)["hard"])
    rows, where = [], ray_cluster()
    device = cluster.device(where, experiment.device) if where else experiment.device
    for about in _each(hard, sets, "redundancy, set"):
        halves = _halves(in_memory(about.images).plain())
        scores = [
            evaluate_sets(
                [train],
                test,
                [(0, network, about.seed)],
                protocol=hard.scale.protocol,
                device=device,
                folder=work_dir() / "evaluation",
                ray=where,
            )[0]
            for train, test in (halves, halves[::-1])
        ]
        value, seconds = fmean(one.last for one in scores), sum(one.seconds for one in scores)
        rows.append(about.row("redundancy", value, seconds=seconds, network=network))
    return results.frame(rows)


def _halves(data: ImageData) -> tuple[ImageData, ImageData]:
    """The even and the odd images of each class.

    Their names hold their pixels' fingerprint: a score on disk knows test images by name and number alone.
    """
    own = [data.class_indices(label) for label in range(len(data.classes))]
    halves = [data.subset(torch.cat([indices[start::2] for indices in own])) for start in (0, 1)]
    even, odd = (replace(half, split=f"{half.split}, half {fingerprint(half)}") for half in halves)
    return even, odd


def all_rows(experiment: Experiment, sets: Sets, network: str, reference: Method) -> pd.DataFrame:
    """Accuracies, influence loss and the two of `latent_rows` of every sampled set."""
    parts = [
        accuracy_rows(experiment, sets, network),
        influence_rows(experiment, sets),
        latent_rows(experiment, sets, reference),
    ]
    return pd.concat(parts, ignore_index=True)


def distribution_rows(experiment: Experiment, sets: Sets, *, images: int = 500) -> pd.DataFrame:
    """Fréchet distance, coverage and Wasserstein distance of every set to real images (Table 11).

    `images` training ones a class.

    In the features of `Models.extractor`; every metric's name says which. Coverage's threshold in Inception's
    space is the paper's 300, read as a squared distance; elsewhere the median distance of a real image to its
    nearest in another real draw of IPC images a class. Neither that draw nor images that a Random set
    selected are in the reference.
    """
    extractor, real, threshold = _reference(experiment, sets, images)
    spread, rows = metrics.gaussian(real), []
    for about in _each(experiment, sets, "distances, set"):
        fake = features.features(extractor, in_memory(about.images))
        values = {
            metrics.distance_name(extractor): metrics.frechet_distance(spread, fake),
            f"coverage over {extractor.space}": metrics.coverage(real, fake, threshold),
            f"Wasserstein over {extractor.space}": metrics.wasserstein(real, fake),
        }
        rows += [about.row(metric, value) for metric, value in values.items()]
    return results.frame(rows)


def coverage_rows(experiment: Experiment, sets: Sets, *, images: int = 500) -> pd.DataFrame:
    """The coverage of `distribution_rows` alone; of few real images where figures mean nothing."""
    scale = experiment.scale
    count = images if scale.figures_mean_something else min(images, scale.candidates)
    extractor, real, threshold = _reference(experiment, sets, count)
    rows = []
    for about in _each(experiment, sets, "coverage, set"):
        value = metrics.coverage(real, features.features(extractor, in_memory(about.images)), threshold)
        rows.append(about.row(f"coverage over {extractor.space}", value))
    return results.frame(rows)


def _reference(experiment: Experiment, sets: Sets, images: int) -> tuple[features.Extractor, Tensor, float]:
    """A space, the features of real images in it, and coverage's threshold."""
    extractor = experiment.models.extractor()
    reference, other = _real_images(experiment, sets, images)
    real, others = features.features(extractor, reference), features.features(extractor, other)
    return (
        extractor,
        real,
        300**0.5 if extractor.is_inception else metrics.coverage_threshold(real, others),
    )


def _real_images(experiment: Experiment, sets: Sets, images: int) -> tuple[ImageData, ImageData]:
    """About `images` real ones a class to compare with, and another draw of IPC ones."""
    train = experiment.train
    drawn = train.per_class(min(images + sets.ipc, len(train) // len(train.classes)), seed=99)
    labels = range(len(drawn.classes))
    order = torch.cat([drawn.class_indices(label)[: sets.ipc] for label in labels])
    rest = torch.cat([drawn.class_indices(label)[sets.ipc :] for label in labels])
    # Random's images do not cover themselves.
    chosen = [own for _, _, own in sets if isinstance(own, ImageData)]
    taken = {image.numpy().tobytes() for own in chosen for image in own.fetch(torch.arange(len(own)))}
    free = torch.tensor([image.numpy().tobytes() not in taken for image in drawn.fetch(rest)])
    return drawn.subset(rest[free]), drawn.subset(order)


def map_of_sets(
    experiment: Experiment, sets: Sets, label: int, *, images: int = 300
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A joint t-SNE, and result rows of Wasserstein distances, of one class.

    Of every set of one seed, and `images` real training ones of it.

    In the features that `distribution_rows` measures in.
    """
    extractor = experiment.models.extractor()

    def points(data: ImageData) -> Tensor:
        return features.features(extractor, data.subset(data.class_indices(label)[:images]))

    real, first = points(experiment.train), sets.of_seed(sets.shown_seed)
    own = {method: points(in_memory(found)) for method, found in first.items()}
    rows = [
        About(experiment, method, sets.shown_seed, first[method], sets.ipc).row(
            f"Wasserstein over {extractor.space}", metrics.wasserstein(real, found)
        )
        for method, found in own.items()
    ]
    count = len(real) + sum(map(len, own.values()))
    named = {"real": real} | {method.label: found for method, found in own.items()}
    places = metrics.joint_tsne(named, perplexity=min(30.0, count // 3))
    return places.assign(**{"class": experiment.train.classes[label]}), results.frame(rows)


def notes(experiment: Experiment, sets: Sets, folder: str = "") -> str:
    """Of rows that are no guided sampling: what their images are, whether networks are trained on them in a
    way of their own, and which settings are not the authors'. Kept as `folder/notes.md` if one is given.
    """
    lines = []
    for method in sets.methods:
        if (own := BASELINES.get(method.family)) is None:
            continue
        line = f"- {method.label}: {ORIGINS[own.origin]}"
        if own.protocol is not None:
            line += f"; networks are trained by its own protocol, {own.protocol(experiment.scale).name}"
        if changed := own.shortened(experiment, sets.ipc):
            line += f"; settings (the authors'): {', '.join(changed)}"
        lines.append(line)
    text = "\n".join(lines) + "\n"
    if folder:
        files.write(Path(folder) / "notes.md", text)
    return text


def save(*frames: pd.DataFrame, folder: str = "") -> None:
    """Store rows, one JSON file each, in the cache's `results`, and as `rows.csv` in `folder` if given."""
    rows = pd.concat(frames, ignore_index=True)
    for record in rows.to_dict("records"):
        results.append(work_dir() / "results", results.Row(**record))
    if folder:
        files.write(Path(folder) / "rows.csv", rows.to_csv(index=False, lineterminator="\n"))


def save_table(experiment: Experiment, table: pd.DataFrame, folder: str, name: str) -> None:
    """Write a table of no result rows, with its origin, as `folder/NAME.csv` if a folder is given.

    Such are coordinates and curves.
    """
    if folder:
        origin = dict(dataset=experiment.train.name, scale=experiment.scale.name, git_revision=git_revision())
        files.write(
            Path(folder) / f"{name}.csv", table.assign(**origin).to_csv(index=False, lineterminator="\n")
        )
