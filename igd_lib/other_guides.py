"""Other papers' guides, and the reviewers' control: what may steer a step beside the paper's two.

`Modes` is MGD3's guidance (Chan-Santiago et al., ICML 2025), `Transport` a pull towards the real latents of a
class by optimal transport (as in the OT-guided diffusion of NeurIPS 2025), `ClassifierLoss` the plainest use
of the surrogate's checkpoints. Each says what it reads and what it does to a step, and goes with any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from igd_lib.config import STANDARD, Fidelity, Guidance
from igd_lib.data.resizing import OutputResize
from igd_lib.guidance import check_samples_apart
from igd_lib.guides import Guide, Shortcuts, Step, ThroughDecoder, Update
from igd_lib.surrogate import Checkpoints

Reading = Literal["code", "algorithm"]
STOP = (25, 50)  # MGD3's t_stop, of so many steps


def mode_range(num_steps: int, counts_from: int = 0) -> tuple[int, int]:
    """The first and last index that MGD3 guides: above t_stop = 25 of 49 ... 0, as its code counts 50 steps.

    With T other steps t_stop is 25 / 50 of T. counts_from: the last step's index
    (`Fidelity.range_counts_from`).
    """
    first = min(num_steps * STOP[0] // STOP[1] + 1, num_steps - 1)
    return first + counts_from, num_steps - 1 + counts_from


class InRange(Guide):
    """A guide of the steps A ... B of its `guided_range`."""

    guided_range: tuple[int, int]

    def covers(self, index: int) -> bool:
        return self.guided_range[0] <= index <= self.guided_range[1]

    def _check_range(self) -> None:
        if not 0 <= self.guided_range[0] <= self.guided_range[1]:
            raise ValueError(f"guided_range is (A, B) with 0 <= A <= B, got {self.guided_range}")


@dataclass
class Modes(InRange):
    """MGD3: each image's predicted clean latent is drawn towards an anchor m of its class.

    reading "code", as its code has it for DDPM: z_{t-1} = mean + scale sigma_t (m - x_0) + sigma_t noise,
    with sigma_t the sd of the step's noise, so that nothing happens where the step adds none. "algorithm",
    its Algorithm 1, for any scheduler: eps' = eps - sqrt(1 - alpha_bar) scale (m - x_0) in eps' place. Its
    Eq. 6 prints the opposite sign, away from m. x_0 is Eq. 2 of the noise after CFG; no gradient is needed.
    Raises ValueError for anchors of another shape than the latents, and for reading "code" with a scheduler
    that adds no noise.
    """

    anchors: Tensor  # (B, C, h, w), scaled as the transformer's latents: one for each image
    guided_range: tuple[int, int]  # `mode_range`'s
    scale: float = 0.1
    reading: Reading = "code"

    def __post_init__(self) -> None:
        _check_strength("scale", self.scale)
        self._check_range()
        if self.reading not in ("code", "algorithm"):
            raise ValueError(f"reading is 'code' or 'algorithm', got {self.reading!r}")
        if not torch.isfinite(self.anchors).all():
            raise ValueError("anchors are not finite; check the autoencoder's weights and precision")

    def __call__(self, step: Step) -> Update:
        if self.anchors.shape != step.z.shape:
            raise ValueError(
                f"anchors are one a latent, {tuple(step.z.shape)}, got {tuple(self.anchors.shape)}"
            )
        eps, clean = step.eps.detach(), step.clean.detach()
        towards = self.scale * (self.anchors.to(clean) - clean)
        report = {"mode_distance": (self.anchors.to(clean) - clean).flatten(1).norm(dim=1)}
        if self.reading == "algorithm":
            return Update(eps=eps - (1 - step.alpha_bar).sqrt() * towards, report=report)
        if step.sigma is None:
            raise ValueError(
                "reading='code' moves by the noise of DDPM's steps, and this scheduler adds none; take "
                "reading='algorithm'"
            )
        return Update(-step.sigma * towards, report=report)


@dataclass
class ClassifierLoss(ThroughDecoder):
    """The control: down the cross-entropy of the decoded image, by the checkpoints of `Influence`.

    Scale, decoder, size of the image, Jacobian and the checkpoints' weights are those of `Influence`, with k
    and factor of its rho_t. What differs is the loss: no class gradients, no second derivative.
    Raises ValueError for targets that are no (B,) labels of the checkpoints.
    """

    name: ClassVar[str] = "classifier"
    guidance: Guidance
    checkpoints: Checkpoints
    targets: Tensor
    decoder: Any
    fidelity: Fidelity = STANDARD
    shortcuts: Shortcuts = field(default_factory=Shortcuts)
    resize: OutputResize | None = None

    def __post_init__(self) -> None:
        check_samples_apart(self.checkpoints.model)
        if self.targets.ndim != 1:
            raise ValueError(f"targets are (B,) labels, got {tuple(self.targets.shape)}")
        if self.fidelity.second_chain:
            raise ValueError("the classifier loss has no second chain; take a fidelity without")

    def loss(self, images: Tensor, subset: Sequence[int]) -> Tensor:
        weights = [self.checkpoints.weights[e] for e in subset]
        return cross_entropy(images, self.targets, self.checkpoints.keep(subset), weights)


def cross_entropy(
    images: Tensor, targets: Tensor, checkpoints: Checkpoints, weights: Sequence[float]
) -> Tensor:
    """(B,): of images (B, 3, H, W) in [-1, 1] and labels (B,), the weighted mean over checkpoints."""
    total = images.new_zeros(len(images))
    for state, weight in zip(checkpoints.states, weights, strict=True):
        logits = functional_call(checkpoints.model, state, (images,))
        if len(targets) != len(images) or int(targets.max()) >= logits.shape[1]:
            raise ValueError(
                f"targets are {len(images)} labels below {logits.shape[1]}, got {targets.tolist()}"
            )
        total = total + weight * F.cross_entropy(logits, targets, reduction="none")
    return total / len(checkpoints.states)


@dataclass
class Transport(InRange):
    """Optimal transport: down the gradient of a Sinkhorn distance to real latents of the class, times beta.

    Compared are, for each image on its own, two sets of clean scaled latents, every one of a set with equal
    weight: this image's predicted clean latent (Eq. 2, after CFG, by which is differentiated) joined with the
    final latents of the earlier images of its class (held fixed), and the class's real latents. So an image
    is drawn to what the earlier ones leave out. The distance is `sinkhorn_distance`'s, a mean over the n
    images, times n: so each is pulled alike, however many came before. Its gradient goes through the
    transformer to z_t, and z_{t-1} moves by -beta times it. Like gamma, beta's effect on a latent of d values
    is proportional to 1 / d. Raises ValueError for a beta that is not finite or negative, and for latents
    that do not fit.
    """

    beta: float
    real: Sequence[Tensor]  # B tensors (N_b, C, h, w)
    memory: Sequence[Tensor]  # B tensors (M_b, C, h, w), M_b = 0 for a class's first image
    guided_range: tuple[int, int]
    share: float = 0.05  # of the mean cost: how much the plan is blurred

    def __post_init__(self) -> None:
        _check_strength("beta", self.beta)
        self._check_range()
        if not 0 < self.share < math.inf:
            raise ValueError(f"share is above 0 and finite, got {self.share}")
        if len(self.real) != len(self.memory) or any(len(own) == 0 for own in self.real):
            raise ValueError(
                "every image needs real latents of its class and a memory, got "
                f"{[len(own) for own in self.real]} and {len(self.memory)} memories"
            )

    @property
    def through_model(self) -> bool:
        return True

    def __call__(self, step: Step) -> Update:
        if len(self.real) != len(step.z) or any(own.shape[1:] != step.z.shape[1:] for own in self.real):
            raise ValueError(
                f"real latents are {len(step.z)} tensors (N, {', '.join(map(str, step.z.shape[1:]))}), got "
                f"{[tuple(own.shape) for own in self.real]}"
            )
        with torch.enable_grad():
            loss = torch.stack(
                [self._loss(*own) for own in zip(step.clean, self.memory, self.real, strict=True)]
            )
        shift = self.beta * step.gradient(loss)
        return Update(shift, report={"transport_loss": loss.detach(), "transport_shift": shift})

    def _loss(self, clean: Tensor, earlier: Tensor, real: Tensor) -> Tensor:
        points = torch.cat([clean[None], earlier.to(clean)])
        return len(points) * sinkhorn_distance(points, real.to(clean), self.share)


def sinkhorn_distance(points: Tensor, real: Tensor, share: float) -> Tensor:
    """The entropic transport cost () of points (n, ...) and real (N, ...): min <P, M> + r sum P log P.

    Over plans P with uniform margins; M_ij = || x_i - y_j ||^2 / d of d values, and r is `share` of its mean,
    taken as a constant. In double precision by POT's iterations in logarithms; the gradient by the points is
    <P, dM> at the optimal plan. Raises RuntimeError where they do not converge.
    """
    import ot

    x, y = points.flatten(1).double(), real.flatten(1).double()
    # Not torch.cdist, whose squares lose digits where points are near.
    cost = torch.stack([(own - y).square().mean(1) for own in x])
    fixed = cost.detach()
    blur = share * float(fixed.mean())
    a, b = (fixed.new_full((count,), 1 / count) for count in fixed.shape)
    plan, log = ot.bregman.sinkhorn_log(
        a, b, fixed, blur, numItermax=ITERATIONS, stopThr=1e-9, warn=False, log=True
    )
    if not plan.isfinite().all() or log["err"][-1] > 1e-4:
        raise RuntimeError(f"the transport plan did not converge in {ITERATIONS} iterations; raise share")
    return ((plan * cost).sum() + blur * torch.xlogy(plan, plan).sum()).to(points.dtype)


ITERATIONS = 5000


def _check_strength(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is a finite number of at least 0, got {value}")
