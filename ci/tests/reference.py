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


def cosine(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(), b.flatten()
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def influence(image: Tensor, target: int, checkpoints, gradients: Tensor, weights=None) -> Tensor:
    """Eq. 7 for one image (3, H, W); gradients (E, P). Differentiable in the image."""
    total = 0.0
    for e, state in enumerate(checkpoints.states):
        model = copy.deepcopy(checkpoints.model).requires_grad_(True)
        model.load_state_dict(state)
        loss = F.cross_entropy(model(image[None]), torch.tensor([target]))
        parts = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        own = torch.cat([part.flatten() for part in parts])
        total = total + (1.0 if weights is None else weights[e]) * (1 - cosine(own, gradients[e]))
    return total / len(checkpoints.states)


def deviation(latent: Tensor, memory: Tensor) -> Tensor:
    """Eq. 8 for one latent (C, h, w); memory (M, C, h, w)."""
    best = latent.sum() * 0
    for index, earlier in enumerate(memory):
        value = cosine(latent, earlier)
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
) -> Tensor:
    """Algorithm 1 for one image, with the update rules of DDPM (Ho et al., Eq. 7) or DDIM (Song et al.,
    Eq. 12).

    noise: (C, h, w). Returns the final latent (C, h, w). Only the noise schedule is the scheduler's.
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
    z = noise
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
            losses = []
            for prediction in [eps, eps_other] if fidelity.both_halves else [eps]:
                clean = (z - math.sqrt(1 - a) * prediction) / math.sqrt(a)
                image = vae.decode(clean[None] / vae.config.scaling_factor).sample[0]
                image = image.clamp(-1, 1) if fidelity.clamp_images else image
                losses.append(influence(image, target, checkpoints, gradients, weights))
            (gradient,) = torch.autograd.grad(sum(losses) / len(losses), z)
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
                (gradient,) = torch.autograd.grad(deviation(z, memory), z)
                shift = shift + guidance.gamma * gradient

        # The solver's own step.
        with torch.no_grad():
            clean = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
            if fidelity.solver == "ddim":
                z_next = math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * eps
            else:
                beta = 1 - a / a_next
                z_next = (math.sqrt(a_next) * beta * clean + math.sqrt(1 - beta) * (1 - a_next) * z) / (1 - a)
                if t > 0:
                    small = torch.tensor(max(beta * (1 - a_next) / (1 - a), 1e-20))
                    share = torch.tensor(0.0)
                    if len(outputs[0]) == 2 * channels:  # learned range: between log(small) and log(beta)
                        share = (outputs[0][channels:] + 1) / 2
                    variance = torch.exp(share * math.log(beta) + (1 - share) * small.log())
                    z_next = (
                        z_next
                        + variance.sqrt()
                        * torch.randn(1, *noise.shape, generator=generator, dtype=noise.dtype)[0]
                    )
            z = z_next - shift
    return z.detach()
