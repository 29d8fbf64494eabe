"""One key for a piece of work on disk, used by the cache's folder and by the manifest in it alike.

A key is made of the kind of work, that kind's schema number, and the settings that differ from the schema's
frozen defaults. So a new setting, listed here with the value that means "as before", keeps everybody's cache;
and a change of results raises the schema number, which leaves old work where it is and names new work anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from igd_lib.tools import files
from igd_lib.tools.machine import work_dir

# Raised when the same settings give another result.
SCHEMA = {
    "surrogate": 2,
    "gradients": 2,
    "similarities": 2,
    "set": 2,
    "evaluation": 3,
    "rded": 3,
    "dm": 1,
    "idc": 1,
    "datm": 1,
    "experts": 1,
    "sre2l": 1,
    "gvbsm": 1,
    "d4m": 1,
    "tdsdm": 1,
    "adapter": 1,
    "coreset": 1,
    "latents": 1,
    "anchors": 1,
    "minimax": 2,
    "finetune": 1,
    "teacher": 1,
}

# What a setting is where work on disk does not name it. Values are never changed under one schema number; a
# new
# setting is added with the value that gives the results it gave before.
FROZEN: dict[str, dict[str, Any]] = {
    "surrogate": {
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch_size": 64,
        "saves_in_first_epoch": 1,
        "seed": 0,
        "keep_epochs": None,
        "augment": None,
    },
    "gradients": {"images": 200},
    "similarities": {"images": [80, 500]},
    "set": {
        "resize": "bilinear",
        "guidance": {"k": 5.0, "gamma": 120.0, "guided_range": [30, 45]},
        "guides": None,
        "cfg_scale": 4.0,
        "num_steps": 50,
        "fidelity": {
            "solver": "ddpm",
            "timestep_spacing": "linspace",
            "timestep_frequencies": "original",
            "cfg_channels": 3,
            "range_counts_from": 0,
            "rho_factor": 0.0015,
            "eps": "combined",
            "second_chain": False,
            "cosine_floor": 1e-6,
            "backward": "once",
            "clamp_images": False,
            "memory_size": 64,
            "gradient_images": 200,
            "filter_images": [80, 500],
            "checkpoints": "fixed",
            "similarity": "per_class",
            "surrogate": "released",
            "surrogate_augmentation": True,
            "vae": "stabilityai/sd-vae-ft-mse",
        },
        "shortcuts": {"jacobian": "full", "every": 1, "checkpoints_per_step": None, "guidance_decoder": None},
        "checkpoints": None,
        "output_resize": None,
        "precision": "float32",
    },
    "evaluation": {
        "protocol": {
            "labels": "hard",
            "lr_by_network": [],
            "own_lr": False,
            "momentum": 0.9,
            "betas": [0.9, 0.999],
            "decay": "all",
            "over_100_classes": None,
            "made_for": None,
            "batch_size": 64,
            "batch_by_ipc": [],
            "batch_doubled_for": [],
            "epochs": None,
            "epochs_by_ipc": [
                [1, 3000],
                [10, 2000],
                [50, 1500],
                [200, 1000],
                [500, 500],
                [float("inf"), 300],
            ],
            "schedule": "multistep",
            "milestones": [2 / 3, 5 / 6],
            "lr_decay": 0.2,
            "train_resize": None,
            "patch_factor": 1,
            "crop_scale": [0.5, 1.0],
            "flip": True,
            "jitter": 0.4,
            "lighting": 0.1,
            "cutmix": 1.0,
            "cutmix_probability": 1.0,
            "mixup": 0.0,
            "dsa": "",
            "diffaug": "",
            "soft_loss": "kl",
            "temperature": 20.0,
            "hard_weight": 0.1,
            "double_pass": False,
            "mixed_precision": False,
            "tf32": "convolutions",
            "test_resize": None,
            "evaluations": 100,
            "test_every": None,
            "test_after": 0.0,
            "reported": "best",
            "seeds": [0, 1, 2, 3, 4],
        },
        "teacher": None,
        "precision": "float32",
    },
    "rded": {"size": 224, "factor": 2, "candidates": 300, "crops": 5, "jpeg_quality": 75, "seed": 0},
    "coreset": {"seed": 0},
    "latents": {"dtype": "torch.float32"},
    "anchors": {"seed": 0, "latents": {"dtype": "torch.float32"}},
    "minimax": {
        "recipe": {
            "epochs": 8,
            "steps": 12_000,
            "batch_size": 8,
            "lr": 1e-3,
            "ema": 0.9999,
            "real_weight": 0.002,
            "generated_weight": 0.008,
            "memory_size": 64,
            "label_dropout": 0.1,
            "flip": True,
            "posterior": "sample",
            "resize": "bicubic-halving",
            "images": None,
            "seed": 0,
        },
        "accumulate": 1,
        "mixed_precision": "no",
        "image_size": None,
    },
    "finetune": {
        "recipe": {
            "parameters": "difffit",
            "epochs": 1000,
            "steps": 24_000,
            "batch_size": 32,
            "lr": 1e-3,
            "ema": 0.9999,
            "label_dropout": 0.1,
            "flip": True,
            "posterior": "sample",
            "resize": "bicubic-halving",
            "images": None,
            "seed": 0,
        },
        "accumulate": 1,
        "mixed_precision": "no",
        "image_size": None,
    },
}
FROZEN |= {
    "dm": {
        "settings": {
            "network": "convnet3",
            "iterations": 20000,
            "lr": 1.0,
            "momentum": 0.5,
            "batch_real": 256,
            "augmentation": "color_crop_cutout_flip_scale_rotate",
            "init": "real",
            "mean": [0.4914, 0.4822, 0.4465],
            "std": [0.2023, 0.1994, 0.201],
        }
    },
    "idc": {
        "settings": {
            "outer": 2000,
            "inner": 100,
            "metric": "mse",
            "lr": 0.005,
            "base_side": 32,
            "momentum": 0.5,
            "batch_real": 64,
            "batch_synthetic": 128,
            "augmentation": "color_crop_cutout",
            "network": "convnet3",
            "early": 0,
            "net_images": 2000,
            "net_lr": 0.01,
            "net_momentum": 0.9,
            "net_weight_decay": 0.0005,
            "mix": 0.5,
            "mean": [0.4914, 0.4822, 0.4465],
            "std": [0.2023, 0.1994, 0.201],
        }
    },
    "sre2l": {
        "settings": {
            "size": 32,
            "batch": 100,
            "iterations": 1000,
            "lr": 0.25,
            "weight": 0.01,
            "first": 10.0,
            "views": {"crop_scale": None, "pad": 0, "flip": False, "roll": 4},
            "jpeg_quality": 75,
        }
    },
    "gvbsm": {
        "settings": {
            "size": 32,
            "batch": 100,
            "iterations": 4000,
            "lr": 0.05,
            "weight": 0.01,
            "first": 10.0,
            "views": {"crop_scale": None, "pad": 4, "flip": True, "roll": 32},
            "jpeg_quality": None,
            "patch": 4,
            "average": 0.8,
            "drop": 0.4,
            "density_weight": 1.0,
            "temperature": 4.0,
            "target_images": None,
            "target_batch": 64,
        }
    },
    "d4m": {
        "settings": {
            "strength": 0.7,
            "cfg_scale": 8.0,
            "num_steps": 50,
            "solver": "configured",
            "posterior": "sample",
            "size": None,
            "prompt": "{}",
            "negative_prompt": "cartoon, anime, painting",
            "km_expand": 10,
            "images": None,
        }
    },
    "tdsdm": {
        "settings": {
            "strength": 0.75,
            "cfg_scale": 2.0,
            "num_steps": 30,
            "solver": "unipc",
            "posterior": "sample",
            "size": None,
            "prompt": "{}, photo, best quality",
            "negative_prompt": "distorted, unrealistic, blurry, out of frame, cropped, deformed",
            "adapter_scale": 0.5,
            "adapter": {
                "epochs": 100,
                "steps": None,
                "batch_size": 8,
                "lr": 0.0001,
                "ema": 0.0,
                "label_dropout": 0.0,
                "flip": True,
                "posterior": "sample",
                "resize": "bilinear",
                "images": None,
                "seed": 42,
                "rank": 4,
                "snr_cap": 5.0,
                "matching": 0.003,
                "weight_decay": 0.01,
                "clip": 1.0,
                "prompt": "photo of {}",
            },
        }
    },
    "datm": {
        "settings": {
            "experts": {
                "network": "convnet3",
                "count": 100,
                "epochs": 100,
                "lr": 0.01,
                "batch_size": 256,
                "rho": 0.01,
                "alpha": 0.3,
                "augmentation": "color_crop_cutout_flip_scale_rotate",
                "images": None,
                "whiten": True,
                "eps": 0.1,
                "mean": [0.4914, 0.4822, 0.4465],
                "std": [0.2023, 0.1994, 0.201],
                "seed": 0,
            },
            "iterations": 10000,
            "steps": 80,
            "expert_epochs": 2,
            "batch_size": 100,
            "first_epoch": 0,
            "upper": 10,
            "last_upper": 20,
            "widened_by": 1000,
            "threshold": 1.0,
            "lr_images": 100.0,
            "lr_labels": 2.0,
            "lr_rate": 1e-05,
            "rate": 0.01,
            "init": "correct",
            "labels": "soft",
            "images": "float",
        },
    },
}
# What a set's key has of an adapter or of experts names those too.
FROZEN["adapter"] = {"settings": FROZEN["tdsdm"]["settings"]["adapter"]}
FROZEN["experts"] = {"settings": FROZEN["datm"]["settings"]["experts"]}
# A teacher is trained under a protocol too, and a new field of protocols is listed once.
FROZEN["teacher"] = {"protocol": FROZEN["evaluation"]["protocol"], "seed": 0}


def key(kind: str, settings: Mapping[str, Any]) -> str:
    """Twelve hex digits that name a piece of work. Raises KeyError for an unknown kind."""
    changed = _changed(_plain(settings), _plain(FROZEN[kind]))
    return settings_hash({"kind": kind, "schema": SCHEMA[kind], "settings": changed})


def folder(kind: str, settings: Mapping[str, Any]) -> Path:
    """Where such a piece of work lies: `work_dir()/KIND/KEY`."""
    return work_dir() / kind / key(kind, settings)


def kept(kind: str, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Folders of work of a kind with these settings, whatever else they may name. Damaged ones are passed."""
    for path in sorted((work_dir() / kind).glob("*/manifest.json")):
        try:
            found = json.loads(path.read_text())
            own = {name: value for name, value in found["settings"].items() if name in settings}
            if found["schema"] == SCHEMA[kind] and key(kind, own) == key(kind, settings):
                yield path.parent
        except (ValueError, KeyError, TypeError, AttributeError):
            continue


def manifest(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a piece of work says of itself on disk: its kind, schema number, key and settings."""
    return {"kind": kind, "schema": SCHEMA[kind], "key": key(kind, settings), "settings": _plain(settings)}


def difference(kind: str, present: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """A manifest's first difference from work of these settings in words; None if it is the same work.

    Settings that one of the two does not name have the schema's frozen default. Raises ValueError for a
    manifest without settings.
    """
    if present.get("schema") != SCHEMA[kind]:
        return (
            f"it was made under schema {present.get('schema')} of {kind!r}, results now are of schema "
            f"{SCHEMA[kind]}"
        )
    noted = present.get("settings")
    if not isinstance(noted, dict):
        raise ValueError("it has no settings")
    defaults = _plain(FROZEN[kind])
    ours, theirs = _filled(_plain(settings), defaults), _filled(_plain(noted), defaults)
    return files.difference(theirs, dict.fromkeys(theirs) | ours)


def claim(path: str | Path, kind: str, settings: Mapping[str, Any], what: str) -> None:
    """Note the settings of new work in the JSON file `path`, or compare them with those noted there.

    Raises ValueError naming the first difference ("FOLDER holds `what` of other settings ..."), or a damaged
    file.
    """
    path = Path(path)
    if not path.is_file():
        files.write(path, json.dumps(manifest(kind, settings), indent=2) + "\n")
        return
    try:
        present = dict(json.loads(path.read_text()))
        found = difference(kind, present, settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder and run again") from error
    if found:
        raise ValueError(f"{path.parent} holds {what} of other settings: {found}; choose another folder")


def settings_hash(settings: object) -> str:
    """Twelve hex digits that name a JSON-able collection of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, whole floats as integers: 5 and 5.0 are one setting."""
    return json.loads(json.dumps(settings), parse_float=_number)


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _changed(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings that differ from the defaults, nested alike."""
    found = {}
    for name, value in settings.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            value, default = _changed(value, default), {}
        if name not in defaults or value != default:
            found[name] = value
    return found


def _filled(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings with the defaults of those that are not named, nested alike."""
    found = dict(settings)
    for name, default in defaults.items():
        value = settings.get(name, default)
        found[name] = (
            _filled(value, default) if isinstance(value, dict) and isinstance(default, dict) else value
        )
    return found
