"""The paper's own models: their shapes with random weights everywhere, their weights where they have been downloaded."""

from __future__ import annotations

import os
import resource

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

from igd_lib import experiment
from igd_lib.config import PAPER, RELEASED, Guidance
from igd_lib.models import network
from igd_lib.sampler import IGDPipeline, make_scheduler, sample_igd
from igd_lib.surrogate import Checkpoints

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30  # GiB


def dit_xl_2() -> DiTTransformer2DModel:
    """The configuration of facebook/DiT-XL-2-256."""
    return DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32, patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip


def sd_vae() -> AutoencoderKL:
    """The configuration of stabilityai/sd-vae-ft-mse."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512),
        layers_per_block=2, latent_channels=4, norm_num_groups=32, sample_size=256, scaling_factor=0.18215,
    ).eval()  # fmt: skip


def one_guided_step(transformer, vae, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, dict]:
    """The first of one step, guided by one ConvNet-6 checkpoint; bfloat16 models, float32 latents."""
    transformer, vae = transformer.to(device, dtype), vae.to(device, dtype)
    surrogate = network("convnet6", num_classes=10, image_size=256).to(device).eval()
    checkpoints = Checkpoints(surrogate, [surrogate.state_dict()], [0.0], [0.01])
    parameters = sum(parameter.numel() for parameter in surrogate.parameters())
    seen = {}
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    found = sample_igd(
        transformer, vae, make_scheduler(RELEASED, DDIMScheduler().config, learned_variance=True), latents, torch.tensor([207], device=device),
        targets=torch.tensor([3], device=device), guidance=Guidance(5.0, 120.0, (0, 0)), checkpoints=checkpoints,
        gradients=torch.randn(1, 1, parameters, device=device), memory=[torch.randn(2, 4, 32, 32, device=device)], num_steps=1,
        callback=lambda index, timestep, info: seen.update(info), generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    return found, seen


@pytest.mark.skipif(MEMORY < 14, reason=f"needs 14 GiB of memory for DiT-XL/2's shapes in float32; this machine has {MEMORY:.0f}")
def test_one_guided_step_at_the_papers_shapes_on_a_cpu():
    """675 million parameters and more (diffusers keeps both embedders in every block), within 24 GiB."""
    torch.manual_seed(0)
    transformer = dit_xl_2()
    assert sum(parameter.numel() for parameter in transformer.parameters()) > 675e6
    found, seen = one_guided_step(transformer, sd_vae(), "cpu", torch.float32)
    assert found.shape == (1, 4, 32, 32) and torch.isfinite(found).all()
    assert seen["influence_shift"].abs().max() > 0 and seen["deviation_loss"].abs() > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 < 24


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "TF32"])
def test_one_guided_step_at_the_papers_shapes_on_a_gpu(dtype):
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    found, seen = one_guided_step(dit_xl_2(), sd_vae(), "cuda", dtype)
    assert torch.isfinite(found).all() and seen["influence_shift"].abs().max() > 0


@pytest.mark.weights
def test_the_papers_weights_sample_a_recognisable_latent():
    """Run with `-m weights` where DiT-XL/2 and the VAE are: vanilla latents have the variance of real ones."""
    folders = [experiment._model_folder(*model) for model in (experiment.DIT, experiment.SD_VAE)]
    if None in folders:
        pytest.skip("DiT-XL/2 or the VAE is not on this machine: hf download " + " and ".join(name for name, _ in (experiment.DIT, experiment.SD_VAE)))
    pipe = IGDPipeline.from_pretrained(folders[0], vae=AutoencoderKL.from_pretrained(folders[1]))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    latents = pipe([207], generator=torch.Generator().manual_seed(0), num_inference_steps=10, fidelity=PAPER, output_type="latent").images
    assert torch.isfinite(latents).all() and 0.5 < latents.std() < 1.5
