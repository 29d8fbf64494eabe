"""The shipped stand-in is good enough to show something, and its build can be run and resumed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from igd_lib.data.images import to_float
from igd_lib.models import standin
from igd_lib.models.standin import StandIn, build, new_transformer
from igd_lib.pipeline import IGDPipeline

SHORT = StandIn(
    "fashion-mnist",
    vae_channels=(8, 8),
    vae_steps=2,
    vae_batch=8,
    layers=2,
    heads=2,
    head_dim=8,
    dit_steps=2,
    dit_batch=8,
    decoder_channels=(4, 4),
    decoder_steps=2,
)

# --- the shipped one


@pytest.fixture(scope="module")
def real(fashion_train):
    """50 real images a class."""
    return to_float(fashion_train.per_class(50, seed=0).fetch(torch.arange(500)))


@pytest.fixture(scope="module")
def latents(standin_pipe, real):
    with torch.no_grad():
        return standin_pipe.vae.encode(real).latent_dist.mean * standin_pipe.vae.config.scaling_factor


def test_latents_are_nearly_centred_with_unit_variance(latents):
    """A large common mean would blunt the cosine of the deviation guidance."""
    share = latents.mean(0).norm() / latents.flatten(1).norm(dim=1).mean()
    assert share < 0.3
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_the_autoencoder_reconstructs_real_images(standin_pipe, real, latents):
    restored = standin_pipe.decode(latents)
    assert (restored - real).square().mean() < 0.02
    # Much better than each image's own mean.
    assert (restored - real).square().mean() < 0.2 * real.var()


def test_the_guidance_decoder_stands_in_for_the_vaes(standin_pipe, latents):
    """A ninth of the parameters, nearly the same images, and a gradient of them that points the same way."""
    tiny = standin.tiny_decoder("fashion-mnist")
    own = sum(parameter.numel() for parameter in tiny.decoder.parameters())
    assert own < sum(parameter.numel() for parameter in standin_pipe.vae.decoder.parameters()) / 9
    weight = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def decoded(decoder):
        z = latents[::25].clone().requires_grad_()
        images = decoder.decode(z / decoder.config.scaling_factor).sample
        return images.detach(), torch.autograd.grad((images * weight).sum(), z)[0].flatten(1)

    (small, one), (whole, two) = decoded(tiny), decoded(standin_pipe.vae)
    assert (small - whole).square().mean() < 0.05 * whole.var()
    assert torch.cosine_similarity(one, two).mean() > 0.6


def test_the_transformer_knows_the_classes(standin_pipe, real, latents):
    """At a middle timestep the true class predicts the noise better than the next class does."""
    labels = torch.arange(10).repeat_interleave(50)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((500,), 700)
    noisy = standin_pipe.scheduler.add_noise(latents, noise, timesteps)

    def error(classes):
        with torch.no_grad():
            output = standin_pipe.transformer(noisy, timestep=timesteps, class_labels=classes).sample
        return (output - noise).square().mean().item()

    null = torch.full((500,), 10)
    assert error(labels) < 0.97 * error(null) and error(null) < 0.97 * error((labels + 1) % 10)


def test_the_shipped_stand_in_is_ready_to_use(standin_pipe):
    assert standin_pipe.transformer.config.num_embeds_ada_norm == 10
    assert standin_pipe.transformer.config.sample_size == 8 and standin_pipe.vae.config.sample_size == 32
    assert (
        standin_pipe.transformer.dtype == standin_pipe.vae.dtype == torch.float32
    )  # stored in half precision
    assert not standin_pipe.transformer.training and not standin_pipe.vae.training
    images = standin_pipe(
        [9], num_inference_steps=5, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    assert images.shape == (1, 32, 32, 3)


def test_the_assets_stay_below_20_mb_each_and_40_in_all():
    sizes = {}
    for name in standin.STANDINS:
        walked = os.walk(standin.ASSETS / name, followlinks=True)
        files = [Path(folder, file) for folder, _, names in walked for file in names]
        sizes[name] = sum(path.stat().st_size for path in files)
    assert all(0 < size < 20e6 for size in sizes.values()) and sum(sizes.values()) < 40e6
    files = [path for path in standin.ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == sum(sizes.values())  # no others
    assert not [
        path.name for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")
    ]  # nothing is unpickled


def test_unknown_stand_ins_are_named():
    with pytest.raises(FileNotFoundError, match=r"no stand-in 'cifar-9'.*igd standin"):
        standin.path("cifar-9")
    with pytest.raises(KeyError):
        build("cifar-9", "nowhere")


# --- building one


@pytest.fixture
def few_images(monkeypatch, fashion_train):
    monkeypatch.setattr(standin, "load", lambda *_: fashion_train.per_class(3, seed=0))


def weights(folder):
    return {
        part: load_file(folder / part / "diffusion_pytorch_model.safetensors")
        for part in ("vae", "transformer")
    }


def test_a_built_stand_in_loads_as_a_pipeline(few_images, tmp_path):
    assert build("fashion-mnist", tmp_path / "toy", recipe=SHORT) == tmp_path / "toy"
    pipe = IGDPipeline.from_pretrained(tmp_path / "toy")
    pipe.set_progress_bar_config(disable=True)
    images = pipe([0, 9], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3) and np.isfinite(images).all()
    assert all(
        tensor.dtype == torch.float16
        for part in weights(tmp_path / "toy").values()
        for tensor in part.values()
    )
    made = json.loads((tmp_path / "toy" / "training.json").read_text())
    assert made["recipe"]["dit_steps"] == 2 and made["images"] == 30 and made["last_loss"] > 0
    assert pipe.get_label_ids(["Ankle boot"]) == [9]
    assert not (tmp_path / "toy" / ".work").exists()  # training states would be shipped with it


def test_a_build_cut_short_resumes(few_images, monkeypatch, tmp_path, capsys):
    build("fashion-mnist", tmp_path / "whole", recipe=SHORT)

    def power_cut(*_):
        raise KeyboardInterrupt

    real = standin.train_transformer
    monkeypatch.setattr(standin, "train_transformer", power_cut)
    with pytest.raises(KeyboardInterrupt):
        build("fashion-mnist", tmp_path / "cut", recipe=SHORT)
    assert (tmp_path / "cut" / ".work" / "vae.safetensors").is_file()
    assert not (tmp_path / "cut" / "model_index.json").exists()  # not taken for a finished one
    spent = tmp_path / "cut" / ".work" / "seconds.json"
    assert 0 < json.loads(spent.read_text()) < 600
    spent.write_text("7200.0")
    monkeypatch.setattr(standin, "train_transformer", real)
    capsys.readouterr()
    build("fashion-mnist", tmp_path / "cut", recipe=SHORT)
    said = capsys.readouterr().out
    assert "dit 2/2" in said and "vae 2/2" not in said  # the autoencoder was not trained again
    assert 2 <= json.loads((tmp_path / "cut" / "training.json").read_text())["hours"] < 2.2
    cut, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    for part, tensors in whole.items():
        assert tensors.keys() == cut[part].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(cut[part][name], tensor, rtol=1e-2, atol=1e-4)


def test_a_guidance_decoder_is_added_to_a_stand_in(few_images, monkeypatch, tmp_path):
    build("fashion-mnist", tmp_path / "toy", recipe=SHORT)
    monkeypatch.setattr(standin, "ASSETS", tmp_path)
    with pytest.raises(OSError):
        standin.tiny_decoder("toy")
    assert standin.add_decoder("toy", tmp_path / "toy", recipe=SHORT) == tmp_path / "toy" / "guidance_decoder"
    found = standin.tiny_decoder("toy")
    assert found.decode(torch.zeros(1, 4, 16, 16)).sample.shape == (
        1,
        3,
        32,
        32,
    )  # two channel widths: one doubling
    assert not (tmp_path / "toy" / ".work").exists()


def test_training_is_deterministic_in_the_seed(few_images, fashion_train, tmp_path):
    data = fashion_train.per_class(3, seed=0)
    runs = [standin.train_vae(SHORT, data, tmp_path / name).state_dict() for name in ("a", "b")]
    assert all(torch.equal(runs[0][name], value) for name, value in runs[1].items())


def test_a_new_transformer_predicts_nothing():
    """Zero-initialised output and conditioning: a stable start."""
    model = new_transformer(SHORT, 10, 8).eval()
    with torch.no_grad():
        output = model(
            torch.randn(1, 4, 8, 8), timestep=torch.tensor([5]), class_labels=torch.tensor([3])
        ).sample
    assert (output == 0).all()


def test_learning_rate_warms_up_and_decays():
    rates = [standin.learning_rate(step, 1000, 2.0) for step in range(1001)]
    assert rates[0] == pytest.approx(2.0 / 200) and rates[199] == rates[200] == 2.0
    assert rates[600] == pytest.approx(1.0) and rates[1000] == pytest.approx(0)
    assert all(a >= b for a, b in zip(rates[200:], rates[201:], strict=False))
