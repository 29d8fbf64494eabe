"""A DiT that learns other classes: its loss falls, labels are told apart, an interruption changes nothing."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from click.testing import CliRunner
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from igd_lib.__main__ import igd
from igd_lib.baselines import tuning
from igd_lib.baselines.finetuning import Finetuning, finetune
from igd_lib.data.images import from_tensors
from igd_lib.experiment import pieces
from igd_lib.models import standin
from igd_lib.models.difffit import is_trained, share_embedders
from igd_lib.pipeline import IGDPipeline
from igd_lib.tools import keys
from igd_lib.tools.machine import cache_dir

SHORT = Finetuning(steps=4, batch_size=4, ema=0.5)
TABLE = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"


@pytest.fixture
def ten(tiny_pipe) -> IGDPipeline:
    """A DiT of ten classes whose blocks have equal embedders, as the original's have."""
    first, second = (block.norm1.emb for block in tiny_pipe.transformer.transformer_blocks)
    second.load_state_dict(first.state_dict())
    return tiny_pipe


def plain_colours(count: int = 8, size: int = 16):
    """Two classes: nearly black images and nearly white ones."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 30, (2 * count, 3, size, size), generator=generator)
    labels = torch.arange(2).repeat(count)
    images = (noise + 225 * labels[:, None, None, None]).to(torch.uint8)
    return from_tensors("colours", "train", ("black", "white"), images, labels)


def trained(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@torch.no_grad()
def noise_error(pipe: IGDPipeline, data, ids: torch.Tensor) -> float:
    """The mean squared error of the predicted noise over the data, at timesteps spread evenly."""
    scheduler = DDPMScheduler(beta_schedule="linear")
    generator, errors = torch.Generator().manual_seed(3), []
    images = data.fetch(torch.arange(len(data))).float() / 127.5 - 1
    latents = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
    for t in range(100, 1000, 100):
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.full((len(data),), t)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        eps = pipe.transformer(noisy, timestep=timesteps, class_labels=ids).sample[:, :4]
        errors.append((eps - noise).square().mean())
    return torch.stack(errors).mean().item()


def test_all_parameters_learn_and_labels_are_used(tiny, tmp_path):
    """An untrained DiT's noise error falls; it is then higher without a label, and highest with a wrong one.

    The same noise throughout, so that the errors are compared in pairs.
    """
    models, data = tiny(num_classes=10), plain_colours()
    models.vae.register_to_config(scaling_factor=3.0)  # its latents have a deviation of 0.86 then
    shape = standin.StandIn("", layers=2, heads=2, head_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = standin.new_transformer(shape, 10, 8)
    pipe = IGDPipeline(transformer.eval(), models.vae, models.ddpm)
    recipe = replace(
        Finetuning(), parameters="all", steps=200, batch_size=8, lr=3e-3, ema=0.9, posterior="mean"
    )
    found = IGDPipeline.from_pretrained(finetune(pipe, data, tmp_path / "out", recipe=recipe))
    right, wrong, no = data.labels, 1 - data.labels, torch.full_like(data.labels, 2)
    assert noise_error(pipe, data, torch.full_like(right, 10)) == pytest.approx(1, abs=0.01)
    after = noise_error(found, data, right)
    assert after < 0.2 and 1.01 * after < noise_error(found, data, no) < noise_error(found, data, wrong)
    assert found.labels == {"black": 0, "white": 1} and found.transformer.config.num_embeds_ada_norm == 2


def test_difffit_teaches_the_stand_in_classes_that_it_is_not_told(
    standin_pipe, fashion_train, fashion_test, tmp_path
):
    """Trousers and bags as classes without a source: on test images their labels come to tell them apart."""

    def two(data, count):
        chosen = torch.cat([data.class_indices(label)[:count] for label in (1, 8)])
        labels = torch.arange(2).repeat_interleave(count)
        return replace(data.subset(chosen, "two"), classes=("trousers", "bags"), labels=labels)

    recipe = replace(SHORT, steps=40, batch_size=16, lr=1e-2, ema=0.8, posterior="mean")
    out = finetune(standin_pipe, two(fashion_train, 100), tmp_path / "out", recipe=recipe)
    found, test = IGDPipeline.from_pretrained(out), two(fashion_test, 20)
    before = noise_error(standin_pipe, test, torch.full_like(test.labels, 10))  # as every class begins
    after, wrong = (noise_error(found, test, labels) for labels in (test.labels, 1 - test.labels))
    assert after < 0.99 * before and wrong > 1.03 * after, (before, after, wrong)


@pytest.mark.parametrize("parameters", ["all", "difffit"])
def test_what_is_trained(ten, toy_data, tmp_path, parameters):
    """All parameters; or DiffFit's, whose scales are folded into weights of the first half of the blocks."""
    before = copy.deepcopy(ten.transformer.state_dict())
    out = finetune(ten, toy_data, tmp_path / "out", recipe=replace(SHORT, parameters=parameters))
    after, names = trained(out), {name for name, _ in ten.transformer.named_parameters()}
    same = {n for n in names if before[n].shape == after[n].shape and torch.equal(before[n], after[n])}
    folded = {f"transformer_blocks.0.{part}.weight" for part in ("attn1.to_q", "attn1.to_k", "attn1.to_v")}
    folded |= {f"transformer_blocks.0.{part}.weight" for part in ("attn1.to_out.0", "ff.net.2")}
    chosen = {name for name, p in ten.transformer.named_parameters() if is_trained(name, p)} | folded
    # Of a softmax, a constant added to all keys changes nothing: their biases have no gradient but rounding.
    exempt = {name for name in names if name.endswith("to_k.bias")}
    assert (same - exempt) == (set() if parameters == "all" else names - chosen - exempt)
    assert after[TABLE.format(0)].shape == (4, 16)
    assert torch.equal(after[TABLE.format(0)], after[TABLE.format(1)])  # trained as one
    assert all(torch.equal(before[name], value) for name, value in ten.transformer.state_dict().items())


def test_a_label_s_row_alone_learns_from_its_images(ten, toy_data, tmp_path):
    """Without dropout the unlabelled row stays; with it, it learns as well."""
    known = ten.transformer.state_dict()[TABLE.format(0)]
    for dropout, rows in ((0.0, [0, 1, 2]), (0.5, [0, 1, 2, 3])):
        recipe = replace(SHORT, steps=12, label_dropout=dropout)
        out = finetune(ten, toy_data, tmp_path / str(dropout), recipe=recipe, sources=[7, None, 2])
        changed = (trained(out)[TABLE.format(0)] != known[[7, 10, 2, 10]]).any(1).nonzero().flatten().tolist()
        assert changed == rows
    with pytest.raises(ValueError, match="sources has one id"):
        finetune(ten, toy_data, tmp_path / "few", sources=[7])


@pytest.mark.parametrize("parameters", ["all", "difffit"])
def test_an_interrupted_run_ends_with_the_same_weights(ten, toy_data, tmp_path, monkeypatch, parameters):
    options = dict(recipe=replace(SHORT, steps=7, parameters=parameters))
    whole = trained(finetune(ten, toy_data, tmp_path / "whole", **options))
    monkeypatch.setattr(tuning, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(tuning, "SAVE_TIMES", 0.0)
    step = tuning.Training.step

    def cut(self, number, *rest):
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tuning.Training, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            finetune(ten, toy_data, tmp_path / "cut", **options)
    assert not (tmp_path / "cut").exists()
    taken = []
    monkeypatch.setattr(
        tuning.Training, "step", lambda self, number, *rest: taken.append(number) or step(self, number, *rest)
    )
    found = trained(finetune(ten, toy_data, tmp_path / "cut", **options))
    assert taken == [4, 5, 6] and all(torch.equal(found[name], value) for name, value in whole.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]
    with pytest.raises(ValueError, match=r"other settings: recipe\.lr = 0\.001, wanted 0\.1"):
        finetune(ten, toy_data, tmp_path / "cut", recipe=replace(options["recipe"], lr=0.1))


def test_images_of_another_size_are_made_at_the_dit_s(ten, tmp_path, monkeypatch, capsys):
    """8 px for a DiT of 16: each image once resized by PIL's bicubic filter, and said so."""
    small, seen = plain_colours(size=8), []

    def look(self, number, images, labels, generator):
        seen.append(images)
        return torch.zeros(1)

    monkeypatch.setattr(tuning.Training, "step", look)
    recipe = replace(SHORT, steps=4, batch_size=4, flip=False)
    out = finetune(ten, small, tmp_path / "out", recipe=recipe)
    from PIL import Image

    def enlarged(image):
        pixels = image.permute(1, 2, 0).numpy()
        return bytes(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC).tobytes())

    expected = {enlarged(image) for image in small.fetch(torch.arange(16))}
    found = {image.permute(1, 2, 0).contiguous().numpy().tobytes() for part in seen for image in part}
    assert found == expected and len(found) == 16
    assert "images of 8 px are resized to the DiT's 16 px" in capsys.readouterr().out
    assert json.loads((out / "finetune.json").read_text())["settings"]["image_size"] == 16


def test_every_field_of_the_recipe_is_in_the_frozen_defaults():
    frozen, recipe = keys.FROZEN["finetune"]["recipe"], Finetuning()
    assert {field.name: getattr(recipe, field.name) for field in fields(Finetuning)} == frozen
    with pytest.raises(ValueError, match="parameters are 'all' or 'difffit', got 'some'"):
        Finetuning(parameters="some")


# --- the command


def test_the_command_writes_what_the_paper_s_scale_looks_up(ten, monkeypatch, tmp_path):
    """DiT-cifar-10 from a DiT of the machine, found by the name that `dit_of` asks for; not twice."""
    monkeypatch.setattr("igd_lib.experiment.weights.load", lambda *_: plain_colours())
    ten.save_pretrained(cache_dir() / "models" / pieces.DIT[0].split("/")[1])
    ten.vae.save_pretrained(cache_dir() / "models" / pieces.SD_VAE[0].split("/")[1])
    out = cache_dir() / "models" / "DiT-cifar-10"
    told = CliRunner().invoke(igd, ["finetune", "cifar-10", str(out), "--steps", "2", "--batch-size", "4"])
    assert told.exit_code == 0, told.output
    assert pieces.model_folder(*pieces.dit_of("cifar-10")) == out
    pipe = IGDPipeline.from_pretrained(out)
    assert pipe.transformer.config.timestep_frequencies == "original" and pipe.labels["white"] == 1
    assert share_embedders(pipe.transformer)
    refused = CliRunner().invoke(igd, ["finetune", "imagewoof", str(tmp_path / "x")])
    assert refused.exit_code == 1 and "knows the classes of imagewoof" in refused.output


@pytest.fixture
def flowers(tmp_path):
    """A folder of one's own: three classes of four images, of which DiT knows one perhaps."""
    for split in ("train", "test"):
        for shade, name in enumerate(("daisy", "rose", "tulip")):
            (tmp_path / "flowers" / split / name).mkdir(parents=True)
            for number in range(4):
                image = Image.new("RGB", (20, 24), (60 * shade, 40 * number, 9))
                image.save(tmp_path / "flowers" / split / name / f"{number}.png")
    return tmp_path / "flowers"


def test_the_command_takes_a_folder(ten, flowers):
    """Its classes, in the order of their names; images of the DiT's size, of which it says so."""
    ten.save_pretrained(cache_dir() / "models" / pieces.DIT[0].split("/")[1])
    ten.vae.save_pretrained(cache_dir() / "models" / pieces.SD_VAE[0].split("/")[1])
    out, short = cache_dir() / "models" / "DiT-flowers", ["--steps", "2", "--batch-size", "4"]
    told = CliRunner().invoke(igd, ["finetune", str(flowers), str(out), *short, "--image-size", "20"])
    assert told.exit_code == 0 and "images of 20 px are resized to the DiT's 16 px" in told.output, (
        told.output
    )
    pipe = IGDPipeline.from_pretrained(out)
    assert (
        pipe.labels == {"daisy": 0, "rose": 1, "tulip": 2}
        and pipe.transformer.config.num_embeds_ada_norm == 3
    )
    (flowers / "imagenet_ids.csv").write_text(
        "folder,wnid\ndaisy,n11939491\nrose,n12620546\ntulip,n12057211\n"
    )
    refused = CliRunner().invoke(igd, ["finetune", str(flowers), str(out) + "2", *short])
    assert refused.exit_code == 1 and "DiT-XL/2 knows the classes of" in refused.output
    assert "imagenet_ids.csv): it is sampled as it is; --base FOLDER" in refused.output
    base = ["--base", str(cache_dir() / "models" / pieces.DIT[0].split("/")[1])]
    told = CliRunner().invoke(igd, ["finetune", str(flowers), str(out) + "2", *short, *base])
    assert told.exit_code == 0, told.output
    lost = CliRunner().invoke(igd, ["finetune", str(flowers / "x"), str(out) + "3"])
    assert lost.exit_code == 1 and "DATASET is a folder or one of cifar-10, " in lost.output


def test_the_command_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("igd_lib.experiment.weights.load", lambda *_: plain_colours())
    monkeypatch.setattr(pieces, "model_folder", lambda *_: None)
    told = CliRunner().invoke(igd, ["finetune", "cifar-10", str(tmp_path / "x")])
    assert told.exit_code == 1 and "is not on this machine: hf download" in told.output
    assert list(tmp_path.iterdir()) == []


WORKER = """
import sys
from ci.tests.test_finetuning import victim
victim(sys.argv[1])
"""


def victim(folder) -> None:
    """Fine-tunes the tiny model slowly, its state saved after every step."""
    from ci.bench.shapes import tiny_models

    torch.manual_seed(0)
    tuning.SAVE_SECONDS = tuning.SAVE_TIMES = 0.0
    finetune(IGDPipeline(*tiny_models(10)), plain_colours(), folder, recipe=replace(SHORT, steps=40))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    environment = {**os.environ, "IGD_QUIET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    command = [sys.executable, "-c", WORKER]
    process = subprocess.Popen([*command, str(tmp_path / "cut")], env=environment, stderr=subprocess.PIPE)
    state = tuning.work_folder(tmp_path / "cut") / "training.safetensors"
    deadline = time.monotonic() + 120
    while not state.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.is_file() and not (tmp_path / "cut").exists(), process.stderr.read().decode()[-2000:]
    for folder in ("cut", "whole"):
        subprocess.run([*command, str(tmp_path / folder)], env=environment, check=True, capture_output=True)
    cut, whole = trained(tmp_path / "cut"), trained(tmp_path / "whole")
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
