"""A diffusers pipeline whose sampling can be guided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from igd_lib.config import STANDARD, Fidelity
from igd_lib.models.dit import match_original
from igd_lib.sampler import Generators, sample_igd
from igd_lib.schedulers import make_scheduler

DECODING = 2**31  # bytes: images are decoded in slices that take no more


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

    @classmethod
    def stored(cls, folder: str | Path, **models: Any) -> IGDPipeline:
        """`from_pretrained` of a folder, whichever files its weights are in; a .bin is read as weights only.

        models: parts that are there already, such as vae.
        """
        folder = Path(folder)
        tensors = any((folder / "transformer").glob("*.safetensors"))
        return cls.from_pretrained(folder, use_safetensors=tensors, **models)

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Not offered: guidance differentiates through transformer and decoder at once.

        So both stay on the device.
        """
        raise NotImplementedError(
            "IGDPipeline cannot offload models: a guided step differentiates through the decoder and the "
            "transformer in one graph, "
            "which keeps the weights of both. Use bfloat16, a smaller batch or jacobian='decoder'; for "
            "vanilla sampling use diffusers' DiTPipeline"
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
        return randn_tensor(
            shape, generator=list(generators), device=self._execution_device, dtype=torch.float32
        )

    @property
    def image_size(self) -> int:
        """The side of its images, in pixels: a latent's, times what the autoencoder makes of it."""
        return self.transformer.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def check_images_of(self, name: str, image_size: int) -> None:
        """Raise ValueError unless its images have the sides of the data set `name`, in pixels."""
        if image_size != self.image_size:
            raise ValueError(
                f"the diffusion model makes images of {self.image_size} px, those of {name} have "
                f"{image_size}: load the data at {self.image_size} px (`ImageData.at`, or a DataSpec's "
                f"image_size), take a model of {image_size} px, or declare how its images are resized "
                "(resize='bilinear')"
            )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], of scaled latents (B, C, h, w).

        Raises FloatingPointError where latents or pixels are not finite.
        """
        _check_finite(latents, "latents", "check the transformer's weights and precision, and what guides")
        parts = [self._decoded(part) for part in latents.split(self.decoded_together)]
        images = parts[0] if len(parts) == 1 else torch.cat(parts)
        _check_finite(
            images, "decoded pixels", f"the autoencoder is in {self.vae.dtype}; take float32 or bfloat16"
        )
        return images

    def _decoded(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.float()

    @property
    def decoded_together(self) -> int:
        """How many images `decode` has in work at once: within `DECODING` bytes, about."""
        # The last block holds about six maps of its width, each of the image's size.
        side, width = self.image_size, self.vae.config.block_out_channels[0]
        return max(1, DECODING // (6 * width * side**2 * self.vae.dtype.itemsize))

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
        fidelity: Fidelity = STANDARD,
        **guided: Any,
    ) -> ImagePipelineOutput | tuple:
        """As `DiTPipeline`, with `sample_igd`'s keywords.

        Those are guidance, checkpoints, gradients, targets, memory, jacobian.

        output_type: "pil", "np", "pt" (floats in [0, 1]) or "latent". callback_on_step_end(pipe, step,
        timestep, info) may return {"latents": ...} to replace them. Returns `ImagePipelineOutput`.
        """
        device = self._execution_device
        config = self.transformer.config
        shape = (len(class_labels), config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

        def callback(index: int, timestep: int, info: dict[str, Any]) -> dict[str, Any] | None:
            assert callback_on_step_end is not None  # not handed on without one
            return callback_on_step_end(self, num_inference_steps - 1 - index, timestep, info)

        latents = sample_igd(
            self.transformer,
            self.vae,
            self.scheduler_for(fidelity),
            latents,
            torch.tensor(class_labels, device=device),
            num_steps=num_inference_steps,
            cfg_scale=guidance_scale,
            generator=generator,
            fidelity=fidelity,
            callback=callback if callback_on_step_end else None,
            **guided,
        )
        _check_finite(latents, "latents", "what the callback returned is not")
        images: Any = latents
        if output_type != "latent":
            images = (self.decode(latents) / 2 + 0.5).clamp(0, 1)
            if output_type != "pt":
                images = images.cpu().permute(0, 2, 3, 1).numpy()
                images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _check_finite(values: Tensor, what: str, hint: str) -> None:
    """Raise FloatingPointError unless all are finite: as uint8 they would be black pixels."""
    if not torch.isfinite(values).all():
        raise FloatingPointError(f"{what} are not finite: {hint}")
