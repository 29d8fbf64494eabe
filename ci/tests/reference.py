"""The paper's formulas written out naively: one image at a time, plain loops, plain autograd."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from torch.nn import functional as F


def class_gradient(model, state: dict[str, Tensor], images: Tensor, label: int) -> Tensor:
    """The flat gradient of the mean cross-entropy of float images of one class."""
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    loss = sum(F.cross_entropy(model(image[None]), torch.tensor([label])) for image in images) / len(images)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def cosine(a: Tensor, b: Tensor, floor: float = 0.0) -> Tensor:
    a, b = a.flatten(), b.flatten()
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt() + floor)


def influence(
    images, target: int, checkpoints, gradients: Tensor, weights=None, floor: float = 0.0
) -> Tensor:
    """Eq. 7 for one sample: an image (3, H, W), or a list of them whose mean cross-entropy is meant.

    gradients: (E, P). Differentiable in the images.
    """
    images = images if isinstance(images, list) else [images]
    total = 0.0
    for e, state in enumerate(checkpoints.states):
        model = copy.deepcopy(checkpoints.model).requires_grad_(True)
        model.load_state_dict(state)
        loss = sum(F.cross_entropy(model(one[None]), torch.tensor([target])) for one in images) / len(images)
        parts = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        own = torch.cat([part.flatten() for part in parts])
        total = total + (1.0 if weights is None else weights[e]) * (1 - cosine(own, gradients[e], floor))
    return total / len(checkpoints.states)


def deviation(latent: Tensor, memory: Tensor, floor: float = 0.0) -> Tensor:
    """Eq. 8 for one latent (C, h, w); memory (M, C, h, w)."""
    best = latent.sum() * 0
    for index, earlier in enumerate(memory):
        value = cosine(latent, earlier, floor)
        best = value if index == 0 or value > best else best
    return best


def trajectory(
    models,
    scheduler,
    noise: Tensor,
    label: int,
    target: int,
    checkpoints,
    gradients,
    memory,
    guidance,
    fidelity,
    *,
    cfg: float,
    steps: int,
    jacobian: str = "full",
    generator=None,
    second_generator=None,
) -> Tensor:
    """Algorithm 1 for one image, with the update rules of DDPM (Ho et al., Eq. 7) or DDIM (Song et al.,
    Eq. 12).

    noise: (C, h, w). Returns the final latent (C, h, w). Only the noise schedule is the scheduler's. With
    `fidelity.second_chain`, the released sampler's second latent is carried along: it has the same start,
    the other half's prediction and variance, which are of the first latent, noise from `second_generator`,
    and no guidance; G_I is of the mean cross-entropy of both decoded images, its derivative by the first.
    """
    transformer, vae = models.transformer, models.vae
    scheduler.set_timesteps(steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    null = transformer.config.num_embeds_ada_norm
    channels = len(noise)
    if fidelity.memory_size is not None:
        memory = memory[-fidelity.memory_size :]
    mean_rate = sum(checkpoints.learning_rates) / len(checkpoints.learning_rates)
    weights = [rate / mean_rate for rate in checkpoints.learning_rates]
    z, z_2 = noise, noise
    for step, t in enumerate(timesteps):
        guided = (
            guidance.guided_range[0]
            <= steps - 1 - step + fidelity.range_counts_from
            <= guidance.guided_range[1]
        )
        a = float(scheduler.alphas_cumprod[t])
        a_next = float(scheduler.alphas_cumprod[timesteps[step + 1]]) if step + 1 < steps else 1.0
        z = z.detach().requires_grad_(guided)

        # Classifier-free guidance, channel by channel.
        with torch.set_grad_enabled(guided and jacobian == "full"):
            outputs = [
                transformer(z[None], timestep=torch.tensor([t]), class_labels=torch.tensor([c])).sample[0]
                for c in (label, null)
            ]
            conditional, unconditional = (output[:channels] for output in outputs)
            half, other = list(conditional), list(unconditional)
            for c in range(fidelity.cfg_channels or channels):
                half[c] = other[c] = unconditional[c] + cfg * (conditional[c] - unconditional[c])
            eps, eps_other = torch.stack(half), torch.stack(other)

        # Guidance terms.
        shift = torch.zeros_like(noise)
        if guided:
            latents = [(z, eps), (z_2, eps_other)] if fidelity.second_chain else [(z, eps)]
            images = []
            for latent, prediction in latents:
                clean = (latent - math.sqrt(1 - a) * prediction) / math.sqrt(a)
                image = vae.decode(clean[None] / vae.config.scaling_factor).sample[0]
                images.append(image.clamp(-1, 1) if fidelity.clamp_images else image)
            loss = influence(images, target, checkpoints, gradients, weights, fidelity.cosine_floor)
            (gradient,) = torch.autograd.grad(loss, z)
            scaled = (conditional if fidelity.eps == "conditional" else eps).detach()
            rho = (
                guidance.k
                * fidelity.rho_factor
                * math.sqrt(1 - a)
                * (scaled**2).sum().sqrt()
                / (gradient**2).sum().sqrt()
            )
            shift = shift + rho * gradient
            if len(memory):
                (gradient,) = torch.autograd.grad(deviation(z, memory, fidelity.cosine_floor), z)
                shift = shift + guidance.gamma * gradient

        # The solver's own step, of each chain with its own half.
        with torch.no_grad():
            rest = [output[channels:] for output in outputs]
            moved = _solver_step(fidelity.solver, z, eps, rest[0], a, a_next, t, generator)
            z_2 = _solver_step(fidelity.solver, z_2, eps_other, rest[1], a, a_next, t, second_generator)
            z = moved - shift
    return z.detach()


def _solver_step(
    solver: str, z: Tensor, eps: Tensor, rest: Tensor, a: float, a_next: float, t: int, generator
):
    """z_{t-1} by DDIM, or by DDPM with a learned range of variances where the model gives one (`rest`)."""
    clean = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
    if solver == "ddim":
        return math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * eps
    beta = 1 - a / a_next
    mean = (math.sqrt(a_next) * beta * clean + math.sqrt(1 - beta) * (1 - a_next) * z) / (1 - a)
    if t == 0:
        return mean
    small = torch.tensor(max(beta * (1 - a_next) / (1 - a), 1e-20), dtype=z.dtype)
    share = (rest + 1) / 2 if len(rest) else torch.zeros((), dtype=z.dtype)  # between log(small), log(beta)
    variance = torch.exp(share * math.log(beta) + (1 - share) * small.log())
    return mean + variance.sqrt() * torch.randn(1, *z.shape, generator=generator, dtype=z.dtype)[0]
