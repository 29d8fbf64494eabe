"""What a run at the paper's scale needs, and where it is."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from igd_lib.config import STANDARD, Fidelity
from igd_lib.data.datasets import DATASETS
from igd_lib.data.images import missing
from igd_lib.models import standin
from igd_lib.tools.machine import cache_dir

DIT = ("facebook/DiT-XL-2-256", "eab87f77abd5aef071a632f08807fbaab0b704d0")  # CC-BY-NC 4.0
SD_VAE = ("stabilityai/sd-vae-ft-mse", "31f26fdeee1355a5c34592e401dd41e45d25a493")


def missing_for_paper(dataset: str, fidelity: Fidelity = STANDARD) -> list[str]:
    """What the paper's scale still needs here, a line a piece with how to get it; empty if nothing."""
    if dataset in standin.STANDINS:
        return [f"{dataset} is a stand-in's data set and has no paper scale; use scale='small'"]
    if dataset not in DATASETS:
        return [f"unknown data set {dataset!r}"]
    lines = missing(dataset)
    for repository, revision in (dit_of(dataset), vae_of(fidelity)):
        if model_folder(repository, revision) is None:
            download = f"hf download {repository} --revision {revision}, or " if revision else ""
            lines.append(
                f"the weights {repository}: {download}copy the folder to "
                f"{cache_dir() / 'models' / repository.split('/')[-1]}"
            )
    if not torch.cuda.is_available() and not os.environ.get("IGD_ALLOW_CPU"):
        lines.append(
            "a CUDA GPU: none was found (set IGD_ALLOW_CPU=1 to run the paper's scale on a CPU all the "
            "same, very slowly)"
        )
    return lines


def dit_of(dataset: str) -> tuple[str, str | None]:
    """DiT-XL/2 where it knows the classes; else a DiT fine-tuned on the data, from a local folder only."""
    return DIT if DATASETS[dataset].label_ids else (f"DiT-{dataset}", None)


def vae_of(fidelity: Fidelity) -> tuple[str, str | None]:
    """The autoencoder and its pinned revision; one without a pin is taken from a local folder only."""
    return SD_VAE if fidelity.vae == SD_VAE[0] else (fidelity.vae, None)


def model_folder(repository: str, revision: str | None) -> Path | None:
    """A model's folder under `$IGD_CACHE/models`, or in the Hugging Face cache at the pinned revision."""
    own = cache_dir() / "models" / repository.split("/")[-1]
    if own.is_dir() or revision is None:
        return own if own.is_dir() else None
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
