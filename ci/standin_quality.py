"""Measures a shipped stand-in against its bars and writes its model card, sample grid and numbers.

Bars: a network trained on all of its real training images recognises so many of 500 vanilla samples, and
training on vanilla samples reaches so much of Random's accuracy (five draws each, IPC 10 and 50); `BARS` has
the shares. Run the parts `samples` and `accuracy` (side by side if you like), then `card`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from igd_lib.analysis import features, metrics
from igd_lib.data.images import to_float
from igd_lib.evaluation import evaluate
from igd_lib.experiment.experiment import Experiment, prepare
from igd_lib.experiment.methods import Method
from igd_lib.experiment.run import Run
from igd_lib.models import standin
from igd_lib.teacher_training import STAND_IN_TEACHER, stand_in_teacher, train_teacher
from igd_lib.teachers import Teacher, predict, topk
from igd_lib.tools import files

PARTS = Path("out/standin_quality")
# Percent of samples recognised, and of Random's accuracy at IPC 10 and 50.
BARS = {"fashion-mnist": (90, {50: 95}), "cifar-10": (85, {10: 100, 50: 92})}


def samples(experiment: Experiment, vanilla: Method, name: str) -> dict[str, float]:
    """What the judge, a network trained on all real images, recognises (percent), Fréchet distances over its
    features, reconstruction, latents.
    """
    found = experiment.set(vanilla, 0, 50).data()
    grid = make_grid(torch.cat([found.of_class(label, 12) for label in range(10)]) / 255, nrow=12, padding=1)
    files.write(standin.path(name) / "samples.png", lambda path: save_image(grid, path, format="png"))
    recipe, place = STAND_IN_TEACHER, PARTS / name / "judge"
    judge = stand_in_teacher(name) or train_teacher(
        experiment.train, experiment.test, place, network="convnet3", recipe=recipe
    )
    logits, labels = predict(judge.model, found, recipe), found.labels
    of_class = [topk(logits[labels == label], labels[labels == label], 1) for label in range(10)]
    return {
        "cfg": vanilla.cfg_scale,
        "judge_top1_percent": judge.top1,
        "recognised_percent": topk(logits, labels, 1),
        "recognised_least_percent": min(of_class),
        **frechet_distances(experiment, judge, vanilla),
        **reconstruction(experiment),
    }


def frechet_distances(experiment: Experiment, judge: Teacher, vanilla: Method) -> dict[str, float]:
    """Of 2,500 vanilla samples, and of as many real training images, from the test images."""
    extractor = features.network_extractor(judge.model, "the judge")
    real = metrics.gaussian(features.features(extractor, experiment.test))
    every = [experiment.set(vanilla, seed, 50).data() for seed in range(5)]
    sampled = torch.cat([features.features(extractor, one) for one in every])
    trained = features.features(extractor, experiment.train.per_class(len(sampled) // 10, seed=0))
    return {
        "samples_compared": len(sampled),
        "frechet": metrics.frechet_distance(real, sampled),
        "frechet_real": metrics.frechet_distance(real, trained),
    }


@torch.no_grad()
def reconstruction(experiment: Experiment) -> dict[str, float]:
    """The autoencoder's error on the test images, pixels in [-1, 1], and its latents' statistics."""
    vae, errors, latents = experiment.models.pipe.vae, [], []
    for images, _ in experiment.test.batches(250):
        real = to_float(images)
        latents.append(vae.encode(real).latent_dist.mean)
        errors.append((vae.decode(latents[-1]).sample - real).square().mean((1, 2, 3)))
    scaled = torch.cat(latents) * vae.config.scaling_factor
    share = scaled.mean(0).norm() / scaled.flatten(1).norm(dim=1).mean()
    return {
        "reconstruction_mse": torch.cat(errors).mean().item(),
        "latent_sd": scaled.std().item(),
        "latent_mean_share": share.item(),
    }


def prepared(name: str, ipc: int) -> tuple[Experiment, Method]:
    """The stand-in's experiment, and vanilla sampling at the cfg that was chosen for that IPC."""
    experiment = prepare("standin_quality", None, "small", run=Run(ipc=ipc, stand_in=name))
    return experiment, Method(cfg_scale=experiment.scale.best_cfg, cfg_choice="best")


def accuracies(name: str, seeds: Sequence[int]) -> None:
    """Top-1 of ConvNet-3 trained on 10 and 50 images a class, Random and vanilla, a file a draw."""
    for ipc in (10, 50):
        experiment, vanilla = prepared(name, ipc)
        protocol = experiment.scale.protocol
        for seed in seeds:
            sets = {"random": experiment.train.per_class(ipc, seed)}
            sets["vanilla"] = experiment.set(vanilla, seed, ipc)
            row = {"ipc": ipc, "seed": seed, "protocol": protocol.name, "cfg": vanilla.cfg_scale}
            for kind, images in sets.items():
                score = evaluate(images, experiment.test, network="convnet3", protocol=protocol, seed=seed)
                row[kind] = score.last
            files.write(PARTS / name / f"ipc{ipc}-{seed}.json", json.dumps(row) + "\n")
            print(row, flush=True)


def card(name: str) -> None:
    """Merge the parts into quality.json and README.md beside the weights."""
    found = json.loads((PARTS / name / "samples.json").read_text())
    draws = [json.loads(path.read_text()) for path in sorted((PARTS / name).glob("ipc*-*.json"))]
    found["accuracy"] = draws
    files.write(standin.path(name) / "quality.json", json.dumps(found, indent=2) + "\n")
    training = json.loads((standin.path(name) / "training.json").read_text())
    text = written(name, found, training)
    files.write(standin.path(name) / "README.md", text)
    print(text)


def of_draws(found: dict, ipc: int, kind: str) -> Tensor:
    """(n,) top-1 of the draws at an IPC."""
    return torch.tensor([draw[kind] for draw in found["accuracy"] if draw["ipc"] == ipc]).double()


ABOUT = {
    "fashion-mnist": (
        "Fashion-MNIST",
        "Fashion-MNIST is MIT-licensed",
        "the first 5,000 of each class; the other 10,000 are the validation split",
    ),
    "cifar-10": (
        "CIFAR-10",
        "CIFAR-10 names no licence (Krizhevsky, 2009); its images come from the withdrawn 80 Million Tiny Images",
        "the first 4,500 of each class; the other 5,000 are the validation split",
    ),
}


def written(name: str, found: dict, training: dict) -> str:
    """The model card."""
    title, licence, split = ABOUT[name]
    recipe, (recognised, shares) = training["recipe"], BARS[name]
    lines = []
    for ipc in (10, 50):
        random, vanilla = of_draws(found, ipc, "random"), of_draws(found, ipc, "vanilla")
        first = next(draw for draw in found["accuracy"] if draw["ipc"] == ipc)
        share = 100 * (vanilla.mean() / random.mean()).item()
        bar = f" (bar: {shares[ipc]} %)" if ipc in shares else ""
        lines.append(
            f"| IPC {ipc} | ConvNet-3, `{first['protocol']}`: Random {random.mean():.1f} ± {random.std():.1f}, "
            f"vanilla (cfg {first['cfg']:g}) {vanilla.mean():.1f} ± {vanilla.std():.1f} (sd over n = {len(random)} draws): {share:.1f} % of "
            f"Random's{bar} |"
        )
    hours = "not kept"
    if "hours" in training:
        hours = f"{training['hours']:g} hours on {training['threads']} thread(s) of a CPU"
    flips = "; both each image and its mirror image" if recipe["flip"] else ""
    return f"""# Model card: the {title} stand-in

A small latent diffusion model that lets every notebook run without ImageNet or DiT-XL/2. It is trained from scratch by
`igd standin {name}` and stored in diffusers' folder format, in half precision. Its code and weights are
Apache-2.0; {licence}. Nothing of DiT's or Stable Diffusion's weights is in it.

| | |
|---|---|
| data | {title}, {training["images"]:,} training images ({split}){flips} |
| autoencoder | `AutoencoderKL`, channels {tuple(recipe["vae_channels"])}, latents 4 x 8 x 8, {recipe["vae_steps"]:,} steps of {recipe["vae_batch"]} |
| transformer | `DiTTransformer2DModel`, {recipe["layers"]} layers, {recipe["heads"]} heads of {recipe["head_dim"]}, patch {recipe["patch"]}, noise prediction, {recipe["dit_steps"]:,} steps of {recipe["dit_batch"]}, EMA {recipe["ema"]} |
| time | {hours} |
| seed | {recipe["seed"]} |
| loss, last 500 steps | {training["last_loss"]:.4f} (noise error weighted by min(SNR, 1) / SNR) |
| reconstruction error | mean squared error {found["reconstruction_mse"]:.4f} on the test images, pixels in [-1, 1] |
| latents | sd {found["latent_sd"]:.3f}; norm of the mean over mean norm {found["latent_mean_share"]:.3f} |
| recognised | a ConvNet-3 trained on all training images, {found["judge_top1_percent"]:.1f} % on real test images, classifies {found["recognised_percent"]:.1f} % of 500 vanilla samples (cfg {found["cfg"]}) as their class, {found["recognised_least_percent"]:.0f} % of the worst class (bar: {recognised} %) |
| Fréchet distance | over this network's features, from the test images: {found["samples_compared"]:,} samples {found["frechet"]:.1f}, as many real training images {found["frechet_real"]:.1f} |
{chr(10).join(lines)}

The cfgs were chosen on the validation split. `ci/standin_quality.py` measures all of this again.

![12 vanilla samples of each class: images 0 to 11 of seed 0](samples.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("samples", "accuracy", "card"))
    parser.add_argument("--stand-in", choices=tuple(BARS), default="cifar-10")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    given = parser.parse_args()
    name = given.stand_in
    if given.part == "card":
        return card(name)
    if given.part == "accuracy":
        return accuracies(name, given.seeds)
    experiment, vanilla = prepared(name, 10)
    result = samples(experiment, vanilla, name)
    files.write(PARTS / name / "samples.json", json.dumps(result, indent=2) + "\n")
    print(result)


if __name__ == "__main__":
    main()
