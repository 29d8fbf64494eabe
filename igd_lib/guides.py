"""What may steer a denoising step: the guides that `sample` asks at every step.

A guide sees a `Step` and answers with an `Update`. The paper's two are `Influence` and `Deviation`; other
papers' are in `other_guides`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from igd_lib.config import STANDARD, Fidelity, Guidance
from igd_lib.data.resizing import OutputResize
from igd_lib.guidance import deviation_loss, influence_loss, influence_scale, predicted_clean
from igd_lib.schedulers import step_options, step_output
from igd_lib.surrogate import Checkpoints

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Step:
    """One denoising step as a guide sees it. Tensors are (B, C, h, w) unless said otherwise."""

    index: int  # of the respaced steps, the last one's being `Fidelity.range_counts_from`
    timestep: int  # of the scheduler's training timesteps
    num_steps: int
    alpha_bar: Tensor  # ()
    z: Tensor  # z_t; a leaf of the graph in guided steps
    eps: Tensor  # the noise after CFG
    conditional: Tensor  # the conditional prediction
    variance: Tensor | None  # of a model and scheduler with a learned one
    clean: Tensor  # the clean latents that z and eps imply (Eq. 2)
    other: Tensor  # the second half of the batch after CFG
    other_variance: Tensor | None
    shared: bool = False  # whether another guide needs the graph through the transformer too
    # the sd of the noise that the scheduler adds, (B, C, h, w) or (); None of one that adds none
    sigma: Tensor | None = None

    def gradient(self, loss: Tensor, *, again: bool = False) -> Tensor:
        """The gradient by z of a loss (B,) from this step; `again`: another of its gradients follows."""
        with torch.enable_grad():
            total = loss.sum()
        return torch.autograd.grad(total, self.z, retain_graph=again or self.shared)[0]


@dataclass(frozen=True)
class Update:
    """What a guide does to a step: z_{t-1} moves by -`shift`; the scheduler gets `eps`, not the step's."""

    shift: Tensor | None = None
    eps: Tensor | None = None
    report: Mapping[str, Tensor] = field(default_factory=dict)  # for the sampler's callback


class Guide:
    """What `sample` asks of a guide; a subclass says what it does in the steps that it covers."""

    @property
    def through_model(self) -> bool:
        """Whether its next call needs the graph through the transformer."""
        return False

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The networks it differentiates through, whose parameters are frozen meanwhile."""
        return ()

    def covers(self, index: int) -> bool:
        """Whether it guides the step `index`."""
        return True

    def __call__(self, step: Step) -> Update:
        """Asked in every step that it covers."""
        raise NotImplementedError

    def after(self, step: Step) -> None:
        """Told of every step, guided or not, when its guides have been asked."""


@dataclass(frozen=True)
class GuideFactory:
    """Makes a guide for each batch of a set, which may depend on class, image and those before it."""

    # labels (B,), image numbers, earlier latents (M_b, C, h, w); with `with_models` the `Sampling` too
    make: Callable[..., Guide]
    # JSON-able: what names the guide in the set's key, digests of its data included
    settings: Mapping[str, Any]
    remembers: bool = True  # whether it reads the earlier latents of a class
    with_models: bool = False  # whether it uses the models, which move to where images are sampled
    # What it is for a set, by images a class, steps and the last step's index; None: the same for all.
    for_set: Callable[[int, int, int], GuideFactory] | None = None
    prepare: Callable[[Sequence[int]], None] | None = None  # asked before images of these labels are sampled

    def __call__(
        self, labels: Tensor, indices: Sequence[int], memory: Sequence[Tensor], sampling: Any = None
    ) -> Guide:
        return self.make(labels, indices, memory, *([sampling] if self.with_models else []))


@dataclass(frozen=True)
class Shortcuts:
    """Ways to cheaper influence guidance, which change the result; the defaults are the exact one."""

    # through transformer and decoder (the paper), or the decoder alone
    jacobian: Literal["full", "decoder"] = "full"
    every: int = 1  # the gradient is computed in each m-th guided step and used again in between, rho_t anew
    checkpoints_per_step: int | None = None  # how many enter a step, in turn; None: all

    def __post_init__(self) -> None:
        if self.jacobian not in ("full", "decoder"):
            raise ValueError(f"jacobian is 'full' or 'decoder', got {self.jacobian!r}")
        if self.every < 1 or (self.checkpoints_per_step is not None and self.checkpoints_per_step < 1):
            raise ValueError(
                f"every and checkpoints_per_step are at least 1, got {self.every} and "
                f"{self.checkpoints_per_step}"
            )


class SecondChain:
    """The released sampler's second latent of every sample, which its G_I looks at too.

    It starts from the sample's own initial noise and is never guided. At every step the transformer is asked
    about the sample alone; the second latent is moved by the other half of that answer (mixed by CFG on the
    guided channels, unconditional on the rest, its own learned variance; without CFG the only answer), with
    step noise of its own. So the clean latent that it seems to imply is far from any image's. Source: the
    released code's p_sample, of which DiT's forward_with_cfg is a part.
    """

    def __init__(self, scheduler: Any, generators: Generators = None):
        """scheduler: the sampler's, copied; generators: the samples', from which its own are derived.

        Without generators its noise is drawn from the global one.
        """
        self.scheduler = copy.deepcopy(scheduler)
        self.latents: Tensor | None = None  # (B, C, h, w), from the first step on
        self.options = step_options(scheduler, other_noise(generators))

    def clean(self, step: Step) -> Tensor:
        """The clean latents (B, C, h, w) that it seems to imply; differentiable by the sample's z."""
        latents = step.z.detach() if self.latents is None else self.latents  # both start from the same noise
        return predicted_clean(latents, step.other, step.alpha_bar)

    @torch.no_grad()
    def move(self, step: Step) -> None:
        """One step of the second latent."""
        if self.latents is None:
            self.latents = step.z.detach()
            self.scheduler.set_timesteps(step.num_steps, device=step.z.device)
        output = step_output(step.other, step.other_variance)
        timestep = torch.tensor(step.timestep, device=step.z.device)
        self.latents = self.scheduler.step(output, timestep, self.latents, **self.options).prev_sample


def other_noise(generators: Generators) -> Generators:
    """Generators of other noise, each a function of what a given one is about to draw, and leaves it that."""
    if generators is None:
        return None
    if isinstance(generators, torch.Generator):
        state = hashlib.sha256(generators.get_state().numpy().tobytes()).digest()
        return torch.Generator(generators.device).manual_seed(int.from_bytes(state[:8], "big") >> 1)
    return [other_noise(generator) for generator in generators]  # type: ignore[misc]


class ThroughDecoder(Guide):
    """A loss of the decoded image by the surrogate's checkpoints, its gradient scaled by rho_t (Eq. 9).

    A subclass has the fields below and says what the loss is.
    """

    name: ClassVar[str]  # in reports
    guidance: Guidance
    checkpoints: Checkpoints
    targets: Tensor  # (B,): the surrogate's labels
    decoder: Any  # AutoencoderKL, or a small one such as AutoencoderTiny
    fidelity: Fidelity
    shortcuts: Shortcuts
    resize: OutputResize | None  # of decoded images, to the size that the surrogate sees
    _steered: int = 0  # guided steps so far
    _gradient: Tensor | None = None  # the last one computed

    def loss(self, images: Tensor, subset: Sequence[int]) -> Tensor:
        """(B,): the mean over the checkpoints `subset`; images as `images_of` gives them."""
        raise NotImplementedError

    def images_of(self, step: Step) -> Tensor:
        """The decoded images that the loss looks at, (B, 3, H, W)."""
        return self.decoded(step.clean)

    @property
    def through_model(self) -> bool:
        return self.shortcuts.jacobian == "full" and self._is_due

    @property
    def modules(self) -> Sequence[nn.Module]:
        return self.decoder, self.checkpoints.model

    @property
    def _is_due(self) -> bool:
        return self._steered % self.shortcuts.every == 0

    def covers(self, index: int) -> bool:
        return self.guidance.covers(index)

    def __call__(self, step: Step) -> Update:
        report = {}
        if self._is_due:
            report[f"{self.name}_loss"], self._gradient = self._loss_and_gradient(step, self._in_turn())
        assert self._gradient is not None  # of this step or an earlier one
        self._steered += 1
        eps = step.conditional if self.fidelity.eps == "conditional" else step.eps
        scale = influence_scale(
            self.guidance.k, step.alpha_bar, eps.detach(), self._gradient, factor=self.fidelity.rho_factor
        )
        shift = scale * self._gradient
        return Update(shift, report=report | {f"{self.name}_shift": shift})

    def _in_turn(self) -> list[int]:
        """Which checkpoints enter this step."""
        count = min(self.shortcuts.checkpoints_per_step or len(self.checkpoints), len(self.checkpoints))
        return [
            (self._steered // self.shortcuts.every * count + i) % len(self.checkpoints) for i in range(count)
        ]

    def _loss_and_gradient(self, step: Step, subset: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The loss (B,) over the checkpoints `subset`, and its gradient by z_t."""
        with torch.enable_grad():
            images = self.images_of(step)
            # All checkpoints in one piece or each in its own: their sum is the same.
            pieces = [[e] for e in subset] if self.fidelity.backward == "per_checkpoint" else [list(subset)]
            loss, gradient = torch.zeros_like(step.z[:, 0, 0, 0]), torch.zeros_like(step.z)
            for number, piece in enumerate(pieces, start=1):
                term = self.loss(images, piece) * len(piece) / len(subset)
                loss = loss + term.detach()
                gradient = gradient + step.gradient(term, again=number < len(pieces))
        return loss, gradient

    def decoded(self, clean: Tensor) -> Tensor:
        """Images (B, 3, H, W) of scaled latents, as the surrogate sees them."""
        latents = clean.to(self.decoder.dtype) / self.decoder.config.scaling_factor
        image = self.decoder.decode(latents).sample.to(clean.dtype)
        image = image if self.resize is None else self.resize(image)
        return image.clamp(-1, 1) if self.fidelity.clamp_images else image


@dataclass
class Influence(ThroughDecoder):
    """The influence guidance G_I (Eq. 7), scaled by rho_t (Eq. 9).

    Raises ValueError where targets or gradients do not fit each other or the checkpoints.
    """

    name: ClassVar[str] = "influence"
    guidance: Guidance
    checkpoints: Checkpoints
    gradients: Tensor  # (E, B, P): each sample's own class average
    targets: Tensor
    decoder: Any
    fidelity: Fidelity = STANDARD
    shortcuts: Shortcuts = field(default_factory=Shortcuts)
    second_chain: SecondChain | None = None  # the released code's
    resize: OutputResize | None = None

    def __post_init__(self) -> None:
        size = len(self.targets)
        if self.targets.shape != (size,) or self.gradients.shape[:2] != (len(self.checkpoints), size):
            raise ValueError(
                f"targets are ({size},) and gradients ({len(self.checkpoints)}, {size}, P), "
                f"got {tuple(self.targets.shape)} and {tuple(self.gradients.shape)}"
            )

    def after(self, step: Step) -> None:
        if self.second_chain is not None:
            self.second_chain.move(step)

    def loss(self, images: Tensor, subset: Sequence[int]) -> Tensor:
        part, weights = self.checkpoints.keep(subset), [self.checkpoints.weights[e] for e in subset]
        # Indexing copies, so not where all are taken.
        own = self.gradients if len(subset) == len(self.checkpoints) else self.gradients[list(subset)]
        return influence_loss(
            images, self.targets, part, own, weights=weights, floor=self.fidelity.cosine_floor
        )

    def images_of(self, step: Step) -> Tensor:
        """(B, 3, H, W), or (B, 2, 3, H, W) with a second chain."""
        image = super().images_of(step)
        if self.second_chain is None:
            return image
        return torch.stack([image, self.decoded(self.second_chain.clean(step))], dim=1)


@dataclass
class Deviation(Guide):
    """The deviation guidance G_D (Eq. 8): away from the most similar earlier latent of the class."""

    guidance: Guidance
    # B tensors (M_b, C, h, w) of earlier final latents of the same class, oldest first
    memory: Sequence[Tensor]
    size: int | None = None  # how many of the last latents count; None: all
    floor: float = 0.0  # of the cosine's denominator

    def __post_init__(self) -> None:
        self.memory = [latents[-self.size :] if self.size else latents for latents in self.memory]

    def covers(self, index: int) -> bool:
        return self.guidance.covers(index)

    def __call__(self, step: Step) -> Update:
        with torch.enable_grad():
            z = step.z.detach().requires_grad_()
            loss = deviation_loss(z, self.memory, floor=self.floor)
            (gradient,) = torch.autograd.grad(loss.sum(), z)
        return Update(self.guidance.gamma * gradient, report={"deviation_loss": loss.detach()})
