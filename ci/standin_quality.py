"""Measures the shipped stand-in against its bars and writes its model card, sample grid and numbers.

Bars: a ConvNet-3 trained on real images recognises at least 90 % of 500 vanilla samples, and training
on vanilla samples at IPC 50 reaches at least 95 % of Random's accuracy (five draws each). Run the
parts `samples` and `ipc50` (side by side if you like), then `card`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torchvision.utils import make_grid, save_image

from igd_lib.data.images import to_float
from igd_lib.evaluation import evaluate
from igd_lib.experiment.experiment import Experiment, prepare
from igd_lib.experiment.methods import Method
from igd_lib.experiment.run import Run
from igd_lib.models import standin
from igd_lib.models.networks import network
from igd_lib.protocols import SMALL_HARD
from igd_lib.surrogate import train_surrogate
from igd_lib.teachers import accuracy, predict, topk
from igd_lib.tools import files

PARTS = Path("out/standin_quality")


def samples(experiment: Experiment, vanilla: Method) -> dict[str, float]:
    """A real-data classifier's accuracy on 500 samples and on test images (percent), reconstruction, latent
    statistics.
    """
    data = experiment.set(vanilla, 0, 50).data()
    grid = make_grid(torch.cat([data.of_class(label, 12) for label in range(10)]) / 255, nrow=12, padding=1)
    files.write(standin.path() / "samples.png", lambda path: save_image(grid, path, format="png"))
    torch.manual_seed(0)
    model = network("convnet3", num_classes=10, image_size=32)
    train_surrogate(model, experiment.train.per_class(2000, seed=0), epochs=5)
    images = to_float(experiment.test.fetch(torch.arange(len(experiment.test))))
    with torch.no_grad():
        latents = experiment.models.pipe.vae.encode(images).latent_dist.mean
        error = (experiment.models.pipe.vae.decode(latents).sample - images).square().mean().item()
    scaled = latents * experiment.models.pipe.vae.config.scaling_factor
    return {
        "cfg": vanilla.cfg_scale,
        "recognised_samples_percent": topk(predict(model, data, SMALL_HARD), data.labels, 1),
        "recognised_test_percent": accuracy(model, experiment.test, SMALL_HARD)[0],
        "reconstruction_mse": error,
        "latent_sd": scaled.std().item(),
        "latent_mean_share": (scaled.mean(0).norm() / scaled.flatten(1).norm(dim=1).mean()).item(),
    }


def ipc50(experiment: Experiment, vanilla: Method, seeds: list[int]) -> None:
    """Top-1 of a ConvNet-3 trained on 50 images a class, Random and vanilla, a file a seed."""
    for seed in seeds:
        row = {"seed": seed}
        for name, images in (
            ("random", experiment.train.per_class(50, seed)),
            ("vanilla", experiment.set(vanilla, seed, 50)),
        ):
            row[name] = evaluate(
                images, experiment.test, network="convnet3", protocol=SMALL_HARD, seed=seed
            ).last
        files.write(PARTS / f"ipc50-{seed}.json", json.dumps(row) + "\n")
        print(row, flush=True)


def card() -> None:
    """Merge the parts into quality.json and README.md beside the weights."""
    found = json.loads((PARTS / "samples.json").read_text())
    draws = [json.loads(path.read_text()) for path in sorted(PARTS.glob("ipc50-*.json"))]
    random, vanilla = (
        torch.tensor([draw[name] for draw in draws]).double() for name in ("random", "vanilla")
    )
    training = json.loads((standin.path() / "training.json").read_text())
    recipe = training["recipe"]
    quality = found | {"ipc50": draws, "vanilla_over_random": (vanilla.mean() / random.mean()).item()}
    files.write(standin.path() / "quality.json", json.dumps(quality, indent=2) + "\n")
    text = f"""# Model card: the Fashion-MNIST stand-in

A small latent diffusion model that lets every notebook run without ImageNet or DiT-XL/2. It is trained from scratch by
`igd standin fashion-mnist` and stored in diffusers' folder format, in half precision. Its code and weights are
Apache-2.0; Fashion-MNIST is MIT-licensed. Nothing of DiT's or Stable Diffusion's weights is in it.

| | |
|---|---|
| data | Fashion-MNIST, {training["images"]:,} training images (the first 5,000 of each class; the other 10,000 are the validation split) |
| autoencoder | `AutoencoderKL`, channels {tuple(recipe["vae_channels"])}, latents 4 x 8 x 8, {recipe["vae_steps"]:,} steps of {recipe["vae_batch"]} (about 0.2 s each on 2 cores) |
| transformer | `DiTTransformer2DModel`, {recipe["layers"]} layers, {recipe["heads"]} heads of {recipe["head_dim"]}, patch {recipe["patch"]}, noise prediction, {recipe["dit_steps"]:,} steps of {recipe["dit_batch"]} (about 0.2 s each on 2 cores), EMA {recipe["ema"]} |
| seed | {recipe["seed"]} |
| loss, last 500 steps | {training["last_loss"]:.4f} (noise error weighted by min(SNR, 1) / SNR) |
| reconstruction error | mean squared error {found["reconstruction_mse"]:.4f} on 2,000 test images, pixels in [-1, 1] |
| latents | sd {found["latent_sd"]:.3f}; norm of the mean over mean norm {found["latent_mean_share"]:.3f} |
| recognised | a ConvNet-3 trained on 20,000 real images, {found["recognised_test_percent"]:.1f} % on real test images, classifies {found["recognised_samples_percent"]:.1f} % of 500 vanilla samples (cfg {found["cfg"]}) as their class |
| IPC 50 | ConvNet-3, 30 epochs, 2,000 test images: Random {random.mean():.1f} ± {random.std():.1f}, vanilla {vanilla.mean():.1f} ± {vanilla.std():.1f} (sd over n = {len(draws)} draws): {100 * quality["vanilla_over_random"]:.1f} % of Random's |

The cfg was chosen on the validation split. `ci/standin_quality.py` measures all of this again.

![12 vanilla samples of each class: images 0 to 11 of seed 0](samples.png)
"""
    files.write(standin.path() / "README.md", text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("samples", "ipc50", "card"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    if arguments.part == "card":
        return card()
    experiment = prepare("standin_quality", "fashion-mnist", "small", run=Run(ipc=50))
    vanilla = Method(cfg_scale=experiment.scale.best_cfg, cfg_choice="best")
    if arguments.part == "ipc50":
        return ipc50(experiment, vanilla, arguments.seeds)
    result = samples(experiment, vanilla)
    files.write(PARTS / "samples.json", json.dumps(result, indent=2) + "\n")
    print(result)


if __name__ == "__main__":
    main()
