"""Memory: the dry run against real tensors, what a machine has, decoding in slices, precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, DiTTransformer2DModel

from igd_lib import memory
from igd_lib.config import RELEASED
from igd_lib.guides import GuideFactory, Shortcuts
from igd_lib.memory import Footprint, Live, Models, Surrogate
from igd_lib.models.networks import network
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampling import Sampling

TRANSFORMER = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=8,
    num_layers=2,
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
TINY = dict(
    decoder_block_out_channels=(8, 8),
    num_decoder_blocks=(1, 1),
    encoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 1),
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


def counted(sampling: Sampling, batch: int, work=memory.one_step) -> int:
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
        {"precision": "bfloat16", "recompute": True, "guidance_decoder": AutoencoderTiny(**TINY).eval()},
        {"fidelity": RELEASED, "shortcuts": Shortcuts("decoder")},
        {"guidance": None, "checkpoints": None},
    ],
    ids=["guided", "bfloat16, recompute, small decoder", "released, decoder Jacobian", "vanilla"],
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
    assert vanilla[0].image < guided.image
    weights = sum(value.numel() for model in real().networks for value in model.parameters())
    low = memory.vanilla_step(MODELS, precision="bfloat16")
    assert 1.9 * weights < vanilla[0].fixed - low.fixed < 2.1 * weights  # two bytes less a weight


def test_a_footprint_grows_with_the_batch():
    plain, sliced = Footprint(100, 10), Footprint(100, 10, together=4)
    assert (plain.peak(7), sliced.peak(7), sliced.peak(2)) == (170, 140, 120)
    assert [plain.batch(free) for free in (99, 100, 109, 110, 155)] == [0, 0, 0, 1, 5]
    assert [sliced.batch(free) for free in (99, 130, 140)] == [0, 3, memory.ANY]


def test_other_guides_count_as_one_through_all_models(real):
    none = dict(guidance=None, checkpoints=None)
    sampling = real(others=[GuideFactory(lambda *_: None, {})], **none)
    (other,) = memory._footprints(lambda: memory._copied(sampling), memory.one_step)
    assert other.image > 3 * memory.of(real(**none))[0].image


# --- what a machine has

GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """Factory: a Linux machine's files, 8 GiB of its RAM available, with the limits of control groups."""

    def make(**groups: tuple[str, int]):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:  {8 * GIB // 1024} kB\n")
        path = "/".join(groups)
        (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/elsewhere\n0::/{path}\n")
        folder = tmp_path / "sys/fs/cgroup"
        for name, (limit, used) in groups.items():
            folder = folder / name
            folder.mkdir(parents=True)
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.current").write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\nfile 2\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("groups", "left"),
    [
        ({}, 8),
        ({"job": ("max", 5 * GIB)}, 8),
        ({"job": (6 * GIB, 5 * GIB)}, 2),  # its cached files can go
        ({"user": (4 * GIB, 3 * GIB), "job": ("max", GIB)}, 2),  # the group above it has the limit
        ({"user": (99 * GIB, 3 * GIB)}, 8),
    ],
    ids=str,
)
def test_free_ram_is_what_the_system_and_its_groups_leave(machine, groups, left):
    assert memory._free_ram(machine(**groups)) == left * GIB


def test_a_system_that_says_nothing_of_its_ram_is_half_trusted(tmp_path):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory._free_ram(tmp_path) == total // 2
    assert 0 < memory.free("cpu") <= total


@pytest.mark.parametrize(("share", "left"), [(1.0, 13), (0.3, 14)])
def test_free_memory_of_a_gpu_counts_what_torch_holds_for_reuse(monkeypatch, share, left):
    """10 GiB free of 80, 5 held of which 2 are used; or 24 of 80 allowed to this process, another one's 8."""
    free, held, used = (10, 5, 2) if share == 1.0 else (48, 20, 10)
    says = {
        "mem_get_info": (free * GIB, 80 * GIB),
        "memory_allocated": used * GIB,
        "memory_reserved": held * GIB,
        "get_per_process_memory_fraction": share,
    }
    for name, value in says.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert memory.free("cuda:1") == left * GIB


def test_what_fits_is_within_the_free_memory_beside_the_models(real, monkeypatch):
    sampling = real()
    step, decoding = memory.of(sampling)
    assert memory.weights(sampling) == pytest.approx(step.fixed, rel=0.02)
    for images in (0, 1, 6):
        beside = step.peak(images) - memory.weights(sampling) + step.image // 2
        monkeypatch.setattr(memory, "free", lambda _, beside=beside: beside / memory.HEADROOM)
        assert memory.fitting(sampling) == images
    monkeypatch.setattr(memory, "free", lambda _: 100 * GIB)
    assert 100 < memory.fitting(sampling) < memory.ANY  # decoding in slices is no limit
    monkeypatch.setattr(memory, "of", lambda _: [step, decoding, Footprint(step.fixed, step.image * 50)])
    assert memory.fitting(sampling) < 1000 and decoding.together is not None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("can't allocate memory"), False),
    ],
    ids=repr,
)
def test_memory_that_ran_out_is_told_from_other_errors(error, expected):
    assert memory.ran_out(error) is expected


def test_the_cpu_s_own_error_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.ran_out(caught.value)


@pytest.mark.slow
def test_the_paper_s_shapes_take_what_is_predicted():
    """DiT-XL/2, SD's autoencoder and four ConvNet-6: on their tensors, and as the process grows."""
    command = [sys.executable, "-m", "ci.bench.footprint", "1"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["counted"] == pytest.approx(found["predicted"], rel=0.05)
    assert found["grown"] == pytest.approx(found["predicted"], rel=0.15)


# --- decoding in slices

SD_VAE = VAE | dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    norm_num_groups=32,
)


def test_large_images_are_decoded_in_slices_and_small_ones_at_once(real, monkeypatch):
    pipe = real().pipe
    latents, asked = torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z: asked.append(len(z)) or decode(z))
    whole = pipe.decode(latents)
    assert asked == [7] and torch.equal(whole, decode(latents / pipe.vae.config.scaling_factor).sample)
    image = 6 * 16 * 16**2 * 4
    assert pipe.decoded_together == 2**31 // image
    monkeypatch.setattr("igd_lib.pipeline.DECODING", 3 * image)
    torch.testing.assert_close(pipe.decode(latents), whole, rtol=1e-4, atol=1e-5)
    assert asked[1:] == [3, 3, 1]
    monkeypatch.setattr("igd_lib.pipeline.DECODING", 1)
    assert pipe.decoded_together == 1


def test_a_slice_s_size_is_what_decoding_takes():
    """SD's autoencoder at 256 px: the rule of `decoded_together` against the dry run."""
    footprint = memory.decoding(Models(TRANSFORMER | {"sample_size": 32}, SD_VAE))
    assert footprint.image == pytest.approx(2**31 / footprint.together, rel=0.12)
    assert footprint.peak(100) - footprint.fixed <= 1.1 * 2**31


# --- precision and recomputing


@pytest.fixture
def step(real):
    """Factory: latents after one guided step, and the sampling they are of."""

    def take(**options):
        sampling = real(guidance=replace(memory.GUIDED, k=300.0), **options).lowered()
        with sampling.arithmetic():
            return memory.one_step(sampling, 2), sampling

    return take


@pytest.mark.parametrize(
    "fidelity", [RELEASED, replace(RELEASED, backward="once", second_chain=False)], ids=str
)
def test_recomputed_activations_give_the_same_bits(step, fidelity):
    """With a backward pass a checkpoint too, and the models are left as they were."""
    kept, _ = step(fidelity=fidelity)
    again, sampling = step(fidelity=fidelity, recompute=True)
    assert torch.equal(kept, again)
    assert not any(model.is_gradient_checkpointing for model in sampling.networks)
    with sampling.arithmetic(), sampling.arithmetic():
        assert all(model.is_gradient_checkpointing for model in sampling.networks)
    assert not any(model.is_gradient_checkpointing for model in sampling.networks)


def test_bfloat16_is_of_the_networks_alone_and_the_given_ones_stay(step, real):
    single, given = step()
    low, sampling = step(precision="bfloat16")
    assert {model.dtype for model in sampling.networks} == {torch.bfloat16}
    assert {model.dtype for model in given.networks} == {torch.float32}
    assert sampling.lowered().pipe.transformer is sampling.pipe.transformer  # no second copy
    assert low.dtype == torch.float32
    state = sampling.checkpoints.states[0]
    assert all(value.dtype == torch.float32 for value in state.values())
    cosine = torch.cosine_similarity(low.flatten(1), single.flatten(1))
    assert (cosine > 0.99).all() and not torch.equal(low, single)


def test_an_unknown_precision_is_refused(real):
    with pytest.raises(
        ValueError, match=r"precision is one of \('float32', 'tf32', 'bfloat16'\), got 'fp16'"
    ):
        real(precision="fp16")


@pytest.mark.parametrize(("precision", "where"), [("float32", "convolutions"), ("tf32", "all")])
def test_tf32_is_asked_for_by_precision_alone(real, monkeypatch, precision, where):
    asked = []

    def tf32(device: str, where: str):
        asked.append((device, where))
        return nullcontext()

    monkeypatch.setattr("igd_lib.sampling.machine.tf32", tf32)
    with real(precision=precision).arithmetic():
        assert asked == [("cpu", where)]
