"""What Minimax fine-tuning did to the stand-in: its diffusion loss on images it has not seen, and how alike
its samples are.

`python ci/minimax_quality.py` fine-tunes the model where no notebook has (some minutes), prints a table and
fails if the loss rose by more than `WORSE` or the nearest neighbour within a class did not move away. Rows go
to paper_figures/data/minimax_quality.csv.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch
from diffusers import DDPMScheduler

from igd_lib.analysis import results, statistics
from igd_lib.baselines.tuning import diffusion_loss
from igd_lib.experiment import measures
from igd_lib.experiment.experiment import Experiment, prepare
from igd_lib.experiment.methods import Method
from igd_lib.experiment.run import Run
from igd_lib.models import standin
from igd_lib.pipeline import IGDPipeline
from igd_lib.tools import files

OUT = Path(__file__).parents[1] / "paper_figures" / "data" / "minimax_quality.csv"
WORSE = 0.02  # of the diffusion loss, at most


@torch.no_grad()
def losses_on_test_images(experiment: Experiment, pipe: IGDPipeline, seed: int) -> dict[str, float]:
    """The mean squared error of the predicted noise over the test images, each with one draw of timestep and
    noise.

    As Minimax trains, every timestep alike; and with the weights that the stand-in's DiT was trained with,
    which hardly look at small noise.
    """
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    by_timestep = standin.noise_weights(scheduler, standin.STANDINS[experiment.train.name])
    generator, ids, losses, weights = (
        torch.Generator().manual_seed(seed),
        torch.tensor(experiment.label_ids),
        [],
        [],
    )
    for images, labels in experiment.test.batches(250):
        latents = experiment.scale.minimax.latents(pipe.vae, images, generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.randint(1000, (len(latents),), generator=generator).to(latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        output = pipe.transformer(
            noisy, timestep=timesteps, class_labels=ids[labels].to(latents.device)
        ).sample
        losses.append(
            diffusion_loss(output[:, : noise.shape[1]], noise, latents, noisy, timesteps, scheduler).cpu()
        )
        weights.append(by_timestep[timesteps.cpu()])
    loss, weight = torch.cat(losses), torch.cat(weights)
    return {
        "diffusion_loss": loss.mean().item(),
        "diffusion_loss_capped": ((weight * loss).sum() / weight.sum()).item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ipc", type=int, default=10)
    given = parser.parse_args()
    experiment = prepare("minimax_quality", "fashion-mnist", "small", run=Run(ipc=given.ipc))
    plain, tuned = Method(), Method(backbone="minimax")
    pipes = {plain: experiment.models.pipe, tuned: experiment.models.minimax}
    sets = experiment.sets([plain, tuned], given.ipc, given.seeds)
    rows = [
        measures.About(experiment, method, seed, images, given.ipc).row(metric, value)
        for method, seed, images in sets
        for metric, value in losses_on_test_images(experiment, pipes[method], seed).items()
    ]
    latents = measures.latent_rows(experiment, sets, plain)
    whole = pd.concat([results.frame(rows), latents[latents.metric == "nearest"]], ignore_index=True)
    files.write(OUT, whole.sort_values(["metric", "method", "seed"]).to_csv(index=False, lineterminator="\n"))
    print(results.summary(whole, ("metric", "method")).round(4).to_string(index=False))
    found = {
        metric: statistics.paired(whole[whole.metric == metric], tuned.label, plain.label)
        for metric in sorted(set(whole.metric))
    }
    for metric, difference in found.items():
        print(
            f"{metric}, Minimax - DiT: {difference.mean():+.4f}, sd {difference.std():.4f} over n = "
            f"{len(difference)} pairs"
        )
    before = whole[whole.backbone == "dit"].groupby("metric")["value"].mean()
    worse = [
        metric
        for metric in found
        if metric.startswith("diffusion") and found[metric].mean() > WORSE * before[metric]
    ]
    return int(bool(worse) or found["nearest"].mean() >= 0)


if __name__ == "__main__":
    sys.exit(main())
