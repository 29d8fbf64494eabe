"""The peak of one guided step at the paper's shapes on this CPU, beside what `igd_lib.memory` predicts.

`python -m ci.bench.footprint BATCH [PRECISION [recompute]]` takes a step with random weights (a minute or two
an image on one core) and prints GiB: predicted, counted on its tensors, and by how much the process grew.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from ci.bench import shapes
from igd_lib import memory
from igd_lib.models.networks import network
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampling import Sampling
from igd_lib.surrogate import Checkpoints

GIB = 2**30


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at its most."""
    lines = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return int(lines[name].split()[0]) * 1024


def real(precision: str, recompute: bool) -> Sampling:
    """DiT-XL/2, SD's autoencoder and four ConvNet-6 with random weights."""
    net = network("convnet6", num_classes=10, image_size=256).eval()
    states = [{name: value.clone() for name, value in net.state_dict().items()} for _ in range(4)]
    checkpoints = Checkpoints(net, states, [0.0, 1.0, 2.0, 3.0], [0.01] * 4)
    pipe = IGDPipeline(shapes.dit_xl_2(), shapes.sd_vae(), memory.DDPMScheduler())
    own = {"precision": precision, "recompute": recompute, "num_steps": 1}
    return Sampling(pipe, memory.GUIDED, checkpoints=checkpoints, **own).lowered()


def main(batch: int, precision: str = "float32", recompute: bool = False) -> None:
    before = resident("VmRSS")
    sampling, started = real(precision, recompute), time.monotonic()
    counted = memory.peak(sampling, batch, memory._step, memory.Live())
    grown, seconds = resident("VmHWM") - before, time.monotonic() - started
    config, vae = shapes_of(sampling)
    options = {"precision": precision, "recompute": recompute}
    predicted = memory.guided_step(memory.Models(config, vae), memory.Surrogate(), **options)
    print(
        f"batch {batch}, {precision}{', recompute' if recompute else ''}: predicted "
        f"{predicted.peak(batch) / GIB:.3f}, counted {counted / GIB:.3f}, grown {grown / GIB:.3f} GiB; "
        f"{seconds:.0f} s",
        flush=True,
    )


def shapes_of(sampling: Sampling) -> tuple[dict, dict]:
    """The configurations of its models."""
    return dict(sampling.pipe.transformer.config), dict(sampling.pipe.vae.config)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(int(sys.argv[1]), *sys.argv[2:3], recompute="recompute" in sys.argv)
