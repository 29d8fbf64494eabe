"""New images from latents that are there already: what D4M and TDSDM share, on a DiT or on Stable Diffusion.

Both methods were published on Stable Diffusion 1.5 (weights under CreativeML OpenRAIL-M, which restricts
their use), which is told a class by a prompt. On a DiT the class label takes the prompt's place, and the null
class the negative prompt's, as where MGD3 (Chan-Santiago et al., ICML 2025) compared D4M on DiT-XL/2 (weights
under CC-BY-NC 4.0).

A strength is a share of the steps, and what it leaves of the latents goes with the noise schedule: 0.7 leaves
sqrt(alpha_bar) = 0.29 of them on Stable Diffusion's, and 0.08 on DiT's, where images hardly differ from plain
samples of the same noise. The presets for a DiT therefore have the strength that leaves as much there
as the authors' does on Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from igd_lib.baselines.tuning import Posterior, encoded
from igd_lib.config import STANDARD, Fidelity, Solver
from igd_lib.data.images import ImageData, from_tensors, to_uint8
from igd_lib.data.resizing import needed
from igd_lib.distillation import image_generator
from igd_lib.models.dit import class_ids
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampler import Start, steps_taken
from igd_lib.sampling import Precision, Sampling, architecture
from igd_lib.schedulers import make_scheduler
from igd_lib.tools import files
from igd_lib.tools.progress import progress

# CreativeML OpenRAIL-M. A mirror: the repository that both methods' code names is gone.
SD_15 = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14")

Noise = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Img2Img:
    """How new images come from latents; `D4M` and `TDSDM` give the values."""

    strength: float  # share of the steps that are taken: 0 keeps the latents, 1 begins at noise
    cfg_scale: float
    num_steps: int  # of which int(num_steps x strength) are taken
    solver: Solver  # "configured": the pipeline's own scheduler
    posterior: Posterior  # what stands for an image's latents; the mean for a DiT that was trained on means
    size: int | None = None  # px a side of the set's images; None: the data's
    prompt: str = "{}"  # of Stable Diffusion, the class's name in it
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"strength is the share of the steps that are taken, 0 ... 1, got {self.strength}"
            )
        if self.num_steps < 1 or (self.size is not None and self.size < 1):
            raise ValueError(f"num_steps and size are at least 1, got {self.num_steps} and {self.size}")
        for name, known in (("solver", Solver), ("posterior", Posterior)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} is one of {get_args(known)}, got {getattr(self, name)!r}")
        check_prompt(self.prompt)


def check_prompt(prompt: str) -> None:
    """Raise ValueError unless it has one place for a name."""
    if prompt.count("{}") != 1 or prompt.replace("{}", "").count("{"):
        raise ValueError(f"a prompt has one {{}} for the class's name, got {prompt!r}")


class Backbone(Protocol):
    """A latent diffusion model that is told the data's classes."""

    together: int  # images that go through it side by side

    @property
    def image_size(self) -> int:
        """The side of its images, in px."""
        ...

    @property
    def classes(self) -> int:
        """How many classes of the data it has an id or a name for."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """What its images depend on: JSON-able, weights by their digests."""
        ...

    @property
    def vae(self) -> AutoencoderKL: ...

    @property
    def network(self) -> nn.Module:
        """What predicts the noise."""
        ...

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,): alpha_bar of every timestep that it was trained with."""
        ...

    def to(self, device: str) -> Any:
        """The same on a device, in its precision."""
        ...

    def with_network(self, network: nn.Module) -> Any:
        """The same with another network."""
        ...

    def sized(self, data: ImageData) -> ImageData:
        """The data's images as it takes them."""
        ...

    def generator(self, seed: int, label: int, index: int) -> torch.Generator:
        """Of the noise of image `index` of a class."""
        ...

    def denoise(
        self, latents: Tensor, label: int, how: Img2Img, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Float images (B, 3, H, H), about [-1, 1], of a class from scaled latents (B, C, h, w)."""
        ...

    def noise(self, prompt: str) -> Noise:
        """The network's noise (B, C, h, w), without guidance: of a network, noisy latents, timesteps (B,)
        and labels (B,), where label `classes` is no class.
        """
        ...


# --- a DiT


@dataclass(frozen=True)
class DiT:
    """DiT-XL/2, a DiT that was fine-tuned on the data, or a stand-in."""

    pipe: IGDPipeline
    ids: tuple[int, ...]  # the transformer's id of every class of the data, in label order
    fidelity: Fidelity = STANDARD  # its solver gives way to the method's
    precision: Precision = "float32"
    together = 25

    @classmethod
    def of(cls, pipe: IGDPipeline, data: ImageData, label_ids: Sequence[int] | None = None) -> DiT:
        """For the data's classes. Raises ValueError as `class_ids`."""
        return cls(pipe, tuple(class_ids(pipe.transformer, len(data.classes), label_ids)))

    @property
    def image_size(self) -> int:
        return self.pipe.image_size

    @property
    def classes(self) -> int:
        return len(self.ids)

    @cached_property
    def about(self) -> dict[str, Any]:
        return {
            "backbone": "dit",
            "label_ids": list(self.ids),
            "fidelity": {"timestep_spacing": self.fidelity.timestep_spacing}
            | {"cfg_channels": self.fidelity.cfg_channels},
            "precision": self.precision,
            "model": architecture(self.pipe.transformer),
            "transformer": files.digest(self.pipe.transformer.state_dict()),
            "vae": files.digest(self.pipe.vae.state_dict()),
        }

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipe.vae

    @property
    def network(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def alphas_cumprod(self) -> Tensor:
        return _alphas_cumprod(self.pipe.scheduler)

    def to(self, device: str) -> DiT:
        return replace(self, pipe=Sampling(self.pipe, precision=self.precision).to(device).lowered().pipe)

    def with_network(self, network: nn.Module) -> DiT:
        return replace(self, pipe=IGDPipeline(network, self.pipe.vae, self.pipe.scheduler))

    def sized(self, data: ImageData) -> ImageData:
        """As DiT's own training images: the shorter side resized, the centre cut out."""
        return data.at(self.image_size, "bicubic-halving")

    def generator(self, seed: int, label: int, index: int) -> torch.Generator:
        """The same noise as that of a sampled set's image."""
        return image_generator(seed, self.ids[label], index)

    def denoise(
        self, latents: Tensor, label: int, how: Img2Img, generators: Sequence[torch.Generator]
    ) -> Tensor:
        fidelity = replace(self.fidelity, solver=how.solver)
        sampling = Sampling(
            self.pipe,
            cfg_scale=how.cfg_scale,
            num_steps=how.num_steps,
            fidelity=fidelity,
            precision=self.precision,
        )
        noise, start = self.pipe.latent_noise(generators), Start(latents, how.strength)
        with sampling.arithmetic():
            ids = [self.ids[label]] * len(latents)
            return sampling.decode(sampling.sample(noise, ids, (), generators, start=start))

    def noise(self, prompt: str) -> Noise:
        """Labels stand for the prompt."""
        config = self.pipe.transformer.config
        ids = torch.tensor([*self.ids, config.num_embeds_ada_norm])

        def predicted(network: nn.Module, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
            given = ids.to(labels.device)[labels]
            return network(noisy, timestep=timesteps, class_labels=given).sample[:, : config.in_channels]

        return predicted


# --- Stable Diffusion


@dataclass(frozen=True)
class StableDiffusion:
    """Stable Diffusion 1.5, which is told a class by its name; `stable_diffusion` loads it.

    Images are resized to its size, whatever their shape, as both methods' code has it.
    """

    pipe: Any  # a StableDiffusionImg2ImgPipeline without a safety checker
    names: tuple[str, ...]  # of the classes, in label order: "tench, Tinca tinca"
    together = 8

    def __post_init__(self) -> None:
        if getattr(self.pipe, "safety_checker", None) is not None:
            raise ValueError(
                "the safety checker would put black images into the set: load the pipeline with "
                "`stable_diffusion`, or with safety_checker=None"
            )

    @property
    def image_size(self) -> int:
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    @property
    def classes(self) -> int:
        return len(self.names)

    @cached_property
    def about(self) -> dict[str, Any]:
        parts = ("unet", "vae", "text_encoder")
        return {
            "backbone": "stable-diffusion",
            "names": list(self.names),
            "precision": str(self.pipe.unet.dtype).removeprefix("torch."),
            "scheduler": [type(self.pipe.scheduler).__name__, architecture(self.pipe.scheduler)],
        } | {part: files.digest(getattr(self.pipe, part).state_dict()) for part in parts}

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipe.vae

    @property
    def network(self) -> nn.Module:
        return self.pipe.unet

    @property
    def alphas_cumprod(self) -> Tensor:
        return _alphas_cumprod(self.pipe.scheduler)

    def to(self, device: str) -> StableDiffusion:
        return replace(self, pipe=self.pipe.to(device))

    def with_network(self, network: nn.Module) -> StableDiffusion:
        return replace(self, pipe=self._with(unet=network))

    def _with(self, **parts: Any) -> Any:
        """The pipeline with other parts."""
        made = type(self.pipe)(**(self.pipe.components | parts), requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    def sized(self, data: ImageData) -> ImageData:
        return stretched(data, self.image_size)

    def generator(self, seed: int, label: int, index: int) -> torch.Generator:
        return image_generator(seed, label, index)

    def denoise(
        self, latents: Tensor, label: int, how: Img2Img, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Raises FloatingPointError for images that are black or not finite."""
        scheduler, count = self.pipe.scheduler, len(latents)
        if how.solver != "configured":
            scheduler = make_scheduler(Fidelity(solver=how.solver), scheduler.config)
        # Latents that the pipeline is given are taken as scaled ones.
        final = latents.to(self.pipe.device, self.pipe.unet.dtype)
        if steps_taken(how.num_steps, how.strength) > 0:
            final = self._with(scheduler=scheduler)(
                prompt=[how.prompt.format(self.names[label])] * count,
                negative_prompt=[how.negative_prompt] * count,
                image=final,
                strength=how.strength,
                num_inference_steps=how.num_steps,
                guidance_scale=how.cfg_scale,
                generator=list(generators),
                output_type="latent",
            ).images
        with torch.no_grad():
            decoded = self.vae.decode(final.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        _check_images(decoded, self.names[label], self.vae.dtype)
        return decoded.float()

    def noise(self, prompt: str) -> Noise:
        """The empty prompt is no class."""
        texts = [*(prompt.format(name) for name in self.names), ""]
        with torch.no_grad():
            found = [self.pipe.encode_prompt(text, self.pipe.device, 1, False)[0] for text in texts]
        embeddings = torch.cat(found).float()

        def predicted(network: nn.Module, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
            return network(noisy, timesteps, encoder_hidden_states=embeddings[labels]).sample

        return predicted


def _alphas_cumprod(scheduler: Any) -> Tensor:
    if scheduler.config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(f"a model that predicts noise is needed, not {scheduler.config.prediction_type!r}")
    return scheduler.alphas_cumprod


def _check_images(images: Tensor, name: str, dtype: torch.dtype) -> None:
    """Raise FloatingPointError for what would be black pixels, and for images that are."""
    if not torch.isfinite(images).all() or (images <= -1).flatten(1).all(1).any():
        raise FloatingPointError(
            f"Stable Diffusion's images of {name!r} are black or not finite: its models are in {dtype}; take "
            "float32 or bfloat16"
        )


def stretched(data: ImageData, size: int) -> ImageData:
    """The same images with both sides resized to `size` px, made from the originals when asked for."""
    if data.image_size == size and data.original is None:
        return data

    def fetch(indices: Tensor) -> Tensor:
        made = (TF.resize(data.photograph(index), [size, size]) for index in indices.tolist())
        return torch.stack([TF.pil_to_tensor(image) for image in made])

    return replace(data, image_size=size, fetch=fetch, original=data.photograph, slow=True)


def stable_diffusion(
    folder: str | Path | None = None,  # None: the hub's, at the pinned revision
    *,
    dtype: torch.dtype = torch.float32,  # the authors': float16, on a GPU
) -> Any:
    """Stable Diffusion 1.5 (CreativeML OpenRAIL-M) without its safety checker, from safetensors only.

    Raises FileNotFoundError with how to get the weights.
    """
    from diffusers import StableDiffusionImg2ImgPipeline  # it brings transformers, which takes seconds

    where, revision = (str(folder), None) if folder is not None else SD_15
    try:
        pipe = StableDiffusionImg2ImgPipeline.from_pretrained(
            where,
            revision=revision,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            torch_dtype=dtype,
            local_files_only=folder is not None,
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no Stable Diffusion in {where} ({str(error).splitlines()[0]}): hf download {SD_15[0]} "
            f"--revision {SD_15[1]}, or give a folder that has its safetensors"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- sets


def check_counts(data: ImageData, backbone: Backbone, ipc: int) -> None:
    """Raise ValueError unless every class has `ipc` images, and the model an id or a name for each."""
    if backbone.classes != len(data.classes):
        raise ValueError(
            f"the diffusion model is told {backbone.classes} classes, {data.name} has {len(data.classes)}: "
            "give it an id or a name for each, in label order"
        )
    smallest = int(data.labels.bincount(minlength=len(data.classes)).min())
    if not 1 <= ipc <= smallest:
        raise ValueError(f"ipc is 1 ... {smallest}, which the smallest class has, got {ipc}: take fewer")


def encode(backbone: Backbone, images: Tensor, how: Img2Img, generator: torch.Generator) -> Tensor:
    """Scaled latents, float32 (n, C, h, w), of uint8 images (n, 3, H, H) of the model's size."""
    parts = images.split(backbone.together)
    return torch.cat([encoded(backbone.vae, part, how.posterior, generator) for part in parts])


def rendered(backbone: Backbone, latents: Tensor, label: int, how: Img2Img, seed: int, size: int) -> Tensor:
    """uint8 (n, 3, size, size): a class's images from its scaled latents (n, C, h, w), on the CPU.

    Image i has a generator of its own; resizing is bicubic, clamping and rounding come last.
    """
    resize, parts = needed("bicubic", backbone.image_size, size), []
    for indices in torch.arange(len(latents)).split(backbone.together):
        generators = [backbone.generator(seed, label, index) for index in indices.tolist()]
        images = backbone.denoise(latents[indices.to(latents.device)], label, how, generators)
        parts.append(to_uint8(images if resize is None else resize(images)).cpu())
    return torch.cat(parts)


def made(
    data: ImageData, make: Callable[[int], Tensor], labels: Sequence[int] | None, split: str, what: str
) -> ImageData:
    """The images of some classes, or of all, class after class."""
    wanted = range(len(data.classes)) if labels is None else labels
    parts = [make(label) for label in progress(list(wanted), f"{what}, class")]
    owners = torch.cat([torch.full((len(p),), label) for p, label in zip(parts, wanted, strict=True)])
    return from_tensors(data.name, split, data.classes, torch.cat(parts), owners)
