"""The class x IPC loop: samples a data set class by class into a folder that can be resumed.

Classes are independent; image j of a class depends on images 0 ... j-1 through the deviation memory.
So a run batches over classes, and resumes each class from its longest prefix on disk. Every image's
noise comes from its own generator, so results do not depend on batch, order or restart; and a resumed run
samples in the batches of an uninterrupted one, so on the same device not even the last bit does.

A run holds the locks of the classes that it has in work, a chunk of them at a time: several runs into one
folder divide its classes among them.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igd_lib import memory
from igd_lib.config import STANDARD, Fidelity, Guidance
from igd_lib.data.images import ImageData, to_uint8
from igd_lib.data.resizing import Filter, needed
from igd_lib.guides import GuideFactory, Shortcuts
from igd_lib.models.dit import class_ids
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampling import Gradients, Precision, Sampling
from igd_lib.sets.store import RUN, DistilledSet, tensor_sha256
from igd_lib.surrogate import Checkpoints
from igd_lib.tools import cluster, files, keys
from igd_lib.tools.progress import progress, resumable
from igd_lib.tools.version import VERSION, git_revision

MANIFEST = "manifest.json"


def image_generator(seed: int, label: int, index: int) -> torch.Generator:
    """The generator of one image's noise: image `index` of the diffusion model's class `label`."""
    state = np.random.SeedSequence([seed, label, index]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def distill(
    pipe: IGDPipeline,
    dataset: ImageData,  # the training images, for class order and class gradients
    *,
    ipc: int,
    guidance: Guidance | Sequence[GuideFactory] | None,  # the paper's, other guides, or none
    checkpoints: Checkpoints | None,  # for k > 0
    out_dir: str | Path,
    seed: int = 0,
    classes: Sequence[int] | None = None,  # which labels of the data set; None: all
    # the diffusion model's id of every class; None: 0 ... C-1, of a model that has these classes alone
    label_ids: Sequence[int] | None = None,
    only: Sequence[int] | None = None,  # the labels that this run works on; None: all of `classes`
    # images that go through the models side by side; 0: as the set was begun, or at most 50 (without a memory
    # 100), as many as fit
    batch: int = 0,
    batch_classes: int | None = None,  # classes in work, and locked, at once; None: 50
    gradients: Gradients
    | None = None,  # such as `ClassGradients`; None: computed a batch of classes at a time
    cfg_scale: float = 4.0,
    num_steps: int = 50,
    fidelity: Fidelity = STANDARD,
    resize: Filter | None = None,  # of a model's images to the data's size, where it makes others
    precision: Precision = "float32",  # "tf32", or "bfloat16" for transformer and autoencoders
    recompute: bool = False,  # activations twice instead of keeping them: less memory, the same bits
    ray: bool
    | str = False,  # on a Ray cluster that sees `out_dir`: True a local one, or its address (extra [cluster])
    workers: int | None = None,  # of the cluster; None: one a GPU
    wait: bool = False,  # for classes that another run has in work, instead of refusing
    **shortcuts: Any,  # `sample_igd`'s: jacobian, guidance_decoder, every, checkpoints_per_step
) -> DistilledSet:
    """Sample `ipc` images of each class into `out_dir`, resuming what is there, and return the set.

    The manifest has the settings, the digests of all weights, and the revision of the code that made the set.
    A batch is halved where memory runs out, and where not even one image fits, `recompute` is on.
    Raises ValueError when `out_dir` holds a set of other settings or weights (the first difference is named),
    when the data's images have another size than the model's and no resize is declared, the model has other
    classes than the data and no `label_ids` say which are meant, or ipc < 1; FloatingPointError when latents
    or pixels are not finite (nothing of that batch is stored); OSError when `out_dir` cannot be written;
    BlockingIOError when another run has one of this run's classes in work; OutOfMemoryError when one image is
    too much.
    """
    decoder = shortcuts.pop("guidance_decoder", None)
    if unknown := set(shortcuts) - {"jacobian", "every", "checkpoints_per_step"}:
        raise TypeError(
            f"unknown options {sorted(unknown)}; shortcuts are jacobian, guidance_decoder, every, "
            "checkpoints_per_step"
        )
    paper = guidance if isinstance(guidance, Guidance) else None
    sampling = Sampling(
        pipe=pipe,
        guidance=paper,
        others=() if guidance is None or isinstance(guidance, Guidance) else guidance,
        checkpoints=checkpoints,
        gradients=gradients,
        cfg_scale=cfg_scale,
        num_steps=num_steps,
        fidelity=fidelity,
        shortcuts=Shortcuts(**shortcuts),
        guidance_decoder=decoder,
        resize=needed(resize, pipe.image_size, dataset.image_size),
        precision=precision,
        recompute=recompute,
    )
    ids = class_ids(pipe.transformer, len(dataset.classes), label_ids)
    wanted = Wanted(sampling, dataset, ipc, seed, _selected(dataset, classes), ids)
    run = Division(only, batch, batch_classes, ray, workers, wait)
    return _fill(wanted, Path(out_dir), run)


@dataclass(frozen=True)
class Wanted:
    """A set that is to be: how it is sampled, of what, how many."""

    sampling: Sampling
    data: ImageData
    ipc: int
    seed: int
    selected: list[int]  # labels of the data set
    ids: list[int]  # the diffusion model's id of every class

    def __post_init__(self) -> None:
        if self.ipc < 1:
            raise ValueError(f"ipc is at least 1, got {self.ipc}")
        object.__setattr__(self, "sampling", self.sampling.for_set(self.ipc))
        self.sampling.check_images_of(self.data)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the set's key is made of."""
        about = {
            "dataset": self.data.name,
            "classes": list(self.data.classes),
            "image_size": self.data.image_size,
            "resize": self.data.resize,  # of the images that class gradients are of
        }
        return about | {"label_ids": self.ids, "ipc": self.ipc} | self.sampling.settings

    @property
    def about(self) -> dict[str, Any]:
        """What the set is of, as its manifest says beside its kind, schema, key and settings."""
        return {
            "dataset": self.data.name,
            "classes": list(self.data.classes),
            "label_ids": self.ids,
            "selected": self.selected,
            "ipc": self.ipc,
            "seed": self.seed,
            "image_size": self.data.image_size,
        }


def _selected(data: ImageData, classes: Sequence[int] | None) -> list[int]:
    """The labels to sample, checked."""
    selected = list(range(len(data.classes))) if classes is None else [int(c) for c in classes]
    if not selected or min(selected) < 0 or max(selected) >= len(data.classes):
        raise ValueError(f"classes are labels 0 ... {len(data.classes) - 1}, got {selected}")
    if len(set(selected)) < len(selected):
        raise ValueError(f"classes names a label twice: {selected}")
    return selected


@dataclass(frozen=True)
class Division:
    """How the work on a set is divided, which it does not depend on but for rounding. `distill` says more."""

    only: Sequence[int] | None = None  # labels
    batch: int = 0  # images side by side; 0: what fits
    batch_classes: int | None = None
    ray: bool | str = False
    workers: int | None = None
    wait: bool = False

    def __post_init__(self) -> None:
        if self.batch < 0 or (self.batch_classes is not None and self.batch_classes < 1):
            raise ValueError(
                "batch is at least 1, or 0 for what fits, and batch_classes at least 1, got "
                f"{self.batch} and {self.batch_classes}"
            )

    def labels(self, selected: Sequence[int]) -> list[int]:
        """Those it works on, in the set's order."""
        wanted = set(selected if self.only is None else self.only)
        if strangers := sorted(wanted - set(selected)):
            raise ValueError(
                f"only names labels of the set's {len(selected)}, {strangers[0]} is none of them"
            )
        return [label for label in selected if label in wanted]

    def most(self, remembers: bool) -> int:
        """Images side by side at most where nobody says how many, as in every earlier version."""
        return max(self.batch_classes or 0, 50 if remembers else 100)


def fill(
    wanted: Wanted,
    out_dir: str | Path,
    *,
    only: Sequence[int] | None = None,
    batch: int = 0,
    batch_classes: int | None = None,
    ray: bool | str = False,
    workers: int | None = None,
    wait: bool = False,
) -> DistilledSet:
    """`distill` for a set that has been described: sample what `out_dir` lacks of it."""
    return _fill(wanted, Path(out_dir), Division(only, batch, batch_classes, ray, workers, wait))


def _fill(wanted: Wanted, path: Path, run: Division) -> DistilledSet:
    labels = run.labels(wanted.selected)
    out = _open(path, wanted)
    if not any(out.lacking([label]) for label in labels):
        return out

    def done() -> str:
        count = len(out.selected) * out.ipc - out.lacking()
        return f"{count} of {len(out.selected) * out.ipc} images are in {out.path}"

    if not run.wait:
        out.check_free(labels)
    for factory in wanted.sampling.others:  # with the models as they were given
        if factory.prepare is not None:
            factory.prepare([label for label in labels if out.lacking([label])])
    job = _Job(wanted, out.path, run.batch, run.most(wanted.sampling.remembers))
    with resumable(done):
        with files.locked(out.path, RUN, wait=True):
            out.remove_leftovers()
        if run.ray:
            _on_a_cluster(job, out, labels, run)
        else:
            chunks = chunked(labels, run.batch_classes or max(50, run.batch))
            with _here(job) as own:
                _in_turn(out, [[chunk] for chunk in chunks], own.run_all, run.wait)
    return DistilledSet(path)


def chunked(selected: Sequence[int], size: int) -> list[list[int]]:
    """Labels in chunks of that size, the last one perhaps smaller."""
    return [list(selected[i : i + size]) for i in range(0, len(selected), size)]


Chunks = list[list[int]]  # of labels


def _in_turn(
    out: DistilledSet, waves: list[Chunks], sample: Callable[[Chunks, str], object], wait: bool
) -> None:
    """Sample chunks of classes, a wave at a time, as far as no other run has them; then what is left."""
    while waves:
        left = []
        for number, wave in enumerate(waves, start=1):
            wave = [chunk for chunk in wave if out.lacking(chunk)]
            with out.claimed([label for chunk in wave for label in chunk]) as mine:
                others = [
                    [label for label in chunk if label not in mine and out.lacking([label])] for chunk in wave
                ]
                if not wait:
                    out.check_free([label for chunk in others for label in chunk])
                own = [[label for label in chunk if label in mine] for chunk in wave]
                sample([chunk for chunk in own if out.lacking(chunk)], f"classes {number}/{len(waves)}")
            left.append([chunk for chunk in others if chunk])
        waves = [wave for wave in left if wave]
        if waves:
            out.wait_for(waves[0][0][0])


def _on_a_cluster(job: _Job, out: DistilledSet, labels: list[int], run: Division) -> None:
    """Chunks of classes as tasks on Ray actors that hold the pipeline; this process holds their locks."""
    with cluster.cluster(run.ray) as ray:
        count, _ = cluster.workers_of(ray, run.workers)
        chunks = chunked(labels, run.batch_classes or min(50, -(-len(labels) // count)))

        def done() -> str:
            return f"{len(labels) * out.ipc - out.lacking(labels)} of {len(labels) * out.ipc} images"

        def sample(own: Chunks, _: str) -> None:
            if own:
                cluster.run_all(
                    ray,
                    _Job.run,
                    job,
                    own,
                    workers=run.workers,
                    label="distil, chunks of classes",
                    done=done,
                )

        _in_turn(out, [chunks], sample, run.wait)


@contextmanager
def _here(job: _Job) -> Iterator[_Job]:
    """The job, ready to be done by this process.

    Where its precision needs models of its own, the given ones wait in RAM meanwhile.
    """
    given = job.wanted.sampling
    device = given.pipe._execution_device
    ready = job.to(str(device))
    aside = [
        model for model in given.networks if not any(model is own for own in ready.wanted.sampling.networks)
    ]
    for model in aside:
        model.to("cpu")
    try:
        yield ready
    finally:
        for model in aside:
            model.to(device)


@dataclass
class _Pace:
    """How many images go through the models side by side: fewer once memory has run out."""

    images: int = 0  # 0: not known yet
    recompute: bool = False

    def each(self, items: Sequence[Item], work: Callable[[Sequence[Item]], object]) -> None:
        """`work` on all items, so many at a time; what ran out of memory is done again in halves.

        Raises OutOfMemoryError, with what helps, where one image is too much.
        """
        done = 0
        while done < len(items):
            part = items[done : done + self.images]
            if self._fits(part, work):
                done += len(part)
            else:
                gc.collect()
                torch.cuda.empty_cache()
                self.images = len(part) // 2
                print(
                    f"out of memory with {len(part)} images side by side: going on with {self.images} at a "
                    "time; what is done is kept",
                    flush=True,
                )

    @staticmethod
    def _fits(part: Sequence[Item], work: Callable[[Sequence[Item]], object]) -> bool:
        try:
            work(part)
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
            if len(part) == 1:
                raise torch.OutOfMemoryError(f"{_NO_ROOM} ({str(error).splitlines()[0]})") from error
            return False  # nothing of the batch is held any more when it is tried again
        return True


_NO_ROOM = (
    "one image is more than the memory holds. What helps: precision='bfloat16', recompute=True, "
    "jacobian='decoder', a smaller surrogate or fewer checkpoints, or a device with more memory"
)


@dataclass(frozen=True)
class _Job:
    """What a chunk of classes needs to be sampled, here or on a machine that sees the same folder."""

    wanted: Wanted
    path: Path
    batch: int  # as asked for; 0: what fits
    most: int  # images side by side where that is to be found out
    pace: _Pace = field(default_factory=_Pace)

    def to(self, device: str) -> _Job:
        """The same with its models on a device and in their precision."""
        return replace(self, wanted=replace(self.wanted, sampling=self.wanted.sampling.to(device).lowered()))

    def run_all(self, chunks: Chunks, where: str) -> None:
        """One chunk after another."""
        for chunk in chunks:
            self.run(chunk, f"distil, {where}, image")

    def run(self, chunk: Sequence[int], what: str = "distil, image") -> None:
        """Sample what is missing of the classes `chunk`, in the batches of an uninterrupted run."""
        out = DistilledSet(self.path)
        out.remove_leftovers(chunk)  # of a run or a worker that died
        finished = {label: out.valid(label) for label in chunk}
        if all(count == out.ipc for count in finished.values()):
            return
        device = self.wanted.sampling.pipe._execution_device
        # What was trained or read on another one follows the pipeline.
        wanted = self.to(str(device))._paced(out).wanted
        sampling = wanted.sampling
        # Without a memory, images of a class are independent too.
        rounds = 1 if sampling.remembers else max(1, self.pace.images // len(chunk))
        earlier: dict[int, list[Tensor]] = {label: [] for label in chunk}
        if sampling.remembers:
            earlier = {label: list(out.latents(label, finished[label]).to(device)) for label in chunk}
        guiding = chunk if sampling.influences else ()
        # They follow to the device with the batch that they guide.
        own = {label: sampling.class_gradients(wanted.data, label).cpu() for label in guiding}
        first = min(finished.values()) // rounds * rounds
        for start in progress(range(first, out.ipc, rounds), what):

            def sample(items: Sequence[Item], start: int = start) -> None:
                lacking = {(label, index) for label, index in items if index >= finished[label]}
                if lacking:
                    known = {label: earlier[label][:start] for label, _ in items}
                    for (label, _), latent in _sample(wanted, out, items, lacking, known, own).items():
                        earlier[label].append(latent)

            indices = range(start, min(start + rounds, out.ipc))
            self.pace.each([(label, index) for index in indices for label in chunk], sample)

    def _paced(self, out: DistilledSet) -> _Job:
        """The same with a batch that fits: the set's first one, which its manifest notes, where it does."""
        sampling, pace = self.wanted.sampling, self.pace
        if not pace.images:
            room = self.batch or _room(sampling)
            if room == 0 and not sampling.recompute:
                pace.recompute = True
                print(f"{_RECOMPUTING} ({sampling.pipe._execution_device})", flush=True)
                room = _room(replace(sampling, recompute=True))
            pace.images = _noted(out, self.batch, self.most, max(1, room))
        sampling = replace(sampling, recompute=sampling.recompute or pace.recompute)
        return replace(self, wanted=replace(self.wanted, sampling=sampling))


_RECOMPUTING = (
    "not even one image fits into the memory that is free: activations are computed twice instead of kept, "
    "which takes longer and changes nothing else"
)


def _room(sampling: Sampling) -> int:
    """How many images fit side by side; as many as one likes with models of a stand-in's size."""
    return memory.ANY if memory.weights(sampling) < memory.SMALL else memory.fitting(sampling)


def _noted(out: DistilledSet, asked: int, most: int, room: int) -> int:
    """The batch that was asked for, or that the set was begun with, or `most`, where there is room.

    The first one is noted in the manifest: with the same one a resumed run gives the same bits.
    """
    with files.locked(out.path, RUN, wait=True):
        manifest = DistilledSet(out.path).manifest  # another worker may have noted one meanwhile
        images = asked or min(manifest.get("batch", most), room)
        if "batch" not in manifest:
            files.write(out.path / MANIFEST, json.dumps(manifest | {"batch": images}, indent=2) + "\n")
    return images


Item = tuple[int, int]  # a label, and the number of an image of that class


def _sample(
    wanted: Wanted,
    out: DistilledSet,
    items: Sequence[Item],
    lacking: set[Item],
    known: Mapping[int, Sequence[Tensor]],  # earlier latents of each class
    gradients: Mapping[int, Tensor],
) -> dict[Item, Tensor]:
    """Sample one batch of images, store those that are lacking and return their latents."""
    sampling, started = wanted.sampling, time.monotonic()
    labels, ids = [label for label, _ in items], [wanted.ids[label] for label, _ in items]
    generators = [image_generator(wanted.seed, wanted.ids[label], index) for label, index in items]
    noise = sampling.pipe.latent_noise(generators)
    earlier = [torch.stack(list(known[label])) if known[label] else noise[:0] for label in labels]
    guides = sampling.guides(labels, [index for _, index in items], earlier, gradients, generators)
    with sampling.arithmetic():
        latents = sampling.sample(noise, ids, guides, generators)
        images = to_uint8(sampling.decode(latents)).cpu()
    seconds, found = (time.monotonic() - started) / len(items), {}
    for item, latent, image in zip(items, latents, images, strict=True):
        if item in lacking:
            found[item] = latent
            _store(out, item, latent, image, seconds)
    return found


def _store(out: DistilledSet, item: Item, latent: Tensor, image: Tensor, seconds: float) -> None:
    """Write one image and its latent; the latent comes last, with the sums of both."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    png = files.write(out.image_path(*item), lambda path: picture.save(path, format="PNG"))
    note = {
        "seconds": round(seconds, 4),
        "image_sha256": files.sha256(png),
        "latent_sha256": tensor_sha256(latent),
    }
    files.save_tensors(out.latent_path(*item), {"latent": latent}, **note)


def _open(path: Path, wanted: Wanted) -> DistilledSet:
    """Start a set, or reopen one of the same settings."""
    if not (path / MANIFEST).exists():
        # Under the lock: a run that samples removes what looks half-written. It is held for a moment.
        with files.locked(path, RUN, wait=True):
            if not (path / MANIFEST).exists():
                _begin(path, wanted)
    present = DistilledSet(path)
    found = files.difference(present.manifest, wanted.about)
    try:
        found = found or keys.difference("set", present.manifest, wanted.settings)
    except ValueError as error:
        damaged = f"{path / MANIFEST} is damaged ({error})"
        raise ValueError(f"{damaged}; restore it, or delete the folder and distil again") from error
    if found:
        raise ValueError(
            f"{path} holds a set of other settings: {found}; choose another out_dir or delete it"
        )
    return present


def _begin(path: Path, wanted: Wanted) -> None:
    made = {
        "revision": git_revision(),
        "versions": {
            "igd_lib": VERSION,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }
    manifest = wanted.about | keys.manifest("set", wanted.settings) | made
    files.write(path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
