"""Scores an exported set with DD-Ranking's label-robust score (hard labels): the round trip through somebody
else's evaluation.

DD-Ranking needs numpy below 2, so an environment of its own, without igd_lib (about 7 GB, most of it torch):

    python3 -m venv ddr-venv
    ddr-venv/bin/pip install torch==2.14.1 torchvision==0.29.1 ddranking==0.2.0
    ddr-venv/bin/python ci/ddranking_check.py EXPORT DATA

EXPORT: a folder from `DistilledSet.export`. "rded" goes in as `image_path`, "safetensors" as `image_tensor`
and `hard_labels`, "imagefolder" as `image_path` if its sorted folders are in label order, which is how
DD-Ranking reads them. DATA: Fashion-MNIST's four files, CIFAR-10's six of the binary version, or `train` and
`val` (or `test`) with one folder a class. --csv FILE adds a line with settings and scores to a table. The
defaults are DD-Ranking's; the score needs them. For a look on a laptop, cut the training:
--epochs 20 --runs 1 --batch-size 20 --real-images 100 --test-images 100 --device cpu.

What 0.2.0 lacks is replaced here and nothing else: it knows only its own data sets (`get_dataset`; real data
is trained as it trains CIFAR-10), and after all training it cannot save its score, as it appends each one
twice (`save_results`). It also puts percentages where its documentation's formula, normalised to [0, 1], has
fractions; both are printed. Its seeds are the time of day: no two runs are alike.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ddranking import LabelRobustScoreHard
from ddranking.metrics import hard_label
from ddranking.utils import REAL_DATA_TRAINING_CONFIG, TensorDataset
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision import transforms

IDX = {"train": "train", "test": "t10k"}
NORMALISE = transforms.Normalize([0.5] * 3, [0.5] * 3)
CIFAR = {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]}


def real_images(
    folder: Path, split: str, classes: list[str], size: int, count: int | None
) -> tuple[Tensor, list[int]]:
    """float (N, 3, size, size) in [0, 1] and labels in the export's class order: the first `count` images of
    each class, all with None.
    """
    if (folder / f"{IDX[split]}-labels-idx1-ubyte.gz").is_file():
        labels, pixels = idx_images(folder, IDX[split])
    elif (folder / CIFAR[split][0]).is_file():
        records = [np.fromfile(folder / name, np.uint8).reshape(-1, 1 + 3072) for name in CIFAR[split]]
        whole = np.concatenate(records)
        labels, pixels = whole[:, 0], whole[:, 1:].reshape(-1, 3, 32, 32)
    else:
        return folder_images(folder, split, classes, size, count)
    chosen = np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(len(classes))])
    return torch.from_numpy(pixels[chosen]).float() / 255, labels[chosen].tolist()


def idx_images(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST's labels (N,) and pixels, padded to (N, 3, 32, 32) uint8."""
    labels, pixels = (
        np.frombuffer(
            gzip.decompress((folder / f"{split}-{name}-ubyte.gz").read_bytes()), np.uint8, offset=offset
        ).copy()
        for name, offset in (("labels-idx1", 8), ("images-idx3", 16))
    )
    padded = np.pad(pixels.reshape(-1, 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2)))
    return labels, padded.repeat(3, axis=1)


def folder_images(
    folder: Path, split: str, classes: list[str], size: int, count: int | None
) -> tuple[Tensor, list[int]]:
    """The same of `train`, and of `val` or `test`, with one folder a class."""
    names = (split,) if split == "train" else ("val", "test")
    place = next((folder / name for name in names if (folder / name).is_dir()), None)
    if place is None:
        raise SystemExit(
            f"{folder} has neither Fashion-MNIST's nor CIFAR-10's files (binary version) nor a folder of "
            f"{split} images"
        )
    read = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()])
    paths = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((place / name).iterdir())[:count]
    ]
    images = torch.stack([read(Image.open(path).convert("RGB")) for path, _ in paths])
    return images, [label for _, label in paths]


class Score(LabelRobustScoreHard):
    def _get_class_to_samples(self, *_) -> None:
        """Paths of the real images, which `random_data_format="image"` alone needs; ours are in memory."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="ConvNet-3")
    parser.add_argument("--epochs", type=int, default=300, help="of every training, 10 at least")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--batch-size", type=int, default=256, help="for the small sets; the real data has 256"
    )
    parser.add_argument(
        "--lr", type=float, help="for the distilled set; by default the best of five, as for random images"
    )
    parser.add_argument(
        "--real-images",
        type=int,
        help="a class, for the full-data network and the random sets; all by default",
    )
    parser.add_argument("--test-images", type=int, help="a class; all by default")
    parser.add_argument("--name", default="", help="of the set, in the table")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    parser = arguments()
    options, started = parser.parse_args(), time.monotonic()
    manifest = json.loads((options.export / "manifest.json").read_text())
    if wrong := refusal(options, manifest):
        parser.error(wrong)
    given, size = distilled(options.export, manifest["format"])
    train, test = (
        TensorDataset(NORMALISE(images), labels)
        for images, labels in (
            real_images(options.data, split, manifest["classes"], size, count)
            for split, count in (("train", options.real_images), ("test", options.test_images))
        )
    )
    offer(train, test, size, len(manifest["classes"]))
    found = scores(options, manifest["set"], given, size)
    report(options, manifest, found, (len(train), len(test)), time.monotonic() - started)


def refusal(options: argparse.Namespace, manifest: dict[str, Any]) -> str:
    """Why this export cannot be scored so; empty where it can."""
    if options.epochs < 10:
        return "--epochs is 10 at least: DD-Ranking tests every tenth epoch"
    if manifest["counts"] != [manifest["set"]["ipc"]] * len(manifest["classes"]):
        return "the export lacks classes; DD-Ranking needs them all"
    if manifest["plain_imagefolder_agrees"] is False:
        return (
            "DD-Ranking sorts class folders, and this export's are not in label order; export as 'rded' "
            "or 'safetensors'"
        )
    return ""


def distilled(export: Path, stored_as: str) -> tuple[dict[str, Any], int]:
    """The distilled images as DD-Ranking's arguments, and how many pixels wide they are."""
    if stored_as != "safetensors":
        return {"image_path": str(export)}, Image.open(next(export.glob("*/00000.png"))).width
    tensors = load_file(export / "data.safetensors")
    images = NORMALISE(tensors["images"] / 255)
    return {"image_tensor": images, "hard_labels": tensors["labels"]}, images.shape[-1]


def offer(train: TensorDataset, test: TensorDataset, size: int, classes: int) -> None:
    """Have DD-Ranking take these real images, and neither look for data of its own nor save its score."""
    same = {label: label for label in range(classes)}
    taken = (3, (size, size), [0.5] * 3, [0.5] * 3, classes, train, test, test, same, same)
    hard_label.get_dataset = lambda *_: taken
    hard_label.save_results = lambda *_: None


def scores(
    options: argparse.Namespace, origin: dict[str, Any], given: dict[str, Any], size: int
) -> dict[str, float]:
    """What DD-Ranking measures, by its own names."""
    own = f"{origin['dataset']}-{options.model}"
    REAL_DATA_TRAINING_CONFIG[own] = REAL_DATA_TRAINING_CONFIG["CIFAR10-ConvNet-3"]
    with tempfile.TemporaryDirectory() as scratch:
        score = Score(
            dataset=origin["dataset"],
            ipc=origin["ipc"],
            model_name=options.model,
            data_aug_func=None,
            lr_scheduler="cosine",
            num_eval=options.runs,
            im_size=(size, size),
            num_epochs=options.epochs,
            syn_batch_size=options.batch_size,
            num_workers=0,
            custom_train_trans=transforms.Compose([transforms.ToTensor(), NORMALISE]),
            device=options.device,
            random_data_path=f"{scratch}/random",
            save_path=f"{scratch}/scores.csv",
            eval_full_data=True,
        )
        return score.compute_metrics(**given, syn_lr=options.lr)


def documented(found: dict[str, float]) -> float:
    """The score by the formula of DD-Ranking's documentation, w = 0.5, of the means as fractions."""
    alpha = (found["improvement_over_random_mean"] - found["hard_label_recovery_mean"]) / 200
    return (math.exp(alpha) - math.exp(-1)) / (math.exp(1) - math.exp(-1))


def report(
    options: argparse.Namespace,
    manifest: dict[str, Any],
    found: dict[str, float],
    images: tuple[int, int],  # real ones to train and to test on
    seconds: float,
) -> None:
    """Print settings and scores, and add them to the table."""
    origin, score = manifest["set"], documented(found)
    print(
        f"\n{origin['dataset']} as {manifest['format']}, ipc {origin['ipc']}, {options.model}, "
        f"{options.epochs} epochs, {options.runs} runs, batches of {options.batch_size}, "
        f"{images[0]} real and {images[1]} test images, {seconds:.0f} s"
    )
    shown = {
        "real images - distilled": "hard_label_recovery",
        "distilled - random images": "improvement_over_random",
    }
    for what, name in shown.items():
        mean, sd = found[f"{name}_mean"], found[f"{name}_std"]
        print(f"{what}: {mean:.2f} points (sd {sd:.2f}, n = {options.runs})")
    print(
        f"label-robust score: {score:.4f} by its documentation (of the means), "
        f"{found['label_robust_score_mean']:.4f} as the package computes it"
    )
    if options.csv is not None:
        line = {
            "set": options.name or options.export.name,
            "real - distilled (points)": f"{found['hard_label_recovery_mean']:.1f}",
            "distilled - random (points)": f"{found['improvement_over_random_mean']:.1f}",
            "label-robust score": f"{score:.3f}",
            "data": f"{origin['dataset']}, IPC {origin['ipc']}",
            "network": options.model,
            "epochs": options.epochs,
            "runs": options.runs,
            "real images": images[0],
            "test images": images[1],
            "learning rate": options.lr or "best of five",
        }
        keep(options.csv, line)


def keep(path: Path, line: dict[str, object]) -> None:
    """Add a line to a table; another of the same set gives way."""
    old = list(csv.DictReader(path.open())) if path.is_file() else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(line), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*(one for one in old if one["set"] != line["set"]), line])


if __name__ == "__main__":
    main()
