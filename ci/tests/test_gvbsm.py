"""G-VBSM: statistics, averages and densification by hand, what the targets are, its labels and their loss."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from igd_lib import evaluation, teachers
from igd_lib.baselines import gvbsm as module
from igd_lib.baselines import recovery
from igd_lib.baselines.gvbsm import (
    GVBSM,
    IMAGENET_NETWORKS,
    WINDOWED,
    Averages,
    Matched,
    Objective,
    densification,
    ensemble,
    gvbsm,
    imagenet_networks,
    patch_statistics,
    targets_of,
)
from igd_lib.baselines.recovery import CROPPED, Views, by_class, frozen, seed_of
from igd_lib.evaluation import evaluate, logit_loss, schedule
from igd_lib.models.networks import network
from igd_lib.protocols import GVBSM_SOFT, GVBSM_SOFT_32, SMALL_GVBSM, SMALL_SOFT, Protocol
from igd_lib.teachers import Teacher

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
KINDS = (nn.BatchNorm2d, nn.Conv2d)
TINY = GVBSM(size=8, batch=6, iterations=4, views=Views(pad=1, flip=True), target_batch=4)
PLAIN = replace(TINY, views=Views(), drop_rate=0.0)


def small_network(channels: int, classes: int = 3) -> nn.Sequential:
    """Two convolutions, one of them with batch normalisation, that has seen some images."""
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, classes),
    )
    with torch.no_grad():
        for _ in range(20):
            model.train()(0.5 * torch.randn(12, 3, 8, 8) + torch.tensor([0.2, -0.1, 0.3]).reshape(3, 1, 1))
    return model.eval()


@pytest.fixture
def pair() -> list[Teacher]:
    torch.manual_seed(1)
    return [
        Teacher(small_network(n), f"{n} channels", "random", ("a", "b", "c"), MEAN, STD, least=0.0)
        for n in (3, 5)
    ]


@pytest.fixture
def data(toy_data):
    return toy_data.at(8)


def pixels_of(found):
    return found.fetch(torch.arange(len(found)))


# --- statistics


def spread(values) -> tuple[float, float]:
    """Mean and biased variance, number by number."""
    values = [float(value) for value in values]
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / len(values)


def naive_channels(x) -> tuple[list[float], list[float]]:
    found = [spread(x[:, channel].flatten()) for channel in range(x.shape[1])]
    return [mean for mean, _ in found], [variance for _, variance in found]


def naive_patches(x, patch: int) -> tuple[list[float], list[float]]:
    """Row by row; sides are raised to multiples of `patch`, bilinearly, about the pixels' centres."""
    height, width = x.shape[2:]
    tall, wide = (math.ceil(side / patch) * patch for side in (height, width))

    def at(place: int, side: int, wanted: int) -> tuple[int, int, float]:
        exact = max((place + 0.5) * side / wanted - 0.5, 0)
        low = min(int(exact), side - 1)
        return low, min(low + 1, side - 1), exact - low

    found = []
    for top in range(0, tall, patch):
        for left in range(0, wide, patch):
            values = []
            for row in range(top, top + patch):
                for column in range(left, left + patch):
                    (y, below, v), (u, right, h) = at(row, height, tall), at(column, width, wide)
                    upper = x[:, :, y, u] * (1 - h) + x[:, :, y, right] * h
                    lower = x[:, :, below, u] * (1 - h) + x[:, :, below, right] * h
                    values += (upper * (1 - v) + lower * v).flatten().tolist()
            found.append(spread(values))
    return [mean for mean, _ in found], [variance for _, variance in found]


@pytest.mark.parametrize("sides", [(8, 8), (8, 12), (6, 5), (4, 4), (2, 3), (1, 1)])
def test_patch_statistics_against_a_loop(sides):
    """One patch up to four px; other sides are raised to eight."""
    x = torch.randn(3, 2, *sides, dtype=torch.float64)
    found, expected = patch_statistics(x, 4), naive_patches(x, 4)
    assert len(found[0]) == math.ceil(sides[0] / 4) * math.ceil(sides[1] / 4)
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, torch.tensor(wanted, dtype=torch.float64))


def test_averages_by_hand():
    """From zero on: (1 - alpha) x, then alpha of it and (1 - alpha) of the next."""
    averages = Averages([(torch.zeros(2),), (torch.zeros(1), torch.zeros(1))])
    first, second = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 8.0])
    [found] = averages.moved(0, (first,), 0.8)
    torch.testing.assert_close(found, 0.2 * first)
    [found] = averages.moved(0, (second,), 0.8)
    torch.testing.assert_close(found, 0.8 * 0.2 * first + 0.2 * second)
    assert averages.get_buffer("1_0").item() == averages.get_buffer("1_1").item() == 0


def test_the_averages_gradient_is_the_current_statistic_s():
    """Not (1 - alpha) of it."""
    averages = Averages([(torch.zeros(3),)])
    for alpha in (0.8, 0.4):
        x = torch.randn(3, requires_grad=True)
        [found] = averages.moved(0, (x**2,), alpha)
        weights = torch.randn(3)
        (gradient,) = torch.autograd.grad((weights * found).sum(), x)
        torch.testing.assert_close(gradient, 2 * weights * x.detach())


# --- the distance of a network's statistics


def inputs_of(model, images) -> list[torch.Tensor]:
    """What enters each layer."""
    found, x = [], images
    for layer in model:
        found.append(x)
        x = layer(x)
    return found


def naive_statistics(model, images, patch: int) -> list[list[torch.Tensor]]:
    """Of each convolution and normalisation: by channels, and of convolutions by patches."""
    found = []
    for layer, x in zip(model, inputs_of(model, images), strict=True):
        if isinstance(layer, nn.Conv2d):
            found.append([*naive_channels(x), *naive_patches(x, patch)])
        elif isinstance(layer, nn.BatchNorm2d):
            found.append([*naive_channels(x)])
    return [[torch.tensor(value, dtype=torch.float64) for value in values] for values in found]


@pytest.fixture
def matched(pair, data):
    """A network in float64 with random targets, and images."""
    model = frozen(pair[1], "cpu").double()
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    targets = [tuple(torch.randn_like(value) for value in own) for own in naive_statistics(model, images, 4)]
    return Matched(model, targets, PLAIN), images


def test_the_distance_against_a_naive_float64_one(matched):
    """Two batches, averages carried on; four norms a convolution, two a normalisation; the first tenfold."""
    own, _ = matched
    averages = [[torch.zeros_like(value) for value in values] for values in own.targets]
    assert [len(values) for values in own.targets] == [4, 2, 4]
    for seed in range(2):
        images = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        expected = 0.0
        for number, values in enumerate(naive_statistics(own.model, images, 4)):
            for index, value in enumerate(values):
                averages[number][index] = 0.8 * averages[number][index] + 0.2 * value
                gap = (averages[number][index] - own.targets[number][index]).tolist()
                expected += (10 if number == 0 else 1) * math.sqrt(sum(part**2 for part in gap))
        logits, distance = own(images, torch.Generator())
        assert distance.item() == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(logits, own.model(images))


def test_gradients_of_the_distance_by_finite_differences(matched):
    """Of what the gradient is meant to be of: the averages held, the current statistics moving all of it."""
    own, images = matched
    own(
        torch.randn_like(images), torch.Generator()
    )  # so that the averages are not those of these images alone
    images.requires_grad_()
    _, distance = own(images, torch.Generator())
    (gradient,) = torch.autograd.grad(distance, images)
    held = [
        [own.averages.get_buffer(f"{n}_{k}").clone() for k in range(len(v))]
        for n, v in enumerate(own.targets)
    ]
    start = naive_statistics(own.model, images.detach(), 4)

    def surrogate(x):
        total = 0.0
        for number, values in enumerate(naive_statistics(own.model, x, 4)):
            for index, value in enumerate(values):
                moved = held[number][index] + value - start[number][index]
                norm = (moved - own.targets[number][index]).norm().item()
                total += (10 if number == 0 else 1) * norm
        return total

    direction = torch.randn(images.shape, dtype=torch.float64)
    step = 1e-5 * direction
    difference = (surrogate(images.detach() + step) - surrogate(images.detach() - step)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-4)


def test_convolutions_are_left_out_with_their_probability(matched):
    """Left out, a convolution has no distance and its averages stand still; normalisations never are."""
    own, images = matched
    own.settings = replace(PLAIN, drop_rate=0.4)
    generator, moved = torch.Generator().manual_seed(0), torch.zeros(3)
    for _ in range(200):
        before = copy.deepcopy(own.averages.state_dict())
        own(torch.randn_like(images), generator)
        after = own.averages.state_dict()
        for number in range(3):
            changes = [
                not torch.equal(before[name], after[name]) for name in after if name.startswith(f"{number}_")
            ]
            assert len(set(changes)) == 1
            moved[number] += changes[0]
    assert moved[1] == 200 and 95 < moved[0] < 145 and 95 < moved[2] < 145
    own.settings = replace(PLAIN, drop_rate=1 - 1e-9)
    _, distance = own(images, generator)
    normalisation = sum(
        (own.averages.get_buffer(f"1_{k}") - own.targets[1][k]).norm().item() for k in range(2)
    )
    assert distance.item() == pytest.approx(normalisation, rel=1e-10)


# --- densification


def test_densification_is_zero_for_one_image_and_for_a_flat_spectrum():
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert densification(images, torch.tensor([0, 1, 2]), 4.0).item() == pytest.approx(0, abs=1e-12)
    flat = torch.zeros(4, 3, 32, 32, dtype=torch.float64)
    for index in range(4):  # orthogonal, of one length
        flat[index, 0, index, index] = 2.0
    assert densification(flat, torch.zeros(4, dtype=torch.long), 4.0).item() == pytest.approx(0, abs=1e-12)
    flat[0] *= 1.1
    assert densification(flat, torch.zeros(4, dtype=torch.long), 4.0).item() > 1e-3


@pytest.mark.parametrize("side", [32, 64])
def test_densification_against_a_naive_float64_one(side):
    """Class by class, at 32 px, neither centred nor scaled, by numpy's eigenvalues of any matrix."""
    images = 0.03 * side / 32 * torch.randn(7, 3, side, side, dtype=torch.float64)
    labels, expected = torch.tensor([4, 1, 4, 1, 4, 1, 1]), 0.0
    for label in (1, 4):
        rows = []
        for image in images[labels == label]:
            step = side // 32
            rows.append(
                [
                    float(image[c, y : y + step, x : x + step].mean())
                    for c in range(3)
                    for y in range(0, side, step)
                    for x in range(0, side, step)
                ]
            )
        gram = np.array([[sum(a * b for a, b in zip(p, q, strict=True)) for q in rows] for p in rows])
        values = np.linalg.eigvals(gram).real
        p, q = (np.exp(values / t) / np.exp(values / t).sum() for t in (4.0, 1.0))
        expected += float((p * np.log(p / q)).sum())
    assert densification(images, labels, 4.0).item() == pytest.approx(expected, rel=1e-8)
    assert expected > 1e-3


def test_the_gradient_of_densification_lowers_the_largest_eigenvalue():
    """Down it, for the others' gain; and it is that of the right side alone."""
    torch.manual_seed(3)
    images = (0.02 * torch.randn(5, 3, 32, 32, dtype=torch.float64)).requires_grad_()
    labels = torch.zeros(5, dtype=torch.long)

    def spectrum(x):
        return torch.linalg.eigvalsh(x.flatten(1) @ x.flatten(1).T)

    (gradient,) = torch.autograd.grad(densification(images, labels, 4.0), images)
    before, after = spectrum(images), spectrum((images - 0.01 * gradient).detach())
    assert after[-1] < before[-1] - 1e-4 and after[0] > before[0]
    by_hand = torch.autograd.grad(
        -((before.detach() / 4).softmax(0) * before.log_softmax(0)).sum(), images, retain_graph=True
    )[0]
    torch.testing.assert_close(gradient, by_hand)


# --- the whole loss


def test_the_loss_is_the_sum_of_its_parts_by_the_network_whose_turn_it_is(pair, data):
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    settings = replace(PLAIN, statistics_weight=0.3, density_weight=0.7)
    models = [frozen(teacher, "cpu").double() for teacher in pair]
    targets = [naive_statistics(model, torch.randn(6, 3, 8, 8, dtype=torch.float64), 4) for model in models]

    def networks():
        return [Matched(model, own, settings) for model, own in zip(models, targets, strict=True)]

    found, apart = Objective(networks(), labels, settings, before=3), networks()
    images = 0.1 * torch.randn(6, 3, 8, 8, dtype=torch.float64)
    for iteration, turn in enumerate((1, 0, 1)):  # three iterations of an earlier batch were before
        logits, distance = apart[turn](images, torch.Generator())
        density = densification(images, labels, 4.0)
        expected = F.cross_entropy(logits, labels) + 0.3 * distance + 0.7 * density
        assert found(iteration, images, torch.Generator()).item() == pytest.approx(expected.item(), rel=1e-10)
    assert density > 1e-3


def test_the_first_step_by_hand(pair, data, monkeypatch):
    """Adam's first step is the rate times the gradient's sign; then the clamp."""
    settings, kept = replace(PLAIN, batch=3, iterations=1, lr=0.2), []
    finished = recovery.Run.finished
    monkeypatch.setattr(
        recovery.Run,
        "finished",
        lambda run: kept.append(run.images.pixels.detach().clone()) or finished(run),
    )
    found = gvbsm(data, pair[:1], 1, settings, seed=2)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed_of(2, 0))).requires_grad_()
    model = frozen(pair[0], "cpu")
    targets = targets_of(model, pair[0], data, settings, "cpu")
    loss = Objective([Matched(model, targets, settings)], torch.arange(3), settings, 0)
    (gradient,) = torch.autograd.grad(loss(0, x, torch.Generator()), x)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    x = x.detach() - 0.2 * gradient / (gradient.abs() + 1e-8)
    x = torch.minimum(torch.maximum(x, -mean / std), (1 - mean) / std)
    torch.testing.assert_close(kept[0], x, rtol=0, atol=1e-5)
    stored = ((x * std + mean).double().clamp(0, 1) * 255).floor()
    assert (pixels_of(found).double() - stored).abs().max() <= 1  # the last bits of a float32


def test_the_loss_falls(pair, data):
    """Measured without views, left-out layers and averages."""
    settings = replace(TINY, iterations=60, lr=0.1, statistics_weight=0.1, ema=0.5)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    models = [frozen(teacher, "cpu") for teacher in pair]
    targets = [
        targets_of(model, teacher, data, PLAIN, "cpu") for model, teacher in zip(models, pair, strict=True)
    ]
    run = recovery.Run(6, settings, pair[0], 0, "cpu")

    def plain():
        exact = replace(settings, ema=0.0, drop_rate=0.0, views=Views())
        networks = [Matched(model, own, exact) for model, own in zip(models, targets, strict=True)]
        loss = Objective(networks, labels, exact, 0)
        return sum(loss(turn, run.images.pixels, torch.Generator()).item() for turn in range(2))

    before = plain()
    networks = [Matched(model, own, settings) for model, own in zip(models, targets, strict=True)]
    run.optimise(Objective(networks, labels, settings, 0), "test")
    assert plain() < 0.7 * before


# --- targets


def test_targets_against_a_naive_accumulation(pair, data):
    """Batches of 4, the last of 2, each weighted by its images; normalisations' are the running ones."""
    model = frozen(pair[1], "cpu")
    found = targets_of(model, pair[1], data, PLAIN, "cpu")
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in (MEAN, STD))
    total = None
    for part in order.split(4):
        images = (data.fetch(part).double() / 255 - mean) / std
        own = naive_statistics(copy.deepcopy(model).double(), images, 4)
        weighted = [[value * len(part) / 18 for value in values] for values in own]
        total = (
            weighted
            if total is None
            else [[a + b for a, b in zip(*both, strict=True)] for both in zip(total, weighted, strict=True)]
        )
    total[1] = [model[1].running_mean.double(), model[1].running_var.double()]
    assert [len(values) for values in found] == [4, 2, 4]
    for own, wanted in zip(found, total, strict=True):
        for a, b in zip(own, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_targets_are_of_images_cropped_each_by_itself_and_not_rolled(pair, data, monkeypatch):
    seen, real = [], module.view
    monkeypatch.setattr(
        module,
        "view",
        lambda images, views, *rest, **how: (
            seen.append((images, views, how)) or real(images, views, *rest, **how)
        ),
    )
    settings = replace(TINY, views=WINDOWED, target_images=2)
    targets_of(frozen(pair[0], "cpu"), pair[0], data, settings, "cpu")
    assert [len(images) for images, _, _ in seen] == [4, 2]  # two of each class
    assert all(views == replace(WINDOWED, roll=0) and how == {"each": True} for _, views, how in seen)
    assert all(images.min() >= 0 and images.max() <= 1 for images, _, _ in seen)  # padded with black


def test_an_interrupted_pass_for_the_targets_goes_on(pair, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    model, path = frozen(pair[0], "cpu"), tmp_path / "targets.safetensors"
    whole = targets_of(model, pair[0], data, TINY, "cpu")
    calls, real = [], module.normalise

    def counted(images, *rest):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(images, *rest)

    monkeypatch.setattr(module, "normalise", counted)
    with pytest.raises(KeyboardInterrupt):
        targets_of(model, pair[0], data, TINY, "cpu", path)
    for _ in range(2):
        found = targets_of(model, pair[0], data, TINY, "cpu", path)
        assert calls == [4, 4, 4, 4, 4, 2]
        for own, wanted in zip(found, whole, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, wanted, strict=True))


# --- sets


def test_batches_are_of_whole_classes():
    assert [len(part) for part in by_class(1000, 10, 80)] == [80] * 125
    assert by_class(5, 2, 5) == (
        ((0, 0), (0, 1), (1, 0), (1, 1)),
        ((2, 0), (2, 1), (3, 0), (3, 1)),
        ((4, 0), (4, 1)),
    )
    with pytest.raises(ValueError, match="ipc 11 needs batches of at least 11, not 10; raise batch"):
        by_class(5, 11, 10)


def test_sets_come_class_after_class(pair, data):
    settings = replace(
        TINY, batch=4, iterations=60, lr=0.25, views=Views(), statistics_weight=0.0, density_weight=0.0
    )
    found = gvbsm(data, pair, 2, settings, seed=4)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.classes == data.classes
    assert (found.name, found.image_size) == ("toy", 8)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    inputs = (pixels_of(found).float() / 255 - mean) / std
    assert pair[0].model(inputs).argmax(1).tolist() == found.labels.tolist()


def test_averages_go_on_from_batch_to_batch(pair, data):
    """The second of two batches begins with those of the first's end, and with the next network's turn."""
    settings = replace(TINY, batch=2, iterations=3)
    found = gvbsm(data, pair, 1, settings, seed=6)
    models = [frozen(teacher, "cpu") for teacher in pair]
    networks = [
        Matched(model, targets_of(model, teacher, data, settings, "cpu"), settings)
        for model, teacher in zip(models, pair, strict=True)
    ]
    images = []
    for number, labels in enumerate(([0, 1], [2])):
        run = recovery.Run(len(labels), settings, pair[0], seed_of(6, number), "cpu")
        images.append(
            run.optimise(Objective(networks, torch.tensor(labels), settings, 3 * number), "by hand")
        )
    assert torch.equal(pixels_of(found), torch.cat(images))
    run = recovery.Run(1, settings, pair[0], seed_of(6, 1), "cpu")
    fresh = [Matched(own.model, own.targets, settings) for own in networks]
    anew = run.optimise(Objective(fresh, torch.tensor([2]), settings, 3), "by hand")
    assert not torch.equal(anew, images[1])


def test_a_seed_gives_the_same_bytes_and_nothing_else_is_touched(pair, data):
    before = [copy.deepcopy(teacher.model.state_dict()) for teacher in pair]
    state = torch.get_rng_state()
    first, again, other = (gvbsm(data, pair, 2, TINY, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(pixels_of(first), pixels_of(again))
    assert not torch.equal(pixels_of(first), pixels_of(other))
    assert torch.equal(torch.get_rng_state(), state)
    for teacher, own in zip(pair, before, strict=True):
        assert all(torch.equal(value, own[name]) for name, value in teacher.model.state_dict().items())
        assert all(parameter.requires_grad for parameter in teacher.model.parameters())


class Killed(BaseException):
    """What nothing catches, as nothing catches kill -9."""


@pytest.mark.parametrize("at", [2, 5, 8])
def test_an_interrupted_run_ends_with_the_same_bytes(pair, data, tmp_path, monkeypatch, at):
    """Cut off in the first, in the second and between two batches; the averages go on too."""
    monkeypatch.setattr(recovery, "CHECKPOINT_SECONDS", 0.0)
    settings = replace(TINY, batch=4, iterations=4)
    whole = pixels_of(gvbsm(data, pair, 2, settings, seed=1))
    calls, call = [], Objective.__call__

    def counted(self, iteration, *rest):
        calls.append(iteration)
        if len(calls) == at:
            raise Killed
        return call(self, iteration, *rest)

    monkeypatch.setattr(Objective, "__call__", counted)
    with pytest.raises(Killed):
        gvbsm(data, pair, 2, settings, seed=1, state=tmp_path)
    found = gvbsm(data, pair, 2, settings, seed=1, state=tmp_path)
    assert torch.equal(pixels_of(found), whole) and len(calls) == 9  # one of eight iterations twice begun
    monkeypatch.setattr(module, "targets_of", None)
    again = gvbsm(data, pair, 2, settings, seed=1, state=tmp_path)
    assert torch.equal(pixels_of(again), whole) and len(calls) == 9


# --- settings, and what is refused


def test_the_settings_are_the_authors():
    """Their scripts for IPC 10 on ImageNet-1K and CIFAR; batches of two classes for more images is ours."""
    paper = GVBSM.paper("imagenet", 10)
    assert (paper.size, paper.batch, paper.iterations, paper.lr) == (224, 80, 4000, 0.1)
    weights = paper.statistics_weight, paper.first_layer, paper.density_weight, paper.temperature
    assert weights == (0.01, 10.0, 0.5, 4.0)  # D half: their other terms are means over half a batch
    assert (paper.patch, paper.ema, paper.drop_rate, paper.jpeg_quality) == (16, 0.4, 0.0, 75)
    assert (paper.views, paper.target_images, paper.target_batch) == (CROPPED, None, 256)
    cifar = GVBSM.paper("cifar-10", 10)
    assert (cifar.size, cifar.batch, cifar.iterations, cifar.lr) == (32, 100, 4000, 0.05)
    assert (cifar.statistics_weight, cifar.first_layer, cifar.density_weight, cifar.temperature) == (
        0.01,
        10.0,
        1.0,
        4.0,
    )
    assert (cifar.patch, cifar.ema, cifar.drop_rate, cifar.jpeg_quality) == (4, 0.8, 0.4, None)
    assert cifar.views == Views(pad=4, flip=True, roll=32)
    assert (cifar.target_images, cifar.target_batch) == (None, 64)
    assert cifar == GVBSM() and GVBSM.paper("cifar-100", 10) == replace(cifar, density_weight=0.5)
    assert (GVBSM.paper("imagenet", 50).batch, GVBSM.paper("cifar-10", 1000).batch) == (100, 2000)
    assert GVBSM.small() == replace(cifar, iterations=300, target_images=500)
    assert GVBSM.small(100).batch == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ema=1.0), "ema and drop_rate are in 0 ... 1, got 1.0 and 0.4"),
        (dict(drop_rate=-0.1), "ema and drop_rate are in 0 ... 1, got 0.8 and -0.1"),
        (dict(patch=0), "patch and target_batch are at least 1 and temperature is above 0, got 0, 4 and 4.0"),
        (dict(temperature=0.0), "temperature is above 0, got 4, 4 and 0.0"),
        (dict(iterations=0), "iterations are at least 1"),
    ],
)
def test_settings_out_of_their_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_what_cannot_be_had_is_refused(pair, data, tmp_path):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    first, second = pair
    for others, message in (
        ([], "needs at least one teacher; name some"),
        (
            [first, replace(second, std=(0.5,) * 3)],
            "5 channels was trained with another normalisation than 3",
        ),
        (
            [first, replace(second, classes=("a", "c", "b"))],
            "label 1 is 'b' in the 3 channels and 'c' in the 5",
        ),
        (
            [first, replace(second, model=linear)],
            "5 channels has no convolutions and no batch normalisations",
        ),
        ([first, replace(second, least=99.0)], r"5 channels \(random\) gets .* below 99 %"),
    ):
        with pytest.raises(ValueError, match=message):
            gvbsm(data, others, 1, TINY)
    with pytest.raises(ValueError, match="ipc is at least 1, got 0"):
        gvbsm(data, pair, 0, TINY)
    with pytest.raises(ValueError, match="ipc 7 needs batches of at least 7, not 6; raise batch"):
        gvbsm(data, pair, 7, TINY)
    gvbsm(data, pair, 1, TINY, state=tmp_path)
    for change, message in (
        (dict(ema=0.5), "ema = 0.8, wanted 0.5"),
        (dict(patch=2), "patch = 4, wanted 2"),
    ):
        with pytest.raises(ValueError, match=f"holds the state of other settings: {message}; choose another"):
            gvbsm(data, pair, 1, replace(TINY, **change), state=tmp_path)


def test_a_non_finite_loss_raises(pair, data):
    with torch.no_grad():
        pair[1].model[-1].bias.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="in iteration 2 of 4; lower lr"):
        gvbsm(data, pair, 1, TINY)


@pytest.mark.parametrize("name", IMAGENET_NETWORKS[1:])
def test_imagenets_networks_are_torchvisions_or_refused(monkeypatch, tmp_path, name):
    """Their logits at the classes' ids; where a file is missing the error says where it goes."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    whole = network(f"torchvision/{name}", num_classes=1000, image_size=224).eval()
    weights = type(teachers.get_model_weights(name).IMAGENET1K_V1)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: whole.state_dict())
    found = teachers.imagenet_teacher(("woof", "meow"), (207, 5), f"torchvision/{name}")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found.model.eval()(images), whole(images)[:, [207, 5]])
    assert found.architecture == f"torchvision/{name}" and found.classes == ("woof", "meow")

    def offline(self, **_):
        raise URLError("no network")

    monkeypatch.setattr(weights, "get_state_dict", offline)
    with pytest.raises(FileNotFoundError, match=r"no network.*; download https://.*\.pth to .*checkpoints"):
        teachers.imagenet_teacher(("woof", "meow"), (207, 5), f"torchvision/{name}")


def test_imagenets_networks_are_four(monkeypatch):
    monkeypatch.setattr(module, "imagenet_teacher", lambda *given: given)
    assert imagenet_networks(("woof",), (207,)) == [
        (("woof",), (207,), f"torchvision/{name}")
        for name in ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5")
    ]


# --- labels by all networks, and their loss


def test_an_ensemble_equalises_the_norms_of_a_batch_s_logits(pair):
    """Each network's logits, all of a batch, are scaled to the mean of the networks' norms; then averaged."""
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        pair[1].model[-1].weight.mul_(30)
        own = [teacher.model(images).double() for teacher in pair]
        norms = [math.sqrt(sum(value**2 for value in logits.flatten().tolist())) for logits in own]
        target = sum(norms) / 2
        equal, plain = (ensemble(pair, equalise=equalise) for equalise in (True, False))
        scaled = [logits * target / norm for logits, norm in zip(own, norms, strict=True)]
        torch.testing.assert_close(equal.model(images).double(), (scaled[0] + scaled[1]) / 2)
        torch.testing.assert_close(plain.model(images).double(), (own[0] + own[1]) / 2)
    assert norms[1] > 5 * norms[0]
    assert (equal.classes, equal.mean, equal.std) == (pair[0].classes, MEAN, STD)
    assert equal.architecture != plain.architecture and "3 channels, 5 channels" in equal.architecture
    with pytest.raises(ValueError, match="trained with another normalisation"):
        ensemble([pair[0], replace(pair[1], mean=(0.0,) * 3)], equalise=True)


def test_the_label_loss_against_a_float64_reference():
    """Mean over images and classes of squared differences, plus the weighted mean cross-entropy."""
    logits, teacher = (3 * torch.randn(5, 7, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 6, 3, 3, 1])
    logits.requires_grad_()
    for weight in (0.1, 0.15, 0.0):
        squares, ce = 0.0, 0.0
        for row, target, label in zip(logits.tolist(), teacher.tolist(), labels.tolist(), strict=True):
            squares += sum((a - b) ** 2 for a, b in zip(row, target, strict=True))
            ce += math.log(sum(math.exp(value) for value in row)) - row[label]
        loss = logit_loss(logits, teacher, labels, weight)
        assert loss.item() == pytest.approx(squares / 35 + weight * ce / 5, rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, logits)
        hard = (logits.softmax(1) - F.one_hot(labels, 7)) / 5
        torch.testing.assert_close(gradient, 2 * (logits - teacher) / 35 + weight * hard)


def test_hard_labels_are_those_of_the_images_before_they_were_mixed(pair, data, monkeypatch):
    """One step of SGD by hand: the teacher's logits of the mixed batch, the first images' own labels."""
    finals = []
    monkeypatch.setattr(
        evaluation, "accuracy", lambda model, *_: finals.append(copy.deepcopy(model)) or (0.0, 0.0)
    )
    monkeypatch.setattr(evaluation, "augment", lambda pixels, *_: pixels)
    monkeypatch.setattr(
        evaluation,
        "cutmix",
        lambda pixels, labels, *_: (0.6 * pixels + 0.4 * pixels.flip(0), labels.flip(0), 0.6),
    )
    protocol = Protocol(
        "test",
        8,
        MEAN,
        STD,
        "sgd",
        0.5,
        0.0,
        "soft",
        epochs=1,
        batch_size=18,
        milestones=(),
        soft_loss="mse+ce",
        hard_weight=0.15,
        evaluations=1,
    )
    teacher = ensemble(pair, equalise=True)
    options = dict(network="convnet2", protocol=protocol, seed=3, teacher=teacher, device="cpu")
    evaluate(data, data, mixed_precision=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = network("convnet2", num_classes=3, image_size=8).double()
    order = torch.randperm(18, generator=torch.Generator().manual_seed(3))
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in (MEAN, STD))
    pixels = data.fetch(order).double() / 255
    inputs = (0.6 * pixels + 0.4 * pixels.flip(0) - mean) / std
    with torch.no_grad():
        target = teacher.model(inputs.float()).double()
    logits = model(inputs)
    hard = F.cross_entropy(logits, data.labels[order])
    (((logits - target) ** 2).mean() + 0.15 * hard).backward()
    for found, parameter in zip(finals[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.double(), parameter - 0.5 * parameter.grad, rtol=1e-3, atol=1e-5)


def test_its_protocols_are_the_authors():
    """Scripts and defaults of their training code: ImageNet-1K's, CIFAR-10's, and the small one's loss."""
    plain = GVBSM_SOFT.training("torchvision/resnet18", 10, 1000)
    assert (plain.epochs, plain.batch_size, plain.lr, plain.weight_decay) == (300, 1024, 1e-3, 0.01)
    assert (GVBSM_SOFT.soft_loss, GVBSM_SOFT.hard_weight, GVBSM_SOFT.labels) == ("mse+ce", 0.1, "soft")
    assert (GVBSM_SOFT.crop_scale, GVBSM_SOFT.flip, GVBSM_SOFT.cutmix) == ((0.08, 1.0), True, 1.0)
    assert (GVBSM_SOFT.jitter, GVBSM_SOFT.lighting, GVBSM_SOFT.decay) == (0.0, 0.0, "matrices")
    cifar = GVBSM_SOFT_32.training("resnet18_modified", 10, 10)
    assert (cifar.epochs, cifar.batch_size, cifar.lr, cifar.weight_decay) == (1000, 100, 1e-3, 0.0)
    assert (GVBSM_SOFT_32.hard_weight, GVBSM_SOFT_32.image_size) == (0.15, 32)
    changes = ("soft_loss", "hard_weight", "schedule", "patch_factor", "crop_scale", "double_pass")
    as_cifar = {name: getattr(GVBSM_SOFT_32, name) for name in changes}
    assert replace(SMALL_SOFT, name="small-gvbsm", **as_cifar) == SMALL_GVBSM
    factors = [schedule(GVBSM_SOFT, epoch, 4) for epoch in range(4)]
    assert factors == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
