"""The paper's models with random weights: for counting and timing, which do not depend on the weights."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DDPMScheduler, DiTTransformer2DModel

from igd_lib.models.networks import network
from igd_lib.models.shapes import dit_xl_2, sd_vae
from igd_lib.surrogate import Checkpoints


def convnet6(count: int, device: str = "cpu") -> Checkpoints:
    """`count` checkpoints of a ConvNet-6 for ten classes at 256 px."""
    models = [network("convnet6", num_classes=10, image_size=256).to(device).eval() for _ in range(count)]
    return Checkpoints(
        models[0],
        [model.state_dict() for model in models],
        [float(index) for index in range(count)],
        [0.01] * count,
    )


def paper(device: str = "cpu", dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """DiT-XL/2, the SD VAE, TAESD's configuration as a guidance decoder, four checkpoints of ConvNet-6."""
    torch.manual_seed(0)
    models = [model.to(device, dtype) for model in (dit_xl_2(), sd_vae(), AutoencoderTiny().eval())]
    return SimpleNamespace(
        transformer=models[0],
        vae=models[1],
        tiny=models[2],
        config=DDIMScheduler().config,
        checkpoints=convnet6(4, device),
    )


def tiny_models(num_classes: int) -> tuple[DiTTransformer2DModel, AutoencoderKL, DDPMScheduler]:
    """A two-layer DiT, an autoencoder (16 px, latents 4 x 8 x 8) and a scheduler: models that cost next to
    nothing.
    """
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=num_classes,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return transformer.eval(), vae.eval(), DDPMScheduler(timestep_spacing="linspace", clip_sample=False)
