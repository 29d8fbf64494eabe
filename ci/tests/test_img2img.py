"""Sampling from latents that are there already, on a DiT and on Stable Diffusion."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import PNDMScheduler, UniPCMultistepScheduler
from PIL import Image

from ci import fakes
from igd_lib.baselines.d4m import D4M
from igd_lib.baselines.img2img import (
    SD_15,
    DiT,
    StableDiffusion,
    encode,
    rendered,
    stable_diffusion,
    stretched,
)
from igd_lib.baselines.tdsdm import TDSDM
from igd_lib.config import Fidelity
from igd_lib.data.images import ImageData, from_tensors, to_uint8
from igd_lib.distillation import image_generator
from igd_lib.sampler import Denoiser, Start, sample, steps_taken
from igd_lib.schedulers import make_scheduler

HOW = replace(D4M.small(), num_steps=6, strength=0.5)


def noise(count=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, 8, 8, generator=generator, dtype=dtype)


def centres(count=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return 0.5 * torch.randn(count, 4, 8, 8, generator=generator, dtype=dtype)


def denoiser(models, count=2):
    return Denoiser(models.transformer, torch.arange(count), 4.0, None)


# --- where sampling begins


@pytest.mark.parametrize(
    "num_steps, strength, taken",
    [(50, 0.7, 35), (30, 0.75, 22), (50, 1.0, 50), (50, 0.0, 0), (3, 0.3, 0), (4, 0.25, 1)],
)
def test_strength_is_the_share_of_the_steps_that_are_taken(tiny, num_steps, strength, taken):
    """The last ones, each with its own timestep and index."""
    models, seen = tiny(num_classes=10), []
    assert steps_taken(num_steps, strength) == taken
    models.ddim.set_timesteps(num_steps)
    expected = models.ddim.timesteps.tolist()[num_steps - taken :]
    sample(
        denoiser(models),
        models.ddim,
        noise(),
        start=Start(centres(), strength),
        num_steps=num_steps,
        callback=lambda index, timestep, info: seen.append((index, timestep)),
    )
    assert seen == list(zip(range(taken - 1, -1, -1), expected, strict=True))


def test_strength_0_keeps_the_latents_and_1_is_plain_sampling(tiny):
    models = tiny(num_classes=10)
    kept = sample(denoiser(models), models.ddim, noise(), start=Start(centres(), 0.0), num_steps=6)
    assert torch.equal(kept, centres())
    plain = sample(denoiser(models), models.ddim, noise(), num_steps=6)
    far = Start(100 * centres(), 1.0)
    assert torch.equal(sample(denoiser(models), models.ddim, noise(), start=far, num_steps=6), plain)
    near = sample(denoiser(models), models.ddim, noise(), start=Start(centres(), 0.9), num_steps=6)
    assert (near - plain).abs().max() > 0.1


@torch.no_grad()
def test_it_is_ddim_from_the_noised_latents(tiny):
    """A straight line in float64: four of ten steps."""
    models = tiny(num_classes=10, dtype=torch.float64)
    z, clean = noise(dtype=torch.float64), centres(dtype=torch.float64)
    found = sample(denoiser(models), models.ddim, z, start=Start(clean, 0.4), num_steps=10)
    betas = torch.linspace(1e-4, 0.005, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)
    expected = alpha_bar[300].sqrt() * clean + (1 - alpha_bar[300]).sqrt() * z
    for t in (300, 200, 100, 0):
        classes = torch.tensor([0, 1, 10, 10])
        eps = models.transformer(
            expected.repeat(2, 1, 1, 1), timestep=torch.tensor([t] * 4), class_labels=classes
        )
        with_label, without = eps.sample.chunk(2)
        mixed = without + 4 * (with_label - without)
        clear = (expected - (1 - alpha_bar[t]).sqrt() * mixed) / alpha_bar[t].sqrt()
        # diffusers keeps the first alpha_bar for the end of the last step (1 with set_alpha_to_one).
        following = alpha_bar[t - 100] if t else torch.ones(())
        expected = following.sqrt() * clear + (1 - following).sqrt() * mixed
    assert (found - expected).abs().max() < 1e-4 < (found - clean).abs().max()  # alphas are in float32


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmsolver++", "unipc"])
@torch.no_grad()
def test_every_solver_begins_there(tiny, solver):
    """As diffusers' own schedulers do that are told where to begin."""
    models = tiny(num_classes=10)
    scheduler = make_scheduler(Fidelity(solver=solver), models.ddim.config)
    generators = [image_generator(0, 0, index) for index in range(2)]
    own = dict(generator=generators) if solver == "ddpm" else {}
    found = sample(denoiser(models), scheduler, noise(), start=Start(centres(), 0.5), num_steps=8, **own)
    theirs = make_scheduler(Fidelity(solver=solver), models.ddim.config)
    theirs.set_timesteps(8)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(4)
    z = theirs.add_noise(centres(), noise(), theirs.timesteps[4:5])
    options = dict(generator=[image_generator(0, 0, index) for index in range(2)]) if own else {}
    for t in theirs.timesteps[4:]:
        z = theirs.step(denoiser(models)(z, t).eps, t, z, **options).prev_sample
    assert torch.allclose(found, z, atol=1e-5) and (found - centres()).abs().max() > 0.1


def test_what_does_not_fit_is_refused(tiny):
    models = tiny(num_classes=10)
    with pytest.raises(ValueError, match=r"have the noise's shape, \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"):
        sample(denoiser(models), models.ddim, noise(), start=Start(centres(1), 0.5))
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(
            ValueError, match=r"strength is the share of the steps that are taken, 0 \.\.\. 1"
        ):
            Start(centres(), strength)
        with pytest.raises(ValueError, match="strength is the share"):
            replace(HOW, strength=strength)
    with pytest.raises(ValueError, match="solver is one of .*'unipc'.* got 'pndm'"):
        replace(HOW, solver="pndm")
    with pytest.raises(ValueError, match="posterior is one of"):
        replace(HOW, posterior="mode")
    with pytest.raises(ValueError, match="num_steps and size are at least 1, got 0 and None"):
        replace(HOW, num_steps=0)
    for prompt in ("photo", "{} and {}", "{name}"):
        with pytest.raises(ValueError, match="a prompt has one {} for the class's name"):
            replace(HOW, prompt=prompt)


# --- on a DiT


def test_a_dit_s_images_have_the_noise_of_sampled_sets(tiny_pipe):
    """At strength 1 they are those of the pipeline, with its class ids, guidance and decoder."""
    ids = (7, 3)
    how, backbone = replace(HOW, strength=1.0), DiT(tiny_pipe, ids)
    found = rendered(backbone, centres(3), 1, how, seed=5, size=16)
    expected = tiny_pipe(
        [3] * 3,
        generator=[image_generator(5, 3, index) for index in range(3)],
        num_inference_steps=6,
        guidance_scale=4.0,
        fidelity=Fidelity(solver="ddim"),
        output_type="pt",
    ).images
    assert torch.equal(found, to_uint8(2 * expected - 1)) and found.float().std() > 5


def test_images_do_not_depend_on_their_number_or_neighbours(tiny_pipe, monkeypatch):
    backbone = DiT(tiny_pipe, (7, 3))
    whole = rendered(backbone, centres(5), 0, HOW, seed=0, size=16).int()
    assert (whole[:2] - rendered(backbone, centres(5)[:2], 0, HOW, seed=0, size=16).int()).abs().max() <= 1
    monkeypatch.setattr(DiT, "together", 2)
    assert (whole - rendered(backbone, centres(5), 0, HOW, seed=0, size=16).int()).abs().max() <= 1
    assert (whole[0] - whole[1]).abs().max() > 10


def test_another_size_is_a_resize_of_what_was_decoded(tiny_pipe):
    backbone = DiT(tiny_pipe, (7, 3))
    large, small = (rendered(backbone, centres(), 0, HOW, seed=0, size=size) for size in (16, 8))
    assert small.shape == (2, 3, 8, 8)
    pooled = torch.nn.functional.avg_pool2d(large.float(), 2)
    assert (small.float() - pooled).abs().mean() < 10 < pooled.std()


def test_latents_are_scaled_and_of_the_stated_kind(tiny_pipe, toy_data):
    images = toy_data.fetch(torch.arange(5))
    backbone = DiT(tiny_pipe, (0, 1, 2))
    with torch.no_grad():
        posterior = tiny_pipe.vae.encode(images / 127.5 - 1).latent_dist
    mean = encode(backbone, images, replace(HOW, posterior="mean"), torch.Generator())
    assert torch.allclose(mean, 0.7 * posterior.mean, atol=1e-6) and not mean.requires_grad
    drawn = encode(backbone, images, replace(HOW, posterior="sample"), torch.Generator().manual_seed(3))
    expected = 0.7 * posterior.sample(torch.Generator().manual_seed(3))
    assert torch.allclose(drawn, expected, atol=1e-6) and (drawn - mean).abs().max() > 0.1


def test_ids_are_those_of_the_data_s_classes(tiny_pipe, toy_data):
    assert DiT.of(tiny_pipe, toy_data, [4, 2, 0]).ids == (4, 2, 0)
    with pytest.raises(ValueError, match="which of its classes are they"):
        DiT.of(tiny_pipe, toy_data)


def test_what_is_said_of_a_model_changes_with_it(tiny, tiny_pipe, toy_data):
    backbone = DiT.of(tiny_pipe, toy_data, [4, 2, 0])
    one = backbone.about
    assert json.loads(json.dumps(one)) == one
    with torch.no_grad():
        tiny_pipe.transformer.proj_out_2.bias += 1
    fresh = DiT.of(tiny_pipe, toy_data, [4, 2, 0]).about
    assert {name for name in one if one[name] != fresh[name]} == {"transformer"}
    assert DiT.of(tiny_pipe, toy_data, [4, 2, 1]).about != fresh


@pytest.mark.parametrize("kind, solver", [(D4M, "pndm"), (TDSDM, "unipc")])
def test_on_a_dit_as_much_is_left_of_the_latents_as_the_authors_leave(kind, solver):
    """alpha_bar where sampling begins; their strength itself would leave an eighth of it."""
    schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    plms = PNDMScheduler(skip_prk_steps=True, **schedule)
    theirs = plms if solver == "pndm" else UniPCMultistepScheduler.from_config(plms.config)
    left = {}
    for name, how, scheduler in (
        ("theirs", kind(), theirs),
        ("ours", kind.dit("imagenet", 10), make_scheduler(Fidelity(solver=kind.dit("", 1).solver), {})),
        ("same", replace(kind.dit("imagenet", 10), strength=kind().strength), None),
    ):
        own = scheduler or make_scheduler(Fidelity(solver=how.solver), {})
        own.set_timesteps(how.num_steps)
        first = own.timesteps[how.num_steps - steps_taken(how.num_steps, how.strength)]
        left[name] = own.alphas_cumprod[int(first)].item()
    assert 0.8 < left["ours"] / left["theirs"] < 1.25 and left["same"] < left["theirs"] / 7, left


# --- on Stable Diffusion


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """Factory: a random Stable Diffusion of a few channels, images of 16 px, with SD-1.5's scheduler."""
    folder = tmp_path_factory.mktemp("words")
    return lambda vae: fakes.stable_diffusion(vae, latent_px=8, words=folder)


@pytest.fixture
def sd(tiny_sd, tiny) -> StableDiffusion:
    return StableDiffusion(tiny_sd(tiny().vae), ("tench, tinca", "dog", "church"))


SD_HOW = replace(D4M(), num_steps=6, strength=0.5)


@torch.no_grad()
@pytest.mark.parametrize("solver", ["unipc", "configured"])
def test_stable_diffusion_is_told_the_prompts_and_begins_at_the_latents(sd, solver):
    """A straight line: latents noised as they are given, guidance 8 away from the negative prompt."""
    how, pipe = replace(SD_HOW, solver=solver, prompt="photo {}"), sd.pipe
    found = sd.denoise(centres(), 0, how, [image_generator(3, 0, index) for index in range(2)])
    scheduler = pipe.scheduler
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(6)
    timesteps = scheduler.timesteps[3:]
    drawn = torch.stack([torch.randn(4, 8, 8, generator=image_generator(3, 0, index)) for index in range(2)])
    z = scheduler.add_noise(centres(), drawn, timesteps[:1])

    def embedded(text):
        ids = pipe.tokenizer(
            [text], padding="max_length", max_length=30, truncation=True, return_tensors="pt"
        )
        return pipe.text_encoder(ids.input_ids)[0].expand(2, -1, -1)

    wanted, unwanted = embedded("photo tench, tinca"), embedded("cartoon, anime, painting")
    for t in timesteps:
        given, away = (pipe.unet(z, t, encoder_hidden_states=text).sample for text in (wanted, unwanted))
        z = scheduler.step(away + 8 * (given - away), t, z).prev_sample
    expected = pipe.vae.decode(z / 0.7).sample
    assert torch.allclose(found, expected, atol=1e-4) and expected.std() > 0.05
    other = sd.denoise(centres(), 1, how, [image_generator(3, 0, index) for index in range(2)])
    assert (other - found).abs().max() > 1e-3


@torch.no_grad()
def test_stable_diffusion_at_strength_0_decodes_what_it_is_given(sd):
    """So latents are scaled ones, and not scaled again."""
    found = sd.denoise(centres(), 0, replace(SD_HOW, strength=0.0), [torch.Generator()] * 2)
    assert torch.equal(found, sd.vae.decode(centres() / 0.7).sample)


def test_a_pipeline_with_a_safety_checker_is_refused(sd):
    checked = SimpleNamespace(safety_checker=object())
    with pytest.raises(ValueError, match="black images into the set: load the pipeline with `stable_diff"):
        StableDiffusion(checked, ("a",))


@pytest.mark.parametrize("value", [-1.5, float("nan")])
def test_black_images_and_such_as_would_be_are_refused(sd, monkeypatch, value):
    one = torch.rand(2, 3, 16, 16)
    one[1] = value
    monkeypatch.setattr(sd.pipe.vae, "decode", lambda latents: SimpleNamespace(sample=one))
    with pytest.raises(FloatingPointError, match="of 'dog' are black or not finite: its models are in torch"):
        sd.denoise(centres(), 1, replace(SD_HOW, strength=0.0), [torch.Generator()] * 2)
    one[1] = -1.0
    one[1, 0, 0, 0] = 0.0  # dark, not black
    sd.denoise(centres(), 1, replace(SD_HOW, strength=0.0), [torch.Generator()] * 2)


def test_stable_diffusion_is_loaded_from_safetensors_without_its_checker(sd, tmp_path, monkeypatch):
    from diffusers import StableDiffusionImg2ImgPipeline

    sd.pipe.save_pretrained(tmp_path / "sd")
    index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # as the real one has
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps(index))
    pipe = stable_diffusion(tmp_path / "sd")
    assert pipe.safety_checker is None and torch.equal(pipe.unet.conv_in.weight, sd.pipe.unet.conv_in.weight)
    weights = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(sd.pipe.unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"hf download {SD_15[0]} --revision {SD_15[1]}, or give a fold"
    ):
        stable_diffusion(tmp_path / "sd")
    with pytest.raises(FileNotFoundError, match=r"no Stable Diffusion in .*nowhere"):
        stable_diffusion(tmp_path / "nowhere")
    asked = {}

    def hub(name, **options):
        asked.update(options, name=name)
        raise OSError("offline")

    monkeypatch.setattr(StableDiffusionImg2ImgPipeline, "from_pretrained", hub)
    with pytest.raises(FileNotFoundError, match=r"\(offline\): hf download"):
        stable_diffusion()
    assert (asked["name"], asked["revision"]) == SD_15 and len(SD_15[1]) == 40
    assert asked["use_safetensors"] is True and asked["safety_checker"] is None


def test_images_of_any_shape_are_stretched(tmp_path):
    """Nothing is cut off: the left quarter, white, stays a quarter."""
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 10, 20))
    data = ImageData("wide", "train", ("a",), torch.zeros(1).long(), 20, None, lambda index: image)
    found = stretched(data, 16)
    pixels = found.fetch(torch.tensor([0]))
    assert found.image_size == 16 and pixels.shape == (1, 3, 16, 16)
    assert pixels[..., :3].min() == 255 and pixels[..., 5:].max() == 0
    square = from_tensors("s", "train", ("a",), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1))
    assert stretched(square, 16) is square


def test_what_is_said_of_stable_diffusion(sd):
    one = sd.about
    assert json.loads(json.dumps(one)) == one and one["precision"] == "float32"
    assert one["names"] == ["tench, tinca", "dog", "church"] and one["scheduler"][0] == "PNDMScheduler"
    with torch.no_grad():
        sd.pipe.unet.conv_in.bias += 1
    fresh = replace(sd, names=("a", "b", "c")).about
    assert {name for name in one if one[name] != fresh[name]} == {"names", "unet"}
