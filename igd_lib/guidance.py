"""The two guidance losses and the adaptive scale, as pure functions of tensors (Eq. 7, 8 and 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

if TYPE_CHECKING:
    from igd_lib.surrogate import Checkpoints


def sample_gradients(model: nn.Module, state: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
    """Each sample's own cross-entropy gradient, (B, P); differentiable in images.

    P runs in `model.parameters()` order.

    images: (B, 3, H, W) in [-1, 1], or (B, K, 3, H, W) for the gradient of the mean over a sample's K images;
    targets: (B,) labels of `model`; state: a state dict of `model`. Raises ValueError for a model in training
    mode with batch normalisation: there a sample's gradient depends on the other samples, and has no meaning
    of its own.
    """
    return torch.cat(_by_parameter(model, state, images, targets), dim=1)


def _by_parameter(
    model: nn.Module, state: dict[str, Tensor], images: Tensor, targets: Tensor
) -> list[Tensor]:
    """`sample_gradients` in pieces, (B, size) a parameter."""
    check_samples_apart(model)

    def loss(parameters: dict[str, Tensor], own: Tensor, target: Tensor) -> Tensor:  # own: (K, 3, H, W)
        logits = functional_call(model, (parameters, buffers), (own,))
        return F.cross_entropy(logits, target.expand(len(own)))

    names = [name for name, _ in model.named_parameters()]
    parameters = {name: state[name] for name in names}
    buffers = {name: state[name] for name, _ in model.named_buffers()}
    own = images if images.ndim == 5 else images[:, None]
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, own, targets)
    return [per_sample[name].flatten(1) for name in names]


def check_samples_apart(model: nn.Module) -> None:
    """Raise ValueError for a model whose answer to a sample depends on the others of its batch."""
    if any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules()
    ):
        raise ValueError(
            "this surrogate normalises over the batch, so a sample has no gradient of its own; "
            "use a network with instance, group or layer normalisation (all of the protocol's are), or "
            "call .eval()"
        )


def influence_loss(
    images: Tensor,
    targets: Tensor,
    checkpoints: Checkpoints,
    gradients: Tensor,
    *,
    weights: Sequence[float] | None = None,
    floor: float = 0.0,
) -> Tensor:
    """G_I (Eq. 7): one minus the cosine of a sample's and its class's gradients, averaged over checkpoints.

    images: (B, 3, H, W) in [-1, 1], or (B, K, 3, H, W): the gradient of the mean cross-entropy over a
    sample's K images; targets: (B,) surrogate labels; gradients: (E, B, P), each sample's own class average;
    weights: one a checkpoint (Eq. 7's learning rates), 1 by default; floor: added to the cosine's
    denominator (`Fidelity.cosine_floor`). Returns (B,), in [0, 2] for weights of mean 1. Raises ValueError
    when E differs between the arguments.
    """
    if len(gradients) != len(checkpoints.states):
        raise ValueError(f"{len(checkpoints.states)} checkpoints, but class gradients of {len(gradients)}")
    total = images.new_zeros(len(images))
    for index, state in enumerate(checkpoints.states):
        own = _by_parameter(checkpoints.model, state, images, targets)
        weight = 1.0 if weights is None else weights[index]
        total = total + weight * (1 - _cosine(own, gradients[index], floor))
    return total / len(checkpoints.states)


def _cosine(pieces: Sequence[Tensor], whole: Tensor, floor: float) -> Tensor:
    """The cosine of vectors in pieces, (B, size) each, and whole ones (B, P); 0 where either is 0.

    As `F.cosine_similarity` on the joined pieces, in a quarter less of a guided step's time: nothing of P
    values is divided or copied.
    """
    parts = whole.split([piece.shape[1] for piece in pieces], dim=1)
    product = sum(torch.linalg.vecdot(piece, part) for piece, part in zip(pieces, parts, strict=True))
    squares = [sum(torch.linalg.vecdot(piece, piece) for piece in pieces), torch.linalg.vecdot(whole, whole)]
    one, other = (square.clamp_min(1e-16).sqrt() for square in squares)
    return product / (one * other + floor)


def predicted_clean(noisy: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents (B, C, h, w) that noisy ones and their predicted noise imply (Eq. 2).

    alpha_bar: a scalar or (B, 1, 1, 1).
    """
    return (noisy - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def deviation_loss(latents: Tensor, memory: Sequence[Tensor], *, floor: float = 0.0) -> Tensor:
    """G_D (Eq. 8): cosine to the most similar earlier latent of the class; 0 for an empty memory.

    latents: (B, C, h, w); memory: B tensors (M_b, C, h, w); floor: added to the denominator of the most
    similar one's cosine (`Fidelity.cosine_floor`). Returns (B,) in [-1, 1].
    """
    losses = [
        _nearest(latent.flatten(), earlier.flatten(1), floor) if len(earlier) else latent.sum() * 0
        for latent, earlier in zip(latents, memory, strict=True)
    ]
    return torch.stack(losses)


def _nearest(latent: Tensor, earlier: Tensor, floor: float) -> Tensor:
    """The cosine of a latent (D,) and the most similar of (M, D)."""
    nearest = earlier[F.cosine_similarity(latent.detach()[None], earlier, dim=1).argmax()]
    denominator = (latent.norm() * nearest.norm()).clamp_min(1e-8) + floor
    return torch.dot(latent, nearest) / denominator


def influence_scale(
    k: float, alpha_bar: float | Tensor, eps: Tensor, grad: Tensor, *, factor: float
) -> Tensor:
    """rho_t (Eq. 9): k * factor * sqrt(1 - alpha_bar) * ||eps|| / ||grad||, a value a sample.

    eps, grad: (B, C, h, w). Returns (B, 1, 1, 1); 0 where the gradient is 0, so no guidance there.
    """
    norm = grad.flatten(1).norm(dim=1)
    ratio = torch.where(
        norm > 0,
        eps.flatten(1).norm(dim=1) / norm.where(norm > 0, torch.ones_like(norm)),
        torch.zeros_like(norm),
    )
    return (k * factor * (1 - torch.as_tensor(alpha_bar)) ** 0.5 * ratio).reshape(-1, 1, 1, 1)
