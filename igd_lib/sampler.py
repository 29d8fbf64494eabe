"""Influence-guided sampling (Algorithm 1) over any diffusers scheduler, and a pipeline around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from igd_lib.config import RELEASED, Fidelity, Guidance
from igd_lib.guidance import deviation_loss, influence_loss, influence_scale
from igd_lib.surrogate import Checkpoints
from igd_lib.weights import match_original

Generators = torch.Generator | Sequence[torch.Generator] | None


def make_scheduler(fidelity: Fidelity, base_config: Any, *, learned_variance: bool = False) -> Any:
    """The scheduler that `fidelity` asks for, on the noise schedule of `base_config`.

    learned_variance: whether the transformer also predicts a variance range, as DiT-XL/2 does.
    """
    options: dict[str, Any] = {"timestep_spacing": fidelity.timestep_spacing, "clip_sample": False, "thresholding": False}
    if fidelity.solver == "ddim":
        return DDIMScheduler.from_config(base_config, **options)
    return DDPMScheduler.from_config(base_config, variance_type="learned_range" if learned_variance else "fixed_small", **options)


def sample_igd(
    transformer: DiTTransformer2DModel,
    vae: AutoencoderKL,
    scheduler: Any,
    latents: Tensor,
    labels: Tensor,
    *,
    targets: Tensor | None = None,
    guidance: Guidance | None = None,
    checkpoints: Checkpoints | None = None,
    gradients: Tensor | None = None,
    memory: Sequence[Tensor] | None = None,
    num_steps: int = 50,
    cfg_scale: float = 4.0,
    fidelity: Fidelity = RELEASED,
    jacobian: Literal["full", "decoder"] = "full",
    generator: Generators = None,
    callback: Callable[[int, int, dict[str, Any]], None] | None = None,
) -> Tensor:
    """Algorithm 1: denoise `latents`, guided by G_I and G_D while the step index is in the guided range.

    latents: (B, C, h, w) unit Gaussian noise; labels: (B,) the transformer's class ids; targets: (B,)
    the surrogate's labels (needed for k > 0); gradients: (E, B, P), each sample's own class average;
    memory: B tensors (M_b, C, h, w) of earlier final latents of the same class, oldest first.
    `guidance=None` is the scheduler's own sampling. `scheduler` is used as configured. jacobian:
    "full" differentiates through the transformer (the paper), "decoder" holds its output constant.
    callback(index, timestep, info) after each step; info has latents and, when guided, the losses.
    Returns final latents (B, C, h, w), scaled as the transformer's. Raises ValueError on inputs that
    do not fit, FloatingPointError when guidance is not finite.
    """
    _check(transformer, scheduler, latents, labels, targets, guidance, checkpoints, gradients, memory, num_steps)
    if jacobian not in ("full", "decoder"):
        raise ValueError(f"jacobian is 'full' or 'decoder', got {jacobian!r}")
    channels = latents.shape[1]
    accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
    learned = getattr(scheduler.config, "variance_type", None) in ("learned", "learned_range")
    memory = None if memory is None else [m[-fidelity.memory_size :] if fidelity.memory_size else m for m in memory]
    null = torch.full_like(labels, transformer.config.num_embeds_ada_norm)

    def denoise(z_t: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """eps after CFG, the conditional eps, the other half's eps after CFG, the predicted variance."""
        halves = 2 if cfg_scale > 1 else 1
        inputs = scheduler.scale_model_input(torch.cat([z_t] * halves), timestep).to(transformer.dtype)
        classes = torch.cat([labels, null]) if halves == 2 else labels
        output = transformer(inputs, timestep=timestep.expand(len(inputs)), class_labels=classes).sample.to(z_t.dtype)
        eps, rest = output[:, :channels], output[: len(z_t), channels:]
        variance = rest if learned and rest.shape[1] == channels else None
        if halves == 1:
            return eps, eps, eps, variance
        conditional, unconditional = eps.chunk(2)
        mixed = unconditional + cfg_scale * (conditional - unconditional)
        n = fidelity.cfg_channels or channels
        combined = torch.cat([mixed[:, :n], conditional[:, n:]], dim=1)
        other = torch.cat([mixed[:, :n], unconditional[:, n:]], dim=1)
        return combined, conditional, other, variance

    scheduler.set_timesteps(num_steps, device=latents.device)
    steps = scheduler.timesteps
    with _frozen(transformer, vae, *([checkpoints.model] if checkpoints else [])), torch.no_grad():
        z_t = latents * scheduler.init_noise_sigma
        for step, timestep in enumerate(steps):
            index = len(steps) - 1 - step
            guided = guidance is not None and guidance.covers(index)
            influence = guided and guidance.k > 0
            alpha_bar = scheduler.alphas_cumprod[int(timestep)].to(z_t)
            info: dict[str, Any] = {}
            shift: Tensor | float = 0.0

            if influence:
                with torch.enable_grad():
                    z_t = z_t.detach().requires_grad_()
                    with torch.set_grad_enabled(jacobian == "full"):
                        eps, conditional, other, variance = denoise(z_t, timestep)
                    losses = []
                    for noise in [eps, other] if fidelity.both_halves else [eps]:
                        clean = (z_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
                        images = vae.decode(clean.to(vae.dtype) / vae.config.scaling_factor).sample.to(z_t.dtype)
                        losses.append(influence_loss(images, targets, checkpoints, gradients, weights=checkpoints.weights))
                    loss = torch.stack(losses).mean(0)
                    (gradient,) = torch.autograd.grad(loss.sum(), z_t)
                z_t, eps, conditional = z_t.detach(), eps.detach(), conditional.detach()
                variance = None if variance is None else variance.detach()
                scaled = conditional if fidelity.eps == "conditional" else eps
                shift = influence_scale(guidance.k, alpha_bar, scaled, gradient, factor=fidelity.rho_factor) * gradient
                info |= {"influence_loss": loss.detach(), "influence_shift": shift}
            else:
                eps, _, _, variance = denoise(z_t, timestep)

            if guided and guidance.gamma > 0:
                with torch.enable_grad():
                    z = z_t.detach().requires_grad_()
                    deviation = deviation_loss(z, memory)
                    (gradient,) = torch.autograd.grad(deviation.sum(), z)
                shift = shift + guidance.gamma * gradient
                info["deviation_loss"] = deviation.detach()

            # s(z_t, t, eps) - rho_t grad G_I - gamma grad G_D (Eq. 9).
            output = eps if variance is None else torch.cat([eps, variance], dim=1)
            extra = {"generator": generator} if accepts_generator else {}
            z_t = scheduler.step(output, timestep, z_t, **extra).prev_sample - shift
            if guided and not torch.isfinite(z_t).all():
                raise FloatingPointError(f"latents are not finite after guided step {index}; lower k or gamma ({guidance})")
            if callback is not None:
                callback(index, int(timestep), {"latents": z_t, **info})
    return z_t


def _check(transformer, scheduler, latents, labels, targets, guidance, checkpoints, gradients, memory, num_steps) -> None:
    size = len(latents)
    if transformer.training:
        raise ValueError("the transformer is in training mode and would drop labels at random; call .eval()")
    if labels.shape != (size,):
        raise ValueError(f"labels are ({size},), one a latent, got {tuple(labels.shape)}")
    if abs(float(scheduler.init_noise_sigma) - 1) > 1e-6:
        raise ValueError(f"{type(scheduler).__name__} rescales its samples; Algorithm 1 needs a variance-preserving one (DDPM, DDIM, DPM-Solver++, UniPC)")
    if guidance is None:
        return
    if guidance.guided_range[0] >= num_steps:
        raise ValueError(f"guided_range {guidance.guided_range} lies outside the {num_steps} steps 0 ... {num_steps - 1}: nothing would be guided")
    if guidance.k > 0:
        if checkpoints is None or gradients is None or targets is None:
            raise ValueError("k > 0 needs checkpoints, gradients and targets")
        if targets.shape != (size,) or gradients.shape[:2] != (len(checkpoints.states), size):
            raise ValueError(
                f"targets are ({size},) and gradients ({len(checkpoints.states)}, {size}, P), "
                f"got {tuple(targets.shape)} and {tuple(gradients.shape)}"
            )
    if guidance.gamma > 0 and (memory is None or len(memory) != size):
        raise ValueError(f"gamma > 0 needs memory, one tensor (M, C, h, w) a sample (M = 0 at first): {size}, got {memory and len(memory)}")


@contextmanager
def _frozen(*modules: nn.Module) -> Iterator[None]:
    """No parameter of `modules` takes part in autograd inside; restored afterwards."""
    trainable = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class IGDPipeline(DiTPipeline):
    """A diffusers `DiTPipeline` whose sampling can be guided; loads the stand-in and DiT-XL/2 alike.

    Loading `facebook/DiT-XL-2-256` fetches weights under CC-BY-NC 4.0 (no commercial use).
    """

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict[str, str] | None = None,  # JSON's keys are strings
    ):
        if transformer.config.get("timestep_frequencies") == "original":
            match_original(transformer)
        super().__init__(transformer, vae, scheduler, id2label)

    def scheduler_for(self, fidelity: Fidelity) -> Any:
        """The scheduler to sample with: the pipeline's own where `fidelity.solver` is "configured"."""
        if fidelity.solver == "configured":
            return self.scheduler
        learned = self.transformer.config.out_channels == 2 * self.transformer.config.in_channels
        return make_scheduler(fidelity, self.scheduler.config, learned_variance=learned)

    def latent_noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Initial noise (B, C, h, w), sample b from `generators[b]`."""
        config = self.transformer.config
        shape = (len(generators), config.in_channels, config.sample_size, config.sample_size)
        return randn_tensor(shape, generator=list(generators), device=self._execution_device, dtype=torch.float32)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], of scaled latents (B, C, h, w)."""
        return self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.float()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: Generators = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        fidelity: Fidelity = RELEASED,
        **guided: Any,
    ) -> ImagePipelineOutput | tuple:
        """As `DiTPipeline`, with `sample_igd`'s keywords (guidance, checkpoints, gradients, targets, memory, jacobian).

        output_type: "pil", "np", "pt" (floats in [0, 1]) or "latent". Returns `ImagePipelineOutput`.
        """
        device = self._execution_device
        config = self.transformer.config
        shape = (len(class_labels), config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

        def callback(index: int, timestep: int, info: dict[str, Any]) -> None:
            callback_on_step_end(self, num_inference_steps - 1 - index, timestep, info)

        latents = sample_igd(
            self.transformer, self.vae, self.scheduler_for(fidelity), latents, torch.tensor(class_labels, device=device),
            num_steps=num_inference_steps, cfg_scale=guidance_scale, generator=generator, fidelity=fidelity,
            callback=callback if callback_on_step_end else None, **guided,
        )  # fmt: skip
        images: Any = latents
        if output_type != "latent":
            images = (self.decode(latents) / 2 + 0.5).clamp(0, 1)
            if output_type != "pt":
                images = images.cpu().permute(0, 2, 3, 1).numpy()
                images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
