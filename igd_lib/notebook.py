"""What a notebook does first: its parameters, checked, and the experiment at the scale that this machine allows.

At "paper" the paper's data, models and settings; at "small" the stand-in, real but small; at "smoke" the stand-in cut
to seconds.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils.logging import disable_progress_bar

from igd_lib import cluster, standin
from igd_lib.config import (
    IGD_HARD,
    RDED_SOFT,
    RELEASED,
    SMALL_HARD,
    SMALL_SOFT,
    Fidelity,
    Guidance,
    cache_dir,
    preset,
    ray_cluster,
    reuse_memory,
    surrogate_training,
)
from igd_lib.data import load
from igd_lib.datasets import DATASETS, missing
from igd_lib.experiment import Experiment
from igd_lib.minimax import Minimax
from igd_lib.sampler import IGDPipeline
from igd_lib.weights import match_original

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


def prepare(
    artefact: str,
    dataset: str,
    scale: str = "auto",
    *,
    fidelity: Fidelity = RELEASED,
    ipc: int = 10,
    labels: str = "hard",
    stand_in: str = "fashion-mnist",
) -> Experiment:
    """Data, models and settings for `dataset` at `scale`, evaluated with "hard" or "soft" labels.

    "auto" is "paper" where the paper's data and models are on this machine, else "small" on
    `stand_in`. "paper" raises FileNotFoundError naming every missing piece and how to get it.
    """
    disable_progress_bar()  # of loading models: not worth a line in a notebook
    if not torch.cuda.is_available():
        reuse_memory()
    if scale not in SCALES:
        raise ValueError(f"scale is one of {', '.join(SCALES)}, got {scale!r}")
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(sorted(DATASETS))}")
    lacking = missing_for_paper(dataset, fidelity)
    if scale == "paper" and lacking:
        raise FileNotFoundError("scale='paper' lacks:\n" + "\n".join(f"- {line}" for line in lacking))
    if where := ray_cluster():  # once, for all its sets
        cluster.connect(where)
    if scale == "paper" or (scale == "auto" and not lacking):
        return _paper(artefact, dataset, fidelity, ipc, labels)
    return _small(artefact, dataset, stand_in, fidelity, "small" if scale == "auto" else scale, labels)


def missing_for_paper(dataset: str, fidelity: Fidelity = RELEASED) -> list[str]:
    """What the paper's scale still needs on this machine, a line a piece with how to get it; empty if nothing."""
    if dataset in standin.STANDINS:
        return [f"{dataset} is a stand-in's data set and has no paper scale; use scale='small'"]
    if dataset not in DATASETS:
        return [f"unknown data set {dataset!r}"]
    lines = missing(dataset)
    for repository, revision in (_dit(dataset), _vae(fidelity)):
        if _model_folder(repository, revision) is None:
            download = f"hf download {repository} --revision {revision}, or " if revision else ""
            lines.append(f"the weights {repository}: {download}copy the folder to {cache_dir() / 'models' / repository.split('/')[-1]}")
    if not torch.cuda.is_available() and not os.environ.get("IGD_ALLOW_CPU"):
        lines.append("a CUDA GPU: none was found (set IGD_ALLOW_CPU=1 to run the paper's scale on a CPU all the same, very slowly)")
    return lines


def _dit(dataset: str) -> tuple[str, str | None]:
    """DiT-XL/2 where it knows the classes; else a DiT fine-tuned on the data set, from a local folder only."""
    return DIT if DATASETS[dataset].label_ids else (f"DiT-{dataset}", None)


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


def _paper(artefact: str, dataset: str, fidelity: Fidelity, ipc: int, labels: str) -> Experiment:
    vae = AutoencoderKL.from_pretrained(_model_folder(*_vae(fidelity)))
    pipe = IGDPipeline.from_pretrained(_model_folder(*_dit(dataset)), vae=vae).to("cuda" if torch.cuda.is_available() else "cpu")
    if fidelity.timestep_frequencies == "original":
        match_original(pipe.transformer)
    train, test = load(dataset, "train"), load(dataset, "test")
    ids = DATASETS[dataset].label_ids or tuple(range(len(train.classes)))
    try:
        guidance, source = preset(dataset, "dit", ipc), "Table 12"
    except KeyError:
        guidance, source = Guidance(), "not from Table 12, which has none for it"
    setup = Experiment(
        artefact, dataset, "paper", pipe, train, test, ids, "convnet6" if train.image_size > 64 else "convnet3",
        surrogate_training(fidelity, len(ids)), 0.7, fidelity, guidance, 1.5, RDED_SOFT if labels == "soft" else IGD_HARD, 50,
        f"**Scale: paper.** {dataset}, {_dit(dataset)[0]} (CC-BY-NC 4.0) and {fidelity.vae}; k and gamma {source}.",
    )  # fmt: skip
    if source == "Table 12":
        setup.minimax_guidance = preset(dataset, "minimax", ipc)
    if setup.minimax_missing:
        setup.banner += f" Without the rows on the Minimax backbone: {setup.minimax_missing}."
    return setup


def _small(artefact: str, dataset: str, stand_in: str, fidelity: Fidelity, scale: str, labels: str) -> Experiment:
    spec = DATASETS[standin.STANDINS[stand_in].dataset]
    pipe = IGDPipeline.from_pretrained(standin.path(stand_in)).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    train, test = load(spec, "train"), load(spec, "test")
    asked = "" if dataset == spec.name else f" These are not {dataset} results: the paper's data or models are not on this machine."
    small = STAND_IN_SETTINGS[stand_in]
    test = test.first(small.test_images)
    protocol, num_steps, options = SMALL_SOFT if labels == "soft" else SMALL_HARD, small.num_steps, dict(small.surrogate)
    banner = {
        "small": f"**Scale: small.** The embedded stand-in: real {spec.name} images, a tiny DiT and autoencoder.{asked}",
        "smoke": f"**Scale: smoke.** A seconds-long run of the stand-in that only shows that everything works; its numbers mean nothing.{asked}",
    }[scale]
    setup = Experiment(
        artefact, dataset, scale, pipe, train, test, spec.label_ids or tuple(range(len(train.classes))), small.surrogate_name, options, 0.7, fidelity,
        small.guidance, small.best_cfg, protocol, num_steps, banner,
    )  # fmt: skip
    setup.guidance, setup.minimax_guidance = (own.for_latents(setup.latent_values) for own in (small.guidance, small.minimax_guidance))
    setup.minimax_recipe = small.minimax
    if scale == "smoke":
        setup.protocol, setup.num_steps = replace(protocol, epochs=2, evaluations=1), 10
        setup.guidance, setup.minimax_guidance = (replace(own, guided_range=(6, 7)) for own in (setup.guidance, setup.minimax_guidance))
        setup.minimax_recipe = replace(setup.minimax_recipe, epochs=1, images=2)
        setup.surrogate_options |= {"epochs": 1, "train_images": 20, "saves_in_first_epoch": 2}
        setup.fidelity = replace(fidelity, gradient_images=10)
        setup.test = test.per_class(20, seed=0)
    return setup


@dataclass(frozen=True)
class StandInSettings:
    """Settings of one stand-in, chosen on its validation split; gamma is the paper's, per 4096 latent values."""

    guidance: Guidance
    best_cfg: float
    surrogate_name: str
    surrogate: Mapping[str, Any]
    num_steps: int
    test_images: int  # a class: the first of the test split, fixed
    minimax: Minimax
    minimax_guidance: Guidance


STAND_IN_SETTINGS = {
    "fashion-mnist": StandInSettings(
        guidance=Guidance(30.0, 480.0, (15, 22)),
        best_cfg=1.5,
        surrogate_name="convnet3",
        surrogate=dict(epochs=2, train_images=1000, saves_in_first_epoch=6),
        num_steps=25,
        test_images=200,
        minimax=Minimax(images=200, ema=0.999, flip=False, posterior="mean"),  # 2,000 steps: a few minutes
        minimax_guidance=Guidance(30.0, 480.0, (15, 22)),  # DiT's
    ),
}
