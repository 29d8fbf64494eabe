"""What guided sampling costs: seconds, counted arithmetic and memory, on the stand-ins and at the paper's
shapes; and how long a notebook takes.

`make bench` runs every part, each in a process of its own, and writes paper_figures/data/bench.json; `--only
NAMES` measures these anew in it, `--part NAME` prints one part's JSON. Ratios within one part are what to
quote; absolute times belong to the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ci.bench import notebook, paper, shapes
from ci.bench.measure import counted, peak_gib, timed
from ci.bench.paper import SHORTCUTS
from ci.bench.report import say
from igd_lib.config import RELEASED, STANDARD, Fidelity, Guidance
from igd_lib.data.images import from_tensors
from igd_lib.distillation import distill, image_generator
from igd_lib.experiment.experiment import Experiment, prepare
from igd_lib.experiment.run import Run
from igd_lib.experiment.scales import DEFAULTS, STAND_INS
from igd_lib.models import standin
from igd_lib.models.networks import ConvNet
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampler import sample_igd
from igd_lib.sampling import FAST
from igd_lib.surrogate import Checkpoints
from igd_lib.tools import files

ROOT = Path(__file__).parents[2]
OUT = ROOT / "paper_figures" / "data" / "bench.json"


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


# --- the stand-ins


def standin_setup(name: str = DEFAULTS["small"]) -> tuple[Experiment, Any]:
    setup = prepare("bench", None, "small", run=Run(stand_in=name))
    return setup, standin.tiny_decoder(name).to(setup.device)


@dataclass(frozen=True)
class Way:
    """How images are sampled. shortcuts: `sample_igd`'s; "tiny" names the stand-in's guidance decoder."""

    guided: bool = True
    fidelity: Fidelity = STANDARD
    one_by_one: bool = False
    fast: bool = False  # in `FAST`'s steps, guided with its shortcuts
    shortcuts: Mapping[str, Any] = field(default_factory=dict)


FASTER = {
    "DPM-Solver++ 20": Way(guided=False, fast=True),
    "FAST": Way(fast=True, shortcuts={"guidance_decoder": "tiny"}),
}


def sampler(setup: Experiment, tiny: Any, batch: int, way: Way) -> Callable[[], torch.Tensor]:
    """A function that samples `batch` images of classes 0, 1, ... with five earlier latents each in memory,
    in the models' precision.
    """
    device, dtype, pipe = setup.device, setup.models.pipe.transformer.dtype, setup.models.pipe
    targets = torch.arange(batch, device=device) % 10
    memory = [
        torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(b)).to(device, dtype)
        for b in range(batch)
    ]
    guidance = setup.scale.guidance.for_latents(setup.latent_values)
    options: dict[str, Any] = {"guidance": guidance, "num_steps": setup.scale.num_steps}
    options["fidelity"] = way.fidelity
    if way.fast:
        options = FAST.options(guidance, way.fidelity)
    steps = {name: options.pop(name) for name in ("num_steps", "fidelity")}
    if way.guided:
        options |= {"checkpoints": setup.checkpoints, **way.shortcuts}
        if options.get("guidance_decoder") == "tiny":
            options["guidance_decoder"] = tiny
        by_image = [setup.retained[1](int(label)) for label in targets.tolist()]
        gradients = torch.stack(by_image, dim=1).to(device, dtype)

    def run() -> torch.Tensor:
        found = []
        for part in [[b] for b in range(batch)] if way.one_by_one else [list(range(batch))]:
            generators = [image_generator(0, int(targets[b]), b) for b in part]
            noise, scheduler = pipe.latent_noise(generators).to(dtype), pipe.scheduler_for(steps["fidelity"])
            models = (pipe.transformer, pipe.vae, scheduler, noise, targets[part])
            own = {}
            if way.guided:
                own = options | {"targets": targets[part], "gradients": gradients[:, part]}
                own["memory"] = [memory[b] for b in part]
            found.append(sample_igd(*models, generator=generators, **steps, **own))
        return torch.cat(found)

    return run


def part_standin(repeats: int, number: int) -> dict[str, Any]:
    """Batch 10 on the stand-in of that number: vanilla, exact, every shortcut, and straight-line versions."""
    name, batch = list(STAND_INS)[number], 10
    setup, tiny = standin_setup(name)
    alone = replace(RELEASED, second_chain=False)
    ways = {"vanilla": Way(guided=False)}
    ways |= {label: Way(shortcuts=options) for label, options in SHORTCUTS.items()} | FASTER
    ways["straight line"] = Way(fidelity=alone, one_by_one=True)
    ways["released code"] = Way(fidelity=RELEASED, one_by_one=True)
    ways["exact, second chain"] = Way(fidelity=replace(STANDARD, second_chain=True))
    found = {}
    for label, way in ways.items():  # the slow ones once
        run = sampler(setup, tiny, batch, way)
        work = counted(run)  # which warms up too
        found[label] = {
            "seconds": timed(run, setup.device, 1 if way.one_by_one else repeats) / batch,
            "gflop": work / batch / 1e9,
        }
    return {
        "stand-in": name,
        "surrogate": setup.scale.surrogate,
        "steps": setup.scale.num_steps,
        "checkpoints": len(setup.checkpoints),
        "batch": batch,
        "rows": found,
    }


def part_same() -> dict[str, Any]:
    """How far exact guidance and the straight line are apart after all steps, relative to the latents' norm,
    two images; by precision.

    Rounding grows over guided steps; in double precision only the method is left.
    """
    setup, tiny = standin_setup()
    apart = {}
    for dtype in (torch.float32, torch.float64):
        (
            setup.models.pipe.transformer.to(dtype),
            setup.models.pipe.vae.to(dtype),
            setup.checkpoints.model.to(dtype),
        )
        for state in setup.checkpoints.states:
            state.update({name: value.to(dtype) for name, value in state.items()})
        for chain in (False, True):
            fast, slow = (replace(fidelity, second_chain=chain) for fidelity in (STANDARD, RELEASED))
            ours, theirs = (
                sampler(setup, tiny, 2, Way(fidelity=fast))(),
                sampler(setup, tiny, 2, Way(fidelity=slow, one_by_one=True))(),
            )
            apart[f"{'second chain, ' if chain else ''}{str(dtype).removeprefix('torch.')}"] = float(
                (ours - theirs).norm() / theirs.norm()
            )
    return apart


def part_batch(batch: int, recompute: int = 0) -> dict[str, Any]:
    """Exact guided sampling of one batch: images a second and peak memory; recompute: with activation
    checkpointing.
    """
    setup, tiny = standin_setup()
    if recompute:
        setup.models.pipe.transformer.enable_gradient_checkpointing()
        setup.models.pipe.vae.enable_gradient_checkpointing()
    run = sampler(setup, tiny, batch, Way())
    if setup.device == "cuda":
        run()
    seconds = timed(run, setup.device, 1)
    return {
        "batch": batch,
        "recompute": bool(recompute),
        "images_per_second": batch / seconds,
        "peak_gib": peak_gib(setup.device),
    }


def part_variants(repeats: int) -> dict[str, Any]:
    """Whether other memory layouts and compilation pay, batch 10: seconds an image, vanilla and exact."""
    found = {}
    for name in ("plain", "channels_last", "torch.compile"):
        setup, tiny = standin_setup()
        if name == "channels_last":
            setup.models.pipe.vae.to(memory_format=torch.channels_last)
            setup.checkpoints.model.to(memory_format=torch.channels_last)
        if name == "torch.compile":
            setup.models.pipe.transformer.compile()
            setup.models.pipe.vae.decoder.compile()
        runs = {kind: sampler(setup, tiny, 10, Way(kind == "exact")) for kind in ("vanilla", "exact")}
        for run in runs.values():  # compiles
            run()
        found[name] = {kind: timed(run, setup.device, repeats) / 10 for kind, run in runs.items()}
    return found


# --- growth


def part_growth(images: int, classes: int) -> dict[str, Any]:
    """Time an image and peak memory of `distill` itself, with models so small that its own work shows:
    memory, class gradients, files.
    """
    torch.manual_seed(0)
    parts = shapes.tiny_models(classes)
    pipe = IGDPipeline(*parts)
    pipe.set_progress_bar_config(disable=True)
    model = ConvNet(2, classes, 16, width=8).eval()
    checkpoints = Checkpoints(model, [model.state_dict()], [0.0], [0.01])
    pixels = torch.randint(0, 256, (2 * classes, 3, 16, 16), dtype=torch.uint8)
    data = from_tensors(
        "growth",
        "train",
        [str(label) for label in range(classes)],
        pixels,
        torch.arange(classes).repeat_interleave(2),
    )
    ipc = images // classes

    def sample(folder: str, ipc: int) -> None:
        guided = dict(guidance=Guidance(5.0, 7.5, (1, 2)), checkpoints=checkpoints, num_steps=4)
        distill(pipe, data, ipc=ipc, out_dir=folder, batch_classes=10, **guided)

    with tempfile.TemporaryDirectory() as folder:
        sample(f"{folder}/first", 1)  # what a process does once
        started = time.perf_counter()
        sample(f"{folder}/timed", ipc)
        seconds = time.perf_counter() - started
    return {
        "images": images,
        "classes": classes,
        "ipc": ipc,
        "seconds_per_image": seconds / images,
        "peak_gib": peak_gib("cpu"),
    }


# --- Ray


def part_workers(workers: int) -> dict[str, Any]:
    """Exact guided sampling of 40 images of ten classes by so many Ray workers (0: without Ray, all threads),
    Ray's start included.
    """
    setup, _ = standin_setup()
    guides = torch.stack([setup.retained[1](label) for label in range(10)], dim=1)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        found = distill(
            setup.models.pipe,
            setup.train,
            ipc=4,
            guidance=setup.scale.guidance.for_latents(setup.latent_values),
            checkpoints=setup.checkpoints,
            gradients=guides,
            out_dir=folder,
            num_steps=setup.scale.num_steps,
            batch_classes=5,
            ray=bool(workers),
            workers=workers or None,
        )
        seconds = time.perf_counter() - started
        return {
            "workers": workers,
            "images_per_second": 40 / seconds,
            "sampling_seconds_an_image": found.seconds / 40,
        }


# --- all of it


def part(name: str, *arguments: object) -> dict[str, Any]:
    """One part's result, from a process of its own."""
    command = [sys.executable, "-m", "ci.bench.bench", "--part", name, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"part {name} {arguments} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} {' '.join(map(str, arguments))}: done", flush=True)
    return found


PARTS = {
    "standin": part_standin,
    "same": part_same,
    "batch": part_batch,
    "variants": part_variants,
    "paper": paper.steps,
    "whole": paper.whole_images,
    "growth": part_growth,
    "workers": part_workers,
    "notebook": notebook.minutes,
}


WHOLE: dict[str, Callable[[], Any]] = {
    "standins": lambda: [part("standin", 3, number) for number in range(len(STAND_INS))],
    "same": lambda: part("same"),
    "batches": lambda: [part("batch", batch) for batch in (1, 2, 4, 8, 16, 32, 64)],
    "recompute": lambda: part("batch", 64, 1),
    "variants": lambda: part("variants", 3),
    "paper": lambda: part("paper", *((10, 3) if torch.cuda.is_available() else (1, 1))),
    "whole": lambda: part("whole", 3 if torch.cuda.is_available() else 1),
    "growth": lambda: [
        part("growth", images, classes) for images, classes in ((10, 10), (100, 10), (1000, 10), (1000, 100))
    ],
    "workers": lambda: [part("workers", workers) for workers in (0, 1, 2)],
    "notebooks": lambda: [part("notebook", *of) for of in ((0, 10), (3, 50))],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="+", help="NAME and its integers: print this part's JSON alone")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(WHOLE), default=list(WHOLE), help="measure these anew"
    )
    arguments = parser.parse_args()
    if arguments.part:
        name, *values = arguments.part
        print(json.dumps(PARTS[name](*map(int, values))))
        return
    report = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    cuda = torch.cuda.is_available()
    here = {
        "machine": torch.cuda.get_device_name() if cuda else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if len(arguments.only) < len(WHOLE) and here != {key: report.get(key) for key in here}:
        raise SystemExit(f"{arguments.out} was measured elsewhere; measure all of it anew")
    report |= here | {name: WHOLE[name]() for name in arguments.only}
    files.write(arguments.out, json.dumps(report, indent=1) + "\n")
    say(report)
    print(f"written to {arguments.out}; python paper_figures/make_figures.py draws it")


if __name__ == "__main__":
    main()
