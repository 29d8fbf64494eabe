"""Minimax fine-tuning of a DiT (Gu et al., CVPR 2024) into a folder for `IGDPipeline`.

Few parameters are trained, against two memories.

`accelerate launch -m igd_lib minimax DATASET OUT` trains on one GPU, several or a CPU, a batch of 8 divided
among them; an interrupted run goes on where it was. DiT-XL/2's weights, and what is fine-tuned from them, are
under CC-BY-NC 4.0 (no commercial use).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from igd_lib.baselines.tuning import TRANSFORMER, Tuning, Work, settings_of, tune, work_folder
from igd_lib.data.datasets import IMAGENET_CLASSES, DataSpec, Resize
from igd_lib.data.images import ImageData
from igd_lib.distillation import Wanted, fill
from igd_lib.models import loadable
from igd_lib.models.dit import class_ids
from igd_lib.models.folder import is_whole, names_by_id
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampling import Sampling, architecture
from igd_lib.sets.store import DistilledSet
from igd_lib.tools import files, keys


@dataclass(frozen=True, kw_only=True)
class Minimax(Tuning):
    """How a DiT is fine-tuned; the defaults are those of the released training script and its `run.sh`.

    The script is given eight epochs and writes its one checkpoint after 12,000 steps, which is sampled: for
    ten classes of ImageNet a little before the epochs end (12,448 steps for ImageWoof, 12,888 for
    ImageNette), for more classes long before. With fewer than 12,000 images it writes none; here it is then
    all epochs.
    """

    epochs: int = 8
    steps: int | None = 12_000
    batch_size: int = 8
    lr: float = 1e-3
    ema: float = 0.9999
    real_weight: float = 0.002  # of 1 - the lowest cosine to the class's real latents
    generated_weight: float = 0.008  # of the highest cosine to the class's earlier predictions
    memory_size: int = 64  # latents a class, first in, first out, of either kind
    label_dropout: float = 0.1
    flip: bool = True
    posterior: Literal["sample", "mean"] = "sample"
    resize: Resize = "bicubic-halving"  # DiT's way, not the one of the sets' evaluation
    images: int | None = None
    seed: int = 0


# --- the losses


class Memory(nn.Module):
    """The last `size` vectors of each class, first in, first out; buffers, so saved with the training."""

    entries: Tensor  # (classes, size, dimension)
    count: Tensor  # (classes,): ever pushed

    def __init__(self, classes: int, size: int, dimension: int):
        super().__init__()
        self.register_buffer("entries", torch.zeros(classes, size, dimension))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.long))  # ever pushed

    def of(self, label: int) -> Tensor:
        """(m, D), in no particular order; m = 0 at first."""
        return self.entries[label, : min(int(self.count[label]), self.entries.shape[1])]

    @torch.no_grad()
    def push(self, vectors: Tensor, labels: Tensor) -> None:
        """Add (B, D) in order."""
        for vector, label in zip(vectors, labels.tolist(), strict=True):
            self.entries[label, int(self.count[label]) % self.entries.shape[1]] = vector
            self.count[label] += 1


def minimax_losses(clean: Tensor, labels: Tensor, real: Memory, generated: Memory) -> tuple[Tensor, Tensor]:
    """Representativeness and diversity losses, scalars (Minimax's Eqs. 3 and 5, as its code has them).

    clean: predicted clean latents (B, ...); labels (B,). For every class of the batch the lowest cosine of
    its predictions to the real memory, subtracted from 1, and the highest to the generated memory; each is
    averaged over the batch's classes, to which a class with empty memories adds nothing.
    """
    vectors = F.normalize(clean.flatten(1).float(), dim=1)
    representativeness, diversity = vectors.new_zeros(()), vectors.new_zeros(())
    present = labels.unique().tolist()
    for label in present:
        if len(generated.of(label)) and len(real.of(label)):
            own = vectors[labels == label]
            representativeness = representativeness + 1 - (own @ F.normalize(real.of(label), dim=1).T).min()
            diversity = diversity + (own @ F.normalize(generated.of(label), dim=1).T).max()
    return representativeness / len(present), diversity / len(present)


class Memories:
    """Minimax's two losses, against the memories of real latents and of earlier predictions."""

    def __init__(self, recipe: Minimax, classes: int, dimension: int, device: torch.device):
        self.real, self.generated = (
            Memory(classes, recipe.memory_size, dimension).to(device) for _ in range(2)
        )
        self.memories: dict[str, nn.Module] = {"real": self.real, "generated": self.generated}
        self.weights = {"representativeness": recipe.real_weight, "diversity": recipe.generated_weight}

    def losses(self, clean: Tensor, labels: Tensor) -> Sequence[Tensor]:
        """`minimax_losses` of a part of a batch."""
        return minimax_losses(clean, labels, self.real, self.generated)

    def after(self, latents: Tensor, clean: Tensor, labels: Tensor) -> None:
        """Remember both kinds, (B, D) each."""
        self.real.push(latents, labels)
        self.generated.push(clean, labels)


# --- training


def settings(
    pipe: IGDPipeline,
    data: ImageData,
    recipe: Minimax,
    classes: Sequence[int],
    label_ids: Sequence[int],
    accumulate: int = 1,
    mixed_precision: str = "no",
) -> dict[str, Any]:
    """What names a fine-tuned model on disk."""
    return settings_of(pipe, data, classes, accumulate, mixed_precision) | {
        "label_ids": list(label_ids),
        "recipe": asdict(recipe),
    }


def finetune(
    pipe: IGDPipeline,
    data: ImageData,
    out: str | Path,
    *,
    recipe: Minimax | None = None,
    classes: Sequence[int] | None = None,  # the labels to train on, e.g. one of `shards`; None: all
    label_ids: Sequence[int] | None = None,  # the transformer's id of every class; None: see `class_ids`
    mixed_precision: str = "no",  # "no", "bf16" or "fp16"
    accumulate: int = 1,  # parts of a batch, one after the other in each process
) -> Path:
    """Fine-tune `pipe`'s transformer on `data`; write a pipeline folder, the scales folded into its weights.

    Returns the folder, and says how much of the untuned model is left in its averaged weights. `pipe` itself
    stays as it is. Each part's losses see its own predictions alone, as each process's do in the released
    script; but the memories are common to all, where that has one a process. Errors as `tuning.tune` and
    `dit.class_ids`.
    """
    recipe = recipe or Minimax()
    selected = list(range(len(data.classes))) if classes is None else list(classes)
    ids = class_ids(pipe.transformer, len(data.classes), label_ids)
    config = pipe.transformer.config
    dimension = config.in_channels * config.sample_size**2
    work = Work(
        "minimax",
        settings(pipe, data, recipe, selected, ids, accumulate, mixed_precision),
        recipe,
        "difffit",
        selected,
        ids,
        names_by_id(pipe.labels),
        lambda device: Memories(recipe, len(ids), dimension, device),
        mixed_precision,
        accumulate,
    )
    return tune(pipe, pipe.transformer, data, out, work)


# --- shards


def shards(classes: int, count: int) -> list[list[int]]:
    """`classes` labels in `count` consecutive shards of nearly equal size.

    ImageNet-1K is fine-tuned a shard at a time.
    """
    if not 1 <= count <= classes:
        raise ValueError(f"count is 1 ... {classes}, got {count}")
    edges = [classes * i // count for i in range(count + 1)]
    return [list(range(a, b)) for a, b in zip(edges, edges[1:], strict=False)]


_NAME = re.compile(r"shard-(\d+)-of-(\d+)")


@dataclass(frozen=True)
class Shards:
    """Models fine-tuned on a shard of the classes each, pipeline folders `shard-007-of-100` of one folder.

    `find` reads how many there are from the folder.
    """

    folder: Path
    classes: tuple[str, ...]  # of the data, in label order
    count: int

    @classmethod
    def find(cls, folder: str | Path, classes: Sequence[str]) -> Shards | None:
        """The shards of a folder, whole ones; None where there is none.

        Raises ValueError where shards of several divisions lie beside each other.
        """
        names = (
            _NAME.fullmatch(path.name) for path in sorted(Path(folder).glob("shard-*")) if is_whole(path)
        )
        counts = sorted({int(name[2]) for name in names if name})
        if len(counts) > 1:
            raise ValueError(f"{folder} holds shards of {counts[0]} and of {counts[1]}; remove either kind")
        return cls(Path(folder), tuple(classes), counts[0]) if counts else None

    @cached_property
    def labels(self) -> list[list[int]]:
        """Every shard's labels."""
        return shards(len(self.classes), self.count)

    def path(self, shard: int) -> Path:
        """A shard's pipeline folder, there or not."""
        return self.folder / f"shard-{shard:03d}-of-{self.count:03d}"

    def shard_of(self, label: int) -> int:
        """The shard that a label is in. Raises ValueError for none of the labels."""
        for number, labels in enumerate(self.labels):
            if label in labels:
                return number
        raise ValueError(f"labels are 0 ... {len(self.classes) - 1}, got {label}")

    @property
    def missing(self) -> list[int]:
        """The shards without a finished model."""
        return [shard for shard in range(self.count) if not is_whole(self.path(shard))]

    def describe(self) -> str:
        """Which are missing, in a line: "98 of 100 shards in FOLDER; missing: 3, 7"."""
        lacking = self.missing
        line = f"{self.count - len(lacking)} of {self.count} shards in {self.folder}"
        return f"{line}; missing: {', '.join(map(str, lacking))}" if lacking else line

    def parts(self, classes: Sequence[str], labels: Sequence[int]) -> dict[int, list[int]]:
        """The labels of a set that has these classes, or some of them, by their shard, in the shards' order.

        Raises ValueError for a class that no shard knows.
        """
        own = {name: label for label, name in enumerate(self.classes)}
        if unknown := [classes[label] for label in labels if classes[label] not in own]:
            raise ValueError(f"no shard in {self.folder} is of the class {unknown[0]!r}")
        found: dict[int, list[int]] = {}
        for label in labels:
            found.setdefault(self.shard_of(own[classes[label]]), []).append(label)
        return dict(sorted(found.items()))

    def problems(self) -> list[str]:
        """What keeps the classes from being sampled, a line a problem; no weights are loaded."""
        lines = [self.describe()] if self.missing else []
        for shard in range(self.count):
            if is_whole(self.path(shard)):
                try:
                    self.digest_of(shard)
                except ValueError as error:
                    lines.append(str(error))
                lines += loadable.problems(self.path(shard), parts=("transformer",))
        return lines

    def digest_of(self, shard: int) -> str:
        """The digest of a shard's weights when they were finished.

        Raises FileNotFoundError where the shard is missing, ValueError where it was trained on other classes.
        """
        path = self.path(shard)
        if not is_whole(path):
            raise FileNotFoundError(f"no model in {path}: {self.describe()}")
        return _trained_on(path, [self.classes[label] for label in self.labels[shard]])

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits of all shards' weights; raises as `digest_of`."""
        return keys.settings_hash([self.digest_of(shard) for shard in range(self.count)])

    def pipe(self, shard: int, **models: Any) -> IGDPipeline:
        """A shard's pipeline, read anew each time; `models` as of `from_pretrained` (`vae`).

        Raises as `digest_of`, and ValueError where its weights are no longer those that were finished.
        """
        digest, path = self.digest_of(shard), self.path(shard)
        found = IGDPipeline.from_pretrained(path, **models)
        if files.digest(found.transformer.state_dict()) != digest:
            raise ValueError(f"{path}: its weights are not those that it was finished with; copy it again")
        return found


def _trained_on(folder: Path, classes: Sequence[str]) -> str:
    """The digest of a fine-tuned folder's weights; ValueError where it was tuned on other classes."""
    note = folder / "minimax.json"
    try:
        content = json.loads(note.read_text())
        trained, digest = list(content["settings"]["classes"]), str(content[TRANSFORMER])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{note} is damaged, or of an earlier version ({type(error).__name__}: {error}); copy the folder "
            "again, or fine-tune again"
        ) from error
    if trained != list(classes):
        raise ValueError(
            f"{folder} was fine-tuned on other classes: {', '.join(trained[:3])} ..., wanted "
            f"{', '.join(classes[:3])} ...; is it of another data set or class order?"
        )
    return digest


def problems(folder: str | Path, spec: DataSpec) -> list[str]:
    """What keeps a folder from being the Minimax model of a data set, or its shards; a line a problem.

    One model may be fine-tuned here or converted; shards are fine-tuned here.
    """
    folder = Path(folder)
    known = len(IMAGENET_CLASSES) if spec.label_ids else len(spec.classes) or None
    if not is_whole(folder):
        try:
            division = Shards.find(folder, spec.classes)
        except ValueError as error:
            return [str(error)]
        if division is not None:
            return division.problems()
        begun = work_folder(folder).is_dir()
        again = "; its fine-tuning is unfinished, the same command goes on" if begun else ""
        return [f"no Minimax model in {folder}{again}"]
    lines = loadable.problems(folder, parts=("transformer",), classes=known, image_size=spec.image_size)
    if (folder / "minimax.json").is_file():
        try:
            _trained_on(folder, spec.classes)
        except ValueError as error:
            lines.append(str(error))
    return lines


# --- sampling with shards


@dataclass(frozen=True)
class ShardedSampling(Sampling):
    """Sampling of a set whose classes are denoised by the models of their shards.

    Its `pipe` has the autoencoder and the scheduler. It names the set, by all shards' weights; `of_shard` is
    what samples.
    """

    shards: Shards = field(kw_only=True)
    shard: int | None = None  # whose model `pipe` has

    @property
    def settings(self) -> dict[str, Any]:
        """As one model's, with a digest of all."""
        own = {"model": self._architecture, "transformer": self.shards.digest}
        return super().settings | own

    @property
    def _architecture(self) -> dict[str, Any]:
        """That of the first shard's model, of which no weights are read."""
        kind = DiTTransformer2DModel
        with torch.device("meta"):
            return architecture(kind.from_config(kind.load_config(self.shards.path(0) / "transformer")))

    def of_shard(self, shard: int) -> ShardedSampling:
        """The same with a shard's model. Raises as `Shards.pipe`, ValueError for another architecture."""
        pipe = self.shards.pipe(shard, vae=self.pipe.vae, scheduler=self.pipe.scheduler)
        if difference := files.difference(architecture(pipe.transformer), self._architecture, "model"):
            raise ValueError(f"{self.shards.path(shard)} is another model than the first shard: {difference}")
        return replace(self, pipe=pipe.to(self.pipe._execution_device), shard=shard)

    def sample(self, *given: Any, **options: Any) -> Tensor:
        """As `Sampling.sample`. Raises RuntimeError where no shard was chosen."""
        if self.shard is None:
            raise RuntimeError("a set of several shards is sampled shard by shard: `fill_by_shard`")
        return super().sample(*given, **options)


def fill_by_shard(
    wanted: Wanted, out_dir: str | Path, *, only: Sequence[int] | None = None, **options: Any
) -> DistilledSet:
    """`distillation.fill`, each class by the model of its shard where there are shards.

    One is in memory at a time; one whose classes are finished is not read.
    """
    sampling = wanted.sampling
    if not isinstance(sampling, ShardedSampling):
        return fill(wanted, out_dir, only=only, **options)
    labels = wanted.selected if only is None else list(only)
    for shard, own in sampling.shards.parts(wanted.data.classes, labels).items():
        if not _is_finished(out_dir, own):
            fill(replace(wanted, sampling=sampling.of_shard(shard)), out_dir, only=own, **options)
    return fill(wanted, out_dir, only=labels, **options)  # nothing is left: it compares the settings


def _is_finished(folder: str | Path, labels: Sequence[int]) -> bool:
    """Whether a set has all images of these classes."""
    if not (Path(folder) / "manifest.json").is_file():
        return False
    return not DistilledSet(folder).lacking(labels)
