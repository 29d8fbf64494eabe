"""What guided sampling costs: seconds, counted arithmetic and memory, on the stand-in and at the paper's
shapes.

`make bench` runs every part, each in a process of its own, and writes paper_figures/data/bench.json; `--only
NAMES` measures these anew in it, `--part NAME` prints one part's JSON. Ratios within one part are what to
quote; absolute times belong to the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ci.bench import shapes
from igd_lib.config import RELEASED, STANDARD, Guidance
from igd_lib.data.images import from_tensors
from igd_lib.distillation import distill, image_generator
from igd_lib.experiment import comparisons
from igd_lib.experiment.experiment import Experiment, prepare
from igd_lib.experiment.methods import Method
from igd_lib.models import standin
from igd_lib.models.networks import ConvNet
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampler import sample_igd
from igd_lib.schedulers import make_scheduler
from igd_lib.surrogate import Checkpoints
from igd_lib.tools import files

ROOT = Path(__file__).parents[2]
OUT = ROOT / "paper_figures" / "data" / "bench.json"
SHORTCUTS: dict[str, dict[str, Any]] = {
    "exact": {}
}  # `sample_igd`'s options; "tiny" names the stand-in's guidance decoder
for _own, _tiny in comparisons.SHORTCUTS:
    _label = Method(shortcuts=_own, tiny_decoder=_tiny).shortcuts_label
    SHORTCUTS[_label] = asdict(_own) | ({"guidance_decoder": "tiny"} if _tiny else {})


def peak_gib(device: str) -> float:
    """The most memory this process has used: the GPU's where there is one, else its resident size."""
    used = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return used / 2**30


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


def timed(run: Callable[[], Any], device: str, repeats: int) -> float:
    """The median of `repeats` runs in seconds; whoever calls has warmed up."""
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def counted(run: Callable[[], Any]) -> float:
    """Floating-point operations (two a multiply-add), by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on this machine."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    a @ a
    return 2 * size**3 / timed(lambda: a @ a, device, 5)


# --- the stand-in


def standin_setup() -> tuple[Experiment, Any]:
    setup = prepare("bench", "fashion-mnist", "small")
    return setup, standin.tiny_decoder("fashion-mnist").to(setup.device)


def sampler(
    setup: Experiment,
    tiny: Any,
    batch: int,
    *,
    guided: bool,
    fidelity=STANDARD,
    one_by_one: bool = False,
    **shortcuts: Any,
) -> Callable[[], torch.Tensor]:
    """A function that samples `batch` images of classes 0, 1, ... with five earlier latents each in memory,
    in the models' precision.
    """
    device, dtype = setup.device, setup.models.pipe.transformer.dtype
    if shortcuts.get("guidance_decoder") == "tiny":
        shortcuts["guidance_decoder"] = tiny
    targets = torch.arange(batch, device=device) % 10
    own = torch.stack([setup.retained[1](int(label)) for label in targets.tolist()], dim=1).to(device, dtype)
    memory = [
        torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(b)).to(device, dtype)
        for b in range(batch)
    ]
    parts = [[b] for b in range(batch)] if one_by_one else [list(range(batch))]

    def run() -> torch.Tensor:
        found = []
        for part in parts:
            generators = [image_generator(0, int(targets[b]), b) for b in part]
            options = (
                dict(
                    targets=targets[part],
                    guidance=setup.scale.guidance.for_latents(setup.latent_values),
                    checkpoints=setup.checkpoints,
                    gradients=own[:, part],
                    memory=[memory[b] for b in part],
                    **shortcuts,
                )
                if guided
                else {}
            )
            found.append(
                sample_igd(
                    setup.models.pipe.transformer,
                    setup.models.pipe.vae,
                    setup.models.pipe.scheduler_for(fidelity),
                    setup.models.pipe.latent_noise(generators).to(dtype),
                    targets[part],
                    num_steps=setup.scale.num_steps,
                    fidelity=fidelity,
                    generator=generators,
                    **options,
                )
            )
        return torch.cat(found)

    return run


def part_standin(repeats: int) -> dict[str, Any]:
    """Batch 10: vanilla, exact, every shortcut, and straight-line versions: seconds and arithmetic."""
    setup, tiny = standin_setup()
    device, batch = setup.device, 10
    rows = {"vanilla": sampler(setup, tiny, batch, guided=False)}
    rows |= {
        name: sampler(setup, tiny, batch, guided=True, **dict(options)) for name, options in SHORTCUTS.items()
    }
    straight, alone = dict(guided=True, one_by_one=True), replace(RELEASED, second_chain=False)
    rows["straight line"] = sampler(setup, tiny, batch, fidelity=alone, **straight)
    rows["released code"] = sampler(setup, tiny, batch, fidelity=RELEASED, **straight)
    rows["exact, second chain"] = sampler(
        setup, tiny, batch, guided=True, fidelity=replace(STANDARD, second_chain=True)
    )
    found = {}
    for name, run in rows.items():  # the slow ones once
        slow = name in ("straight line", "released code")
        work = counted(run)  # which warms up too
        found[name] = {
            "seconds": timed(run, device, 1 if slow else repeats) / batch,
            "gflop": work / batch / 1e9,
        }
    return {
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
                sampler(setup, tiny, 2, guided=True, fidelity=fast)(),
                sampler(setup, tiny, 2, guided=True, fidelity=slow, one_by_one=True)(),
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
    run = sampler(setup, tiny, batch, guided=True)
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
        runs = {kind: sampler(setup, tiny, 10, guided=kind == "exact") for kind in ("vanilla", "exact")}
        for run in runs.values():  # compiles
            run()
        found[name] = {kind: timed(run, setup.device, repeats) / 10 for kind, run in runs.items()}
    return found


# --- the paper's shapes


def part_paper(batch: int, repeats: int) -> dict[str, Any]:
    """One vanilla and one guided step of each kind at DiT-XL/2's shapes, and what they make of 50 steps with
    16 guided.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    models = shapes.paper(device, dtype)
    count = sum(parameter.numel() for parameter in models.checkpoints.model.parameters())
    labels, targets = torch.full((batch,), 207, device=device), torch.full((batch,), 3, device=device)
    gradients = torch.randn(4, batch, count, device=device)
    memory = [torch.randn(64, 4, 32, 32, device=device)] * batch

    def step(guided: bool, fidelity=STANDARD, **shortcuts: Any) -> Callable[[], Any]:
        if shortcuts.get("guidance_decoder") == "tiny":
            shortcuts["guidance_decoder"] = models.tiny
        options = dict(
            targets=targets,
            guidance=Guidance(5.0, 120.0, (0, 0)),
            checkpoints=models.checkpoints,
            gradients=gradients,
            memory=memory,
            **shortcuts,
        )
        scheduler = make_scheduler(fidelity, models.config, learned_variance=True)
        latents = torch.randn(batch, 4, 32, 32, device=device)
        generator = [torch.Generator().manual_seed(b) for b in range(batch)]
        return lambda: sample_igd(
            models.transformer,
            models.vae,
            scheduler,
            latents,
            labels,
            num_steps=1,
            fidelity=fidelity,
            generator=generator,
            **(options if guided else {}),
        )

    runs = {"vanilla": step(False)}
    runs |= {
        name: step(True, **dict(options)) for name, options in SHORTCUTS.items() if "every" not in options
    }
    runs["released code"] = step(True, RELEASED)
    work = {name: counted(run) for name, run in runs.items()}  # which warms up too
    found = {
        name: {"seconds": timed(run, device, repeats) / batch, "tflop": work[name] / batch / 1e12}
        for name, run in runs.items()
    }
    plain = found["vanilla"]

    def over_50(row: dict[str, float], guided: int = 16) -> dict[str, float]:
        return {
            f"{what} / vanilla": (guided * row[what] + (50 - guided) * plain[what]) / (50 * plain[what])
            for what in ("seconds", "tflop")
        }

    whole = {name: over_50(row) for name, row in found.items()}
    for every in (2, 4, 8):
        whole[f"gradient every {every}th step" if every > 2 else "gradient every 2nd step"] = over_50(
            found["exact"], 16 // every
        )
    whole["gradient every 4th step, decoder Jacobian"] = over_50(found["decoder Jacobian"], 4)
    rate = matmul_rate(device, dtype)
    shares = {name: row["tflop"] * 1e12 / row["seconds"] / rate for name, row in found.items()}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "a step": found,
        "over 50 steps with 16 guided": whole,
        "matmul_tflops": rate / 1e12,
        "share of the matmul rate": shares,
        "peak_gib": peak_gib(device),
    }


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
    "paper": part_paper,
    "growth": part_growth,
    "workers": part_workers,
}


WHOLE: dict[str, Callable[[], Any]] = {
    "standin": lambda: part("standin", 3),
    "same": lambda: part("same"),
    "batches": lambda: [part("batch", batch) for batch in (1, 2, 4, 8, 16, 32, 64)],
    "recompute": lambda: part("batch", 64, 1),
    "variants": lambda: part("variants", 3),
    "paper": lambda: part("paper", *((10, 3) if torch.cuda.is_available() else (1, 1))),
    "growth": lambda: [
        part("growth", images, classes) for images, classes in ((10, 10), (100, 10), (1000, 10), (1000, 100))
    ],
    "workers": lambda: [part("workers", workers) for workers in (0, 1, 2)],
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
    rows, plain = report["standin"]["rows"], report["standin"]["rows"]["vanilla"]
    print(f"\nstand-in, {report['machine']}, {report['threads']} threads, batch {report['standin']['batch']}")
    for name, row in rows.items():
        times, work = row["seconds"] / plain["seconds"], row["gflop"] / plain["gflop"]
        print(
            f"{name:32s} {row['seconds']:8.3f} s/image  {times:6.2f} x vanilla  {work:6.2f} x its arithmetic"
        )
    for name, row in report["paper"]["over 50 steps with 16 guided"].items():
        print(
            f"paper's shapes, {name:42s} {row['seconds / vanilla']:6.2f} x vanilla  "
            f"{row['tflop / vanilla']:6.2f} x its arithmetic"
        )
    for name in ("straight line", "released code"):
        times = rows[name]["seconds"] / rows["exact"]["seconds"]
        print(f"exact is {times:.1f} times as fast as the {name} (a backward a checkpoint, image by image)")
    for name, apart in report["same"].items():
        print(f"and {apart:.1e} of the latents' norm apart after all steps ({name})")
    for row in [*report["batches"], report["recompute"]]:
        print(
            f"batch {row['batch']:3d}: {row['images_per_second']:.2f} images/s, {row['peak_gib']:.2f} "
            f"GiB{', activations recomputed' * row['recompute']}"
        )
    for name, row in report["variants"].items():
        print(f"{name:14s} {row['vanilla']:.3f} and {row['exact']:.3f} s/image, vanilla and exact")
    for row in report["growth"]:
        print(
            f"{row['images']:5d} images of {row['classes']:4d} classes: {row['seconds_per_image']:.3f} "
            f"s/image, {row['peak_gib']:.2f} GiB"
        )
    for row in report["workers"]:
        print(f"{row['workers'] or 'no':>2} Ray workers: {row['images_per_second']:.3f} images/s")
    print(f"written to {arguments.out}; python paper_figures/make_figures.py draws it")


if __name__ == "__main__":
    main()
