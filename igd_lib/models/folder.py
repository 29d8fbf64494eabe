"""A whole diffusers pipeline on disk: transformer, autoencoder, scheduler, index; or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

from igd_lib.tools.files import LOCK

INDEX = "model_index.json"  # written last: a folder that has it is whole


def is_whole(folder: str | Path) -> bool:
    """Whether the folder holds a finished pipeline."""
    return (Path(folder) / INDEX).is_file()


def refuse_taken(folder: str | Path) -> None:
    """Raise FileExistsError where a folder to be written holds something, or is no folder."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(inside.name != LOCK for inside in folder.iterdir())):
        raise FileExistsError(f"{folder} is there already and not empty; remove it, or choose another folder")


def dit_scheduler() -> DDIMScheduler:
    """The noise that DiT was trained with: 1,000 steps, betas from 1e-4 to 0.02 in a line."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )


def names_by_id(labels: Mapping[str, int]) -> dict[str, str]:
    """`id2label` of a pipeline's `labels`, which have an entry for each name of a class."""
    found: dict[str, list[str]] = {}
    for name, label in labels.items():
        found.setdefault(str(label), []).append(name)
    return {label: ", ".join(names) for label, names in sorted(found.items(), key=lambda item: int(item[0]))}


def write_pipeline(
    out: str | Path,
    transformer: DiTTransformer2DModel,
    vae: AutoencoderKL,
    scheduler: Any,
    id2label: Mapping[str, str] | None = None,  # by JSON's keys, which are strings
    notes: Mapping[str, str] | None = None,  # further files, texts by name
) -> Path:
    """Write the pipeline to the new folder `out`, for `DiTPipeline` and `IGDPipeline` alike; returns `out`.

    It is written beside, in a folder whose name begins with a dot, and moved to its place when it is whole.
    Raises FileExistsError where `out` holds something (a lock aside), OSError where it cannot be written.
    """
    out = Path(out)
    refuse_taken(out)
    place = out.resolve()
    half = place.with_name(f".{place.name}.half")
    shutil.rmtree(half, ignore_errors=True)  # of a process that was killed
    try:
        half.mkdir(parents=True)
        for name, part in (("transformer", transformer), ("vae", vae), ("scheduler", scheduler)):
            part.save_pretrained(half / name)
        for name, text in (notes or {}).items():
            (half / name).write_text(text)
        index: dict[str, Any] = {
            "_class_name": "DiTPipeline",
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", type(vae).__name__],
            "scheduler": ["diffusers", type(scheduler).__name__],
        }
        if id2label:
            index["id2label"] = dict(id2label)
        (half / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        _flush(half)
        _move(half, place)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return out


def _flush(folder: Path) -> None:
    """To the disk, so that a machine that stops leaves no empty files under their final names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def _move(half: Path, place: Path) -> None:
    """Into an empty place at once; into a folder that is locked part by part, the index last."""
    if not place.exists():
        os.rename(half, place)
        return
    for part in sorted(half.iterdir(), key=lambda part: part.name == INDEX):
        os.replace(part, place / part.name)
