"""TDSDM: its losses, what the adapter is and learns, interrupted training, and the images."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from igd_lib.baselines import tuning
from igd_lib.baselines.img2img import DiT, StableDiffusion, encode
from igd_lib.baselines.tdsdm import (
    TDSDM,
    Adapter,
    AdapterTraining,
    merged,
    min_snr,
    rerendering,
    tdsdm,
    tdsdm_losses,
    tune_adapter,
    with_adapter,
)
from igd_lib.data.images import to_uint8
from test_img2img import tiny_sd as tiny_sd

TRAINED = Adapter(steps=6, batch_size=4, posterior="mean", epochs=1000, lr=1e-2)
SHORT = replace(TDSDM.small(), num_steps=4, adapter=TRAINED)
LAYERS = [
    f"transformer_blocks.{i}.attn1.{name}" for i in (0, 1) for name in ("to_q", "to_k", "to_v", "to_out.0")
]


@pytest.fixture
def backbone(tiny_pipe) -> DiT:
    """Of the toy data's three classes, ids 7, 3 and 5."""
    return DiT(tiny_pipe, (7, 3, 5))


def random_adapter(scale=0.3, rank=4, width=16):
    """What a training might have found: neither half zero."""
    generator = torch.Generator().manual_seed(5)
    shapes = {".lora_A.weight": (rank, width), ".lora_B.weight": (width, rank)}
    return {
        layer + end: scale * torch.randn(shape, generator=generator)
        for layer in LAYERS
        for end, shape in shapes.items()
    }


def predicted(network, count=3):
    generator = torch.Generator().manual_seed(6)
    z = torch.randn(count, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return network(z, timestep=torch.tensor([10, 500, 900]), class_labels=torch.tensor([1, 2, 10])).sample


# --- the losses


def by_loops(eps, noise, alpha_bar, cap):
    """Both terms in plain float64 loops."""
    count, size = len(eps), eps[0].numel()
    eps, noise = ([row.flatten().double().tolist() for row in rows] for rows in (eps, noise))
    weights = []
    for a in alpha_bar.tolist():
        snr = a / (1 - a)
        weights.append((snr if snr < cap else cap) / snr)
    error, summed = 0.0, 0.0
    for j in range(size):
        of_eps, of_noise = 0.0, 0.0
        for i in range(count):
            error += weights[i] * (eps[i][j] - noise[i][j]) ** 2
            of_eps += weights[i] * eps[i][j]
            of_noise += weights[i] * noise[i][j]
        summed += (of_eps - of_noise) ** 2
    return error / (count * size), summed / size


def batch(count=5):
    generator = torch.Generator().manual_seed(0)
    eps, noise = torch.randn(2, count, 2, 3, 3, generator=generator, dtype=torch.float64)
    return eps, noise, torch.tensor([0.9999, 0.95, 0.7, 0.3, 0.001], dtype=torch.float64)[:count]


@pytest.mark.parametrize("cap", [5.0, 1.0])
def test_the_losses_match_plain_loops(cap):
    eps, noise, alpha_bar = batch()
    found = tdsdm_losses(eps, noise, alpha_bar, cap)
    expected = by_loops(eps, noise, alpha_bar, cap)
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-12)
    assert expected[0] != pytest.approx(((eps - noise) ** 2).mean().item(), rel=0.05)  # weights matter


def test_min_snr_weights():
    """Up to an SNR of 5 (alpha_bar 5 / 6) all 1, beyond it 5 / SNR."""
    alpha_bar = torch.tensor([0.5, 5 / 6 - 1e-6, 5 / 6 + 1e-6, 0.9, 0.99], dtype=torch.float64)
    found = min_snr(alpha_bar, 5.0)
    assert found.tolist() == pytest.approx([1, 1, 1, 5 / 9, 5 / 99], abs=1e-5)


def test_the_losses_vanish_where_the_noise_is_found():
    _, noise, alpha_bar = batch()
    assert [value.item() for value in tdsdm_losses(noise.clone(), noise, alpha_bar, 5.0)] == [0, 0]


def test_the_sum_forgives_what_cancels_and_knows_no_order():
    eps, noise, alpha_bar = batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    one = torch.stack(tdsdm_losses(eps, noise, alpha_bar, 5.0))
    other = torch.stack(tdsdm_losses(eps[order], noise[order], alpha_bar[order], 5.0))
    assert torch.allclose(one, other, rtol=1e-12)
    # The noise handed round among samples of one weight: each is wrong, their sum is right.
    equal = torch.full((5,), 0.4, dtype=torch.float64)
    error, summed = tdsdm_losses(noise[order], noise, equal, 5.0)
    assert error > 1 and summed < 1e-25
    mixed = tdsdm_losses(eps[order], noise, alpha_bar, 5.0)[1]
    assert not torch.isclose(mixed, one[1], rtol=1e-3)  # but which noise is whose matters with weights


def test_gradients_are_those_of_finite_differences():
    """Of a two-layer net in float64, both terms together."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 1)).double()
    z, noise, alpha_bar = batch()

    def loss():
        error, summed = tdsdm_losses(net(z), noise, alpha_bar, 5.0)
        return error + 0.3 * summed

    loss().backward()
    for parameter in net.parameters():
        index = torch.randint(parameter.numel(), (1,)).item()
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[index] += 1e-5
            up = loss()
            flat[index] -= 2e-5
            down = loss()
            flat[index] += 1e-5
        expected = ((up - down) / 2e-5).item()
        assert parameter.grad.view(-1)[index].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


# --- the adapter


def test_at_scale_0_it_is_the_base_model(backbone):
    base = backbone.network
    same, half, whole = (merged(base, random_adapter(), scale) for scale in (0.0, 0.5, 1.0))
    assert torch.equal(predicted(same), predicted(base)) and same is not base
    gaps = [(predicted(network) - predicted(base)).abs().max() for network in (half, whole)]
    assert 1e-3 < gaps[0] < gaps[1]


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_merged_weights_are_peft_s_own_function(backbone, scale):
    import copy

    from peft.tuners.lora import LoraLayer

    base, adapter = backbone.network, random_adapter()
    theirs = copy.deepcopy(base)
    chosen = with_adapter(theirs, 4, seed=0)
    assert torch.equal(predicted(theirs), predicted(base))  # at first it does nothing
    assert {name.replace(":", ".") for name in chosen} == set(adapter)
    for module in theirs.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", scale)
    with torch.no_grad():
        for name, value in chosen.items():
            value.copy_(adapter[name.replace(":", ".")])
    assert torch.allclose(predicted(merged(base, adapter, scale)), predicted(theirs), atol=1e-5)
    assert (predicted(theirs) - predicted(base)).abs().max() > 1e-3


def test_it_begins_as_the_authors_begin(backbone):
    """B zero, A normal with a deviation of 1 / rank; nothing else is trained, and the seed decides."""
    network = merged(backbone.network, {}, 1.0)
    before = torch.get_rng_state()
    chosen = with_adapter(network, 8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in chosen.values()} and not network.training
    lows = torch.cat([p.flatten() for name, p in chosen.items() if "lora_A" in name])
    assert lows.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert all((p == 0).all() for name, p in chosen.items() if "lora_B" in name)
    again, other = (with_adapter(merged(backbone.network, {}, 1.0), 8, seed=seed) for seed in (1, 2))
    name = next(iter(chosen))
    assert torch.equal(chosen[name], again[name]) and not torch.equal(chosen[name], other[name])


def test_the_first_step_by_hand(backbone, toy_data):
    """AdamW on clipped gradients of both terms, through W + B A without peft; B is 0, so A only decays."""
    recipe = replace(TRAINED, steps=1, matching=0.4, clip=1e-7, lr=0.02, weight_decay=0.1)
    found = tune_adapter(toy_data, backbone, recipe)
    start = with_adapter(merged(backbone.network, {}, 1.0), recipe.rank, recipe.seed)
    start = {name.replace(":", "."): value.detach().clone() for name, value in start.items()}

    class Alone:  # an accelerator's part in dividing batches
        process_index, num_processes, gradient_accumulation_steps = 0, 1, 1

    _, images, labels, generator = next(iter(tuning.Batches(toy_data, range(3), recipe, Alone())))
    with torch.no_grad():
        latents = backbone.vae.encode(images / 127.5 - 1).latent_dist.mean * 0.7
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (4,), generator=generator)
    alpha_bar = backbone.pipe.scheduler.alphas_cumprod[timesteps]
    a = alpha_bar.reshape(-1, 1, 1, 1)
    highs = {layer: torch.zeros(16, 4, requires_grad=True) for layer in LAYERS}
    base = dict(backbone.network.named_parameters())
    changed = {
        f"{layer}.weight": base[f"{layer}.weight"].detach() + high @ start[f"{layer}.lora_A.weight"]
        for layer, high in highs.items()
    }
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    given = torch.tensor([7, 3, 5])[labels]
    eps = functional_call(
        backbone.network, changed, (noisy,), dict(timestep=timesteps, class_labels=given)
    ).sample
    error, summed = tdsdm_losses(eps, noise, alpha_bar, 5.0)
    gradients = torch.autograd.grad(error + 0.4 * 8 / 4 * summed, list(highs.values()))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    assert norm > 1e-3
    for layer, gradient in zip(LAYERS, gradients, strict=True):
        own = gradient * recipe.clip / (norm + 1e-6)
        expected = -recipe.lr * own / (own.abs() + 1e-8)  # Adam's first step
        assert torch.allclose(found[f"{layer}.lora_B.weight"], expected, rtol=1e-2, atol=1e-5)
        low = start[f"{layer}.lora_A.weight"] * (1 - recipe.lr * recipe.weight_decay)
        assert torch.allclose(found[f"{layer}.lora_A.weight"], low, atol=1e-6)


def test_the_loss_falls_and_the_base_stays(backbone, toy_data):
    before = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    found = tune_adapter(toy_data, backbone, replace(TRAINED, steps=60, batch_size=6, lr=3e-2))
    assert all(torch.equal(before[name], value) for name, value in backbone.network.state_dict().items())
    assert set(found) == set(random_adapter())
    how = replace(SHORT, posterior="mean")
    latents = encode(backbone, toy_data.fetch(torch.arange(18)), how, torch.Generator())
    ids, losses = torch.tensor([7, 3, 5])[toy_data.labels], []
    for scale in (0.0, 1.0):
        network, generator, total = (
            merged(backbone.network, found, scale),
            torch.Generator().manual_seed(9),
            0,
        )
        for t in range(50, 1000, 100):
            noise = torch.randn(latents.shape, generator=generator)
            alpha_bar = backbone.alphas_cumprod[torch.full((18,), t)]
            a = alpha_bar.reshape(-1, 1, 1, 1)
            with torch.no_grad():
                eps = network(
                    a.sqrt() * latents + (1 - a).sqrt() * noise,
                    timestep=torch.full((18,), t),
                    class_labels=ids,
                ).sample
            error, summed = tdsdm_losses(eps, noise, alpha_bar, 5.0)
            total += (error + 0.003 * 8 / 18 * summed).item()
        losses.append(total)
    assert losses[1] < 0.95 * losses[0], losses


def test_same_seed_same_adapter(backbone, toy_data):
    before = torch.get_rng_state()
    one, again, other = (
        tune_adapter(toy_data, backbone, replace(TRAINED, seed=seed, steps=3)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], value) for name, value in again.items())
    assert not all(torch.equal(one[name], value) for name, value in other.items())
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_are_dropped_where_that_is_asked_for(backbone, toy_data, monkeypatch):
    seen, noise = [], DiT.noise

    def spy(self, prompt):
        own = noise(self, prompt)

        def predicted(network, noisy, timesteps, labels):
            seen.append(labels.clone())
            return own(network, noisy, timesteps, labels)

        return predicted

    monkeypatch.setattr(DiT, "noise", spy)
    tune_adapter(toy_data, backbone, replace(TRAINED, steps=20, label_dropout=0.5))
    dropped = torch.cat(seen)
    assert 0.3 < (dropped == 3).float().mean() < 0.7
    seen.clear()
    tune_adapter(toy_data, backbone, TRAINED)
    assert torch.cat(seen).max() == 2


# --- interrupted


def test_an_interrupted_training_ends_with_the_same_adapter(backbone, toy_data, tmp_path, monkeypatch):
    whole = tune_adapter(toy_data, backbone, TRAINED)
    monkeypatch.setattr(tuning, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(tuning, "SAVE_TIMES", 0.0)
    state, step, taken = tmp_path / "state.safetensors", AdapterTraining.step, []

    def cut(self, number, *rest):
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTraining, "step", cut)
        with pytest.raises(KeyboardInterrupt, match="4 of 6 steps are in .*; run the same again"):
            tune_adapter(toy_data, backbone, TRAINED, state=state)
    monkeypatch.setattr(
        AdapterTraining, "step", lambda self, number, *rest: taken.append(number) or step(self, number, *rest)
    )
    found = tune_adapter(toy_data, backbone, TRAINED, state=state)
    assert taken == [4, 5] and all(torch.equal(found[name], value) for name, value in whole.items())
    again = tune_adapter(toy_data, backbone, TRAINED, state=state)
    assert taken == [4, 5] and all(torch.equal(again[name], value) for name, value in whole.items())
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    with pytest.raises(
        ValueError, match=r"training of another adapter: adapter\.lr = 0\.01, wanted 0\.1; cho"
    ):
        tune_adapter(toy_data, backbone, replace(TRAINED, lr=0.1), state=state)
    with pytest.raises(
        ValueError, match=r"another adapter: adapter\.rank = 4, wanted 2; choose another file"
    ):
        tune_adapter(toy_data, backbone, replace(TRAINED, rank=2), state=state)


def test_a_loss_that_is_not_finite_stops_it(backbone, toy_data):
    with torch.no_grad():
        backbone.network.proj_out_2.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 0; lower lr \(0\.01\)"):
        tune_adapter(toy_data, backbone, TRAINED)


# --- the images


def drawn(data, ipc, seed, label):
    return data.per_class(ipc, seed).of_class(label)


def test_at_strength_0_they_are_random_s_images_through_the_autoencoder(backbone, toy_data):
    own = replace(SHORT, strength=0.0)
    chosen = rerendering(toy_data, backbone, random_adapter(), 2, own, seed=4, device="cpu")
    for label in range(3):
        latents = encode(backbone, drawn(toy_data, 2, 4, label), own, torch.Generator())
        assert torch.equal(chosen(label), to_uint8(backbone.pipe.decode(latents)))


def test_half_of_the_adapter_takes_part(backbone, toy_data):
    def images(adapter, **changed):
        own = replace(SHORT, **changed)
        return rerendering(toy_data, backbone, adapter, 2, own, seed=0, device="cpu")(1)

    without, half = images({}), images(random_adapter())
    assert torch.equal(images(random_adapter(), adapter_scale=0.0), without)
    assert (half.int() - without.int()).abs().max() > 3
    doubled = {name: 2 * value if "lora_B" in name else value for name, value in random_adapter().items()}
    assert torch.equal(images(doubled, adapter_scale=0.25), half)
    assert torch.equal(
        backbone.network.state_dict()["proj_out_2.bias"], backbone.pipe.transformer.proj_out_2.bias
    )


def test_the_whole_method(backbone, toy_data, tmp_path, monkeypatch):
    """Its adapter is trained once: other sets read the finished one."""
    state = tmp_path / "state.safetensors"
    before = torch.get_rng_state()
    found = tdsdm(toy_data, backbone, 2, SHORT, seed=3, state=state)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.classes == toy_data.classes
    assert (found.name, found.split, found.image_size) == ("toy", "TDSDM, ipc 2, seed 3", 16)
    monkeypatch.setattr(AdapterTraining, "step", lambda *_: pytest.fail("trained again"))
    some = tdsdm(toy_data, backbone, 2, SHORT, labels=[2, 0], seed=3, state=state)
    assert some.labels.tolist() == [2, 2, 0, 0]
    assert all(torch.equal(some.of_class(label), found.of_class(label)) for label in (0, 2))
    other = tdsdm(toy_data, backbone, 2, SHORT, seed=4, state=state)
    assert not torch.equal(other.fetch(torch.arange(6)), found.fetch(torch.arange(6)))


def test_on_stable_diffusion(tiny_sd, tiny, toy_data):
    """An adapter of self- and cross-attention, told "photo of NAME"; images by another prompt."""
    backbone = StableDiffusion(tiny_sd(tiny().vae), ("tench", "dog", "church"))
    asked, encode_prompt = [], backbone.pipe.encode_prompt
    backbone.pipe.encode_prompt = lambda text, *rest: asked.append(text) or encode_prompt(text, *rest)
    adapter = tune_adapter(toy_data, backbone, replace(TRAINED, steps=2))
    assert asked == ["photo of tench", "photo of dog", "photo of church", ""]
    layers = {name.rsplit(".lora_", 1)[0] for name in adapter}
    assert {name.split(".")[-2 if name[-1] != "0" else -3] for name in layers} == {"attn1", "attn2"}
    assert {name.split("attn")[1][2:] for name in layers} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert all(value.abs().sum() > 0 for value in adapter.values())
    chosen = rerendering(toy_data, backbone, adapter, 2, SHORT, seed=0, device="cpu")
    with torch.no_grad():
        direct = rerendering(toy_data, backbone, {}, 2, SHORT, seed=0, device="cpu")
    assert chosen(0).shape == (2, 3, 16, 16) and not torch.equal(chosen(0), direct(0))


@torch.no_grad()
def test_stable_diffusion_is_told_each_image_s_own_prompt(tiny_sd, tiny):
    backbone = StableDiffusion(tiny_sd(tiny().vae), ("tench", "dog", "church"))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, pipe = torch.tensor([10, 700]), backbone.pipe
    found = backbone.noise("photo of {}")(pipe.unet, z, t, torch.tensor([2, 3]))
    texts = [pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("photo of church", "")]
    expected = pipe.unet(z, t, encoder_hidden_states=torch.cat(texts)).sample
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, backbone.noise("photo of {}")(pipe.unet, z, t, torch.tensor([0, 3])))


# --- settings


def test_the_authors_settings():
    found, own = TDSDM.paper("imagenet", 10), Adapter()
    assert (found.strength, found.cfg_scale, found.num_steps, found.solver) == (0.75, 2.0, 30, "unipc")
    assert found.adapter_scale == 0.5 and found.adapter == own and found == TDSDM()
    assert (own.rank, own.lr, own.weight_decay, own.clip, own.batch_size) == (4, 1e-4, 0.01, 1.0, 8)
    assert (own.epochs, own.steps, own.snr_cap, own.matching, own.seed) == (100, None, 5.0, 0.003, 42)
    small, dit = TDSDM.small(10), TDSDM.dit("imagenet", 10)
    assert small == replace(dit, posterior="mean", adapter=small.adapter) and dit.strength == 0.55
    changed = {f.name for f in fields(Adapter) if getattr(small.adapter, f.name) != getattr(own, f.name)}
    assert changed == {"steps", "batch_size", "posterior", "resize"}
    assert set(asdict(small)["adapter"]) == {f.name for f in fields(Adapter)}


def test_what_does_not_fit_is_refused(backbone, toy_data, monkeypatch):
    """Before anything is trained."""
    monkeypatch.setattr(AdapterTraining, "step", lambda *_: pytest.fail("trained first"))
    with pytest.raises(
        ValueError, match=r"ipc is 1 \.\.\. 6, which the smallest class has, got 7: take fewer"
    ):
        tdsdm(toy_data, backbone, 7, SHORT)
    with pytest.raises(ValueError, match="is told 2 classes, toy has 3"):
        tdsdm(toy_data, replace(backbone, ids=(1, 2)), 2, SHORT)
    with pytest.raises(ValueError, match="ddpm would take a variance that the adapter was not trained for"):
        replace(SHORT, solver="ddpm")
    with pytest.raises(ValueError, match="the last adapter is kept, as in the authors' code: ema is 0"):
        replace(TRAINED, ema=0.9)
    for wrong in (dict(rank=0), dict(snr_cap=0.0), dict(matching=-1.0), dict(clip=0.0)):
        with pytest.raises(ValueError, match="rank is at least 1, snr_cap and clip are above 0, matching is"):
            replace(TRAINED, **wrong)
    with pytest.raises(ValueError, match="a prompt has one {}"):
        replace(TRAINED, prompt="photo")


def test_a_network_without_attention_is_refused():
    with pytest.raises(ValueError, match="to_q"):
        with_adapter(nn.Sequential(nn.Linear(2, 2)), 4, seed=0)


def test_a_model_that_predicts_no_noise_is_refused(backbone, toy_data):
    backbone.pipe.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="a model that predicts noise is needed, not 'v_prediction'"):
        tune_adapter(toy_data, backbone, TRAINED)
