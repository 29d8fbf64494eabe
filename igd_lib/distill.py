"""The class x IPC loop: samples a data set class by class into a folder that can be resumed.

Classes are independent; image j of a class depends on images 0 ... j-1 through the deviation memory.
So a run batches over classes, and resumes each class from its longest prefix on disk. Every image's
noise comes from its own generator, so results do not depend on batch, order or restart; and a resumed run
samples in the batches of an uninterrupted one, so on the same device not even the last bit does.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import igd_lib
from igd_lib import cluster, files, results
from igd_lib.config import RELEASED, Fidelity, Guidance
from igd_lib.data import ImageData, from_tensors, to_uint8
from igd_lib.progress import progress
from igd_lib.sampler import IGDPipeline, check_range, sample_igd
from igd_lib.surrogate import Checkpoints, class_gradients

# `sample_igd`'s options that change its result for speed, and their defaults.
SHORTCUTS = {name: inspect.signature(sample_igd).parameters[name].default for name in ("jacobian", "guidance_decoder", "every", "checkpoints_per_step")}


def _named(value: Any) -> Any:
    """A shortcut's value as the manifest has it: a decoder by its kind, size and weights."""
    if not isinstance(value, torch.nn.Module):
        return value
    return f"{type(value).__name__}, {sum(parameter.numel() for parameter in value.parameters())} parameters, {files.digest(value.state_dict())}"


def image_generator(seed: int, label: int, index: int) -> torch.Generator:
    """The generator of one image's noise: image `index` of the diffusion model's class `label`."""
    state = np.random.SeedSequence([seed, label, index]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


class DistilledSet:
    """A distilled set on disk: `manifest.json`, `images/CLASS/INDEX.png`, `latents/CLASS/INDEX.safetensors`.

    CLASS is the zero-padded label. Raises FileNotFoundError without a manifest, ValueError for a damaged one.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = self.path / "manifest.json"
        if not manifest.is_file():
            raise FileNotFoundError(f"{self.path} holds no distilled set (no manifest.json)")
        try:
            self.manifest: dict[str, Any] = json.loads(manifest.read_text())
            if "format" in self.manifest:
                raise FileNotFoundError(f"{self.path} holds an export for other tools, not a distilled set; open the folder it was made from")
            self.classes = tuple(self.manifest["classes"])
            self.selected: list[int] = list(self.manifest["selected"])
            self.ipc = int(self.manifest["ipc"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} is damaged ({error!r}); restore it, or delete the folder and distil again") from error

    def image_path(self, label: int, index: int) -> Path:
        return self.path / "images" / f"{label:05d}" / f"{index:05d}.png"

    def latent_path(self, label: int, index: int) -> Path:
        return self.path / "latents" / f"{label:05d}" / f"{index:05d}.safetensors"

    def finished(self, label: int) -> int:
        """How many images of a class are there, counted from the first without a gap, at most `ipc`; they are not read."""
        count = 0
        while count < self.ipc and self.image_path(label, count).is_file() and self.latent_path(label, count).is_file():
            count += 1
        return count

    def valid(self, label: int) -> int:
        """How many of the finished images of a class, from the first, can be read and are as they were sampled."""
        for index in range(finished := self.finished(label)):
            if (problem := self._problem(label, index)) is not None:
                print(f"{self.path}: class {label}, image {index}: {problem}; sampled anew from here", flush=True)
                return index
        return finished

    def remove_leftovers(self, labels: Sequence[int] = ()) -> None:
        """Delete what a killed run was writing: beside the manifest, and of the classes `labels`."""
        for folder in (self.path, *(path(label, 0).parent for label in labels for path in (self.image_path, self.latent_path))):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()

    def images(self, label: int) -> Tensor:
        """uint8 (ipc, 3, H, W) of one class, in order. Raises ValueError when the class is not finished or an image damaged."""
        if self.finished(label) < self.ipc:
            raise ValueError(f"{self.path}: class {label} has {self.finished(label)} of {self.ipc} images; run distill again to resume")
        pictures = []
        for path in (self.image_path(label, index) for index in range(self.ipc)):
            try:
                pictures.append(np.asarray(Image.open(path).convert("RGB")))
            except (OSError, SyntaxError) as error:
                repair = f"python -m igd_lib verify --repair {self.path}"
                raise ValueError(f"{path} cannot be read ({error}); {repair} removes what is damaged, and distill samples it anew") from error
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

    def latents(self, label: int, count: int | None = None) -> Tensor:
        """Final latents (n, C, h, w) of a class's first `count` images (all by default), as the sampler gave them."""
        count = self.ipc if count is None else count
        found = [files.load_tensors(self.latent_path(label, index))[0]["latent"] for index in range(count)]
        return torch.stack(found) if found else torch.empty(0)

    def verify(self, *, repair: bool = False) -> list[str]:
        """Read everything again; what is missing, damaged or changed since it was sampled, a line each, class by class.

        repair: remove damaged images, their latents and leftovers of killed runs, so that `distill` samples them anew.
        """
        found = []
        for label in self.selected:
            for index in range(self.ipc):
                if (problem := self._problem(label, index)) is not None:
                    found.append(f"class {label}, image {index}: {problem}")
                    if repair:
                        for path in (self.image_path(label, index), self.latent_path(label, index)):
                            path.unlink(missing_ok=True)
        known = {path(label, index) for label in self.selected for index in range(self.ipc) for path in (self.image_path, self.latent_path)}
        for path in sorted(self.path.rglob("*")):
            if path.is_file() and path not in known and path.name not in ("manifest.json", files.LOCK):
                found.append(f"{path.relative_to(self.path)}: no part of the set")
                if repair and path.name.endswith(".tmp"):
                    path.unlink()
        return found

    def _problem(self, label: int, index: int) -> str | None:
        """What is wrong with one image, None if nothing."""
        image, latent = self.image_path(label, index), self.latent_path(label, index)
        if not image.is_file() or not latent.is_file():
            return "missing" if not image.is_file() and not latent.is_file() else f"no {'image' if latent.is_file() else 'latent'}"
        try:
            tensors, note = files.load_tensors(latent)
            with Image.open(image) as picture:
                size = picture.convert("RGB").size
        except (OSError, ValueError, SyntaxError) as error:
            return f"cannot be read ({error})"
        if size != (self.manifest["image_size"],) * 2:
            return f"{size[0]} x {size[1]} px"
        if note.get("latent_sha256", _tensor_sha256(tensors["latent"])) != _tensor_sha256(tensors["latent"]):
            return "another latent than was sampled"
        if note.get("image_sha256", files.sha256(image)) != files.sha256(image):
            return "another image than was sampled"
        return None

    @property
    def seconds(self) -> float:
        """What sampling the finished images took, in all, whether in one run or several."""
        done = [self.latent_path(label, index) for label in self.selected for index in range(self.finished(label))]
        return sum(files.load_tensors(path)[1].get("seconds", 0.0) for path in done)

    def data(self) -> ImageData:
        """The whole set in memory, class after class, labels in the manifest's class order."""
        images = torch.cat([self.images(label) for label in self.selected])
        labels = torch.tensor(self.selected).repeat_interleave(self.ipc)
        return from_tensors(self.manifest["dataset"], f"distilled, ipc {self.ipc}", self.classes, images, labels)

    def export(self, out_dir: str | Path, format: str = "imagefolder") -> Path:
        """Write the finished set for other tools: "imagefolder", "rded" or "safetensors" (`igd_lib.export`)."""
        from igd_lib.export import export  # which needs this module

        return export(self, out_dir, format=format)


def in_memory(images: ImageData | DistilledSet) -> ImageData:
    """A set's images as data, whichever way it was made."""
    return images.data() if isinstance(images, DistilledSet) else images


def distill(
    pipe: IGDPipeline,
    dataset: ImageData,
    *,
    ipc: int,
    guidance: Guidance | None,
    checkpoints: Checkpoints | None,
    out_dir: str | Path,
    seed: int = 0,
    classes: Sequence[int] | None = None,
    label_ids: Sequence[int] | None = None,
    batch_classes: int | None = None,
    gradients: Tensor | Callable[[int], Tensor] | None = None,
    cfg_scale: float = 4.0,
    num_steps: int = 50,
    fidelity: Fidelity = RELEASED,
    ray: bool | str = False,
    workers: int | None = None,
    wait: bool = False,
    **shortcuts: Any,
) -> DistilledSet:
    """Sample `ipc` images of each class into `out_dir`, resuming what is there, and return the set.

    dataset: the training images, for class order and class gradients; classes: which of its labels
    (default all); label_ids: the diffusion model's id of every class (default 0 ... C-1); gradients:
    (E, C, P) of all classes, or a function of the label that gives (E, P), such as `ClassGradients`; else
    computed a batch of classes at a time;
    batch_classes: classes sampled side by side (at most 50 by default); ray: chunks of so many classes as tasks of a
    Ray cluster that sees `out_dir` (True: a local one, or its address; extra [cluster]), on `workers` actors (default
    one a GPU); wait: for another run into the same folder, instead of refusing; shortcuts: `sample_igd`'s (jacobian,
    guidance_decoder, every, checkpoints_per_step).
    The models are used as they are: what `fidelity` says of the autoencoder and of timestep frequencies is done where they
    are loaded (`notebook.prepare`). The manifest has the digests of all weights.
    Raises ValueError when `out_dir` holds a set of other settings or weights (the first difference is named) or ipc < 1,
    OSError when it cannot be written, BlockingIOError when another run is sampling into it.
    """
    if ipc < 1:
        raise ValueError(f"ipc is at least 1, got {ipc}")
    selected = list(range(len(dataset.classes))) if classes is None else [int(c) for c in classes]
    if not selected or min(selected) < 0 or max(selected) >= len(dataset.classes):
        raise ValueError(f"classes are labels 0 ... {len(dataset.classes) - 1}, got {selected}")
    if len(set(selected)) < len(selected):
        raise ValueError(f"classes names a label twice: {selected}")
    ids = list(range(len(dataset.classes))) if label_ids is None else [int(i) for i in label_ids]
    if len(ids) != len(dataset.classes):
        raise ValueError(f"label_ids has one id a class: {len(dataset.classes)}, got {len(ids)}")
    influence = guidance is not None and guidance.k > 0
    if influence and checkpoints is None:
        raise ValueError("k > 0 needs checkpoints")
    if guidance is not None:
        check_range(guidance, num_steps, fidelity)
    settings = {
        "guidance": None if guidance is None else asdict(guidance),
        "fidelity": asdict(fidelity),
        "cfg_scale": cfg_scale,
        "num_steps": num_steps,
        "jacobian": shortcuts.get("jacobian", "full"),
        "checkpoint_epochs": list(checkpoints.epochs) if influence and checkpoints is not None else None,
        "scheduler": type(pipe.scheduler_for(fidelity)).__name__,
        "model": {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")},
        "weights": {
            "transformer": files.digest(pipe.transformer.state_dict()),
            "vae": files.digest(pipe.vae.state_dict()),
            "checkpoints": [files.digest(state) for state in checkpoints.states] if influence and checkpoints is not None else None,
        },
    }
    if unknown := set(shortcuts) - set(SHORTCUTS):
        raise TypeError(f"unknown options {sorted(unknown)}; shortcuts are {', '.join(SHORTCUTS)}")
    if others := {name: _named(value) for name, value in shortcuts.items() if name != "jacobian" and value != SHORTCUTS[name]}:
        settings["shortcuts"] = others
    wanted = {
        "dataset": dataset.name,
        "classes": list(dataset.classes),
        "label_ids": ids,
        "selected": selected,
        "ipc": ipc,
        "seed": seed,
        "image_size": dataset.image_size,
        "settings": json.loads(json.dumps(settings)),
    }
    wanted["settings_hash"] = results.settings_hash(wanted)
    if not (Path(out_dir) / "manifest.json").exists():
        with files.locked(out_dir, "a run that samples into it", wait=wait):  # which removes what looks half-written
            _open(Path(out_dir), wanted)
    out = _open(Path(out_dir), wanted)
    options = dict(cfg_scale=cfg_scale, num_steps=num_steps, fidelity=fidelity, **shortcuts)
    job = _Job(pipe, dataset, out.path, ids, guidance, checkpoints, gradients, seed, options)
    if all(out.finished(label) == ipc for label in selected):
        return out
    with files.locked(out.path, "a run that samples into it", wait=wait):
        out.remove_leftovers()
        if ray:
            _on_a_cluster(job, out, batch_classes, workers, where=ray)
        else:
            chunks = _chunks(selected, batch_classes or 50)
            for number, chunk in enumerate(chunks):
                job.run(chunk, f"distil, classes {number + 1}/{len(chunks)}, image")
    return out


def _chunks(selected: Sequence[int], size: int) -> list[list[int]]:
    return [list(selected[i : i + size]) for i in range(0, len(selected), size)]


def _on_a_cluster(job: _Job, out: DistilledSet, batch_classes: int | None, workers: int | None, *, where: bool | str) -> None:
    """Chunks of classes as tasks on Ray actors that hold the pipeline."""
    with cluster.cluster(where) as ray:
        count, _ = cluster.workers_of(ray, workers)
        chunks = _chunks(out.selected, batch_classes or min(50, -(-len(out.selected) // count)))

        def done() -> str:
            return f"{sum(out.finished(label) for label in out.selected)} of {len(out.selected) * out.ipc} images"

        cluster.run_all(ray, _Job.run, job, chunks, workers=workers, label="distil, chunks of classes", done=done)


@dataclass(frozen=True)
class _Job:
    """What a chunk of classes needs to be sampled, on this machine or another one that sees the same folder."""

    pipe: IGDPipeline
    dataset: ImageData
    path: Path
    ids: list[int]
    guidance: Guidance | None
    checkpoints: Checkpoints | None
    gradients: Tensor | Callable[[int], Tensor] | None
    seed: int
    options: dict[str, Any]  # of `sample_igd`

    def to(self, device: str) -> _Job:
        """The same with its models on a device."""
        gradients = self.gradients.to(device) if isinstance(self.gradients, Tensor) else self.gradients
        return replace(self, pipe=self.pipe.to(device), checkpoints=self.checkpoints and self.checkpoints.to(device), gradients=gradients)

    def run(self, chunk: Sequence[int], label: str = "distil, image") -> None:
        """Sample what is missing of the classes `chunk`, in the batches of an uninterrupted run."""
        out = DistilledSet(self.path)
        out.remove_leftovers(chunk)  # of a worker that died
        finished = {label: out.valid(label) for label in chunk}
        if all(count == out.ipc for count in finished.values()):
            return
        remember = self.guidance is not None and self.guidance.gamma > 0
        rounds = 1 if remember else max(1, 100 // len(chunk))  # without a memory, images of a class are independent too
        memory = {label: list(out.latents(label, finished[label]).to(self.pipe._execution_device)) for label in chunk} if remember else None
        own = self._own_gradients(chunk)
        first = min(finished.values()) // rounds * rounds
        for start in progress(range(first, out.ipc, rounds), label):
            indices = range(start, min(start + rounds, out.ipc))
            items = [(label, index) for index in indices for label in chunk]
            wanted = {(label, index) for label, index in items if index >= finished[label]}
            if wanted:
                earlier = {label: memory[label][:start] for label in chunk} if memory is not None else None
                for (label, _), latent in _sample(self, out, items, wanted, earlier, own).items():
                    if memory is not None:
                        memory[label].append(latent)

    def _own_gradients(self, chunk: Sequence[int]) -> dict[int, Tensor]:
        """(E, P) of each class, empty without influence guidance."""
        if self.guidance is None or self.guidance.k == 0:
            return {}
        given, images = self.gradients, self.options["fidelity"].gradient_images
        if given is not None:
            return {label: given(label) if callable(given) else given[:, label] for label in chunk}
        return {label: class_gradients(self.checkpoints, self.dataset.of_class(label, images), label) for label in chunk}


def _sample(job: _Job, out: DistilledSet, items, wanted, memory, own) -> dict[tuple[int, int], Tensor]:
    """Sample one batch of (label, index) items, store those that are wanted and return their latents."""
    pipe, started = job.pipe, time.monotonic()
    device = pipe._execution_device
    generators = [image_generator(job.seed, job.ids[label], index) for label, index in items]
    noise = pipe.latent_noise(generators)
    labels = [label for label, _ in items]
    latents = sample_igd(
        pipe.transformer, pipe.vae, pipe.scheduler_for(job.options["fidelity"]), noise,
        torch.tensor([job.ids[label] for label in labels], device=device),
        targets=torch.tensor(labels, device=device) if own else None,
        guidance=job.guidance,
        checkpoints=job.checkpoints if own else None,
        gradients=torch.stack([own[label] for label in labels], dim=1).to(device) if own else None,
        memory=[torch.stack(memory[label]) if memory[label] else noise[:0] for label in labels] if memory is not None else None,
        generator=generators,
        **job.options,
    )  # fmt: skip
    images = to_uint8(pipe.decode(latents)).cpu()
    seconds, found = (time.monotonic() - started) / len(items), {}
    for item, latent, image in zip(items, latents, images, strict=True):
        if item in wanted:
            found[item] = latent
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            png = files.write(out.image_path(*item), lambda path, picture=picture: picture.save(path, format="PNG"))
            note = {"seconds": round(seconds, 4), "image_sha256": files.sha256(png), "latent_sha256": _tensor_sha256(latent)}
            files.save_tensors(out.latent_path(*item), {"latent": latent}, **note)
    return found


def _tensor_sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _open(path: Path, wanted: dict[str, Any]) -> DistilledSet:
    """Start a set, or reopen one of the same settings."""
    versions = {
        "igd_lib": igd_lib.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
    if (path / "manifest.json").exists():
        present = DistilledSet(path)
        if found := files.difference(present.manifest, wanted):
            raise ValueError(f"{path} holds a set of other settings: {found}; choose another out_dir or delete it")
        return present
    files.write(path / "manifest.json", json.dumps({**wanted, "versions": versions}, indent=2) + "\n")
    return DistilledSet(path)
