"""The paper's own models: their shapes with random weights, their weights where they are downloaded."""

from __future__ import annotations

import os
import resource

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch.utils.flop_counter import FlopCounterMode

from ci.bench.shapes import convnet6
from igd_lib.config import PAPER, STANDARD, Guidance
from igd_lib.experiment import pieces
from igd_lib.models.shapes import dit_xl_2, sd_vae
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampler import sample_igd
from igd_lib.schedulers import make_scheduler

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30  # GiB


def one_guided_step(transformer, vae, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, dict]:
    """The first of one step, guided by four ConvNet-6 checkpoints; models of `dtype`, float32 latents."""
    transformer, vae = transformer.to(device, dtype), vae.to(device, dtype)
    checkpoints = convnet6(4, device)
    parameters = sum(parameter.numel() for parameter in checkpoints.model.parameters())
    seen = {}
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    found = sample_igd(
        transformer,
        vae,
        make_scheduler(STANDARD, DDIMScheduler().config, learned_variance=True),
        latents,
        torch.tensor([207], device=device),
        targets=torch.tensor([3], device=device),
        guidance=Guidance(5.0, 120.0, (0, 0)),
        checkpoints=checkpoints,
        gradients=torch.randn(4, 1, parameters, device=device),
        memory=[torch.randn(2, 4, 32, 32, device=device)],
        num_steps=1,
        callback=lambda index, timestep, info: seen.update(info),
        generator=torch.Generator().manual_seed(1),
    )
    return found, seen


@pytest.mark.slow
@pytest.mark.skipif(
    MEMORY < 14,
    reason=f"needs 14 GiB of memory for DiT-XL/2's shapes in float32; this machine has {MEMORY:.0f}",
)
def test_one_guided_step_at_the_papers_shapes_on_a_cpu():
    """More than 675 million parameters, within 24 GiB, at the price that its arithmetic asks."""
    # In TFLOP: DiT with CFG 0.48 forward and as much backward, decoder 0.62 and 0.62, four ConvNet-6 of
    # second order 0.25. Parameters: diffusers keeps both embedders in every block.
    torch.manual_seed(0)
    transformer = dit_xl_2()
    assert sum(parameter.numel() for parameter in transformer.parameters()) > 675e6
    with FlopCounterMode(display=False) as counter:
        found, seen = one_guided_step(transformer, sd_vae(), "cpu", torch.float32)
    assert 0.95 < counter.get_total_flops() / 2.45e12 < 1.05
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
    """Run with `-m weights` where DiT-XL/2 and the VAE are: vanilla latents vary as real ones do."""
    folders = [pieces.model_folder(*model) for model in (pieces.DIT, pieces.SD_VAE)]
    if None in folders:
        pytest.skip(
            "DiT-XL/2 or the VAE is not on this machine: hf download "
            + " and ".join(name for name, _ in (pieces.DIT, pieces.SD_VAE))
        )
    pipe = IGDPipeline.from_pretrained(folders[0], vae=AutoencoderKL.from_pretrained(folders[1]))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    latents = pipe(
        [207],
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=10,
        fidelity=PAPER,
        output_type="latent",
    ).images
    assert torch.isfinite(latents).all() and 0.5 < latents.std() < 1.5
