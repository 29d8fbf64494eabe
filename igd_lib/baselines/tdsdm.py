"""TDSDM, training-data synthesis by distribution matching (Real-Fake; Yuan et al., ICLR 2024).

Real images are noised in part and denoised again by a diffusion model with a low-rank adapter. From the
released code (github.com/BAAI-DCAI/Training-Data-Synthesis):

(1) An adapter of rank 4 on the q, k, v and out of all attention layers is trained with
    mean_i w_i ||eps_hat_i - eps_i||^2 + 0.003 (8 / B) ||sum_i w_i eps_hat_i - sum_i w_i eps_i||^2,
    where norms are means over C x h x w, w_i = min(SNR_i, 5) / SNR_i, and the sums are over a batch of B
    images of mixed classes: the second term matches means of the two distributions in noise space.
(2) Real images are encoded, noised for the step where 75 % of the steps are left, and denoised with half of
    the adapter. The authors do so with every training image. How a set of few came to IGD's table is not
    said; here it is with IPC random ones of a class, those that Random has with the same seed.

Cost: `steps` of training on B images; then each image takes num_steps x strength evaluations of the network
(22 of 30). Here differently: a class's name is its whole caption, without BLIP-2's description and without
the image's CLIP embedding as last token; training images are cut at the centre, not at random; and 0.003 is
divided by B / 8, for of independent errors the square of a sum grows with B, and the authors' B is 8. On a
DiT the label takes the prompt's place. The adapter trains no predicted variance (as DiT-XL/2 has), so a
sampler that takes one is refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from igd_lib.baselines.img2img import (
    Backbone,
    Img2Img,
    check_counts,
    check_prompt,
    encode,
    made,
    rendered,
)
from igd_lib.baselines.tuning import Batches, Posterior, Tuning, train
from igd_lib.config import Solver
from igd_lib.data.datasets import Resize
from igd_lib.data.images import ImageData
from igd_lib.tools import files

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention, by diffusers' names
AUTHORS_BATCH = 8  # images that their sum is over
A, B = ".lora_A.weight", ".lora_B.weight"  # (rank, in) and (out, rank), as peft names them


@dataclass(frozen=True, kw_only=True)
class Adapter(Tuning):
    """How the adapter is trained; the defaults are the released script's."""

    epochs: int = 100
    steps: int | None = None
    batch_size: int = AUTHORS_BATCH
    lr: float = 1e-4
    ema: float = 0.0  # the last adapter is kept
    label_dropout: float = 0.0
    flip: bool = True
    posterior: Posterior = "sample"
    resize: Resize = "bilinear"
    images: int | None = None
    seed: int = 42
    rank: int = 4
    snr_cap: float = 5.0
    matching: float = 0.003  # of the batch's sum, at 8 images
    weight_decay: float = 0.01
    clip: float = 1.0  # the gradient's norm
    prompt: str = "photo of {}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema:
            raise ValueError(f"the last adapter is kept, as in the authors' code: ema is 0, got {self.ema}")
        if self.rank < 1 or self.snr_cap <= 0 or self.matching < 0 or self.clip <= 0:
            raise ValueError(
                "rank is at least 1, snr_cap and clip are above 0, matching is at least 0, got "
                f"{self.rank}, {self.snr_cap}, {self.clip} and {self.matching}"
            )
        check_prompt(self.prompt)


@dataclass(frozen=True, kw_only=True)
class TDSDM(Img2Img):
    """How TDSDM's images are made; the defaults are its code's, on Stable Diffusion 1.5.

    Its prompt is the one that the code has where there are no descriptions.
    """

    strength: float = 0.75
    cfg_scale: float = 2.0
    num_steps: int = 30
    solver: Solver = "unipc"
    posterior: Posterior = "sample"
    prompt: str = "{}, photo, best quality"
    negative_prompt: str = "distorted, unrealistic, blurry, out of frame, cropped, deformed"
    adapter_scale: float = 0.5
    adapter: Adapter = field(default_factory=Adapter)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver == "ddpm":
            raise ValueError(
                "ddpm would take a variance that the adapter was not trained for: solver='unipc'"
            )

    @classmethod
    def paper(cls, dataset: str, ipc: int) -> TDSDM:
        """The authors', the same for all data: they have ImageNet and its parts alone."""
        return cls()

    @classmethod
    def dit(cls, dataset: str, ipc: int) -> TDSDM:
        """The same on a DiT, whose own images are resized in another way.

        Strength 0.55 leaves as much of an image as 0.75 on Stable Diffusion (`img2img`).
        """
        return cls(strength=0.55, adapter=Adapter(resize="bicubic-halving"))

    @classmethod
    def small(cls, ipc: int = 10) -> TDSDM:
        """On a stand-in, whose DiT was trained on posterior means: 500 steps of 32 images."""
        short = Adapter(steps=500, batch_size=32, posterior="mean", resize="bicubic-halving")
        return replace(cls.dit("cifar-10", ipc), posterior="mean", adapter=short)


def tdsdm(
    data: ImageData,
    backbone: Backbone,
    ipc: int,
    settings: TDSDM | None = None,
    *,
    labels: Sequence[int] | None = None,  # the classes to make; None: all
    seed: int = 0,
    device: str = "cpu",
    state: str | Path | None = None,  # the adapter's training, for `tune_adapter`
) -> ImageData:
    """`ipc` images a class, class after class, of the data's size or `settings.size` px.

    The adapter is of all classes; with it a class's images depend on no other's. Raises ValueError for too
    large an IPC, or a model of other classes; FloatingPointError where a loss, latents or pixels are not
    finite.
    """
    settings = settings or TDSDM()
    check_counts(data, backbone, ipc)
    adapter = tune_adapter(data, backbone, settings.adapter, state=state)
    chosen = rerendering(data, backbone, adapter, ipc, settings, seed=seed, device=device)
    return made(data, chosen, labels, split_of(ipc, seed), "TDSDM")


def split_of(ipc: int, seed: int) -> str:
    """What the images call themselves."""
    return f"TDSDM, ipc {ipc}, seed {seed}"


# --- the images


@dataclass(frozen=True)
class Rerendering:
    """Who makes images of what: a label's images, uint8 (ipc, 3, size, size), where it is called."""

    drawn: ImageData  # the real images, of the model's size
    backbone: Backbone  # with the adapter in its weights
    settings: TDSDM
    size: int
    seed: int

    def to(self, device: str) -> Rerendering:
        """The same with its models on a device."""
        return replace(self, backbone=self.backbone.to(device))

    def __call__(self, label: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + label)
        latents = encode(self.backbone, self.drawn.of_class(label), self.settings, generator)
        return rendered(self.backbone, latents, label, self.settings, self.seed, self.size)


def rerendering(
    data: ImageData,
    backbone: Backbone,
    adapter: Mapping[str, Tensor],
    ipc: int,
    settings: TDSDM,
    *,
    seed: int,
    device: str,
) -> Rerendering:
    """What `tdsdm` asks for each class. Raises ValueError alike."""
    check_counts(data, backbone, ipc)
    network = merged(backbone.network, adapter, settings.adapter_scale)
    tuned = backbone.with_network(network).to(device)
    size = settings.size or data.image_size
    return Rerendering(tuned.sized(data.per_class(ipc, seed)), tuned, settings, size, seed)


@torch.no_grad()
def merged(network: nn.Module, adapter: Mapping[str, Tensor], scale: float) -> nn.Module:
    """A copy of the network whose weights are W + scale B A, the adapter's function at that scale."""
    found = copy.deepcopy(network)
    for name, low in adapter.items():
        if name.endswith(A):
            layer = name.removesuffix(A)
            weight: Any = found.get_submodule(layer).weight
            weight += (scale * adapter[layer + B] @ low).to(weight)
    return found


# --- the adapter


def tdsdm_losses(eps: Tensor, noise: Tensor, alpha_bar: Tensor, snr_cap: float) -> tuple[Tensor, Tensor]:
    """The two terms, scalars, the second without its weight: eps and noise (B, C, h, w), alpha_bar (B,)."""
    error = eps - noise
    weights = min_snr(alpha_bar, snr_cap).reshape(-1, 1, 1, 1)
    return (weights * error.square()).mean(), (weights * error).sum(0).square().mean()


def min_snr(alpha_bar: Tensor, cap: float) -> Tensor:
    """min(SNR, cap) / SNR, SNR = alpha_bar / (1 - alpha_bar) (Hang et al., ICCV 2023)."""
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=cap) / snr


def tune_adapter(
    data: ImageData,
    backbone: Backbone,
    recipe: Adapter,
    *,
    state: str | Path | None = None,  # a file that an interrupted run goes on from; a finished one is read
    mixed_precision: str = "no",  # "no", "bf16" or "fp16"
) -> dict[str, Tensor]:
    """Train an adapter on all classes, on accelerate's devices; (rank, in) and (out, rank) of each layer.

    A batch is divided among processes, and the batch's sum is over a process's own part, as where the authors
    have several. The model stays as it is. Raises ValueError where `state` is of other settings,
    FloatingPointError on a non-finite loss.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision)
    about = {
        "adapter": asdict(recipe),
        "data": [data.name, data.split, len(data)],
        "model": backbone.about,
        "mixed_precision": mixed_precision,
    }
    sized = data.at(backbone.image_size, recipe.resize)
    batches = Batches(sized, range(len(data.classes)), recipe, accelerator)
    training = AdapterTraining(backbone, recipe, about, accelerator)
    path = None if state is None else Path(state)
    batches.done = training.load(path)
    if len(batches) > 0:
        train(training, batches, path)
        if path is not None and accelerator.is_main_process:
            training.save(path, batches.steps)
    accelerator.wait_for_everyone()
    return training.found


class AdapterTraining:
    """An adapter in training on one process; the network that it is on is a copy."""

    kind = "tdsdm"

    def __init__(self, backbone: Backbone, recipe: Adapter, about: dict[str, Any], accelerator: Accelerator):
        self.recipe, self.about, self.accelerator = recipe, about, accelerator
        device = accelerator.device
        self.backbone = backbone.to(str(device))
        self.null, self.noise = backbone.classes, self.backbone.noise(recipe.prompt)
        self.alphas_cumprod = self.backbone.alphas_cumprod.to(device)
        network = copy.deepcopy(self.backbone.network).to(device).float()
        self.chosen = with_adapter(network, recipe.rank, recipe.seed)
        self.optimizer: Any = torch.optim.AdamW(
            self.chosen.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.wrapped: Any = network

    @property
    def found(self) -> dict[str, Tensor]:
        """The adapter, on the CPU."""
        return {name.replace(":", "."): value.detach().cpu().clone() for name, value in self.chosen.items()}

    def load(self, path: Path | None) -> int:
        """Go on where an interrupted run was saved; how many steps are done."""
        done = 0
        if path is not None and path.is_file():
            about = files.load_tensors(path)[1]["about"]
            if other := files.difference(about, json.loads(json.dumps(self.about))):
                raise ValueError(f"{path} is the training of another adapter: {other}; choose another file")
            done = files.load_training(path, self.optimizer, adapter=self.chosen)["step"]
        self.wrapped, self.optimizer = self.accelerator.prepare(self.wrapped, self.optimizer)
        return done

    def save(self, path: Path, step: int) -> None:
        note = {"about": self.about}
        files.save_training(path, step, self.optimizer.optimizer, note=note, adapter=self.chosen)

    def step(self, number: int, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One batch; its two losses."""
        recipe, device = self.recipe, self.alphas_cumprod.device
        latents = recipe.latents(self.backbone.vae, images, generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.randint(len(self.alphas_cumprod), (len(labels),), generator=generator)
        dropped = torch.rand(len(labels), generator=generator) < recipe.label_dropout
        given = labels.masked_fill(dropped, self.null).to(device)
        alpha_bar = self.alphas_cumprod[timesteps.to(device)]
        signal, rest = (part.sqrt().reshape(-1, 1, 1, 1) for part in (alpha_bar, 1 - alpha_bar))
        with self.accelerator.autocast():
            noisy = signal * latents + rest * noise
            eps = self.noise(self.wrapped, noisy, timesteps.to(device), given)
        losses = torch.stack(tdsdm_losses(eps.float(), noise, alpha_bar, recipe.snr_cap))
        self._update(number, losses[0] + recipe.matching * AUTHORS_BATCH / len(labels) * losses[1])
        return losses.detach()

    def _update(self, number: int, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"tdsdm: the loss is {loss.item()} at step {number}; lower lr ({self.recipe.lr})"
            )
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.chosen.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def with_adapter(network: nn.Module, rank: int, seed: int) -> nn.ParameterDict:
    """Put an adapter on a network's attentions, in place; its parameters alone are to be trained.

    A is normal with a deviation of 1 / rank and B zero, as in the authors' code: at first it does nothing.
    Raises ValueError for a network without such layers.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS), init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, network.eval())
    return nn.ParameterDict(
        {
            name.replace(".default.", ".").replace(".", ":"): parameter
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }
    )
