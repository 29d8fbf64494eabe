"""Influence-guided sampling (Algorithm 1) over any diffusers scheduler, and a pipeline around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from igd_lib.config import RELEASED, Fidelity, Guidance
from igd_lib.guidance import deviation_loss, influence_loss, influence_scale, predicted_clean
from igd_lib.surrogate import Checkpoints
from igd_lib.weights import match_original

Generators = torch.Generator | Sequence[torch.Generator] | None


class ListedDDIMScheduler(DDIMScheduler):
    """Deterministic DDIM (Song et al., Eq. 12) from each listed timestep to the next.

    diffusers' own steps to t - 1000 // T, which is not the next one when they are spaced "linspace".
    """

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True, **_: Any) -> Any:
        """One step; model_output: noise, with or without a predicted variance. Other keywords are ignored."""
        eps = model_output[:, : sample.shape[1]]
        position = int((self.timesteps == timestep).nonzero()[0])
        alpha_bar = self.alphas_cumprod[int(timestep)].to(sample)
        last = position + 1 == len(self.timesteps)
        following = (self.final_alpha_cumprod if last else self.alphas_cumprod[int(self.timesteps[position + 1])]).to(sample)
        clean = predicted_clean(sample, eps, alpha_bar)
        moved = following.sqrt() * clean + (1 - following).sqrt() * eps
        return DDIMSchedulerOutput(prev_sample=moved, pred_original_sample=clean) if return_dict else (moved, clean)


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
        return DPMSolverMultistepScheduler.from_config(base_config, algorithm_type="dpmsolver++", solver_order=2, variance_type=None, **options)
    if fidelity.solver == "unipc":
        return UniPCMultistepScheduler.from_config(base_config, solver_order=2, **options)
    variance = "learned_range" if learned_variance else "fixed_small"
    return DDPMScheduler.from_config(base_config, variance_type=variance, clip_sample=False, **options)


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
    guidance_decoder: nn.Module | None = None,
    every: int = 1,
    checkpoints_per_step: int | None = None,
    generator: Generators = None,
    callback: Callable[[int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
) -> Tensor:
    """Algorithm 1: denoise `latents`, guided by G_I and G_D while the step index is in the guided range.

    latents: (B, C, h, w) unit Gaussian noise; labels: (B,) the transformer's class ids; targets: (B,)
    the surrogate's labels (needed for k > 0); gradients: (E, B, P), each sample's own class average;
    memory: B tensors (M_b, C, h, w) of earlier final latents of the same class, oldest first.
    `guidance=None` is the scheduler's own sampling. `scheduler` is used as configured.
    Shortcuts, off by default because each changes the result: jacobian: "full" differentiates through the
    transformer (the paper), "decoder" holds its output constant; guidance_decoder: decodes for G_I in the vae's place, such
    as `AutoencoderTiny`; every: G_I's gradient is computed in the first and every m-th guided step after it and used
    again in between, rho_t anew each time; checkpoints_per_step: how many enter a step, in turn (None: all).
    Any variance-preserving scheduler with one evaluation a step will do; multistep ones see the guided
    latents, and UniPC does not correct a step that guidance has moved (its corrector would undo it).
    callback(index, timestep, info) after each step; info has latents, the clean latents that were predicted before it
    (Eq. 5) and, when guided, the losses; a dict with "latents" that it returns replaces them.
    Returns final latents (B, C, h, w), scaled as the transformer's. Raises ValueError on inputs that
    do not fit, FloatingPointError when guidance is not finite.
    """
    _check(transformer, scheduler, latents, labels, targets, guidance, checkpoints, gradients, memory, num_steps, fidelity)
    if jacobian not in ("full", "decoder"):
        raise ValueError(f"jacobian is 'full' or 'decoder', got {jacobian!r}")
    if every < 1 or (checkpoints_per_step is not None and checkpoints_per_step < 1):
        raise ValueError(f"every and checkpoints_per_step are at least 1, got {every} and {checkpoints_per_step}")
    decoder = vae if guidance_decoder is None else guidance_decoder
    channels = latents.shape[1]
    accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
    learned = _learned_variance(scheduler)
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
    if len(steps) != num_steps:
        raise ValueError(f"{type(scheduler).__name__} evaluates the model {len(steps)} times in {num_steps} steps; Algorithm 1 needs one a step")

    def is_guided(step: int) -> bool:
        return guidance is not None and guidance.covers(num_steps - 1 - step + fidelity.range_counts_from)

    def influence_gradient(z_t: Tensor, timestep: Tensor, alpha_bar: Tensor, subset: Sequence[int]) -> tuple[Tensor, Tensor, tuple]:
        """G_I (B,) over the checkpoints `subset`, its gradient (B, C, h, w), and what `denoise` gave."""
        with torch.enable_grad():
            z_t = z_t.detach().requires_grad_()
            with torch.set_grad_enabled(jacobian == "full"):
                prediction = denoise(z_t, timestep)
            eps, _, other, _ = prediction
            images = []
            for noise in [eps, other] if fidelity.both_halves else [eps]:
                clean = predicted_clean(z_t, noise, alpha_bar)
                image = decoder.decode(clean.to(decoder.dtype) / decoder.config.scaling_factor).sample.to(z_t.dtype)
                images.append(image.clamp(-1, 1) if fidelity.clamp_images else image)
            # Eq. 7, all checkpoints in one piece or each in its own: their sum is the same.
            pieces = [[e] for e in subset] if fidelity.backward == "per_checkpoint" else [list(subset)]
            loss, gradient = torch.zeros_like(z_t[:, 0, 0, 0]), torch.zeros_like(z_t)
            for number, piece in enumerate(pieces, start=1):
                part, weights = checkpoints.keep(piece), [checkpoints.weights[e] for e in piece]
                own = gradients if len(piece) == len(checkpoints) else gradients[piece]  # indexing copies
                values = [influence_loss(image, targets, part, own, weights=weights) for image in images]
                term = torch.stack(values).mean(0) * len(piece) / len(subset)
                loss = loss + term.detach()
                gradient = gradient + torch.autograd.grad(term.sum(), z_t, retain_graph=number < len(pieces))[0]
        return loss, gradient, tuple(value if value is None else value.detach() for value in prediction)

    models = [transformer, vae, decoder, *([checkpoints.model] if checkpoints else [])]
    with _uncorrected(scheduler, filter(is_guided, range(num_steps))), _frozen(*models), torch.no_grad():
        z_t = latents * scheduler.init_noise_sigma
        steered, last = 0, None  # steps with G_I so far, and its last gradient
        for step, timestep in enumerate(steps):
            index = len(steps) - 1 - step
            guided = is_guided(step)
            alpha_bar = scheduler.alphas_cumprod[int(timestep)].to(z_t)
            info: dict[str, Any] = {}
            shift: Tensor | float = 0.0

            influence = guided and guidance.k > 0
            if influence and steered % every == 0:
                count = min(checkpoints_per_step or len(checkpoints), len(checkpoints))
                subset = [(steered // every * count + i) % len(checkpoints) for i in range(count)]
                loss, last, (eps, conditional, _, variance) = influence_gradient(z_t, timestep, alpha_bar, subset)
                info["influence_loss"] = loss
            else:
                eps, conditional, _, variance = denoise(z_t, timestep)
            if influence:
                steered += 1
                scaled = conditional if fidelity.eps == "conditional" else eps
                shift = influence_scale(guidance.k, alpha_bar, scaled, last, factor=fidelity.rho_factor) * last
                info["influence_shift"] = shift

            if guided and guidance.gamma > 0:
                with torch.enable_grad():
                    z = z_t.detach().requires_grad_()
                    deviation = deviation_loss(z, memory)
                    (gradient,) = torch.autograd.grad(deviation.sum(), z)
                shift = shift + guidance.gamma * gradient
                info["deviation_loss"] = deviation.detach()

            if callback is not None:
                info["clean"] = predicted_clean(z_t, eps, alpha_bar)
            # s(z_t, t, eps) - rho_t grad G_I - gamma grad G_D (Eq. 9).
            output = eps if variance is None else torch.cat([eps, variance], dim=1)
            extra = {"generator": generator} if accepts_generator else {}
            z_t = scheduler.step(output, timestep, z_t, **extra).prev_sample - shift
            if guided and not torch.isfinite(z_t).all():
                raise FloatingPointError(f"latents are not finite after guided step {index}; lower k or gamma ({guidance})")
            if callback is not None:
                z_t = (callback(index, int(timestep), {"latents": z_t, **info}) or {}).get("latents", z_t)
    return z_t


def _learned_variance(scheduler: Any) -> bool:
    """Whether the scheduler takes the variance that the transformer predicts; a config may carry a type it does not know."""
    known = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    return known and scheduler.config.variance_type in ("learned", "learned_range")


def check_range(guidance: Guidance, num_steps: int, fidelity: Fidelity) -> None:
    """Raise ValueError unless the whole guided range lies within the steps."""
    first = fidelity.range_counts_from
    if not first <= guidance.guided_range[0] <= guidance.guided_range[1] < num_steps + first:
        raise ValueError(f"guided_range {guidance.guided_range} is not within the {num_steps} steps {first} ... {num_steps - 1 + first}")


def _check(transformer, scheduler, latents, labels, targets, guidance, checkpoints, gradients, memory, num_steps, fidelity) -> None:
    size = len(latents)
    if transformer.training:
        raise ValueError("the transformer is in training mode and would drop labels at random; call .eval()")
    if labels.shape != (size,):
        raise ValueError(f"labels are ({size},), one a latent, got {tuple(labels.shape)}")
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod; Algorithm 1 needs a discrete noise schedule")
    if abs(float(scheduler.init_noise_sigma) - 1) > 1e-6:
        raise ValueError(f"{type(scheduler).__name__} rescales its samples; Algorithm 1 needs a variance-preserving one (DDPM, DDIM, DPM-Solver++, UniPC)")
    if _learned_variance(scheduler) and not isinstance(scheduler, DDPMScheduler | DDIMScheduler):
        raise ValueError(f"{type(scheduler).__name__} with variance_type={scheduler.config.variance_type!r} drops latent channels; set variance_type=None")
    if guidance is None:
        return
    check_range(guidance, num_steps, fidelity)
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


@contextmanager
def _uncorrected(scheduler: Any, steps: Iterable[int]) -> Iterator[None]:
    """UniPC recomputes a step's result from its start; inside, not that of `steps`, where guidance was added to it."""
    if not hasattr(scheduler, "disable_corrector"):
        yield
        return
    configured = scheduler.disable_corrector
    scheduler.disable_corrector = [*configured, *steps]
    try:
        yield
    finally:
        scheduler.disable_corrector = configured


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

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Not offered: guidance differentiates through transformer and decoder at once, so both stay on the device."""
        raise NotImplementedError(
            "IGDPipeline cannot offload models: a guided step differentiates through the decoder and the transformer in one graph, "
            "which keeps the weights of both. Use bfloat16, a smaller batch or jacobian='decoder'; for vanilla sampling use diffusers' DiTPipeline"
        )

    enable_sequential_cpu_offload = enable_model_cpu_offload

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

        output_type: "pil", "np", "pt" (floats in [0, 1]) or "latent". callback_on_step_end(pipe, step,
        timestep, info) may return {"latents": ...} to replace them. Returns `ImagePipelineOutput`.
        """
        device = self._execution_device
        config = self.transformer.config
        shape = (len(class_labels), config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

        def callback(index: int, timestep: int, info: dict[str, Any]) -> dict[str, Any] | None:
            return callback_on_step_end(self, num_inference_steps - 1 - index, timestep, info)

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
