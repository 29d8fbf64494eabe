"""Seconds an image on the stand-in, vanilla and guided, and their ratio; from one run on this machine."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import torch

from igd_lib import experiment, files
from igd_lib.distill import image_generator
from igd_lib.sampler import sample_igd


def seconds_an_image(setup: experiment.Experiment, batch: int, guided: bool, repeats: int = 3) -> float:
    """The median over `repeats` runs of a batch, a fixed memory of 5 latents a class."""
    targets = torch.arange(batch) % 10
    options = {}
    if guided:
        memory = [torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(b)) for b in range(batch)]
        options = dict(targets=targets, guidance=setup.guidance, checkpoints=setup.checkpoints, gradients=setup.gradients[:, targets], memory=memory)
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        generators = [image_generator(0, int(label), index) for index, label in enumerate(targets)]
        noise = setup.pipe.latent_noise(generators)
        started = time.perf_counter()
        sample_igd(
            setup.pipe.transformer, setup.pipe.vae, setup.pipe.scheduler_for(setup.fidelity), noise, targets,
            num_steps=setup.num_steps, fidelity=setup.fidelity, generator=generators, **options,
        )  # fmt: skip
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2] / batch


def main() -> None:
    setup = experiment.prepare("bench", "fashion-mnist", "small")
    setup.surrogate_options |= {"epochs": 1, "train_images": 200}
    setup.fit_surrogate()
    report = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "checkpoints": len(setup.checkpoints), "rows": []}
    for batch in (1, 10, 50):
        vanilla, guided = (seconds_an_image(setup, batch, flag) for flag in (False, True))
        report["rows"].append({"batch": batch, "vanilla_s": vanilla, "guided_s": guided, "ratio": guided / vanilla})
        print(f"batch {batch:3d}: vanilla {vanilla:.3f} s, guided {guided:.3f} s an image, ratio {guided / vanilla:.2f}", flush=True)
    path = files.write(Path("out") / "bench.json", json.dumps(report, indent=2) + "\n")
    print(f"{report['threads']} threads, {report['checkpoints']} checkpoints; written to {path}")


if __name__ == "__main__":
    main()
