"""The class x IPC loop: samples a data set class by class into a folder that can be resumed.

Classes are independent; image j of a class depends on images 0 ... j-1 through the deviation memory.
So a run batches over classes, and resumes each class from its longest prefix on disk. Every image's
noise comes from its own generator, so results do not depend on batch, order or restart; and a resumed run
samples in the batches of an uninterrupted one, so on the same device not even the last bit does.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igd_lib.config import STANDARD, Fidelity, Guidance
from igd_lib.data.images import ImageData, to_uint8
from igd_lib.data.resizing import Filter, needed
from igd_lib.guides import GuideFactory, Shortcuts
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampling import Gradients, Sampling
from igd_lib.sets.store import DistilledSet, tensor_sha256
from igd_lib.surrogate import Checkpoints
from igd_lib.tools import cluster, files, keys
from igd_lib.tools.progress import progress, resumable
from igd_lib.tools.version import VERSION, git_revision


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
    label_ids: Sequence[int] | None = None,  # the diffusion model's id of every class; None: 0 ... C-1
    batch_classes: int | None = None,  # classes sampled side by side; None: at most 50
    gradients: Gradients
    | None = None,  # such as `ClassGradients`; None: computed a batch of classes at a time
    cfg_scale: float = 4.0,
    num_steps: int = 50,
    fidelity: Fidelity = STANDARD,
    resize: Filter | None = None,  # of a model's images to the data's size, where it makes others
    ray: bool
    | str = False,  # on a Ray cluster that sees `out_dir`: True a local one, or its address (extra [cluster])
    workers: int | None = None,  # of the cluster; None: one a GPU
    wait: bool = False,  # for another run into the same folder, instead of refusing
    **shortcuts: Any,  # `sample_igd`'s: jacobian, guidance_decoder, every, checkpoints_per_step
) -> DistilledSet:
    """Sample `ipc` images of each class into `out_dir`, resuming what is there, and return the set.

    The manifest has the settings, the digests of all weights, and the revision of the code that made the set.
    Raises ValueError when `out_dir` holds a set of other settings or weights (the first difference is named),
    when the data's images have another size than the model's and no resize is declared, or ipc < 1,
    FloatingPointError when latents or pixels are not finite (nothing of that batch is stored), OSError when
    `out_dir` cannot be written, BlockingIOError when another run is sampling into it.
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
    )
    wanted = Wanted(sampling, dataset, ipc, seed, _selected(dataset, classes), _ids(dataset, label_ids))
    return fill(wanted, out_dir, batch_classes=batch_classes, ray=ray, workers=workers, wait=wait)


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


def _ids(data: ImageData, label_ids: Sequence[int] | None) -> list[int]:
    """The diffusion model's id of every class, checked."""
    ids = list(range(len(data.classes))) if label_ids is None else [int(i) for i in label_ids]
    if len(ids) != len(data.classes):
        raise ValueError(f"label_ids has one id a class: {len(data.classes)}, got {len(ids)}")
    return ids


def fill(
    wanted: Wanted,
    out_dir: str | Path,
    *,
    batch_classes: int | None = None,
    ray: bool | str = False,
    workers: int | None = None,
    wait: bool = False,
) -> DistilledSet:
    """`distill` for a set that has been described: sample what `out_dir` lacks of it."""
    if not (Path(out_dir) / "manifest.json").exists():
        # Under the lock: a run that samples removes what looks half-written.
        with files.locked(out_dir, "a run that samples into it", wait=wait):
            _open(Path(out_dir), wanted)
    out = _open(Path(out_dir), wanted)
    if all(out.finished(label) == wanted.ipc for label in wanted.selected):
        return out
    job = _Job(wanted, out.path)

    def done() -> str:
        count = sum(out.finished(label) for label in out.selected)
        return f"{count} of {len(out.selected) * out.ipc} images are in {out.path}"

    with resumable(done), files.locked(out.path, "a run that samples into it", wait=wait):
        out.remove_leftovers()
        if ray:
            _on_a_cluster(job, out, batch_classes, workers, where=ray)
        else:
            chunks = _chunks(wanted.selected, batch_classes or 50)
            for number, chunk in enumerate(chunks):
                job.run(chunk, f"distil, classes {number + 1}/{len(chunks)}, image")
    return out


def _chunks(selected: Sequence[int], size: int) -> list[list[int]]:
    return [list(selected[i : i + size]) for i in range(0, len(selected), size)]


def _on_a_cluster(
    job: _Job, out: DistilledSet, batch_classes: int | None, workers: int | None, *, where: bool | str
) -> None:
    """Chunks of classes as tasks on Ray actors that hold the pipeline."""
    with cluster.cluster(where) as ray:
        count, _ = cluster.workers_of(ray, workers)
        chunks = _chunks(out.selected, batch_classes or min(50, -(-len(out.selected) // count)))

        def done() -> str:
            finished = sum(out.finished(label) for label in out.selected)
            return f"{finished} of {len(out.selected) * out.ipc} images"

        cluster.run_all(
            ray, _Job.run, job, chunks, workers=workers, label="distil, chunks of classes", done=done
        )


@dataclass(frozen=True)
class _Job:
    """What a chunk of classes needs to be sampled, here or on a machine that sees the same folder."""

    wanted: Wanted
    path: Path

    def to(self, device: str) -> _Job:
        """The same with its models on a device."""
        return replace(self, wanted=replace(self.wanted, sampling=self.wanted.sampling.to(device)))

    def run(self, chunk: Sequence[int], what: str = "distil, image") -> None:
        """Sample what is missing of the classes `chunk`, in the batches of an uninterrupted run."""
        out = DistilledSet(self.path)
        out.remove_leftovers(chunk)  # of a worker that died
        finished = {label: out.valid(label) for label in chunk}
        if all(count == out.ipc for count in finished.values()):
            return
        device = self.wanted.sampling.pipe._execution_device
        # What was trained or read on another one follows the pipeline.
        wanted = self.to(str(device)).wanted
        sampling = wanted.sampling
        # Without a memory, images of a class are independent too.
        rounds = 1 if sampling.remembers else max(1, 100 // len(chunk))
        memory: dict[int, list[Tensor]] = {label: [] for label in chunk}
        if sampling.remembers:
            memory = {label: list(out.latents(label, finished[label]).to(device)) for label in chunk}
        guiding = chunk if sampling.influences else ()
        own = {label: sampling.class_gradients(wanted.data, label) for label in guiding}
        first = min(finished.values()) // rounds * rounds
        for start in progress(range(first, out.ipc, rounds), what):
            indices = range(start, min(start + rounds, out.ipc))
            items = [(label, index) for index in indices for label in chunk]
            lacking = {(label, index) for label, index in items if index >= finished[label]}
            if lacking:
                earlier = {label: memory[label][:start] for label in chunk}
                for (label, _), latent in _sample(wanted, out, items, lacking, earlier, own).items():
                    memory[label].append(latent)


Item = tuple[int, int]  # a label, and the number of an image of that class


def _sample(
    wanted: Wanted,
    out: DistilledSet,
    items: Sequence[Item],
    lacking: set[Item],
    memory: Mapping[int, Sequence[Tensor]],
    gradients: Mapping[int, Tensor],
) -> dict[Item, Tensor]:
    """Sample one batch of images, store those that are lacking and return their latents."""
    sampling, started = wanted.sampling, time.monotonic()
    labels, ids = [label for label, _ in items], [wanted.ids[label] for label, _ in items]
    generators = [image_generator(wanted.seed, wanted.ids[label], index) for label, index in items]
    noise = sampling.pipe.latent_noise(generators)
    earlier = [torch.stack(list(memory[label])) if memory[label] else noise[:0] for label in labels]
    guides = sampling.guides(labels, [index for _, index in items], earlier, gradients, generators)
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
    if (path / "manifest.json").exists():
        present = DistilledSet(path)
        found = files.difference(present.manifest, wanted.about)
        try:
            found = found or keys.difference("set", present.manifest, wanted.settings)
        except ValueError as error:
            damaged = f"{path / 'manifest.json'} is damaged ({error})"
            raise ValueError(f"{damaged}; restore it, or delete the folder and distil again") from error
        if found:
            raise ValueError(
                f"{path} holds a set of other settings: {found}; choose another out_dir or delete it"
            )
        return present
    made = {
        "revision": git_revision(),
        "versions": {
            "igd_lib": VERSION,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }
    files.write(
        path / "manifest.json",
        json.dumps(wanted.about | keys.manifest("set", wanted.settings) | made, indent=2) + "\n",
    )
    return DistilledSet(path)
