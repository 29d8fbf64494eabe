"""The paper's models with random weights: for counting and timing, which do not depend on the weights."""

from __future__ import annotations

from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel


def dit_xl_2(layers: int = 28) -> DiTTransformer2DModel:
    """The configuration of facebook/DiT-XL-2-256, or that of its first layers."""
    return DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()


def sd_vae() -> AutoencoderKL:
    """The configuration of stabilityai/sd-vae-ft-mse."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=256,
        scaling_factor=0.18215,
    ).eval()


def sd_15_unet() -> UNet2DConditionModel:
    """The configuration of Stable Diffusion 1.5's network."""
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    ).eval()
