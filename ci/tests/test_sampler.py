"""Algorithm 1: equal to diffusers without guidance, equal to a straight-line reference with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

import reference
from igd_lib.config import PAPER, RELEASED, STANDARD, Fidelity, Guidance
from igd_lib.distillation import image_generator
from igd_lib.guidance import influence_loss
from igd_lib.guides import Guide, Influence, SecondChain, other_noise
from igd_lib.models.networks import network
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampler import Denoiser, sample, sample_igd
from igd_lib.schedulers import make_scheduler
from igd_lib.surrogate import class_gradients, train_surrogate

GUIDANCE = Guidance(k=5.0, gamma=7.5, guided_range=(3, 6))  # gamma 120 for 256 latent values instead of 4096
DDIM_PAPER = replace(PAPER, rho_factor=0.0015)  # with the literal factor 1, latents fly off
LABELS, TARGETS = torch.tensor([7, 985, 7]), torch.tensor([0, 2, 0])


def generators(count=3):
    return [image_generator(0, 0, index) for index in range(count)]


def noise(count=3, dtype=torch.float32):
    return torch.stack(
        [
            torch.randn(4, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(index))
            for index in range(count)
        ]
    )


def scheduler_of(models, fidelity):
    return make_scheduler(
        fidelity, models.ddim.config, learned_variance=models.transformer.config.out_channels == 8
    )


@pytest.fixture(scope="module")
def guided(toy):
    """Factory: keywords of a guided run of three images; the second has no memory, the others three."""

    def make(dtype=torch.float32):
        case = toy(dtype)
        own = case.gradients[:, TARGETS]
        z = noise(dtype=dtype)
        others = torch.randn(2, 2, 4, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(9))
        # The oldest memory of a sample is its own noise: by far the nearest, unless the FIFO drops it.
        memory = [torch.cat([z[:1], others[0]]), z[:0], torch.cat([z[2:], others[1]])]
        return dict(
            targets=TARGETS,
            guidance=GUIDANCE,
            checkpoints=case.checkpoints,
            gradients=own,
            memory=memory,
            num_steps=10,
        )

    return make


def rows(options, chosen):
    """The keywords of some of the three images."""
    chosen = list(chosen)
    return options | dict(
        targets=TARGETS[chosen],
        gradients=options["gradients"][:, chosen],
        memory=[options["memory"][i] for i in chosen],
    )


# --- without guidance


@pytest.mark.parametrize("out_channels", [4, 8])
def test_unguided_equals_diffusers_pipeline(tiny, out_channels):
    models = tiny(out_channels=out_channels)
    fidelity = Fidelity(solver="configured", cfg_channels=None)
    theirs = DiTPipeline(models.transformer, models.vae, models.ddim)
    theirs.set_progress_bar_config(disable=True)
    options = dict(guidance_scale=4.0, num_inference_steps=6, output_type="np")
    expected = theirs([7, 985, 7], generator=generators(), **options).images
    ours = IGDPipeline(models.transformer, models.vae, models.ddim)
    found = ours([7, 985, 7], generator=generators(), fidelity=fidelity, **options).images
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # The function itself, on the same noise and scheduler.
    latents = sample_igd(
        models.transformer,
        models.vae,
        models.ddim,
        ours.latent_noise(generators()),
        LABELS,
        num_steps=6,
        fidelity=fidelity,
    )
    np.testing.assert_allclose(
        (ours.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), expected, atol=1e-4
    )


def test_unguided_equals_diffusers_pipeline_on_the_stand_in(standin_pipe):
    """At cfg 1, since diffusers' pipeline hard-codes the null class of 1000 classes."""
    scheduler = DDIMScheduler.from_config(standin_pipe.scheduler.config, clip_sample=False)
    theirs = DiTPipeline(standin_pipe.transformer, standin_pipe.vae, scheduler)
    theirs.set_progress_bar_config(disable=True)
    ours = IGDPipeline(standin_pipe.transformer, standin_pipe.vae, scheduler)
    options = dict(guidance_scale=1.0, num_inference_steps=8, output_type="np")
    expected = theirs([0, 5, 9], generator=generators(), **options).images
    found = ours([0, 5, 9], generator=generators(), fidelity=Fidelity(solver="configured"), **options).images
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("fidelity", [STANDARD, DDIM_PAPER], ids=["ddpm", "ddim"])
def test_zero_guidance_is_exactly_unguided(tiny, guided, fidelity):
    models = tiny()
    scheduler = scheduler_of(models, fidelity)
    plain = sample_igd(
        models.transformer,
        models.vae,
        scheduler,
        noise(),
        LABELS,
        num_steps=10,
        fidelity=fidelity,
        generator=generators(),
    )
    options = guided() | dict(guidance=Guidance(0.0, 0.0, (3, 6)))
    zero = sample_igd(
        models.transformer,
        models.vae,
        scheduler,
        noise(),
        LABELS,
        fidelity=fidelity,
        generator=generators(),
        **options,
    )
    assert torch.equal(plain, zero)


def test_cfg_channels_leave_the_rest_conditional(tiny):
    """One DDIM step: with 3 guided channels the 4th comes from the conditional prediction alone."""
    models, z = tiny(dtype=torch.float64), noise(dtype=torch.float64)
    scheduler = DDIMScheduler.from_config(models.ddim.config, timestep_spacing="trailing")

    def one_step(cfg_scale, cfg_channels):
        fidelity = Fidelity(solver="ddim", cfg_channels=cfg_channels)
        return sample_igd(
            models.transformer,
            models.vae,
            scheduler,
            z,
            LABELS,
            num_steps=1,
            cfg_scale=cfg_scale,
            fidelity=fidelity,
        )

    released, everything, conditional = one_step(4.0, 3), one_step(4.0, None), one_step(1.0, None)
    torch.testing.assert_close(released[:, :3], everything[:, :3], rtol=0, atol=0)
    torch.testing.assert_close(released[:, 3], conditional[:, 3])
    assert not torch.allclose(released[:, 3], everything[:, 3])


def test_the_label_and_the_null_class_matter(tiny):
    models = tiny()
    found = sample_igd(
        models.transformer,
        models.vae,
        models.ddim,
        noise(1).expand(2, -1, -1, -1),
        torch.tensor([1, 2]),
        num_steps=4,
    )
    assert not torch.allclose(found[0], found[1], rtol=1e-2)


@pytest.mark.parametrize("num_classes", [10, 1000])
def test_the_null_class_is_the_transformers_own(tiny, guided, num_classes):
    """Unguided sampling of a transformer of any number of classes, against the reference."""
    models, options = tiny(num_classes=num_classes, dtype=torch.float64), guided(torch.float64)
    z = noise(dtype=torch.float64)
    found = sample_igd(
        models.transformer, models.vae, models.ddim, z, torch.tensor([7, 3, 7]), num_steps=5, fidelity=PAPER
    )
    expected = reference.trajectory(
        models,
        models.ddim,
        z[1],
        3,
        0,
        options["checkpoints"],
        None,
        z[:0],
        Guidance(0.0, 0.0, (99, 99)),
        PAPER,
        cfg=4.0,
        steps=5,
    )
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-5)


def test_ddpm_noise_comes_from_each_sample_own_generator(tiny):
    models = tiny()

    def run(order):
        own = [generators()[index] for index in order]
        return sample_igd(
            models.transformer,
            models.vae,
            models.ddpm,
            noise()[order],
            LABELS[order],
            num_steps=5,
            generator=own,
        )

    torch.testing.assert_close(run([2, 0, 1]), run([0, 1, 2])[[2, 0, 1]], rtol=1e-3, atol=1e-4)


# --- the whole guided trajectory

CASES = {
    "standard": (STANDARD, 4, "full"),
    "paper, small factor": (DDIM_PAPER, 4, "full"),
    "learned variance": (STANDARD, 8, "full"),
    "released": (RELEASED, 8, "full"),
    "second chain, short memory": (replace(STANDARD, second_chain=True, memory_size=2), 4, "full"),
    "second chain, decoder Jacobian": (replace(STANDARD, second_chain=True, solver="ddim"), 8, "decoder"),
    "decoder Jacobian": (DDIM_PAPER, 4, "decoder"),
    "conditional eps, all channels": (replace(STANDARD, eps="conditional", cfg_channels=None), 4, "full"),
    "a backward pass a checkpoint": (replace(STANDARD, backward="per_checkpoint"), 4, "full"),
    "clamped images": (replace(STANDARD, clamp_images=True), 4, "full"),
    "DDIM on the released code's timesteps": (replace(STANDARD, solver="ddim"), 4, "full"),
    "the range counted from 1": (replace(STANDARD, range_counts_from=1), 4, "full"),
}


@pytest.mark.parametrize("name", CASES)
def test_guided_trajectory_equals_the_reference(tiny, guided, name):
    """In double precision, image by image, from the paper's formulas; the noise schedule is shared."""
    fidelity, out_channels, jacobian = CASES[name]
    models, options = tiny(out_channels=out_channels, dtype=torch.float64), guided(torch.float64)
    scheduler = scheduler_of(models, fidelity)
    z = noise(dtype=torch.float64)
    found = sample_igd(
        models.transformer,
        models.vae,
        scheduler,
        z,
        LABELS,
        fidelity=fidelity,
        jacobian=jacobian,
        generator=generators(),
        **options,
    )
    plain = sample_igd(
        models.transformer,
        models.vae,
        scheduler,
        z,
        LABELS,
        fidelity=fidelity,
        generator=generators(),
        num_steps=10,
    )
    for b in range(3):
        expected = reference.trajectory(
            models,
            scheduler,
            z[b],
            int(LABELS[b]),
            int(TARGETS[b]),
            options["checkpoints"],
            options["gradients"][:, b],
            options["memory"][b],
            GUIDANCE,
            fidelity,
            cfg=4.0,
            steps=10,
            jacobian=jacobian,
            generator=generators()[b],
            second_generator=other_noise(generators()[b]),
        )
        torch.testing.assert_close(found[b], expected, rtol=1e-4, atol=1e-5)
        # The guidance is far larger than that tolerance.
        effect = (found[b] - plain[b]).abs().max()
        assert effect > 0.02 and (found[b] - expected).abs().max() < 1e-3 * effect


LETTER = {  # the settings to the letter, the released ones also with DDIM; k makes PAPER's factor of 1 usable
    "released": (RELEASED, 5.0),
    "released, DDIM": (replace(RELEASED, solver="ddim"), 5.0),
    "standard": (STANDARD, 5.0),
    "paper": (PAPER, 0.0075),
}


@pytest.mark.parametrize("name", LETTER)
def test_guided_trajectory_of_50_steps_equals_the_reference(tiny, guided, name):
    """At the paper's steps and range, with a learned variance, to 1e-6."""
    fidelity, k = LETTER[name]
    guidance = Guidance(k, 7.5, (30, 45))
    models = tiny(out_channels=8, dtype=torch.float64)
    options = guided(torch.float64) | dict(guidance=guidance, num_steps=50)
    scheduler, z = scheduler_of(models, fidelity), noise(dtype=torch.float64)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()  # diffusers' are single precision
    others = {"guidance": None} if name in ("standard", "paper") else {}
    found, other = (
        sample_igd(
            models.transformer,
            models.vae,
            scheduler,
            z,
            LABELS,
            fidelity=own,
            generator=generators(),
            **(options | change),
        )
        for own, change in ((fidelity, {}), (replace(fidelity, second_chain=False), others))
    )
    for b in (0, 1):
        expected = reference.trajectory(
            models,
            scheduler,
            z[b],
            int(LABELS[b]),
            int(TARGETS[b]),
            options["checkpoints"],
            options["gradients"][:, b],
            options["memory"][b],
            guidance,
            fidelity,
            cfg=4.0,
            steps=50,
            generator=generators()[b],
            second_generator=other_noise(generators()[b]),
        )
        torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-6)
        assert (found[b] - other[b]).abs().max() > 1e-3  # guidance, or the second chain, is far more


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_the_second_chain_depends_on_its_sample_alone(tiny, guided, solver):
    """Whatever the batch and its order, and with schedulers that remember earlier steps."""
    models, options = tiny(out_channels=8, dtype=torch.float64), guided(torch.float64)
    fidelity = replace(RELEASED, solver=solver)

    def run(chosen):
        return sample_igd(
            models.transformer,
            models.vae,
            scheduler_of(models, fidelity),
            noise(dtype=torch.float64)[chosen],
            LABELS[chosen],
            fidelity=fidelity,
            generator=[generators()[index] for index in chosen],
            **rows(options, chosen),
        )

    whole = run([0, 1, 2])
    torch.testing.assert_close(run([2, 0]), whole[[2, 0]], rtol=0, atol=1e-9)
    torch.testing.assert_close(run([1]), whole[[1]], rtol=0, atol=1e-9)


def test_the_second_chain_is_an_unguided_one_of_its_own(tiny, guided):
    """It ends where the scheduler alone leads the same noise, given the other half's predictions."""
    models, options = tiny(out_channels=8, dtype=torch.float64), guided(torch.float64)
    scheduler = scheduler_of(models, RELEASED)
    chain = SecondChain(scheduler, generators())
    guide = Influence(
        GUIDANCE,
        options["checkpoints"],
        options["gradients"],
        TARGETS,
        models.vae,
        RELEASED,
        second_chain=chain,
    )
    seen = []

    class Watch(Guide):
        def after(self, step):
            variance = step.other_variance
            assert variance is not None and not torch.equal(variance, step.variance)
            seen.append((step.timestep, torch.cat([step.other, variance], dim=1).detach()))

        def covers(self, index):
            return False

    denoiser = Denoiser(models.transformer, LABELS, 4.0, 3)
    z = noise(dtype=torch.float64)
    sample(denoiser, scheduler, z, guides=[guide, Watch()], num_steps=10, generator=generators())
    again = scheduler_of(models, RELEASED)
    again.set_timesteps(10)
    own, latents = [other_noise(generator) for generator in generators()], z
    for timestep, output in seen:
        latents = again.step(output, timestep, latents, generator=own).prev_sample
    torch.testing.assert_close(chain.latents, latents, rtol=0, atol=1e-12)
    assert (chain.latents - z).abs().max() > 0.1


def test_noise_of_the_second_chain_leaves_the_samples_noise_alone():
    """Derived from what a generator is about to draw: the same each time, other values, nothing drawn."""
    one, two = image_generator(0, 0, 1), image_generator(0, 0, 1)
    first = torch.randn(100, generator=other_noise(one))
    assert torch.equal(first, torch.randn(100, generator=other_noise(one)))
    assert torch.equal(torch.randn(100, generator=one), own := torch.randn(100, generator=two))
    assert not torch.equal(first, own)
    assert not torch.equal(first, torch.randn(100, generator=other_noise(one)))  # it has gone on
    assert other_noise(None) is None


def test_each_fidelity_field_changes_the_result(tiny, guided):
    """So the reference test above would notice a field that is ignored."""
    models, options = tiny(dtype=torch.float64), guided(torch.float64)

    def run(**changes):
        fidelity = replace(STANDARD, **changes)
        return sample_igd(
            models.transformer,
            models.vae,
            scheduler_of(models, fidelity),
            noise(dtype=torch.float64),
            LABELS,
            fidelity=fidelity,
            generator=generators(),
            **options,
        )

    base = run()
    for change in (
        {"solver": "ddim"},
        {"timestep_spacing": "leading"},
        {"cfg_channels": None},
        {"rho_factor": 0.01},
        {"eps": "conditional"},
        {"second_chain": True},
        {"cosine_floor": 0.5},
        {"memory_size": 2},
        {"clamp_images": True},
        {"range_counts_from": 1},
        {"solver": "dpmsolver++"},
        {"solver": "unipc"},
    ):
        assert (run(**change) - base).abs().max() > 1e-3, change


def test_memory_keeps_the_last_entries(tiny, guided):
    models, options = tiny(), guided()
    fidelity = replace(STANDARD, memory_size=2)
    runs = [
        sample_igd(
            models.transformer,
            models.vae,
            scheduler_of(models, STANDARD),
            noise(),
            LABELS,
            fidelity=f,
            generator=generators(),
            **o,
        )
        for f, o in (
            (fidelity, options),
            (STANDARD, options | dict(memory=[m[-2:] for m in options["memory"]])),
        )
    ]
    assert torch.equal(*runs)


def test_recomputing_activations_gives_the_same_latents(tiny, guided):
    """diffusers' gradient checkpointing: a guided step's blocks run once more, the result is the same."""
    models = tiny()
    found, calls = [], []
    models.transformer.transformer_blocks[0].attn1.register_forward_hook(lambda *_: calls.append(1))
    for recompute, expected in ((False, 10), (True, 14)):
        if recompute:
            models.transformer.enable_gradient_checkpointing()
            models.vae.enable_gradient_checkpointing()
        calls.clear()
        scheduler = scheduler_of(models, STANDARD)
        found.append(
            sample_igd(
                models.transformer, models.vae, scheduler, noise(), LABELS, generator=generators(), **guided()
            )
        )
        assert len(calls) == expected
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_decoder_jacobian_differs_from_full(tiny, guided):
    models, options = tiny(), guided()
    found = [
        sample_igd(
            models.transformer,
            models.vae,
            models.ddpm,
            noise(),
            LABELS,
            jacobian=j,
            generator=generators(),
            **options,
        )
        for j in ("full", "decoder")
    ]
    assert (found[0] - found[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="'full' or 'decoder'"):
        sample_igd(models.transformer, models.vae, models.ddpm, noise(), LABELS, jacobian="none", **options)


# --- shortcuts


def shifts(tiny, guided, **options):
    """Sample with the tiny models: latents, influence shift and loss by index, where there was one."""
    models, seen, losses = tiny(dtype=torch.float64), [], {}

    def callback(index, timestep, info):
        if "influence_shift" in info:
            seen.append((index, info["influence_shift"]))
        if "influence_loss" in info:
            losses[index] = info["influence_loss"]

    found = sample_igd(
        models.transformer,
        models.vae,
        scheduler_of(models, STANDARD),
        noise(dtype=torch.float64),
        LABELS,
        generator=generators(),
        callback=callback,
        **(guided(torch.float64) | options),
    )
    return found, dict(seen), losses


def test_a_gradient_is_used_again_between_every_mth_step(tiny, guided):
    """Computed in every third guided step; in between its direction stays and its length is rho_t's own."""
    options = dict(guidance=Guidance(5.0, 0.0, (2, 8)), memory=None)
    whole, every_step, _ = shifts(tiny, guided, **options)
    found, reused, losses = shifts(tiny, guided, every=3, **options)
    assert list(reused) == list(every_step) == [8, 7, 6, 5, 4, 3, 2] and list(losses) == [8, 5, 2]
    torch.testing.assert_close(reused[8], every_step[8])

    def cosines(a, b):
        return torch.cosine_similarity(a.flatten(1), b.flatten(1))

    for index, source in ((7, 8), (6, 8), (4, 5), (3, 5)):
        torch.testing.assert_close(cosines(reused[index], reused[source]), torch.ones(3, dtype=torch.float64))
        # rho_t's length: k * factor * sqrt(1 - alpha_bar) * ||eps||, close to that with fresh gradients.
        assert (reused[index].norm() / every_step[index].norm() - 1).abs() < 0.05 and not torch.allclose(
            reused[index], reused[source], rtol=1e-3
        )
    assert cosines(reused[7], every_step[7]).max() < 0.99999
    assert (found - whole).abs().max() > 1e-4


def test_checkpoints_enter_in_turn(tiny, guided):
    """One of three a step: the first step's loss is the first checkpoint's, and so on; all is the default."""
    options = dict(guidance=Guidance(5.0, 0.0, (2, 8)), memory=None)
    toy = guided(torch.float64)
    _, _, all_of_them = shifts(tiny, guided, **options)
    _, _, three = shifts(tiny, guided, checkpoints_per_step=3, **options)
    _, _, losses = shifts(tiny, guided, checkpoints_per_step=1, **options)
    for index in all_of_them:
        torch.testing.assert_close(three[index], all_of_them[index], rtol=0, atol=0)
    singles = []
    for e in range(3):
        one = dict(checkpoints=toy["checkpoints"].keep([e]), gradients=toy["gradients"][[e]])
        singles.append(shifts(tiny, guided, **options, **one)[2][8] * toy["checkpoints"].weights[e])
    torch.testing.assert_close(losses[8], singles[0])
    torch.testing.assert_close(sum(singles) / 3, all_of_them[8])  # Eq. 7 is their mean
    assert not torch.allclose(losses[7], losses[8], rtol=1e-2)


def test_another_decoder_guides_in_the_vaes_place(tiny, guided):
    """The vae itself changes nothing; another decoder changes the gradient, and is left as it was."""
    same, _, _ = shifts(tiny, guided, guidance_decoder=tiny(dtype=torch.float64).vae)
    plain, _, _ = shifts(tiny, guided)
    torch.testing.assert_close(same, plain, rtol=0, atol=0)
    other = AutoencoderTiny(
        decoder_block_out_channels=(8, 8),
        encoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).double()
    found, _, _ = shifts(tiny, guided, guidance_decoder=other)
    assert (found - plain).abs().max() > 1e-4 and all(
        parameter.requires_grad and parameter.grad is None for parameter in other.parameters()
    )


@pytest.mark.parametrize("shortcut", [{"every": 2}, {"checkpoints_per_step": 1}, {"jacobian": "decoder"}])
def test_shortcuts_do_not_depend_on_the_batch(tiny, guided, shortcut):
    whole, _, _ = shifts(tiny, guided, **shortcut)
    models, options = tiny(dtype=torch.float64), guided(torch.float64)
    for b in range(3):
        alone = sample_igd(
            models.transformer,
            models.vae,
            scheduler_of(models, STANDARD),
            noise(dtype=torch.float64)[[b]],
            LABELS[[b]],
            generator=[generators()[b]],
            **(rows(options, [b]) | shortcut),
        )
        torch.testing.assert_close(alone[0], whole[b], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shortcut", [{"every": 0}, {"checkpoints_per_step": 0}])
def test_impossible_shortcuts_raise(tiny, guided, shortcut):
    with pytest.raises(ValueError, match="at least 1"):
        shifts(tiny, guided, **shortcut)


@pytest.mark.parametrize("fidelity", [STANDARD, DDIM_PAPER], ids=["ddpm", "ddim"])
def test_guided_result_does_not_depend_on_the_batch(tiny, guided, fidelity):
    models, options = tiny(), guided()
    scheduler = scheduler_of(models, fidelity)
    together = sample_igd(
        models.transformer,
        models.vae,
        scheduler,
        noise(),
        LABELS,
        fidelity=fidelity,
        generator=generators(),
        **options,
    )
    for b in range(3):
        alone = sample_igd(
            models.transformer,
            models.vae,
            scheduler,
            noise()[b : b + 1],
            LABELS[b : b + 1],
            fidelity=fidelity,
            generator=generators()[b : b + 1],
            **rows(options, [b]),
        )
        assert (alone[0] - together[b]).norm() < 1e-3 * together[b].norm()


@pytest.mark.slow
def test_batches_of_1_3_and_10_on_the_stand_in(standin_pipe, early_surrogate):
    """In single precision: final latents to 1e-3 relative; one step's influence gradient to 5e-6.

    At Table 12's strength. The gradient of a ReLU network jumps where rounding flips a unit, so single
    gradients may differ by more (2e-4 has been seen): their median is what is held to 5e-6. At six times
    that strength the jumps add up to 3e-3 in the latents of one image in ten.
    """
    checkpoints, gradients = early_surrogate
    labels, memory = torch.arange(10), list(noise(20).reshape(10, 2, 4, 8, 8))

    def run(size, scheduler, steps, guided_range):
        latents, shifts = [], []
        for part in labels.split(size):
            own, seen = [image_generator(0, int(label), 0) for label in part], {}
            latents.append(
                sample_igd(
                    standin_pipe.transformer,
                    standin_pipe.vae,
                    scheduler,
                    standin_pipe.latent_noise(own),
                    part,
                    targets=part,
                    guidance=Guidance(5.0, 7.5, guided_range),
                    checkpoints=checkpoints,
                    gradients=gradients[:, part],
                    memory=[memory[label] for label in part],
                    num_steps=steps,
                    generator=own,
                    callback=lambda index, t, info, seen=seen: seen.update({index: info}),
                )
            )
            shifts.append(seen[guided_range[1]]["influence_shift"])
        return torch.cat(latents).flatten(1), torch.cat(shifts).flatten(1)

    def difference(found, expected):
        return (found - expected).norm(dim=1) / expected.norm(dim=1)

    whole = (standin_pipe.scheduler_for(STANDARD), 25, (15, 22))
    # A schedule that starts where guidance does, so that its gradient is taken at the very same z_t.
    start = (
        make_scheduler(STANDARD, {**standin_pipe.scheduler.config, "num_train_timesteps": 300}),
        2,
        (1, 1),
    )
    alone, first = run(1, *whole)[0], run(1, *start)[1]
    for size in (3, 10):
        assert difference(run(size, *whole)[0], alone).max() < 1e-3
        assert difference(run(size, *start)[1], first).median() < 5e-6


def test_guidance_acts_only_inside_the_guided_range(tiny, guided):
    """The latents before the range equal the unguided ones; one-step ranges at both ends are reached."""
    models, options = tiny(), guided()

    def latents_by_index(guidance):
        seen = {}
        run = options | dict(guidance=guidance)
        sample_igd(
            models.transformer,
            models.vae,
            models.ddim,
            noise(),
            LABELS,
            callback=lambda i, t, info: seen.update({i: info["latents"]}),
            **run,
        )
        return seen

    plain = latents_by_index(None)
    assert list(plain) == list(range(9, -1, -1))
    for index in (9, 4, 0):
        found = latents_by_index(Guidance(5.0, 7.5, (index, index)))
        same = [i for i in range(10) if torch.equal(found[i], plain[i])]
        assert same == list(range(index + 1, 10))


def test_callback_reports_the_losses_of_guided_steps(tiny, guided):
    models, options = tiny(), guided()
    seen = {}
    sample_igd(
        models.transformer,
        models.vae,
        models.ddpm,
        noise(),
        LABELS,
        callback=lambda i, t, info: seen.update({i: (t, info)}),
        **options,
    )
    assert [seen[i][0] for i in range(9, -1, -1)] == models.ddpm.timesteps.tolist()
    for index, (_, info) in seen.items():
        assert ("influence_loss" in info) == ("deviation_loss" in info) == (3 <= index <= 6)
    assert seen[6][1]["influence_loss"].shape == seen[6][1]["deviation_loss"].shape == (3,)
    assert seen[6][1]["deviation_loss"][1] == 0  # an empty memory


# --- direction, on the stand-in


@pytest.fixture(scope="module")
def early_surrogate(fashion_train):
    """Two checkpoints of a ConvNet-3's first epoch on 400 images, and its class gradients (2, 10, P)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network("convnet3", num_classes=10, image_size=32)
    few = fashion_train.per_class(40, seed=0)
    checkpoints = train_surrogate(model, few, epochs=1, saves_in_first_epoch=3).keep([0, 2])
    return checkpoints, torch.stack(
        [class_gradients(checkpoints, few.of_class(label), label) for label in range(10)], dim=1
    )


@pytest.mark.parametrize(
    "solver",
    [
        "ddpm",
        "dpmsolver++",
        pytest.param("ddim", marks=pytest.mark.slow),
        pytest.param("unipc", marks=pytest.mark.slow),
    ],
)
def test_more_guidance_lowers_the_influence_loss(standin_pipe, early_surrogate, solver):
    """Images of one noise come nearer to their class's gradient; the flipped sign would raise the loss."""
    checkpoints, gradients = early_surrogate
    labels = torch.arange(10)
    fidelity = replace(STANDARD, rho_factor=1.0, solver=solver)
    scheduler = standin_pipe.scheduler_for(fidelity)

    def loss(k):
        own = [image_generator(0, label, 0) for label in range(10)]
        latents = sample_igd(
            standin_pipe.transformer,
            standin_pipe.vae,
            scheduler,
            standin_pipe.latent_noise(own),
            labels,
            targets=labels,
            guidance=Guidance(k, 0.0, (4, 11)),
            checkpoints=checkpoints,
            gradients=gradients,
            num_steps=16,
            cfg_scale=1.5,
            fidelity=fidelity,
            generator=own,
        )
        images = standin_pipe.decode(latents).clamp(-1, 1)
        with torch.no_grad():
            return influence_loss(images, labels, checkpoints, gradients).mean().item()

    none, small, medium = loss(0.0), loss(0.01), loss(0.04)
    assert small < 0.98 * none
    assert medium < 0.98 * small


# --- what it leaves behind, and errors


def test_parameters_are_left_as_they_were(tiny, guided):
    models, options = tiny(), guided()
    first, *_, last = models.transformer.parameters()
    first.requires_grad_(False)
    before = [p.requires_grad for p in models.transformer.parameters()]
    sample_igd(models.transformer, models.vae, models.ddpm, noise(), LABELS, **options)
    assert [p.requires_grad for p in models.transformer.parameters()] == before and last.requires_grad
    modules = (models.transformer, models.vae, options["checkpoints"].model)
    assert all(p.grad is None for module in modules for p in module.parameters())
    # Also when the run fails, in a guided step.
    options["gradients"] = options["gradients"] * float("nan")
    with pytest.raises(FloatingPointError, match="after guided step 6; lower k or gamma"):
        sample_igd(models.transformer, models.vae, models.ddpm, noise(), LABELS, **options)
    assert [p.requires_grad for p in models.transformer.parameters()] == before


@pytest.mark.parametrize("guidance", [GUIDANCE, None], ids=["before the guided range", "unguided"])
def test_latents_that_are_not_finite_stop_an_unguided_step(tiny, guided, guidance):
    """The first step, which nothing guides: its weights or its precision are at fault, not the guidance."""
    models, options = tiny(), guided() | dict(guidance=guidance)
    with pytest.raises(FloatingPointError, match=r"not finite after step 9: check the transformer's weights"):
        sample_igd(models.transformer, models.vae, models.ddpm, noise() * float("nan"), LABELS, **options)
    assert all(p.requires_grad for p in models.transformer.parameters())


def test_training_mode_raises(tiny):
    models = tiny()
    with pytest.raises(ValueError, match=r"\.eval\(\)"):
        sample_igd(models.transformer.train(), models.vae, models.ddim, noise(), LABELS)


BAD = {
    "range outside": (dict(guidance=Guidance(5.0, 7.5, (30, 45))), r"\(30, 45\).*10 steps"),
    "range partly outside": (dict(guidance=Guidance(5.0, 7.5, (8, 10))), r"\(8, 10\).*10 steps 0 ... 9"),
    "range from 0 where steps count from 1": (
        dict(guidance=Guidance(5.0, 7.5, (0, 4)), fidelity=PAPER),
        r"\(0, 4\).*10 steps 1 ... 10",
    ),
    "no checkpoints": (dict(checkpoints=None), "needs checkpoints"),
    "no gradients": (dict(gradients=None), "needs checkpoints"),
    "no targets": (dict(targets=None), "needs checkpoints"),
    "targets of another batch": (dict(targets=TARGETS[:2]), r"targets are \(3,\)"),
    "gradients of another batch": (dict(gradients=torch.zeros(3, 2, 5)), r"gradients \(3, 3, P\)"),
    "gradients of other checkpoints": (dict(gradients=torch.zeros(2, 3, 5)), r"gradients \(3, 3, P\)"),
    "memory of another batch": (dict(memory=[noise()]), "needs memory, .* a sample .*: 3, got 1"),
    "no memory": (dict(memory=None), "gamma > 0 needs memory"),
}


@pytest.mark.parametrize("name", BAD)
def test_inputs_that_do_not_fit_raise(tiny, guided, name):
    changes, message = BAD[name]
    models = tiny()
    with pytest.raises(ValueError, match=message):
        sample_igd(models.transformer, models.vae, models.ddim, noise(), LABELS, **(guided() | changes))


def test_other_number_of_labels_raises(tiny):
    models = tiny()
    with pytest.raises(ValueError, match="labels are"):
        sample_igd(models.transformer, models.vae, models.ddim, noise(), LABELS[:2])


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            EulerDiscreteScheduler(),
            "EulerDiscreteScheduler rescales",
        ),  # Eq. 9 assumes a variance-preserving process
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler"),
        (PNDMScheduler(), "PNDMScheduler evaluates the model"),
        (DPMSolverMultistepScheduler(variance_type="learned_range"), "set variance_type=None"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_schedulers_that_do_not_fit_raise(tiny, scheduler, message):
    models = tiny()
    with pytest.raises(ValueError, match=message):
        sample_igd(models.transformer, models.vae, scheduler, noise(), LABELS)


# --- schedulers


@pytest.mark.parametrize(
    ("solver", "spacing", "first", "last"),
    [
        ("ddpm", "linspace", 999, 0),
        ("ddim", "leading", 980, 0),
        ("ddim", "trailing", 999, 19),
        ("ddim", "linspace", 999, 0),
    ],
)
def test_scheduler_steps_to_its_own_next_timestep(tiny, solver, spacing, first, last):
    """With the true noise as prediction, DDIM lands on the forward process, and so does DDPM's mean."""
    scheduler = make_scheduler(Fidelity(solver=solver, timestep_spacing=spacing), tiny().ddim.config)
    scheduler.set_timesteps(50)
    timesteps = scheduler.timesteps.tolist()
    assert (timesteps[0], timesteps[-1], len(timesteps)) == (first, last, 50)
    alphas = scheduler.alphas_cumprod.double()
    clean, eps = noise(2, torch.float64)
    for t, following in zip(timesteps[:-1], timesteps[1:], strict=True):
        z = alphas[t].sqrt() * clean + (1 - alphas[t]).sqrt() * eps
        extra = {"generator": torch.Generator().manual_seed(t)} if solver == "ddpm" else {}
        found = scheduler.step(eps[None], t, z[None], **extra).prev_sample[0]
        a = alphas[following]
        if solver == "ddim":
            expected = a.sqrt() * clean + (1 - a).sqrt() * eps
        else:  # Ho et al., Eq. 7, with variance fixed_small
            beta = 1 - alphas[t] / a
            expected = (a.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - a) * z) / (1 - alphas[t])
            own = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(t))[0]
            expected += (beta * (1 - a) / (1 - alphas[t])).sqrt() * own
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("solver", ["dpmsolver++", "unipc"])
def test_multistep_solvers_unguided_equal_diffusers_pipeline(tiny, solver, out_channels):
    models = tiny(out_channels=out_channels)
    base = DDPMScheduler(
        variance_type="learned_range", **{k: models.ddim.config[k] for k in ("beta_schedule", "beta_end")}
    ).config
    fidelity = Fidelity(solver=solver, cfg_channels=None)
    options = dict(guidance_scale=4.0, num_inference_steps=8, output_type="np")
    theirs = DiTPipeline(models.transformer, models.vae, make_scheduler(fidelity, base))
    theirs.set_progress_bar_config(disable=True)
    if out_channels == 8:  # its pipeline hands the variance to any scheduler: give it a model without
        narrow = tiny(out_channels=4)
        wide, own = models.transformer.state_dict(), narrow.transformer.state_dict()
        keep = {name: value[: len(own[name])] for name, value in wide.items()}
        order = torch.arange(32).reshape(4, 8)[:, :4].flatten()  # proj_out_2 holds 2 x 2 pixels of 8 channels
        keep |= {f"proj_out_2.{part}": wide[f"proj_out_2.{part}"][order] for part in ("weight", "bias")}
        narrow.transformer.load_state_dict(keep)
        theirs = DiTPipeline(narrow.transformer, models.vae, make_scheduler(fidelity, base))
        theirs.set_progress_bar_config(disable=True)
    expected = theirs([7, 985, 7], generator=generators(), **options).images
    found = IGDPipeline(models.transformer, models.vae, DDPMScheduler.from_config(base))
    np.testing.assert_allclose(
        found([7, 985, 7], generator=generators(), fidelity=fidelity, **options).images, expected, atol=1e-4
    )
    assert expected.std() > 0.01


def test_dpm_solver_reaches_the_guided_latents_of_its_own_formula(tiny, guided):
    """DPM-Solver++ 2M (Lu et al., 2022, Algorithm 2) by hand, each guided step's shift from the callback."""
    models, options = tiny(dtype=torch.float64), guided(torch.float64)
    fidelity = Fidelity(solver="dpmsolver++", cfg_channels=None)
    scheduler, z = scheduler_of(models, fidelity), noise(dtype=torch.float64)
    options["guidance"] = Guidance(5.0, 0.0, (3, 6))
    shifts, steps, seen = {}, options["num_steps"], {}

    def callback(index, timestep, info):
        shifts[index], seen[index] = info.get("influence_shift", 0.0), (timestep, info["latents"])

    sample_igd(
        models.transformer, models.vae, scheduler, z, LABELS, fidelity=fidelity, callback=callback, **options
    )
    alphas, before = scheduler.alphas_cumprod.double(), None
    lam = lambda t: 0.5 * torch.log(alphas[t] / (1 - alphas[t]))  # noqa: E731
    null = torch.full_like(LABELS, models.transformer.config.num_embeds_ada_norm)
    for index in range(steps - 1, 0, -1):
        t, following = seen[index][0], seen[index - 1][0]
        time = torch.full((3,), t)
        with torch.no_grad():
            c, u = (models.transformer(z, timestep=time, class_labels=y).sample for y in (LABELS, null))
        clean = (z - (1 - alphas[t]).sqrt() * (u + 4 * (c - u))) / alphas[t].sqrt()
        h = lam(following) - lam(t)
        if before is None:
            data = clean
        else:
            r = (lam(t) - lam(before[0])) / h
            data = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * before[1]
        before = (t, clean)
        z = (
            ((1 - alphas[following]) / (1 - alphas[t])).sqrt() * z
            - alphas[following].sqrt() * torch.expm1(-h) * data
            - shifts[index]
        )
        torch.testing.assert_close(z, seen[index][1], rtol=1e-5, atol=1e-6)
    assert sorted(
        i for i, shift in shifts.items() if torch.is_tensor(shift) and shift.abs().max() > 1e-3
    ) == [3, 4, 5, 6]


def test_unipc_does_not_undo_guidance(tiny, guided):
    """Its corrector would recompute a guided step from its start; unguided steps keep it."""
    models, options = tiny(), guided()
    options["guidance"] = Guidance(0.0, 60.0, (6, 6))
    fidelity = Fidelity(solver="unipc")
    scheduler = scheduler_of(models, fidelity)

    def run(**changes):
        seen = {}
        sample_igd(
            models.transformer,
            models.vae,
            scheduler,
            noise(),
            LABELS,
            fidelity=fidelity,
            callback=lambda i, t, info: seen.update({i: info["latents"]}),
            **(options | changes),
        )
        return seen

    moved, plain = run(), run(guidance=None)
    assert scheduler.disable_corrector == []
    first, second = ((moved[i] - plain[i])[0].norm() for i in (6, 5))
    assert first > 0.05 and second > 0.7 * first


def test_make_scheduler_never_clips_latents():
    for fidelity in (STANDARD, PAPER):
        scheduler = make_scheduler(fidelity, DDPMScheduler(clip_sample=True, thresholding=True).config)
        assert not scheduler.config.clip_sample and not scheduler.config.thresholding
    assert (
        make_scheduler(STANDARD, DDPMScheduler().config, learned_variance=True).config.variance_type
        == "learned_range"
    )
    assert make_scheduler(STANDARD, DDPMScheduler().config).config.variance_type == "fixed_small"


# --- the pipeline


def test_pipeline_round_trip_gives_the_same_images(tiny_pipe, tmp_path):
    options = dict(num_inference_steps=4, output_type="np")
    expected = tiny_pipe([0, 3], generator=generators(2), **options).images
    tiny_pipe.save_pretrained(tmp_path / "pipe")
    again = IGDPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(again([0, 3], generator=generators(2), **options).images, expected, atol=1e-6)


def test_pipeline_output_types_agree(tiny_pipe):
    found = {
        kind: tiny_pipe([0, 3], generator=generators(2), num_inference_steps=3, output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert (
        found["pt"].shape == (2, 3, 16, 16)
        and found["np"].shape == (2, 16, 16, 3)
        and found["latent"].shape == (2, 4, 8, 8)
    )
    assert found["np"].min() >= 0 and found["np"].max() <= 1
    np.testing.assert_array_equal(found["pt"].permute(0, 2, 3, 1).numpy(), found["np"])
    np.testing.assert_array_equal(
        np.stack([np.asarray(image) for image in found["pil"]]), (found["np"] * 255).round().astype(np.uint8)
    )
    decoded = (tiny_pipe.decode(found["latent"]) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, found["pt"], rtol=0, atol=1e-6)
    (images,) = tiny_pipe(
        [0, 3], generator=generators(2), num_inference_steps=3, output_type="pt", return_dict=False
    )
    assert torch.equal(images, found["pt"])


def test_pipeline_takes_guidance_and_calls_back_each_step(tiny_pipe, guided):
    seen = []

    def callback(pipe, step, timestep, info):
        seen.append((pipe is tiny_pipe, step, timestep, "influence_loss" in info))

    options = guided()
    steps = options.pop("num_steps")
    run = dict(generator=generators(), num_inference_steps=steps, output_type="latent")
    found = tiny_pipe([7, 3, 7], callback_on_step_end=callback, **run, **options).images
    timesteps = tiny_pipe.scheduler_for(STANDARD)
    timesteps.set_timesteps(steps)
    assert seen == [(True, i, t, 3 <= 9 - i <= 6) for i, t in enumerate(timesteps.timesteps.tolist())]
    own = generators()
    expected = sample_igd(
        tiny_pipe.transformer,
        tiny_pipe.vae,
        tiny_pipe.scheduler_for(STANDARD),
        tiny_pipe.latent_noise(own),
        torch.tensor([7, 3, 7]),
        num_steps=steps,
        generator=own,
        **options,
    )
    assert torch.equal(found, expected)


def test_pipeline_callback_can_replace_the_latents(tiny_pipe):
    zero = tiny_pipe(
        [0, 3],
        generator=generators(2),
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, info: (
            {"latents": info["latents"] * 0} if step == 2 else {}
        ),
    ).images
    assert zero.abs().max() == 0


def test_pipeline_takes_one_generator(tiny_pipe):
    runs = [
        tiny_pipe(
            [0, 3], generator=torch.Generator().manual_seed(s), num_inference_steps=3, output_type="latent"
        ).images
        for s in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])


def test_pipeline_refuses_to_offload(tiny_pipe):
    for method in (tiny_pipe.enable_model_cpu_offload, tiny_pipe.enable_sequential_cpu_offload):
        with pytest.raises(NotImplementedError, match="one graph"):
            method()


def test_pipeline_scheduler_follows_the_fidelity(tiny):
    models = tiny(out_channels=8)
    pipe = IGDPipeline(models.transformer, models.vae, models.ddim)
    assert pipe.scheduler_for(Fidelity(solver="configured")) is models.ddim
    assert isinstance(pipe.scheduler_for(PAPER), DDIMScheduler)
    released = pipe.scheduler_for(STANDARD)
    assert isinstance(released, DDPMScheduler)
    assert (released.config.variance_type, released.config.timestep_spacing) == ("learned_range", "linspace")
