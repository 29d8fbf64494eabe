"""The diffusers schedulers that `Fidelity` asks for."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from igd_lib.config import Fidelity
from igd_lib.guidance import predicted_clean


class ListedDDIMScheduler(DDIMScheduler):
    """Deterministic DDIM (Song et al., Eq. 12) from each listed timestep to the next.

    diffusers' own steps to t - 1000 // T, which is not the next one when they are spaced "linspace".
    """

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> Any:
        """One step; model_output: noise, with or without a predicted variance. Other keywords are ignored."""
        eps = model_output[:, : sample.shape[1]]
        position = int((self.timesteps == timestep).nonzero()[0])
        alpha_bar = self.alphas_cumprod[int(timestep)].to(sample)
        last = position + 1 == len(self.timesteps)
        following = (
            self.final_alpha_cumprod if last else self.alphas_cumprod[int(self.timesteps[position + 1])]
        ).to(sample)
        clean = predicted_clean(sample, eps, alpha_bar)
        moved = following.sqrt() * clean + (1 - following).sqrt() * eps
        return (
            DDIMSchedulerOutput(prev_sample=moved, pred_original_sample=clean)
            if return_dict
            else (moved, clean)
        )


def make_scheduler(fidelity: Fidelity, base_config: Any, *, learned_variance: bool = False) -> Any:
    """The scheduler that `fidelity` asks for, on the noise schedule of `base_config`.

    learned_variance: whether the transformer also predicts a variance range, as DiT-XL/2 does; only
    DDPM uses it. DPM-Solver++ and UniPC are of second order.
    """
    options: dict[str, Any] = {"timestep_spacing": fidelity.timestep_spacing, "thresholding": False}
    if fidelity.solver == "ddim":
        kind = ListedDDIMScheduler if fidelity.timestep_spacing == "linspace" else DDIMScheduler
        return kind.from_config(base_config, clip_sample=False, **options)
    if fidelity.solver == "dpmsolver++":
        # With a variance type, diffusers' DPM-Solver++ would keep the first 3 channels of the noise only.
        return DPMSolverMultistepScheduler.from_config(
            base_config, algorithm_type="dpmsolver++", solver_order=2, variance_type=None, **options
        )
    if fidelity.solver == "unipc":
        return UniPCMultistepScheduler.from_config(base_config, solver_order=2, **options)
    variance = "learned_range" if learned_variance else "fixed_small"
    return DDPMScheduler.from_config(base_config, variance_type=variance, clip_sample=False, **options)


def step_options(scheduler: Any, generators: Any) -> dict[str, Any]:
    """What `scheduler.step` is given beside output, timestep and sample: generators, where it draws noise."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generators} if takes else {}


def step_output(eps: Tensor, variance: Tensor | None) -> Tensor:
    """What `scheduler.step` is given of a model: noise (B, C, h, w), with its variance where it has one."""
    return eps if variance is None else torch.cat([eps, variance], dim=1)


def noise_deviation(scheduler: Any, timestep: int, variance: Tensor | None) -> Tensor | None:
    """The sd of the noise that DDPM's step adds at one of its timesteps; None of another scheduler.

    variance: what the model predicts of it, (B, C, h, w) as the sd is then; without a learned one the sd is
    a number. 0 at timestep 0, whose step adds none.
    """
    if not isinstance(scheduler, DDPMScheduler):
        return None
    if timestep == 0:
        return torch.zeros(())
    found = scheduler._get_variance(timestep, predicted_variance=variance)
    if scheduler.variance_type == "learned_range":  # its logarithm
        return (0.5 * found).exp()
    return found if scheduler.variance_type == "fixed_small_log" else found**0.5  # the former is the sd
