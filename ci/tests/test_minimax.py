"""Minimax fine-tuning: its losses, which parameters it trains, its memories, and a folder that loads."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from igd_lib.baselines import tuning
from igd_lib.baselines.minimax import (
    Memory,
    Minimax,
    ShardedSampling,
    Shards,
    fill_by_shard,
    finetune,
    minimax_losses,
    problems,
    shards,
)
from igd_lib.baselines.tuning import diffusion_loss, work_folder
from igd_lib.config import STANDARD, Guidance
from igd_lib.data.datasets import image_folder
from igd_lib.data.images import from_tensors, load, square
from igd_lib.distillation import Wanted, distill, fill
from igd_lib.experiment.scales import STAND_INS
from igd_lib.models.difffit import add_scales, fold_scales, is_trained, share_embedders
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampling import Sampling
from igd_lib.sets.store import DistilledSet

SHORT = Minimax(epochs=2, batch_size=4, memory_size=3)


@pytest.fixture
def tiny_pipe(tiny) -> IGDPipeline:
    """The tiny models as a pipeline of the toy data's three classes."""
    models = tiny(num_classes=3)
    return IGDPipeline(models.transformer, models.vae, models.ddpm)


def schedule() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")


# --- latents


@torch.no_grad()
def test_the_stand_in_is_tuned_on_latents_like_those_it_was_trained_on(standin_pipe, fashion_train):
    """Its DiT's noise error before tuning: on the wrong latents it is above that of a guess of zero."""
    few, own, errors = fashion_train.per_class(10, seed=0), STAND_INS["fashion-mnist"].minimax, {}
    for recipe in (own, replace(own, posterior="sample")):
        generator = torch.Generator().manual_seed(0)
        latents = recipe.latents(standin_pipe.vae, few.fetch(torch.arange(len(few))), generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.arange(5, 1000, 10)  # one an image
        noisy = schedule().add_noise(latents, noise, timesteps)
        errors[recipe.posterior] = (
            (standin_pipe.transformer(noisy, timestep=timesteps, class_labels=few.labels).sample - noise)
            .square()
            .mean()
            .item()
        )
    assert errors["mean"] < 0.2 and errors["sample"] > 0.8
    with pytest.raises(ValueError, match="'sample' or 'mean'"):
        Minimax(posterior="mode")


# --- losses


def naive(clean, labels, real, generated):
    """One pair at a time, in Python."""

    def cosine(a, b):
        a, b = a.flatten().tolist(), b.flatten().tolist()
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
            sum(x * x for x in a) * sum(y * y for y in b)
        )

    present, far, near = sorted(set(labels)), 0.0, 0.0
    for label in present:
        own = [z for z, other in zip(clean, labels, strict=True) if other == label]
        if generated[label]:
            far += 1 - min(cosine(z, m) for z in own for m in real[label])
            near += max(cosine(z, m) for z in own for m in generated[label])
    return far / len(present), near / len(present)


def test_the_two_losses_match_a_naive_reference():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(6, 4, 3, 3, generator=generator)
    labels = [2, 0, 2, 1, 0, 2]
    stored = {0: 2, 1: 0, 2: 5}  # class 1 has nothing yet; class 2 has more than fits
    real, generated = Memory(3, 4, 36), Memory(3, 4, 36)
    kept = {"real": {}, "generated": {}}
    for name, memory in (("real", real), ("generated", generated)):
        for label, count in stored.items():
            vectors = torch.randn(count, 36, generator=generator)
            memory.push(vectors, torch.full((count,), label))
            kept[name][label] = list(vectors.double())[-4:]
    found = minimax_losses(clean, torch.tensor(labels), real, generated)
    assert [value.item() for value in found] == pytest.approx(naive(clean.double(), labels, **kept), rel=1e-5)


def test_the_losses_pull_where_they_should():
    """Down the first's gradient the worst real neighbour comes nearer, by the second's the nearest goes."""
    generator = torch.Generator().manual_seed(1)
    real, generated = Memory(1, 8, 16), Memory(1, 8, 16)
    label = torch.zeros(8, dtype=torch.long)
    real.push(torch.randn(8, 16, generator=generator), label)
    generated.push(torch.randn(8, 16, generator=generator), label)
    clean = torch.randn(1, 4, 2, 2, generator=generator)
    for index in range(2):
        z = clean.clone().requires_grad_()
        before = minimax_losses(z, label[:1], real, generated)[index]
        before.backward()
        assert minimax_losses((z - 0.05 * z.grad).detach(), label[:1], real, generated)[index] < before - 1e-4


def test_a_memory_is_first_in_first_out():
    memory = Memory(2, 3, 1)
    assert memory.of(0).shape == (0, 1)
    memory.push(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), torch.tensor([0, 1, 0, 0, 0]))
    assert sorted(memory.of(0).flatten().tolist()) == [3, 4, 5] and memory.of(1).tolist() == [[2.0]]


@pytest.mark.parametrize("t", [1, 400, 999])
def test_the_variance_is_trained_by_the_variational_bound(t):
    """Against torch's divergence of the posterior, computed from the definition of the forward process."""
    generator = torch.Generator().manual_seed(t)
    clean, noise, v = (torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    eps = noise + 0.1 * torch.randn(noise.shape, generator=generator, dtype=torch.float64)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, 0)
    noisy = bar[t].sqrt() * clean + (1 - bar[t]).sqrt() * noise
    # q(z_{t-1} | z_t, z_0) is proportional to q(z_t | z_{t-1}) q(z_{t-1} | z_0): precisions add.
    precision = (1 - betas[t]) / betas[t] + 1 / (1 - bar[t - 1])

    def posterior_mean(x_0):
        return (
            (1 - betas[t]).sqrt() * noisy / betas[t] + bar[t - 1].sqrt() * x_0 / (1 - bar[t - 1])
        ) / precision

    deviation = ((v + 1) / 2 * betas[t].log() + (1 - v) / 2 * (1 / precision).log()).mul(0.5).exp()
    predicted = (noisy - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()
    bound = kl_divergence(
        Normal(posterior_mean(clean), precision.rsqrt()), Normal(posterior_mean(predicted), deviation)
    ) / math.log(2)
    expected = ((eps - noise) ** 2).mean((1, 2, 3)) + bound.mean((1, 2, 3))
    timesteps = torch.full((2,), t)
    found = diffusion_loss(torch.cat([eps, v], 1), noise, clean, noisy, timesteps, schedule())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)  # the scheduler's products are float32
    assert torch.equal(
        diffusion_loss(eps, noise, clean, noisy, timesteps, schedule()),
        ((eps - noise) ** 2).flatten(1).mean(1),
    )


def test_at_zero_the_bound_is_a_likelihood_of_eight_bit_values():
    """In float64, with the normal distribution itself; DiT's code has an approximation within 2e-4 of it.

    At t = 0 the mean is the predicted latent. Values beyond the ends have all the mass beyond them.
    """
    generator = torch.Generator().manual_seed(0)
    clean, noise, v = (torch.randn(8, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    eps = noise + 0.5 * torch.randn(noise.shape, generator=generator, dtype=torch.float64)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    noisy = (1 - betas[0]).sqrt() * clean + betas[0].sqrt() * noise
    mean = (noisy - betas[0].sqrt() * eps) / (1 - betas[0]).sqrt()
    low = betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1]))  # the posterior's variance at t = 1
    deviation = ((v + 1) / 2 * betas[0].log() + (1 - v) / 2 * low.log()).mul(0.5).exp()
    normal = Normal(mean, deviation)
    upper, lower = normal.cdf(clean + 1 / 255), normal.cdf(clean - 1 / 255)
    mass = torch.where(clean < -0.999, upper, torch.where(clean > 0.999, 1 - lower, upper - lower))
    expected = (eps - noise).square().mean((1, 2, 3)) - mass.log2().mean((1, 2, 3))
    timesteps = torch.zeros(8, dtype=torch.long)
    found = diffusion_loss(torch.cat([eps, v], 1), noise, clean, noisy, timesteps, schedule())
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)
    assert (clean.abs() > 1).any() and (mass > 0.01).all()


def test_the_bound_does_not_train_the_mean():
    clean, noise, noisy = (torch.randn(1, 4, 2, 2) for _ in range(3))
    output = torch.cat(
        [noise, torch.zeros(1, 4, 2, 2)], 1
    ).requires_grad_()  # exact noise: its squared error has no gradient
    diffusion_loss(output, noise, clean, noisy, torch.tensor([500]), schedule()).sum().backward()
    assert (output.grad[:, :4] == 0).all() and (output.grad[:, 4:] != 0).all()


# --- parameters


def test_only_the_stated_kinds_are_trained(tiny):
    transformer = copy.deepcopy(tiny(num_classes=10).transformer)
    add_scales(transformer)
    trained = {name for name, parameter in transformer.named_parameters() if is_trained(name, parameter)}
    block = "transformer_blocks.0."
    scales = {f"{block}attn1.{part}.gammas.0" for part in ("to_q", "to_k", "to_v", "to_out.0")}
    scales |= {f"{block}attn1.to_out.0.gammas.1", f"{block}ff.net.2.gammas.0"}
    assert {name for name in trained if "gammas" in name} == scales  # the first half of two blocks
    biases = {name for name, _ in transformer.named_parameters() if name.endswith(".bias")}
    classes = {f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight" for i in range(2)}
    assert trained == scales | biases | classes
    assert not any(
        name.endswith("linear.weight") or "proj.weight" in name or "timestep_embedder.linear_1.weight" in name
        for name in trained
    )


def test_scales_fold_into_the_weights(tiny):
    transformer = copy.deepcopy(tiny(num_classes=10).transformer)
    names = list(transformer.state_dict())
    inputs = dict(
        hidden_states=torch.randn(2, 4, 8, 8),
        timestep=torch.tensor([3, 700]),
        class_labels=torch.tensor([1, 10]),
    )
    with torch.no_grad():
        plain = transformer(**inputs).sample
        add_scales(transformer)
        torch.testing.assert_close(transformer(**inputs).sample, plain)  # scales of 1
        for name, parameter in transformer.named_parameters():
            if "gammas" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        scaled = transformer(**inputs).sample
        assert (scaled - plain).norm() > 0.01 * plain.norm()
        fold_scales(transformer)
        torch.testing.assert_close(transformer(**inputs).sample, scaled, rtol=1e-4, atol=1e-6)
    assert list(transformer.state_dict()) == names


def test_equal_embedders_are_shared_and_different_ones_are_not(tiny):
    transformer = copy.deepcopy(tiny(num_classes=10).transformer)
    first, second = (block.norm1.emb for block in transformer.transformer_blocks)
    assert not share_embedders(transformer) and first.class_embedder is not second.class_embedder
    second.load_state_dict(first.state_dict())
    assert share_embedders(transformer) and first.class_embedder is second.class_embedder


# --- training


def trained(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_fine_tuned_folder_loads_and_differs_where_it_may(tiny_pipe, toy_data, tmp_path):
    before = copy.deepcopy(tiny_pipe.transformer.state_dict())
    out = finetune(tiny_pipe, toy_data, tmp_path / "out", recipe=replace(SHORT, ema=0.5))
    assert all(
        torch.equal(before[name], value) for name, value in tiny_pipe.transformer.state_dict().items()
    )  # a copy was trained
    found = IGDPipeline.from_pretrained(out)
    assert not found.transformer.training and not work_folder(out).exists()
    after = found.transformer.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    folded = {
        f"transformer_blocks.0.{part}.weight"
        for part in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.2")
    }
    kinds = {name for name in before if name.endswith(".bias") or "class_embedder" in name}
    assert changed <= folded | kinds and folded <= changed and len(changed & kinds) > len(kinds) / 2
    # Nothing is done twice, and other settings are refused.
    stamp = (out / "model_index.json").stat().st_mtime_ns
    assert (
        finetune(tiny_pipe, toy_data, out, recipe=replace(SHORT, ema=0.5)) == out
        and (out / "model_index.json").stat().st_mtime_ns == stamp
    )
    with pytest.raises(
        ValueError, match=r"holds a fine-tuned model of other settings: recipe\.ema = 0\.5, wanted 0\.9"
    ):
        finetune(tiny_pipe, toy_data, out, recipe=replace(SHORT, ema=0.9))


def test_shared_embedders_are_trained_as_one(tiny_pipe, toy_data, tmp_path):
    first, second = (block.norm1.emb for block in tiny_pipe.transformer.transformer_blocks)
    second.load_state_dict(first.state_dict())
    state = trained(finetune(tiny_pipe, toy_data, tmp_path / "out", recipe=replace(SHORT, ema=0.5)))
    name = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    assert torch.equal(state[name.format(0)], state[name.format(1)])
    assert not torch.equal(state[name.format(0)], first.class_embedder.embedding_table.weight)


def test_only_the_classes_of_a_shard_are_seen(tiny, toy_data, tmp_path):
    name = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    models = tiny(num_classes=10)
    before = models.transformer.state_dict()[name]
    out = finetune(
        IGDPipeline(models.transformer, models.vae, models.ddpm),
        toy_data,
        tmp_path / "out",
        recipe=replace(SHORT, ema=0.5, label_dropout=0.0),
        classes=[0, 2],
        label_ids=[4, 5, 6],
    )
    changed = (trained(out)[name] != before).any(1).nonzero().flatten().tolist()
    assert changed == [4, 6]
    assert shards(10, 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]] and [
        label for part in shards(1000, 7) for label in part
    ] == list(range(1000))
    with pytest.raises(ValueError, match="1 ... 10, got 11"):
        shards(10, 11)


def test_the_average_begins_with_the_weights_as_they_were(tiny_pipe, toy_data, tmp_path):
    out = finetune(tiny_pipe, toy_data, tmp_path / "out", recipe=replace(SHORT, ema=1.0))
    for name, value in tiny_pipe.transformer.state_dict().items():
        torch.testing.assert_close(trained(out)[name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accumulated_parts_are_one_step(tiny_pipe, toy_data, tmp_path, monkeypatch, accumulate):
    """The batch is 4 images a step however it is divided: two epochs of four batches."""
    taken, step, seen = [], torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: taken.append(1) or step(self, *rest))
    part = tuning.Training.step
    monkeypatch.setattr(
        tuning.Training, "step", lambda self, *rest: seen.append(len(rest[1])) or part(self, *rest)
    )
    finetune(tiny_pipe, toy_data, tmp_path / "out", recipe=SHORT, accumulate=accumulate)
    assert len(taken) == 8 and seen == [4 // accumulate] * 8 * accumulate


def test_a_batch_that_cannot_be_divided_is_refused(tiny_pipe, toy_data, tmp_path):
    message = "a batch of 4 images cannot be divided among 1 processes x 3 accumulated parts"
    with pytest.raises(ValueError, match=message):
        finetune(tiny_pipe, toy_data, tmp_path / "out", recipe=SHORT, accumulate=3)
    assert not (tmp_path / "out").exists()  # so that other settings can be tried


def batches(data, recipe, rank=0, world=1, parts=1):
    accelerator = SimpleNamespace(process_index=rank, num_processes=world, gradient_accumulation_steps=parts)
    return tuning.Batches(data, range(len(data.classes)), recipe, accelerator)


def test_processes_and_parts_share_the_same_batches(toy_data):
    """Which images a step has does not depend on how it is divided, nor on where the run began."""
    recipe = Minimax(epochs=3, batch_size=8, flip=False)

    def by_step(world, parts, done=0):
        found: dict[int, list[bytes]] = {}
        for rank in range(world):
            share = batches(toy_data, recipe, rank, world, parts)
            share.done = done * parts
            assert len(share) == (6 - done) * parts and share.steps == 6
            for number, images, labels, _ in share:
                assert len(images) == len(labels) == 8 // (world * parts)
                found.setdefault(number // parts, []).extend(image.numpy().tobytes() for image in images)
        return {step: sorted(images) for step, images in found.items()}

    whole = by_step(1, 1)
    assert len(whole) == 6 and all(len(set(images)) == 8 for images in whole.values())
    assert len({tuple(images) for images in whole.values()}) == 6
    for world, parts in ((2, 1), (1, 4), (4, 2), (8, 1)):
        assert by_step(world, parts) == whole
    assert by_step(2, 2, done=4) == {step: whole[step] for step in (4, 5)}
    with pytest.raises(ValueError, match="a batch of 8 images cannot be divided among 3 processes x 1"):
        batches(toy_data, recipe, world=3)


@pytest.mark.parametrize(
    ("images", "steps", "epochs_end"),
    [(12_454, 12_000, 12_448), (12_894, 12_000, 12_888), (2_000, 2_000, 2_000)],
)
def test_training_ends_where_the_released_checkpoint_was_taken(images, steps, epochs_end):
    """ImageWoof, ImageNette, and data for which eight epochs are over before."""
    data = from_tensors(
        "x", "train", ("a",), torch.zeros(images, 3, 1, 1, dtype=torch.uint8), torch.zeros(images)
    )
    assert batches(data, Minimax()).steps == steps
    assert batches(data, Minimax(steps=None)).steps == epochs_end
    assert len(batches(data, Minimax(), world=2, parts=4)) == 4 * steps


def test_steps_end_the_training_and_what_is_left_is_said(tiny_pipe, toy_data, tmp_path, monkeypatch, capsys):
    taken, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: taken.append(1) or step(self, *rest))
    recipe = replace(SHORT, steps=5, ema=0.9)
    finetune(tiny_pipe, toy_data, tmp_path / "out", recipe=recipe)
    assert len(taken) == 5
    # 0.9 ** 5
    assert "minimax: 59.0 % of the kept average is the untuned model (0.9 ** 5)" in capsys.readouterr().out
    assert "30.1 % of the kept average" in tuning.untuned("minimax", Minimax().ema, 12_000)
    with pytest.raises(ValueError, match="steps is at least 1, or None"):
        Minimax(steps=0)


def test_the_average_holds_the_stated_share_of_the_untuned_model(tiny_pipe, toy_data, tmp_path, monkeypatch):
    """Where the optimiser puts every parameter to 1, the average is 1 + share (w - 1) of the untuned w."""
    name = "transformer_blocks.1.norm1.linear.bias"
    before = tiny_pipe.transformer.state_dict()[name].clone()

    def jump(self, *_):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(1.0)

    monkeypatch.setattr(torch.optim.AdamW, "step", jump)
    out = finetune(tiny_pipe, toy_data, tmp_path / "out", recipe=replace(SHORT, steps=6, ema=0.8))
    torch.testing.assert_close(trained(out)[name], 1 + 0.8**6 * (before - 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupted_run_ends_with_the_same_weights(
    tiny_pipe, toy_data, tmp_path, monkeypatch, accumulate
):
    options = dict(recipe=replace(SHORT, steps=7), accumulate=accumulate)
    whole = trained(finetune(tiny_pipe, toy_data, tmp_path / "whole", **options))
    monkeypatch.setattr(tuning, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(tuning, "SAVE_TIMES", 0.0)
    part = tuning.Training.step

    def cut(self, number, *rest):
        if number == 3 * accumulate + accumulate // 2:  # within a step where there are parts
            raise KeyboardInterrupt
        return part(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tuning.Training, "step", cut)
        with pytest.raises(KeyboardInterrupt, match=r"3 of 7 steps are in .*\.cut\.work; run the same again"):
            finetune(tiny_pipe, toy_data, tmp_path / "cut", **options)
    assert (work_folder(tmp_path / "cut") / "training.safetensors").is_file()
    assert not (tmp_path / "cut").exists()  # a folder that is there is a finished model
    found = trained(finetune(tiny_pipe, toy_data, tmp_path / "cut", **options))
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_image_files_are_resized_as_dit_resizes_them(tiny_pipe, tmp_path, monkeypatch):
    generator, expected = np.random.default_rng(0), set()
    for name in ("a", "b"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(4):
            image = Image.fromarray(generator.integers(0, 256, (41 + i, 50, 3), dtype=np.uint8))
            image.save(tmp_path / "data" / "train" / name / f"{i}.png")
            expected.add(np.asarray(square(image, 16, "bicubic-halving")).tobytes())
    data = load(image_folder(tmp_path / "data", image_size=16))
    seen: set[bytes] = set()

    def look(self, number, images, labels, generator):
        seen.update(image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in images)
        return torch.zeros(3)

    monkeypatch.setattr(tuning.Training, "step", look)
    finetune(tiny_pipe, data, tmp_path / "out", recipe=replace(SHORT, flip=False), label_ids=[0, 1])
    assert seen == expected
    usual = replace(SHORT, flip=False, resize="bilinear")
    with pytest.raises(ValueError, match="other settings: recipe.resize = bicubic-halving, wanted bilinear"):
        finetune(tiny_pipe, data, tmp_path / "out", recipe=usual, label_ids=[0, 1])


WORKER = """
import sys, torch
from ci.tests.test_minimax import SHORT, victim
victim(sys.argv[1])
"""


def victim(folder) -> None:
    """Fine-tunes the tiny model slowly, its state saved after every step."""
    from ci.bench.shapes import tiny_models
    from igd_lib.data import images as data

    torch.manual_seed(0)
    tuning.SAVE_SECONDS = tuning.SAVE_TIMES = 0.0
    pipe = IGDPipeline(*tiny_models(10))
    images = torch.randint(
        0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )
    found = data.from_tensors(
        "toy", "train", [str(i) for i in range(10)], images, torch.arange(10).repeat_interleave(4)
    )
    finetune(pipe, found, folder, recipe=replace(SHORT, epochs=4))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    environment = {**os.environ, "IGD_QUIET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    command = [sys.executable, "-c", WORKER, str(tmp_path / "cut")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    state, deadline = work_folder(tmp_path / "cut") / "training.safetensors", time.monotonic() + 120
    while not state.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.is_file(), process.stderr.read().decode()[-2000:]
    assert not (tmp_path / "cut").exists()
    step = json.loads(state.read_bytes()[8:][: int.from_bytes(state.read_bytes()[:8], "little")])[
        "__metadata__"
    ]["igd"]
    assert 0 < json.loads(step)["step"] < 40
    for folder in ("cut", "whole"):
        subprocess.run(
            [sys.executable, "-c", WORKER, str(tmp_path / folder)],
            env=environment,
            check=True,
            capture_output=True,
        )
    cut, whole = trained(tmp_path / "cut"), trained(tmp_path / "whole")
    assert all(torch.equal(cut[name], value) for name, value in whole.items())


def test_a_loss_that_is_not_finite_stops_it(tiny_pipe, toy_data, tmp_path):
    with torch.no_grad():
        tiny_pipe.transformer.proj_out_2.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="minimax: the loss is nan at step 0"):
        finetune(tiny_pipe, toy_data, tmp_path / "out", recipe=SHORT)
    with pytest.raises(ValueError, match="18 images are fewer than a batch of 19"):
        finetune(tiny_pipe, toy_data, tmp_path / "big", recipe=replace(SHORT, batch_size=19))


def test_a_dit_of_other_classes_is_not_guessed_at(tiny, toy_data, tmp_path):
    models = tiny(num_classes=1000)
    with pytest.raises(ValueError, match="knows 1000 classes and the data have 3"):
        finetune(IGDPipeline(models.transformer, models.vae, models.ddpm), toy_data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(tiny_pipe, toy_data, tmp_path):
    """A converted model is no finished fine-tuning."""
    tiny_pipe.save_pretrained(tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(FileExistsError, match="is there already and not empty"):
        finetune(tiny_pipe, toy_data, tmp_path / "out", recipe=SHORT)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


# --- shards


TABLE = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"


@pytest.fixture
def division(tiny_pipe, toy_data, tmp_path) -> Shards:
    """Two shards of three classes, each fine-tuned on its own: (0,) and (1, 2)."""
    found = Shards(tmp_path / "shards", toy_data.classes, 2)
    recipe = replace(SHORT, ema=0.5, label_dropout=0.0, batch_size=2)
    for shard, labels in enumerate(found.labels):
        finetune(tiny_pipe, toy_data, found.path(shard), recipe=recipe, classes=labels)
    return found


def test_every_class_is_in_the_shard_that_was_trained_on_it(division, tiny_pipe, toy_data, tmp_path):
    assert Shards.find(division.folder, toy_data.classes) == division and division.missing == []
    assert division.labels == [[0], [1, 2]]
    assert division.parts(toy_data.classes, [2, 0, 1]) == {0: [0], 1: [2, 1]}
    assert division.parts(("c", "a"), [0, 1]) == {0: [1], 1: [0]}  # a set of some classes, in another order
    assert division.problems() == []
    before = tiny_pipe.transformer.state_dict()[TABLE]
    for shard, labels in enumerate(division.labels):
        pipe = division.pipe(shard, vae=tiny_pipe.vae)
        changed = (pipe.transformer.state_dict()[TABLE] != before).any(1).nonzero().flatten().tolist()
        assert changed == labels and pipe.vae is tiny_pipe.vae
    with pytest.raises(ValueError, match="no shard in .* is of the class 'd'"):
        division.parts(("a", "d"), [0, 1])
    with pytest.raises(ValueError, match=r"labels are 0 \.\.\. 2, got 3"):
        division.shard_of(3)
    with pytest.raises(ValueError, match="fine-tuned on other classes: a ..., wanted b"):
        Shards(division.folder, ("b", "a", "c"), 2).pipe(0)
    finetune(tiny_pipe, toy_data, division.folder / "shard-000-of-003", recipe=SHORT)
    with pytest.raises(ValueError, match="holds shards of 2 and of 3"):
        Shards.find(division.folder, toy_data.classes)


def test_shards_that_are_missing_or_damaged_are_named(division, toy_data, tmp_path):
    assert Shards.find(tmp_path, toy_data.classes) is None
    spec = image_folder(tmp_path, image_size=16, classes=toy_data.classes)
    assert problems(division.folder, spec) == []
    weights = division.path(0) / "transformer" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    [line] = problems(division.folder, spec)
    assert str(weights) in line and "is cut short" in line
    (division.path(1) / "model_index.json").unlink()
    lines = problems(division.folder, spec)
    assert lines[0] == f"1 of 2 shards in {division.folder}; missing: 1" and len(lines) == 2
    with pytest.raises(FileNotFoundError, match=r"shard-001-of-002: 1 of 2 shards .*missing: 1"):
        division.pipe(1)
    [line] = problems(tmp_path / "none", spec)
    assert line == f"no Minimax model in {tmp_path / 'none'}"
    work_folder(tmp_path / "none").mkdir()
    assert "unfinished, the same command goes on" in problems(tmp_path / "none", spec)[0]


def test_a_minimax_folder_of_other_classes_or_sizes_is_refused(tiny_pipe, toy_data, tmp_path):
    out = finetune(tiny_pipe, toy_data, tmp_path / "out", recipe=SHORT)
    spec = image_folder(tmp_path, image_size=16, classes=toy_data.classes)
    assert problems(out, spec) == []
    [line] = problems(out, replace(spec, image_size=32))
    assert "images of 8 x 2 = 16 px, and the data's have 32 px" in line
    [line] = problems(out, replace(spec, classes=("c", "b", "a")))
    assert "fine-tuned on other classes: a, b, c ..., wanted c, b, a" in line
    [line] = problems(out, replace(spec, label_ids=(1, 2, 3)))  # ImageNet's
    assert "knows 3 classes, and 1000 are wanted" in line
    (out / "minimax.json").unlink()  # a checkpoint that was converted has none
    assert problems(out, spec) == []


def test_a_sharded_set_is_the_sets_of_its_shards(division, tiny_pipe, toy_data, tmp_path, monkeypatch):
    """Image by image, with one model in memory at a time; a shard whose classes are there is not read."""
    guidance, steps, made = Guidance(k=0.0, gamma=50.0, guided_range=(1, 3)), 5, []
    common = dict(guidance=guidance, num_steps=steps, fidelity=replace(STANDARD, solver="configured"))
    wanted = Wanted(
        ShardedSampling(tiny_pipe, shards=division, **common), toy_data, 2, 0, [0, 1, 2], [0, 1, 2]
    )

    def alone(shard: int, labels: list[int]) -> DistilledSet:
        pipe = division.pipe(shard, vae=tiny_pipe.vae, scheduler=tiny_pipe.scheduler)
        out = tmp_path / f"alone-{shard}-{labels}"
        return distill(pipe, toy_data, ipc=2, checkpoints=None, out_dir=out, classes=labels, **common)

    first, second, wrong = alone(0, [0]), alone(1, [1, 2]), alone(0, [2])
    read = Shards.pipe

    def counted(self, shard, **models):
        gc.collect()
        assert all(model() is None for model in made), "another shard's model is still in memory"
        pipe = read(self, shard, **models)
        made.append(weakref.ref(pipe.transformer))
        return pipe

    monkeypatch.setattr(Shards, "pipe", counted)
    fill_by_shard(wanted, tmp_path / "set", only=[2])
    assert len(made) == 1
    found = fill_by_shard(wanted, tmp_path / "set")
    assert len(made) == 3 and found.verify() == []  # the second shard had one of its classes
    assert torch.equal(found.latents(0), first.latents(0))
    for label in (1, 2):  # in other batches than alone
        torch.testing.assert_close(found.latents(label), second.latents(label), rtol=1e-4, atol=1e-4)
    assert (found.latents(2) - wrong.latents(2)).abs().mean() > 1e-2
    fill_by_shard(wanted, tmp_path / "set")
    assert len(made) == 3
    with pytest.raises(RuntimeError, match="shard by shard"):
        fill(replace(wanted, sampling=wanted.sampling), tmp_path / "other")
    # A shard that was trained anew is another set.
    note = division.path(0) / "minimax.json"
    note.write_text(note.read_text().replace(division.digest_of(0), "0" * 12))
    again = replace(wanted, sampling=replace(wanted.sampling, shards=replace(division)))
    with pytest.raises(ValueError, match="other settings: transformer"):
        fill_by_shard(again, tmp_path / "set")
    with pytest.raises(ValueError, match="its weights are not those that it was finished with"):
        fill_by_shard(again, tmp_path / "anew")


def test_without_shards_a_set_is_filled_as_ever(tiny_pipe, toy_data, tmp_path):
    sampling = Sampling(tiny_pipe, num_steps=3, fidelity=replace(STANDARD, solver="configured"))
    wanted = Wanted(sampling, toy_data, 1, 0, [0, 1, 2], [0, 1, 2])
    found, other = fill_by_shard(wanted, tmp_path / "a", only=[1]), fill(wanted, tmp_path / "b")
    assert [found.finished(label) for label in range(3)] == [0, 1, 0]
    torch.testing.assert_close(found.latents(1), other.latents(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 7, 100, 1000])
def test_shards_have_every_class_once(tmp_path, count):
    division = Shards(tmp_path, tuple(map(str, range(1000))), count)
    assert [label for labels in division.labels for label in labels] == list(range(1000))
    assert all(
        division.shard_of(label) == number
        for number, labels in enumerate(division.labels)
        for label in labels
    )
    assert max(map(len, division.labels)) - min(map(len, division.labels)) <= 1
    assert len({division.path(shard) for shard in range(count)}) == count
