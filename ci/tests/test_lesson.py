"""The method in two dimensions: exact score, finite differences, and what a class sees."""

from __future__ import annotations

import inspect
import io
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from igd_lib.analysis import statistics, tables
from igd_lib.config import Guidance
from igd_lib.distillation import image_generator
from igd_lib.experiment import lesson
from igd_lib.experiment import lesson_pictures as pictures
from igd_lib.experiment.lesson import CLASSES, FIDELITY, SHARES, SPREAD, Lesson
from igd_lib.guidance import deviation_loss, influence_loss, predicted_clean
from igd_lib.guides import Deviation, Influence
from igd_lib.models.points import PointAutoencoder, PointTransformer, from_points, to_points
from igd_lib.sampler import sample
from igd_lib.surrogate import class_gradients, select_checkpoints


@pytest.fixture(scope="module")
def trained() -> Lesson:
    """The lesson as a class has it: seconds of training."""
    return lesson.prepare(seeds="2", ipc=3)


@pytest.fixture(scope="module")
def smoke() -> Lesson:
    return lesson.prepare("smoke", k=15.0, gamma=240.0)


@pytest.fixture
def double(smoke) -> Lesson:
    """The smoke lesson in double precision, for finite differences."""
    kept = smoke.checkpoints
    states = [{name: value.double() for name, value in state.items()} for state in kept.states]
    transformer = PointTransformer(len(CLASSES))
    transformer.load_state_dict(smoke.transformer.state_dict())
    return replace(
        smoke,
        transformer=transformer.double().eval(),
        autoencoder=PointAutoencoder(smoke.factor, torch.float64),
        checkpoints=replace(kept, states=states),
        gradients=smoke.gradients.double(),
    )


def exact_eps(z: Tensor, alpha_bar: float, label: int, factor: float) -> Tensor:
    """-sqrt(1 - alpha_bar) times the score of the noisy mixture in closed form, (N, 2) in float64."""
    centres = []
    for mode in range(3):
        angle = math.pi / 2 + 2 * math.pi * (label / 9 + mode / 3)
        centres.append([0.7 * math.cos(angle), 0.7 * math.sin(angle)])
    means = math.sqrt(alpha_bar) * factor * torch.tensor(centres, dtype=torch.float64)
    variance = alpha_bar * (factor * SPREAD) ** 2 + 1 - alpha_bar
    away = z.double()[:, None] - means
    density = torch.tensor(SHARES, dtype=torch.float64).log() - away.square().sum(2) / (2 * variance)
    score = -(density.softmax(1)[:, :, None] * away / variance).sum(1)
    return -math.sqrt(1 - alpha_bar) * score


# --- the diffusion model


@pytest.mark.parametrize(
    ("timestep", "direction", "size"),
    [(100, 0.95, 0.3), (300, 0.99, 0.12), (600, 0.998, 0.06), (900, 0.998, 0.05)],
)
def test_eps_is_the_exact_score_s(trained, timestep, direction, size):
    alpha_bar = lesson.noise_schedule().alphas_cumprod[timestep].item()
    generator = torch.Generator().manual_seed(1)
    for label in range(3):
        clean = to_points(trained.test, label) * trained.factor
        noise = torch.randn(clean.shape, generator=generator)
        z = math.sqrt(alpha_bar) * clean + math.sqrt(1 - alpha_bar) * noise
        labels = torch.full((len(z),), label)
        with torch.no_grad():
            found = trained.denoiser(labels)(z.reshape(-1, 2, 1, 1), torch.tensor(timestep)).eps
        wanted, found = exact_eps(z, alpha_bar, label, trained.factor), found.flatten(1).double()
        assert F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > direction
        assert (found - wanted).norm() / wanted.norm() < size


def test_the_model_finds_every_mode_in_its_share_and_no_other_class_s(trained):
    own = replace(trained.with_guidance(0.0, 0.0), ipc=1)
    drawn = lesson.distil(own, range(500, 1000))[:, :, 0]
    every = torch.cat([lesson.modes(label) for label in range(3)])
    for label in range(3):
        nearest = torch.cdist(drawn[:, label], every).argmin(1)
        shares = torch.bincount(nearest, minlength=9) / len(nearest)
        assert shares[3 * label : 3 * label + 3].sum() > 0.9
        torch.testing.assert_close(
            shares[3 * label : 3 * label + 3], torch.tensor(SHARES), atol=0.08, rtol=0.0
        )


def test_the_transformer_has_dit_s_interface():
    asked = inspect.signature(PointTransformer.forward).parameters
    known = inspect.signature(DiTTransformer2DModel.forward).parameters
    assert [name for name in known if name in asked] == list(asked)
    model = PointTransformer(3)
    assert model.config.num_embeds_ada_norm == 3 and model.dtype == torch.float32
    found = model(torch.zeros(5, 2, 1, 1), timestep=torch.full((5,), 7), class_labels=torch.full((5,), 3))
    assert found.sample.shape == (5, 2, 1, 1)


def test_points_are_images_of_one_pixel(smoke):
    points = to_points(smoke.train)
    assert points.shape == (180, 2) and points.abs().max() <= 1.15
    back = to_points(from_points("x", "train", CLASSES, points, smoke.train.labels))
    torch.testing.assert_close(back, points, atol=1e-6, rtol=0.0)
    assert (points * smoke.factor).std().item() == pytest.approx(1.0, abs=1e-5)


# --- what guides


def gradient_by_differences(loss, z: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a loss (N,) of latents (N, 2, 1, 1)."""
    found = torch.zeros_like(z)
    for axis in range(2):
        move = torch.zeros_like(z)
        move[:, axis] = step
        found[:, axis] = ((loss(z + move) - loss(z - move)) / (2 * step)).reshape(-1, 1, 1)
    return found


def test_the_fields_are_the_losses_gradients(double):
    """-rho_t grad G_I and -gamma grad G_D (Eq. 9), in direction and length."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    memory = torch.randn(2, 2, dtype=torch.float64, generator=generator)
    index, label = 35, 1
    found = lesson.forces(double, z, index, label, memory)
    step = lesson.step_at(double, z, index, label)
    alpha_bar, labels = step.alpha_bar.double(), torch.full((6,), label)

    def influence(at: Tensor) -> Tensor:
        eps = double.denoiser(labels)(at, torch.tensor(step.timestep)).eps
        points = predicted_clean(at, eps, step.alpha_bar) / double.factor
        kept, gradients = double.checkpoints, double.gradients[:, labels]
        return influence_loss(points, labels, kept, gradients)

    def deviation(at: Tensor) -> Tensor:
        return deviation_loss(at, [memory.reshape(-1, 2, 1, 1)] * 6)

    with torch.no_grad():
        slope = gradient_by_differences(influence, z.reshape(-1, 2, 1, 1)).flatten(1)
        eps = step.eps.flatten(1)
        length = 15.0 * 0.0015 * (1 - alpha_bar).sqrt() * eps.norm(dim=1, keepdim=True)
        wanted = -length * slope / slope.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found["influence"], wanted, rtol=1e-4, atol=1e-9)
        slope = gradient_by_differences(deviation, z.reshape(-1, 2, 1, 1)).flatten(1)
        torch.testing.assert_close(found["deviation"], -240.0 * 2 / 4096 * slope, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found["eps"], -eps.detach(), rtol=0.0, atol=0.0)


def test_the_influence_field_is_the_loss_s_gradient(double):
    z = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, arrows = lesson.influence_field(double, z, 2, [0])
    assert loss.shape == (6,)
    slope = gradient_by_differences(
        lambda at: lesson.influence_field(double, at.flatten(1), 2, [0])[0], z.reshape(-1, 2, 1, 1)
    )
    torch.testing.assert_close(arrows, -slope.flatten(1), rtol=1e-4, atol=1e-8)


def test_class_gradients_and_algorithm_2_take_points(trained):
    model, state = trained.checkpoints.model, trained.checkpoints.states[-1]
    model.load_state_dict(state)
    points = to_points(trained.train, 1).reshape(-1, 2, 1, 1)
    loss = F.cross_entropy(model(points), torch.full((len(points),), 1))
    wanted = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(trained.gradients[-1, 1], wanted, rtol=1e-3, atol=1e-6)
    every = [class_gradients(trained.trajectory, trained.train.of_class(c), c) for c in range(3)]
    keep = select_checkpoints(torch.stack(every, dim=1), similarity="per_class")
    assert trained.checkpoints.epochs == [trained.trajectory.epochs[index] for index in keep]
    assert len(keep) >= 2 and keep[0] == 0


# --- sampling


def test_without_guidance_it_is_ddim_s_own_sampling(smoke):
    own = smoke.with_guidance(0.0, 0.0)
    scheduler, label = own.scheduler, 2
    scheduler.set_timesteps(own.num_steps)
    z = torch.randn(1, 2, 1, 1, generator=image_generator(5, label, 0))
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            eps = own.transformer(z, timestep=timestep.expand(1), class_labels=torch.tensor([label])).sample
        z = scheduler.step(eps, timestep, z).prev_sample
    found = lesson.distil(own, [5])[0, label, 0]
    torch.testing.assert_close(found, z.flatten() / own.factor, atol=1e-5, rtol=1e-5)


def test_guides_of_no_strength_change_nothing(smoke):
    labels, z = torch.arange(3), torch.randn(3, 2, 1, 1)
    none = Guidance(0.0, 0.0, smoke.guidance.guided_range)
    memory = [torch.randn(2, 2, 1, 1)] * 3
    asked = [
        Influence(none, smoke.checkpoints, smoke.gradients[:, labels], labels, smoke.autoencoder, FIDELITY),
        Deviation(none, memory),
    ]
    plain, guided = (
        sample(smoke.denoiser(labels), smoke.scheduler, z, guides=guides) for guides in ((), asked)
    )
    assert torch.equal(plain, guided)


def test_a_set_depends_on_its_seed_alone(smoke):
    both, again = lesson.distil(smoke, [3, 4]), lesson.distil(smoke, [3, 4])
    assert torch.equal(both, again) and not torch.equal(both[0], both[1])
    torch.testing.assert_close(lesson.distil(smoke, [4])[0], both[1], atol=1e-4, rtol=1e-4)
    first = replace(smoke.with_guidance(0.0, 240.0), ipc=1)  # nothing to deviate from
    assert torch.equal(lesson.distil(first, [3]), lesson.distil(first.with_guidance(0.0, 0.0), [3]))
    assert not torch.equal(both, lesson.distil(smoke.with_guidance(0.0, 0.0), [3, 4]))


def test_the_same_lesson_twice(smoke):
    again = lesson.prepare("smoke", k=15.0, gamma=240.0)
    assert torch.equal(smoke.gradients, again.gradients)
    for one, other in zip(smoke.transformer.parameters(), again.transformer.parameters(), strict=True):
        assert torch.equal(one, other)


def test_ways_end_where_the_set_s_points_are(smoke):
    ways = lesson.paths(smoke, 3, 1)
    assert ways.shape == (2, 51, 2)
    torch.testing.assert_close(ways[:, -1] / smoke.factor, lesson.distil(smoke, [3])[0, 1])


# --- measures


def test_classes_keep_their_order(trained):
    """A network that is trained on real points gives the classes' own labels to their modes."""
    assert trained.train.classes == CLASSES
    drawn = to_points(trained.train.per_class(100, 0)).reshape(3, 100, 2)
    model = lesson.trained_on(trained, drawn, 0)
    for label in range(3):
        assert model(lesson.modes(label).reshape(-1, 2, 1, 1)).argmax(1).tolist() == [label] * 3
    assert lesson.score(model, trained.test) > 95
    assert lesson.modes_found(drawn) == 9 and lesson.modes_found(drawn.flip(0)) < 9


def test_rows_are_paired_and_the_claims_are_the_table_s(smoke):
    rows = lesson.rows(smoke, lesson.sets(smoke))
    assert list(dict.fromkeys(rows.method)) == ["Random", "DiT", "DiT + G_I", "DiT + G_D", "DiT-IGD"]
    assert len(rows) == 3 * 5 * 2 and set(rows.metric) == {"top1", "influence_loss", "modes_found"}
    found = statistics.differences(tables.top1(rows), lesson.claims)
    assert list(found.difference) == [
        "DiT + G_I - DiT",
        "DiT + G_D - DiT",
        "DiT-IGD - DiT",
        "DiT-IGD - DiT + G_D",
        "DiT - Random",
    ]
    assert len(lesson.tried(smoke, [0.0, 5.0], [0.0], [7])) == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scale": "paper"}, "scales auto, small, smoke"),
        ({"ipc": 0}, "ipc is at least 1"),
        ({"guided_range": (45, 30)}, "did you swap"),
        ({"guided_range": (30, 50)}, "not within the 50 steps"),
        ({"k": -1.0}, "at least 0"),
        ({"seeds": "x"}, "seeds are numbers"),
        ({"seeds": "0"}, "at least one"),
    ],
)
def test_what_cannot_be_is_refused_before_training(given, words, monkeypatch):
    monkeypatch.setattr(lesson, "train_denoiser", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match=words):
        lesson.prepare(**({"scale": "smoke"} | given))


# --- pictures


def test_every_picture_is_drawn(smoke):
    for made in (
        pictures.samples(smoke),
        pictures.denoising(smoke, 0),
        pictures.influence(smoke, 0),
        pictures.deviation(smoke, 0),
        pictures.pulls(smoke, 0),
        pictures.ways(smoke, 0),
    ):
        assert made.axes[0].get_title()
        made.canvas.draw()
    none = smoke.with_guidance(0.0, 0.0)
    assert pictures.influence(none, 0) and pictures.pulls(none, 0)


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def png(figure) -> bytes:
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=100)
    return pixels.getvalue()


def test_sliders_show_what_their_values_give(smoke, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    own = smoke.guidance
    assert titles(pictures.sliders(smoke)) == titles(pictures.settings(smoke, own.k, own.gamma))
    monkeypatch.setenv("JPY_SESSION_NAME", "lesson.ipynb")
    k, gamma, picture = pictures.sliders(smoke).children
    assert (k.description, k.value, gamma.description, gamma.value) == ("k", 15.0, "gamma", 240.0)
    assert bytes(picture.value) == png(pictures.settings(smoke, 15.0, 240.0))
    k.value = 0.0
    assert bytes(picture.value) == png(pictures.settings(smoke, 0.0, 240.0))
