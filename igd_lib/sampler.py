"""Influence-guided sampling (Algorithm 1) over any diffusers scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

from igd_lib.config import STANDARD, Fidelity, Guidance
from igd_lib.guidance import predicted_clean
from igd_lib.guides import Deviation, Generators, Guide, Influence, SecondChain, Shortcuts, Step, Update
from igd_lib.schedulers import noise_deviation, step_options, step_output
from igd_lib.surrogate import Checkpoints

Callback = Callable[[int, int, dict[str, Any]], dict[str, Any] | None]


class Prediction(NamedTuple):
    """What the transformer says of a batch, after classifier-free guidance; (B, C, h, w) each."""

    eps: Tensor
    conditional: Tensor  # before CFG
    variance: Tensor | None  # of models that predict one
    other: Tensor  # the unconditional half after CFG: mixed on the guided channels, unconditional on the rest
    other_variance: Tensor | None


@dataclass(frozen=True)
class Denoiser:
    """A transformer with the labels it is asked for and classifier-free guidance.

    Raises ValueError for a transformer in training mode.
    """

    transformer: DiTTransformer2DModel
    labels: Tensor  # (B,): the transformer's class ids
    cfg_scale: float = 4.0  # 1 or less: the conditional prediction alone
    cfg_channels: int | None = 3  # how many latent channels CFG mixes, the first ones; None: all

    def __post_init__(self) -> None:
        if self.transformer.training:
            raise ValueError(
                "the transformer is in training mode and would drop labels at random; call .eval()"
            )

    def __call__(self, z: Tensor, timestep: Tensor) -> Prediction:
        """z: (B, C, h, w) at the scalar `timestep`."""
        channels, guided = z.shape[1], self.cfg_scale > 1
        inputs = torch.cat([z, z]) if guided else z
        null = torch.full_like(self.labels, self.transformer.config.num_embeds_ada_norm)
        classes = torch.cat([self.labels, null]) if guided else self.labels
        output = self.transformer(
            inputs.to(self.transformer.dtype), timestep=timestep.expand(len(inputs)), class_labels=classes
        ).sample.to(z.dtype)
        eps, rest = output[:, :channels], output[:, channels:]
        variances = list(rest.chunk(2 if guided else 1)) if rest.shape[1] == channels else [None]
        if not guided:
            return Prediction(eps, eps, variances[0], eps, variances[0])
        conditional, unconditional = eps.chunk(2)
        mixed = unconditional + self.cfg_scale * (conditional - unconditional)
        n = self.cfg_channels or channels
        combined = torch.cat([mixed[:, :n], conditional[:, n:]], dim=1)
        other = torch.cat([mixed[:, :n], unconditional[:, n:]], dim=1)
        return Prediction(combined, conditional, variances[0], other, variances[-1])


@dataclass(frozen=True)
class Start:
    """Where sampling begins instead of at noise alone (SDEdit, Meng et al., ICLR 2022).

    Clean latents, noised for the first of the steps that are left. The last int(num_steps x strength) are,
    as in diffusers' image-to-image pipelines: with 0 the latents stay as they are, with 1 they play no part.
    """

    clean: Tensor  # (B, C, h, w), scaled as the transformer's
    strength: float  # share of the steps that are taken, 0 ... 1

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"strength is the share of the steps that are taken, 0 ... 1, got {self.strength}"
            )

    def skipped(self, num_steps: int) -> int:
        """How many of the steps, the first ones, are not taken."""
        return num_steps - steps_taken(num_steps, self.strength)

    def noised(self, scheduler: Any, noise: Tensor, number: int) -> Tensor:
        """What step `number` is given: sqrt(alpha_bar) clean + sqrt(1 - alpha_bar) noise."""
        if number == len(scheduler.timesteps):
            return self.clean.to(noise)
        return scheduler.add_noise(self.clean.to(noise), noise, scheduler.timesteps[number : number + 1])


def steps_taken(num_steps: int, strength: float) -> int:
    """How many steps a start of that strength leaves, rounded down."""
    return min(int(num_steps * strength), num_steps)


def sample(
    denoiser: Denoiser,
    scheduler: Any,
    latents: Tensor,  # (B, C, h, w) unit Gaussian noise
    *,
    start: Start | None = None,  # None: the noise
    guides: Sequence[Guide] = (),
    num_steps: int = 50,
    counts_from: int = 0,  # the last step's index for the guides (`Fidelity.range_counts_from`)
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Algorithm 1: denoise `latents`, each step moved by the guides that cover it. Returns z_0, (B, C, h, w).

    Any variance-preserving scheduler with one evaluation a step will do, used as configured; without guides
    this is its own sampling. `callback`: see `sample_igd`. Raises ValueError on what does not fit,
    FloatingPointError when latents are not finite.
    """
    _check(denoiser, scheduler, latents, start)
    timesteps = _timesteps(scheduler, num_steps, latents.device)
    first = 0 if start is None else start.skipped(num_steps)
    options = step_options(scheduler, generator)
    indices = [num_steps - 1 - number + counts_from for number in range(num_steps)]
    guided = [number for number, index in enumerate(indices) if any(guide.covers(index) for guide in guides)]
    modules = [denoiser.transformer, *(module for guide in guides for module in guide.modules)]
    with _uncorrected(scheduler, guided), _frozen(*modules), torch.no_grad():
        z_t = latents * scheduler.init_noise_sigma
        if start is not None and first > 0:
            z_t = start.noised(scheduler, latents, first)
        for index, timestep in zip(indices[first:], timesteps[first:], strict=True):
            asked = [guide for guide in guides if guide.covers(index)]
            through = [guide.through_model for guide in asked]
            step = predict(denoiser, scheduler, z_t, timestep, index, num_steps, sum(through))
            steps = [step if own else _apart(step) for own in through]
            updates = [guide(own) for guide, own in zip(asked, steps, strict=True)]
            for guide in guides:
                guide.after(step)
            # s(z_t, t, eps) - rho_t grad G_I - gamma grad G_D (Eq. 9).
            output = _noise(step, updates)
            shift = sum(update.shift for update in updates if update.shift is not None)
            z_t = scheduler.step(output, timestep, z_t, **options).prev_sample - shift
            if not torch.isfinite(z_t).all():
                raise FloatingPointError(_not_finite(index, asked))
            if callback is not None:
                info: dict[str, Any] = {"latents": z_t, "clean": step.clean.detach(), "guided": bool(asked)}
                for update in updates:
                    info |= update.report
                z_t = (callback(index - counts_from, int(timestep), info) or {}).get("latents", z_t)
    return z_t


def predict(
    denoiser: Denoiser,
    scheduler: Any,
    z_t: Tensor,
    timestep: Tensor,
    index: int,
    num_steps: int,
    through: int,
) -> Step:
    """One forward of the transformer, with a graph from z_t where some guides, `through` of them, need it."""
    alpha_bar = scheduler.alphas_cumprod[int(timestep)].to(z_t)
    with torch.set_grad_enabled(through > 0):
        z = z_t.detach().requires_grad_(through > 0)
        found = denoiser(scheduler.scale_model_input(z, timestep), timestep)
        clean = predicted_clean(z, found.eps, alpha_bar)
    learned = _learned_variance(scheduler)
    variance = found.variance if learned else None
    sigma = noise_deviation(scheduler, int(timestep), _detached(variance))
    return Step(
        index=index,
        timestep=int(timestep),
        num_steps=num_steps,
        alpha_bar=alpha_bar,
        z=z,
        eps=found.eps,
        conditional=found.conditional,
        variance=variance,
        clean=clean,
        other=found.other,
        other_variance=found.other_variance if learned else None,
        shared=through > 1,
        sigma=None if sigma is None else sigma.to(z_t),
    )


def _apart(step: Step) -> Step:
    """The step for a guide that does not go through the model: a graph of its own, from z_t alone."""
    with torch.enable_grad():
        z, eps = step.z.detach().requires_grad_(), step.eps.detach()
        clean = predicted_clean(z, eps, step.alpha_bar)
    return replace(
        step,
        z=z,
        eps=eps,
        conditional=step.conditional.detach(),
        variance=_detached(step.variance),
        clean=clean,
        other=step.other.detach(),
        other_variance=_detached(step.other_variance),
        shared=False,
    )


def _detached(value: Tensor | None) -> Tensor | None:
    return value if value is None else value.detach()


def _noise(step: Step, updates: Sequence[Update]) -> Tensor:
    """What the scheduler is given: the step's noise, changed by the guides, and its variance."""
    eps = step.eps.detach()
    for update in updates:
        if update.eps is not None:
            eps = eps + (update.eps - step.eps).detach()
    return step_output(eps, _detached(step.variance))


def _not_finite(index: int, asked: Sequence[Guide]) -> str:
    if not asked:
        return f"latents are not finite after step {index}: check the transformer's weights and precision"
    strengths = [guide.guidance for guide in asked if hasattr(guide, "guidance")]
    hint = f"lower k or gamma ({strengths[0]})" if strengths else "lower the guides' strength"
    return f"latents are not finite after guided step {index}; {hint}"


def sample_igd(
    transformer: DiTTransformer2DModel,
    vae: AutoencoderKL,
    scheduler: Any,
    latents: Tensor,  # (B, C, h, w) unit Gaussian noise
    labels: Tensor,  # (B,) the transformer's class ids
    *,
    targets: Tensor | None = None,  # (B,) the surrogate's labels, for k > 0
    guidance: Guidance | None = None,  # None: the scheduler's own sampling
    checkpoints: Checkpoints | None = None,  # for k > 0
    gradients: Tensor | None = None,  # (E, B, P) each sample's own class average, for k > 0
    memory: Sequence[Tensor]
    | None = None,  # B tensors (M_b, C, h, w) of earlier final latents, oldest first, for gamma > 0
    num_steps: int = 50,
    cfg_scale: float = 4.0,
    fidelity: Fidelity = STANDARD,
    jacobian: Literal["full", "decoder"] = "full",  # this and the next three: `Shortcuts`
    guidance_decoder: nn.Module
    | None = None,  # decodes for G_I in the vae's place, such as `AutoencoderTiny`
    every: int = 1,
    checkpoints_per_step: int | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Algorithm 1, the paper's guidances: `sample` with `Influence` and `Deviation`, by the paper's names.

    Any variance-preserving scheduler with one evaluation a step will do; multistep ones see the guided
    latents, and UniPC does not correct a step that guidance has moved (its corrector would undo it).
    callback(index, timestep, info) after each step, index T-1 ... 0; info has latents, whether the step was
    guided, the clean latents that were predicted before it (Eq. 2) and, when guided, the losses; a dict with
    "latents" that it returns replaces them. Returns final latents (B, C, h, w), scaled as the transformer's.
    Raises ValueError on inputs that do not fit, FloatingPointError when latents are not finite.
    """
    shortcuts = Shortcuts(jacobian, every, checkpoints_per_step)
    denoiser = Denoiser(transformer, labels, cfg_scale, fidelity.cfg_channels)
    guides: list[Guide] = []
    if guidance is not None:
        check_range(guidance, num_steps, fidelity)
    if guidance is not None and guidance.k > 0:
        if checkpoints is None or gradients is None or targets is None:
            raise ValueError("k > 0 needs checkpoints, gradients and targets")
        _check_batch("targets", targets, len(latents))
        decoder = vae if guidance_decoder is None else guidance_decoder
        chain = SecondChain(scheduler, generator) if fidelity.second_chain else None
        guides.append(
            Influence(guidance, checkpoints, gradients, targets, decoder, fidelity, shortcuts, chain)
        )
    if guidance is not None and guidance.gamma > 0:
        if memory is None or len(memory) != len(latents):
            raise ValueError(
                "gamma > 0 needs memory, one tensor (M, C, h, w) a sample (M = 0 at first): "
                f"{len(latents)}, got {memory and len(memory)}"
            )
        guides.append(Deviation(guidance, memory, fidelity.memory_size, fidelity.cosine_floor))
    return sample(
        denoiser,
        scheduler,
        latents,
        guides=guides,
        num_steps=num_steps,
        counts_from=fidelity.range_counts_from,
        generator=generator,
        callback=callback,
    )


def check_range(guidance: Guidance, num_steps: int, fidelity: Fidelity) -> None:
    """Raise ValueError unless the whole guided range lies within the steps."""
    first = fidelity.range_counts_from
    if not first <= guidance.guided_range[0] <= guidance.guided_range[1] < num_steps + first:
        raise ValueError(
            f"guided_range {guidance.guided_range} is not within the {num_steps} steps {first} ... "
            f"{num_steps - 1 + first}"
        )


def _check_batch(name: str, values: Tensor, size: int) -> None:
    if values.shape != (size,):
        raise ValueError(f"{name} are ({size},), one a latent, got {tuple(values.shape)}")


def _check(denoiser: Denoiser, scheduler: Any, latents: Tensor, start: Start | None) -> None:
    """Raise ValueError where labels, start or scheduler do not fit Algorithm 1."""
    _check_batch("labels", denoiser.labels, len(latents))
    if start is not None and start.clean.shape != latents.shape:
        shapes = f"{tuple(latents.shape)}, got {tuple(start.clean.shape)}"
        raise ValueError(f"the latents to start from have the noise's shape, {shapes}")
    name = type(scheduler).__name__
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{name} has no alphas_cumprod; Algorithm 1 needs a discrete noise schedule")
    if abs(float(scheduler.init_noise_sigma) - 1) > 1e-6:
        raise ValueError(
            f"{name} rescales its samples; Algorithm 1 needs a variance-preserving one (DDPM, DDIM, "
            "DPM-Solver++, UniPC)"
        )
    if _learned_variance(scheduler) and not isinstance(scheduler, DDPMScheduler | DDIMScheduler):
        raise ValueError(
            f"{name} with variance_type={scheduler.config.variance_type!r} drops latent channels; set "
            "variance_type=None"
        )


def _timesteps(scheduler: Any, num_steps: int, device: torch.device) -> Tensor:
    scheduler.set_timesteps(num_steps, device=device)
    if len(scheduler.timesteps) != num_steps:
        raise ValueError(
            f"{type(scheduler).__name__} evaluates the model {len(scheduler.timesteps)} times in "
            f"{num_steps} steps; "
            "Algorithm 1 needs one a step"
        )
    return scheduler.timesteps


def _learned_variance(scheduler: Any) -> bool:
    """Whether the scheduler takes the variance that the transformer predicts.

    A config may carry a type it does not know.
    """
    known = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    return known and scheduler.config.variance_type in ("learned", "learned_range")


@contextmanager
def _frozen(*modules: nn.Module) -> Iterator[None]:
    """No parameter of `modules` takes part in autograd inside; restored afterwards."""
    trainable = [
        parameter for module in modules for parameter in module.parameters() if parameter.requires_grad
    ]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _uncorrected(scheduler: Any, steps: Iterable[int]) -> Iterator[None]:
    """UniPC recomputes a step's result from its start.

    Inside, not that of `steps`, where guidance was added to it.
    """
    if not hasattr(scheduler, "disable_corrector"):
        yield
        return
    configured = scheduler.disable_corrector
    scheduler.disable_corrector = [*configured, *steps]
    try:
        yield
    finally:
        scheduler.disable_corrector = configured
