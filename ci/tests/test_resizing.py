"""A diffusion model of another resolution than the data: refused, or resized where that is declared."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import reference
from igd_lib.config import STANDARD, Guidance
from igd_lib.data import images as data
from igd_lib.data.resizing import OutputResize, needed
from igd_lib.distillation import Wanted, distill, image_generator
from igd_lib.guidance import predicted_clean
from igd_lib.guides import Influence, SecondChain, Step
from igd_lib.models.networks import ConvNet
from igd_lib.sampler import Denoiser
from igd_lib.sampling import Sampling
from igd_lib.surrogate import Checkpoints
from igd_lib.tools import keys

GUIDANCE = Guidance(k=5.0, gamma=30.0, guided_range=(1, 4))
SIZE = 8  # the data's; the tiny models make 16 px


def halving() -> Tensor:
    """(8, 16): the antialiased linear filter, a triangle over the four input pixels around each output one.

    In units of input pixels, output pixel i lies at 2 i + 1 and input pixel j at j + 1/2.
    """
    centres, places = 2.0 * torch.arange(8) + 1, torch.arange(16) + 0.5
    weights = (1 - (places[None] - centres[:, None]).abs() / 2).clamp(min=0).double()
    return weights / weights.sum(1, keepdim=True)


def resized(images: Tensor) -> Tensor:
    """(..., 16, 16) to (..., 8, 8)."""
    filter = halving().to(images)
    return filter @ images @ filter.T


@pytest.fixture
def small():
    """Three checkpoints of a ConvNet for 8 px, class gradients (3, 3, P), and the data, 6 images a class."""

    def make(dtype: torch.dtype = torch.float32) -> SimpleNamespace:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            models = [ConvNet(2, 3, SIZE, width=8).to(dtype).eval() for _ in range(3)]
            images = torch.randint(0, 256, (18, 3, SIZE, SIZE), dtype=torch.uint8)
        states = [dict(model.state_dict()) for model in models]
        floats = images.to(dtype).div(127.5).sub(1).split(6)
        gradients = [
            torch.stack([reference.class_gradient(models[0], state, floats[c], c) for c in range(3)])
            for state in states
        ]
        return SimpleNamespace(
            checkpoints=Checkpoints(models[0], states, [0.0, 1.0, 2.0], [0.01, 0.02, 0.03]),
            gradients=torch.stack(gradients),
            data=data.from_tensors(
                "small", "train", ("a", "b", "c"), images, torch.arange(3).repeat_interleave(6)
            ),
        )

    return make


@pytest.fixture
def run(tiny_pipe, small, tmp_path):
    """Factory: distil 2 images of 3 classes at 8 px with the 16 px model."""

    def run(folder="set", pipe=tiny_pipe, **changes):
        toy = small()
        options = dict(
            ipc=2, guidance=GUIDANCE, checkpoints=toy.checkpoints, num_steps=6, label_ids=(4, 0, 9)
        )
        options |= dict(resize="bilinear", out_dir=tmp_path / folder)
        return distill(pipe, toy.data, **(options | changes))

    return run


# --- the resize


def test_it_is_the_antialiased_linear_filter():
    """By a matrix of triangles, and PIL's own of 8-bit images to its rounding."""
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(OutputResize(8)(images), resized(images), rtol=0, atol=1e-12)
    plain = torch.nn.functional.interpolate(images, size=(8, 8), mode="bilinear")
    assert (plain - resized(images)).abs().max() > 0.05  # without antialias it is another filter
    pixels = (images[0] * 255).round()
    picture = Image.fromarray(pixels.byte().permute(1, 2, 0).numpy()).resize(
        (8, 8), Image.Resampling.BILINEAR
    )
    theirs = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).double()
    assert (OutputResize(8)(pixels[None])[0] - theirs).abs().max() <= 1


def test_it_is_there_where_it_is_declared_and_needed():
    assert needed("bilinear", 256, 32) == OutputResize(32, "bilinear")
    assert needed("bicubic", 32, 256) == OutputResize(256, "bicubic")
    assert needed(None, 256, 32) is None and needed("bilinear", 32, 32) is None
    with pytest.raises(ValueError, match="a resize is one of bilinear, bicubic, got 'area'"):
        needed("area", 256, 32)


# --- the influence loss through it


@pytest.mark.parametrize("clamped", [False, True])
def test_the_gradient_through_it_by_finite_differences(tiny, small, clamped):
    """Of a loss written out naively, image by image, through DiT, decoder and the matrix of triangles."""
    models, toy = tiny(dtype=torch.float64), small(torch.float64)
    fidelity, targets, t = replace(STANDARD, clamp_images=clamped), torch.tensor([0, 2]), 300
    generator = torch.Generator().manual_seed(1)
    z, direction = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64, generator=generator)
    alpha_bar = models.ddim.alphas_cumprod[t].double()
    denoiser = Denoiser(models.transformer, torch.tensor([7, 985]), 4.0, 3)
    mean_rate = sum(toy.checkpoints.learning_rates) / 3
    weights = [rate / mean_rate for rate in toy.checkpoints.learning_rates]

    def losses(latents: Tensor) -> Tensor:
        clean = predicted_clean(latents, denoiser(latents, torch.tensor(t)).eps, alpha_bar)
        images = resized(models.vae.decode(clean / models.vae.config.scaling_factor).sample)
        images = images.clamp(-1, 1) if clamped else images
        gradients = toy.gradients[:, targets]
        found = [
            reference.influence(images[b], int(targets[b]), toy.checkpoints, gradients[:, b], weights, 1e-6)
            for b in range(2)
        ]
        return torch.stack(found).detach()

    guide = Influence(
        GUIDANCE,
        toy.checkpoints,
        toy.gradients[:, targets],
        targets,
        models.vae,
        fidelity,
        resize=OutputResize(8),
    )
    leaf = z.clone().requires_grad_()
    noise = denoiser(leaf, torch.tensor(t))
    clean = predicted_clean(leaf, noise.eps, alpha_bar)
    step = Step(3, t, 6, alpha_bar, leaf, noise.eps, noise.eps, None, clean, noise.eps, None)
    loss, gradient = guide._loss_and_gradient(step, [0, 1, 2])
    torch.testing.assert_close(loss, losses(z), rtol=1e-9, atol=1e-12)
    h = 1e-4
    numeric = (losses(z + h * direction) - losses(z - h * direction)) / (2 * h)
    along = (gradient * direction).flatten(1).sum(1)
    assert along.abs().min() > 1e-5
    torch.testing.assert_close(along, numeric, rtol=1e-4, atol=1e-9)


def test_the_released_second_chain_is_resized_too(tiny, small):
    models, toy = tiny(), small()
    guide = Influence(
        GUIDANCE,
        toy.checkpoints,
        toy.gradients[:, [0]],
        torch.tensor([0]),
        models.vae,
        STANDARD,
        second_chain=SecondChain(models.ddpm, image_generator(0, 0, 0)),
        resize=OutputResize(8),
    )
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    step = Step(3, 300, 6, torch.tensor(0.5), z, z, z, None, z, z, None)
    assert guide.images_of(step).shape == (1, 2, 3, 8, 8)


# --- a set


def test_a_guided_set_of_a_16_px_model_for_8_px_data(run, tiny_pipe):
    """What is stored is what the decoder gives, resized by the matrix; the surrogate steers it."""
    found = run()
    for label in range(3):
        decoded = resized(tiny_pipe.decode(found.latents(label)).double())
        expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
        difference = (found.images(label) - expected).abs()
        assert found.images(label).shape == (2, 3, 8, 8) and difference.max() <= 1
        assert (difference > 0).double().mean() < 0.01  # a rounding, now and then
    assert found.verify() == [] and found.data().image_size == 8 == found.manifest["image_size"]
    assert found.manifest["settings"]["output_resize"] == "bilinear"
    others = [run("plain", guidance=None), run("deviation", guidance=replace(GUIDANCE, k=0.0))]
    for other in others:
        assert all(not torch.equal(other.latents(label), found.latents(label)) for label in range(3))


def test_it_resumes_and_is_part_of_the_key(run, tmp_path):
    whole = run()
    found = run("cut")
    found.image_path(1, 1).unlink()
    assert torch.equal(run("cut").data().fetch(torch.arange(6)), whole.data().fetch(torch.arange(6)))
    with pytest.raises(ValueError, match="other settings: output_resize = bilinear, wanted bicubic"):
        run("cut", resize="bicubic")
    other = run("bicubic", resize="bicubic")
    assert torch.equal(
        run("a", guidance=None).latents(0), run("b", guidance=None, resize="bicubic").latents(0)
    )
    assert not torch.equal(other.latents(0), whole.latents(0))  # the surrogate saw other images
    assert other.manifest["key"] != whole.manifest["key"]


def test_without_the_declaration_it_is_refused_before_anything_is_sampled(run, small, tiny_pipe, tmp_path):
    message = r"makes images of 16 px, those of small have 8: .*or declare how its images are resized"
    with pytest.raises(ValueError, match=message):
        run(resize=None)
    with pytest.raises(ValueError, match="a resize is one of bilinear, bicubic, got 'nearest'"):
        run(resize="nearest")
    sampling = Sampling(tiny_pipe, resize=OutputResize(4))
    with pytest.raises(ValueError, match="the declared resize brings images to 4 px, those of small have 8"):
        Wanted(sampling, small().data, 2, 0, [0, 1, 2], [4, 0, 9])
    assert not (tmp_path / "set").exists()


def test_where_sizes_agree_a_declaration_changes_nothing(toy_data, toy, tiny_pipe, tmp_path):
    """Nor the key: sets from before the setting are found."""
    options = dict(ipc=1, guidance=GUIDANCE, checkpoints=toy().checkpoints, num_steps=6, label_ids=(4, 0, 9))
    plain = distill(tiny_pipe, toy_data, out_dir=tmp_path / "plain", **options)
    same = distill(tiny_pipe, toy_data, out_dir=tmp_path / "same", resize="bilinear", **options)
    assert torch.equal(plain.latents(0), same.latents(0)) and plain.manifest["key"] == same.manifest["key"]
    before = {name: value for name, value in plain.manifest["settings"].items() if name != "output_resize"}
    assert keys.key("set", before) == plain.manifest["key"]
