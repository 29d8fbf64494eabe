"""What guided sampling costs at the paper's shapes, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ci.bench import shapes
from ci.bench.measure import counted, matmul_rate, peak_gib, timed
from igd_lib.config import RELEASED, STANDARD, Fidelity, Guidance
from igd_lib.experiment import comparisons
from igd_lib.experiment.methods import Method
from igd_lib.sampler import sample_igd
from igd_lib.sampling import FAST
from igd_lib.schedulers import make_scheduler

SHORTCUTS: dict[str, dict[str, Any]] = {
    "exact": {}
}  # `sample_igd`'s options; "tiny" names the stand-in's guidance decoder
for _own, _tiny in comparisons.SHORTCUTS:
    _label = Method(shortcuts=_own, tiny_decoder=_tiny).shortcuts_label
    SHORTCUTS[_label] = asdict(_own) | ({"guidance_decoder": "tiny"} if _tiny else {})


def _here() -> tuple[str, torch.dtype, Any]:
    """The device, its precision, and the models there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return device, dtype, shapes.paper(device, dtype)


def _gradients(models: Any, batch: int, device: str) -> torch.Tensor:
    """Class gradients (E, B, P) to be like."""
    count = sum(parameter.numel() for parameter in models.checkpoints.model.parameters())
    return torch.randn(len(models.checkpoints), batch, count, device=device)


def steps(batch: int, repeats: int) -> dict[str, Any]:
    """One vanilla and one guided step of each kind at DiT-XL/2's shapes, and what they make of 50 steps with
    16 guided.
    """
    device, dtype, models = _here()
    labels, targets = torch.full((batch,), 207, device=device), torch.full((batch,), 3, device=device)
    gradients = _gradients(models, batch, device)
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


def whole_images(repeats: int) -> dict[str, Any]:
    """Whole images at DiT-XL/2's shapes: a vanilla one of 50 DDPM steps, and in FAST's steps without guidance
    and with it.
    """
    device, dtype, models = _here()
    labels, targets = torch.tensor([207], device=device), torch.tensor([3], device=device)
    quick = FAST.options(Guidance(5.0, 120.0))
    steering = dict(
        targets=targets,
        checkpoints=models.checkpoints,
        gradients=_gradients(models, 1, device),
        memory=[torch.randn(64, 4, 32, 32, device=device)],
        guidance_decoder=models.tiny,
    )

    def image(fidelity: Fidelity, num_steps: int, **options: Any) -> Callable[[], Any]:
        def run() -> torch.Tensor:
            scheduler = make_scheduler(fidelity, models.config, learned_variance=True)
            noise = torch.randn(1, 4, 32, 32, device=device)
            drawn = torch.Generator().manual_seed(0)
            steps = {"num_steps": num_steps, "fidelity": fidelity, "generator": drawn}
            return sample_igd(models.transformer, models.vae, scheduler, noise, labels, **steps, **options)

        return run

    runs = {
        "vanilla": image(STANDARD, 50),
        "DPM-Solver++ 20": image(quick["fidelity"], quick["num_steps"]),
        "FAST": image(**quick, **steering),
    }
    found = {}
    for name, run in runs.items():
        work = counted(run)  # which warms up too
        found[name] = {"seconds": timed(run, device, repeats), "tflop": work / 1e12}
    return {"dtype": str(dtype).removeprefix("torch."), "rows": found}
