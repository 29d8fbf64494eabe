"""The class x IPC loop: samples a data set class by class into a folder that can be resumed.

Classes are independent; image j of a class depends on images 0 ... j-1 through the deviation memory.
So a run batches over classes, and resumes each class from its longest prefix on disk. Every image's
noise comes from its own generator, so results do not depend on batch, order or restart.
"""

from __future__ import annotations

import inspect
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import igd_lib
from igd_lib import files
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
    weights = [parameter.double().abs().sum().item() for parameter in value.parameters()]
    return f"{type(value).__name__}, {sum(parameter.numel() for parameter in value.parameters())} parameters, sum {sum(weights):.6g}"


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
        """How many images of a class are complete, counted from the first without a gap, at most `ipc`."""
        count = 0
        while count < self.ipc and self.image_path(label, count).is_file() and self.latent_path(label, count).is_file():
            count += 1
        return count

    def images(self, label: int) -> Tensor:
        """uint8 (ipc, 3, H, W) of one class, in order. Raises ValueError when the class is not finished."""
        if self.finished(label) < self.ipc:
            raise ValueError(f"{self.path}: class {label} has {self.finished(label)} of {self.ipc} images; run distill again to resume")
        pictures = [np.asarray(Image.open(self.image_path(label, index)).convert("RGB")) for index in range(self.ipc)]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

    def latents(self, label: int, count: int | None = None) -> Tensor:
        """Final latents (n, C, h, w) of a class's first `count` images (all by default), as the sampler gave them."""
        count = self.ipc if count is None else count
        found = [files.load_tensors(self.latent_path(label, index))[0]["latent"] for index in range(count)]
        return torch.stack(found) if found else torch.empty(0)

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
    **shortcuts: Any,
) -> DistilledSet:
    """Sample `ipc` images of each class into `out_dir`, resuming what is there, and return the set.

    dataset: the training images, for class order and class gradients; classes: which of its labels
    (default all); label_ids: the diffusion model's id of every class (default 0 ... C-1); gradients:
    (E, C, P) of all classes, or a function of the label that gives (E, P), such as `ClassGradients`; else
    computed a batch of classes at a time;
    batch_classes: classes sampled side by side; shortcuts: `sample_igd`'s (jacobian, guidance_decoder, every,
    checkpoints_per_step). Raises ValueError when `out_dir` holds a set of other
    settings (the first difference is named) or ipc < 1, OSError when it cannot be written.
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
    remember = guidance is not None and guidance.gamma > 0
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
    }
    if unknown := set(shortcuts) - set(SHORTCUTS):
        raise TypeError(f"unknown options {sorted(unknown)}; shortcuts are {', '.join(SHORTCUTS)}")
    if others := {name: _named(value) for name, value in shortcuts.items() if name != "jacobian" and value != SHORTCUTS[name]}:
        settings["shortcuts"] = others
    out = _open(
        Path(out_dir),
        {
            "dataset": dataset.name,
            "classes": list(dataset.classes),
            "label_ids": ids,
            "selected": selected,
            "ipc": ipc,
            "seed": seed,
            "image_size": dataset.image_size,
            "settings": json.loads(json.dumps(settings)),
        },
    )
    together = batch_classes or max(1, min(len(selected), 50))
    chunks = [selected[i : i + together] for i in range(0, len(selected), together)]
    rounds = 1 if remember else max(1, 100 // together)  # without a memory, images of a class are independent too
    for number, chunk in enumerate(chunks):
        finished = {label: out.finished(label) for label in chunk}
        memory = {label: list(out.latents(label, finished[label]).to(pipe._execution_device)) if remember else [] for label in chunk}
        if all(count == ipc for count in finished.values()):
            continue
        if not influence:
            own = {}
        elif gradients is not None:
            own = {label: gradients(label) if callable(gradients) else gradients[:, label] for label in chunk}
        else:
            own = {label: class_gradients(checkpoints, dataset.of_class(label, fidelity.gradient_images), label) for label in chunk}
        first = range(min(finished.values()), ipc, rounds)
        for start in progress(first, f"distil, classes {number + 1}/{len(chunks)}, image"):
            items = [(label, j) for j in range(start, min(start + rounds, ipc)) for label in chunk if j >= finished[label]]
            if items:
                _sample(pipe, out, items, ids, memory if remember else None, own, guidance, checkpoints, seed,
                        dict(cfg_scale=cfg_scale, num_steps=num_steps, fidelity=fidelity, **shortcuts))  # fmt: skip
    return out


def _sample(pipe, out, items, ids, memory, own, guidance, checkpoints, seed, options) -> None:
    """Sample one batch of (label, index) items and store it; extends `memory`."""
    device, started = pipe._execution_device, time.monotonic()
    generators = [image_generator(seed, ids[label], index) for label, index in items]
    noise = pipe.latent_noise(generators)
    labels = [label for label, _ in items]
    latents = sample_igd(
        pipe.transformer, pipe.vae, pipe.scheduler_for(options["fidelity"]), noise,
        torch.tensor([ids[label] for label in labels], device=device),
        targets=torch.tensor(labels, device=device) if own else None,
        guidance=guidance,
        checkpoints=checkpoints if own else None,
        gradients=torch.stack([own[label] for label in labels], dim=1).to(device) if own else None,
        memory=[torch.stack(memory[label]) if memory[label] else noise[:0] for label in labels] if memory is not None else None,
        generator=generators,
        **options,
    )  # fmt: skip
    images = to_uint8(pipe.decode(latents)).cpu()
    seconds = (time.monotonic() - started) / len(items)
    for (label, index), latent, image in zip(items, latents, images, strict=True):
        files.save_tensors(out.latent_path(label, index), {"latent": latent}, seconds=round(seconds, 4))
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        files.write(out.image_path(label, index), lambda path, picture=picture: picture.save(path, format="PNG"))
        if memory is not None:
            memory[label].append(latent)


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
        for key, value in wanted.items():
            if present.manifest.get(key) != value:
                old, new = _difference(key, present.manifest.get(key), value)
                raise ValueError(f"{path} holds a set of other settings: {old}, wanted {new}; choose another out_dir or delete it")
        return present
    files.write(path / "manifest.json", json.dumps({**wanted, "versions": versions}, indent=2) + "\n")
    return DistilledSet(path)


def _difference(key: str, old: Any, new: Any) -> tuple[str, str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for inner in new:
            if old.get(inner) != new[inner]:
                return _difference(f"{key}.{inner}", old.get(inner), new[inner])
    return f"{key} = {old}", f"{new}"
