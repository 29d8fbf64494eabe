"""The peak of one guided step at the paper's shapes on this CPU, beside what `igd_lib.memory` predicts.

`python -m ci.bench.footprint BATCH [PRECISION] [recompute]` takes a step with random weights (a minute or two
an image on one core) and prints, in GiB: predicted, counted on its tensors, and by how much the process grew.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ci.bench import shapes
from igd_lib import memory
from igd_lib.sampling import Sampling

GIB = 2**30


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at its most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def measured(models: memory.Models, batch: int, **options: Any) -> dict[str, Any]:
    """What a step took, with fresh models and four ConvNet-6."""
    before, started = resident("VmRSS"), time.monotonic()
    sampling: Sampling = models.sampling(memory.Surrogate(), **options).lowered()
    counted = memory.peak(sampling, batch, memory.one_step, memory.Live())
    grown = resident("VmHWM") - before
    return {"counted": counted / GIB, "grown": grown / GIB, "seconds": time.monotonic() - started}


def main(batch: int, precision: str = "float32", recompute: bool = False) -> None:
    with torch.device("meta"):  # their configurations are all that is wanted
        models = memory.Models(dict(shapes.dit_xl_2().config), dict(shapes.sd_vae().config))
    options: dict[str, Any] = {"precision": precision, "recompute": recompute}
    found = {"batch": batch} | options | measured(models, batch, **options)
    predicted = memory.guided_step(models, memory.Surrogate(), **options).peak(batch) / GIB
    print(json.dumps(found | {"predicted": predicted}), flush=True)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "recompute"]
    main(int(words[0]), *words[1:2], recompute="recompute" in sys.argv)
