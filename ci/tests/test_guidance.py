"""The two guidance losses and the adaptive scale against naive loops in double precision (Eq. 7, 8, 9)."""

import pytest
import torch

import reference
from igd_lib.guidance import deviation_loss, influence_loss, influence_scale, sample_gradients
from igd_lib.surrogate import Checkpoints

TARGETS = torch.tensor([0, 2, 1, 2])


@pytest.fixture(scope="module")
def case(toy):
    """Double-precision checkpoints, four images, and each image's class gradients (E, 4, P)."""
    case = toy(torch.float64)
    case.images = (
        torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    case.own = case.gradients[:, TARGETS]
    return case


def naive_losses(case, images, weights=None):
    terms = [
        reference.influence(x, int(y), case.checkpoints, case.own[:, b], weights)
        for b, (x, y) in enumerate(zip(images, TARGETS, strict=True))
    ]
    return torch.stack(terms)


def image_gradient(case, weights=None):
    images = case.images.clone().requires_grad_()
    losses = influence_loss(images, TARGETS, case.checkpoints, case.own, weights=weights)
    return torch.autograd.grad(losses.sum(), images)[0]


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 1.5]])
def test_influence_loss_equals_naive_loop(case, weights):
    losses = influence_loss(case.images, TARGETS, case.checkpoints, case.own, weights=weights)
    assert losses.shape == (4,)
    assert losses.std() > 1e-3  # four different images, so that a mixed-up batch would show
    torch.testing.assert_close(losses, naive_losses(case, case.images, weights), rtol=1e-8, atol=0)


def test_influence_gradient_equals_naive_double_backward(case):
    images = case.images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(naive_losses(case, images, [0.5, 1.0, 1.5]).sum(), images)
    found = image_gradient(case, [0.5, 1.0, 1.5])
    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item())


def test_influence_of_several_images_is_of_their_mean_loss(case):
    """Against the naive loop, value and gradient; not the mean of the images' own influences."""
    images = torch.stack(
        [case.images, case.images.roll(1, 0), case.images.flip(-1)], dim=1
    )  # (4, 3, 3, 16, 16)
    own = images.clone().requires_grad_()
    losses = influence_loss(own, TARGETS, case.checkpoints, case.own)
    (found,) = torch.autograd.grad(losses.sum(), own)
    naive = images.clone().requires_grad_()
    expected = naive_losses(case, [list(one) for one in naive])
    torch.testing.assert_close(losses, expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), naive)[0], rtol=1e-6, atol=1e-12)
    single = torch.stack([naive_losses(case, images[:, k]) for k in range(3)]).mean(0)
    assert (losses - single).abs().min() > 1e-3
    repeated = images[:, :1].expand(-1, 2, -1, -1, -1)  # twice the same image is that image
    alone = influence_loss(case.images, TARGETS, case.checkpoints, case.own)
    torch.testing.assert_close(
        influence_loss(repeated, TARGETS, case.checkpoints, case.own), alone, rtol=1e-8, atol=0
    )


@pytest.mark.parametrize("floor", [1e-6, 0.5])
def test_a_floor_is_added_to_the_cosine_s_denominator(case, floor):
    found = influence_loss(case.images, TARGETS, case.checkpoints, case.own, floor=floor)
    pairs = list(enumerate(zip(case.images, TARGETS, strict=True)))
    expected = torch.stack(
        [reference.influence(x, int(y), case.checkpoints, case.own[:, b], None, floor) for b, (x, y) in pairs]
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert (found - naive_losses(case, case.images)).abs().min() > 1e-4 * floor
    latents, earlier = case.images, [case.images.flip(0)[:n] for n in (1, 2, 3, 4)]
    deviation = torch.stack(
        [reference.deviation(one, memory, floor) for one, memory in zip(latents, earlier, strict=True)]
    )
    torch.testing.assert_close(deviation_loss(latents, earlier, floor=floor), deviation, rtol=1e-12, atol=0)
    assert (deviation - deviation_loss(latents, earlier)).abs().min() > 1e-12


def test_influence_gradient_equals_finite_differences(case):
    gradient = image_gradient(case)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        direction = torch.randn(case.images.shape, dtype=torch.float64, generator=generator)
        step = 1e-7 * direction
        ahead, behind = (
            influence_loss(case.images + s, TARGETS, case.checkpoints, case.own) for s in (step, -step)
        )
        expected = (gradient * direction).flatten(1).sum(1)
        torch.testing.assert_close((ahead - behind) / 2e-7, expected, rtol=1e-4, atol=1e-6)


def test_weights_scale_each_checkpoint(case):
    """With weight on one checkpoint only, the loss is that checkpoint's term over E."""
    one = case.checkpoints.keep([1])
    alone = influence_loss(case.images, TARGETS, one, case.own[1:2])
    weighted = influence_loss(case.images, TARGETS, case.checkpoints, case.own, weights=[0.0, 3.0, 0.0])
    torch.testing.assert_close(weighted, alone, rtol=1e-12, atol=0)


def test_checkpoint_weights_are_learning_rates_over_their_mean(case):
    assert case.checkpoints.weights == pytest.approx([0.5, 1.0, 1.5])


def test_influence_loss_does_not_depend_on_the_batch(case):
    together = influence_loss(case.images, TARGETS, case.checkpoints, case.own)
    gradient = image_gradient(case)
    for b in range(4):
        image = case.images[b : b + 1].clone().requires_grad_()
        alone = influence_loss(image, TARGETS[b : b + 1], case.checkpoints, case.own[:, b : b + 1])
        torch.testing.assert_close(alone[0], together[b], rtol=1e-12, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(alone.sum(), image)[0][0], gradient[b], rtol=1e-8, atol=1e-14
        )


def test_influence_loss_is_zero_for_the_class_gradient_itself(case):
    own = torch.stack(
        [
            sample_gradients(case.checkpoints.model, state, case.images, TARGETS)
            for state in case.checkpoints.states
        ]
    )
    assert influence_loss(case.images, TARGETS, case.checkpoints, 7 * own).abs().max() < 1e-12
    assert (influence_loss(case.images, TARGETS, case.checkpoints, -own) - 2).abs().max() < 1e-12


@pytest.mark.parametrize("zero", ["class", "sample"])
def test_zero_gradients_give_a_finite_loss_and_derivative(toy, zero):
    """A class gradient of zero, and a sample that the surrogate is certain of, whose own gradient is zero."""
    case = toy(torch.float64)
    checkpoints, gradients = case.checkpoints, case.gradients[:, [1, 1]].clone()
    if zero == "class":
        gradients[:] = 0
    else:
        certain = [
            dict(state) | {"classifier.bias": torch.tensor([0.0, 1e4, 0.0], dtype=torch.float64)}
            for state in checkpoints.states
        ]
        checkpoints = Checkpoints(checkpoints.model, certain, checkpoints.epochs, checkpoints.learning_rates)
    images = (
        torch.zeros(2, 3, 16, 16, dtype=torch.float64)
        .normal_(generator=torch.Generator().manual_seed(0))
        .requires_grad_()
    )
    loss = influence_loss(images, torch.tensor([1, 1]), checkpoints, gradients)
    (derivative,) = torch.autograd.grad(loss.sum(), images)
    torch.testing.assert_close(loss, torch.ones_like(loss))
    assert torch.isfinite(derivative).all()


def test_influence_loss_leaves_the_model_alone(case):
    image_gradient(case)
    assert all(p.grad is None and p.requires_grad for p in case.checkpoints.model.parameters())


def test_batch_statistics_are_refused():
    """In training mode a sample's gradient depends on its batch; with running statistics it does not."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3)
    )
    images, targets = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="normalises over the batch"):
        sample_gradients(model.train(), model.state_dict(), images, targets)
    together = sample_gradients(model.eval(), model.state_dict(), images, targets)
    torch.testing.assert_close(
        sample_gradients(model, model.state_dict(), images[1:], targets[1:])[0], together[1]
    )


def test_other_number_of_class_gradients_raises(case):
    with pytest.raises(ValueError, match="3 checkpoints.*2"):
        influence_loss(case.images, TARGETS, case.checkpoints, case.own[:2])


# --- deviation


def latents_and_memory():
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=generator)
    memory = [torch.randn(m, 4, 2, 2, dtype=torch.float64, generator=generator) for m in (5, 0, 2)]
    return latents, memory


def test_deviation_loss_and_gradient_equal_naive_loop():
    latents, memory = latents_and_memory()
    a, b = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    found = deviation_loss(a, memory)
    expected = torch.stack([reference.deviation(z, m) for z, m in zip(b, memory, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), a)[0],
        torch.autograd.grad(expected.sum(), b)[0],
        rtol=1e-9,
        atol=1e-14,
    )


def test_deviation_gradient_points_to_the_nearest_memory():
    """Against the gradient the latent leaves its nearest neighbour, whatever the neighbour's length."""
    latents, memory = latents_and_memory()
    z = latents[:1].clone().requires_grad_()
    memory = [memory[0] * torch.tensor([1.0, 5.0, 0.1, 2.0, 3.0]).reshape(-1, 1, 1, 1)]
    loss = deviation_loss(z, memory)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert deviation_loss(z.detach() - 0.1 * gradient, memory) < loss


def test_empty_memory_gives_zero_and_a_finite_gradient():
    latents, memory = latents_and_memory()
    z = latents.clone().requires_grad_()
    losses = deviation_loss(z, memory)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    assert losses[1] == 0
    assert (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_memory_holding_the_sample_itself_is_finite():
    latents, _ = latents_and_memory()
    z = latents[:1].clone().requires_grad_()
    loss = deviation_loss(z, [torch.cat([latents[:1], latents[:1]])])
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert loss.item() == pytest.approx(1)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e-12


def test_other_number_of_memories_raises():
    latents, memory = latents_and_memory()
    with pytest.raises(ValueError):
        deviation_loss(latents, memory[:2])


# --- scale


def test_influence_scale_by_hand():
    """k = 5, factor 0.0015, alpha_bar 0.36, ||eps|| = 5 and 10, ||grad|| = 13 and 0.5."""
    eps, grad = torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1)
    eps[0, :2, 0, 0], eps[1, 3] = torch.tensor([3.0, 4.0]), 10.0
    grad[0, 1:3, 0, 0], grad[1, 0] = torch.tensor([5.0, 12.0]), -0.5
    scale = influence_scale(5.0, 0.36, eps, grad, factor=0.0015)
    assert scale.shape == (2, 1, 1, 1)
    assert scale.flatten().tolist() == pytest.approx([0.0075 * 0.8 * 5 / 13, 0.0075 * 0.8 * 10 / 0.5])
    torch.testing.assert_close(influence_scale(5.0, torch.tensor(0.36), eps, grad, factor=0.0015), scale)


def test_zero_gradient_gives_zero_scale():
    eps, grad = torch.ones(2, 4, 1, 1), torch.zeros(2, 4, 1, 1)
    grad[1] = 1
    assert influence_scale(5.0, 0.5, eps, grad, factor=1.0).flatten().tolist() == pytest.approx(
        [0, 5 * 0.5**0.5]
    )
