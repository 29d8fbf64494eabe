"""Memory: the dry run against real tensors, what is read of a machine, and runs where it is scarce."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel

from igd_lib import memory
from igd_lib.config import RELEASED
from igd_lib.guides import Shortcuts
from igd_lib.memory import Live, Models, Surrogate
from igd_lib.models.networks import network
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampling import Sampling

TRANSFORMER = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=8,
    num_layers=3,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=10,
)
VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(16, 32),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
    sample_size=16,
)
MODELS, SURROGATE = Models(TRANSFORMER, VAE), Surrogate("convnet1", 10, 2)


@pytest.fixture(scope="module")
def real():
    """Factory: a sampling of one guided step with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = IGDPipeline(
            DiTTransformer2DModel(**TRANSFORMER).eval(), AutoencoderKL(**VAE).eval(), DDPMScheduler()
        )
        net = network("convnet1", num_classes=10, image_size=16)

    def make(**options) -> Sampling:
        guided = dict(guidance=memory.GUIDED, checkpoints=memory._checkpoints(net, 2), num_steps=1)
        return Sampling(pipe, **(guided | options))

    return make


def counted(sampling: Sampling, batch: int, work=memory._step) -> int:
    """The peak on real tensors, in bytes."""
    return memory.peak(sampling.lowered(), batch, work, Live())


# --- the dry run


def test_live_counts_storages_once_and_until_they_are_released():
    with Live() as live:
        one = torch.zeros(1000)
        view, other = one[10:].reshape(9, 110), one + 1
        del one
        assert live.bytes == live.peak == 8000  # the view keeps the first
        del other
        assert live.bytes == 4000 and live.peak == 8000
        big = torch.zeros(3000)
        assert (live.bytes, live.peak) == (16000, 16000) and view.shape == (9, 110)
        del view, big
        assert live.bytes == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bfloat16", "recompute": True},
        {"fidelity": RELEASED, "shortcuts": Shortcuts("decoder")},
        {"guidance": None, "checkpoints": None},
    ],
    ids=["guided", "bfloat16, recompute", "released, decoder Jacobian", "vanilla"],
)
def test_a_dry_run_takes_what_a_real_step_takes(real, options):
    """Of the same sampling's step and decoding, at the batches it was measured at and far beyond."""
    sampling = real(**options)
    step, decoding = memory.of(sampling)
    for batch in (1, 2, 7):
        assert step.peak(batch) == pytest.approx(counted(sampling, batch), rel=0.05)
        assert decoding.peak(batch) == pytest.approx(counted(sampling, batch, memory._decoding), rel=0.05)


def test_configurations_say_what_models_say(real):
    guided = memory.guided_step(MODELS, SURROGATE)
    assert guided == memory.of(real())[0]
    vanilla = memory.of(real(guidance=None, checkpoints=None))
    assert [memory.vanilla_step(MODELS), memory.decoding(MODELS)] == vanilla
    lean = memory.guided_step(MODELS, SURROGATE, recompute=True)
    decoder = memory.guided_step(MODELS, SURROGATE, jacobian="decoder")
    assert vanilla[0].image < decoder.image < guided.image and lean.image < guided.image
    weights = sum(value.numel() for model in real().networks for value in model.parameters())
    low = memory.vanilla_step(MODELS, precision="bfloat16")
    assert 1.9 * weights < vanilla[0].fixed - low.fixed < 2.1 * weights  # two bytes less a weight
