"""IDC-1: its loss against finite differences, its steps against one optimiser of all classes, resuming."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from igd_lib.baselines import idc as module
from igd_lib.baselines.idc import IDC, Passes, conv_weights, idc, matching_loss, sgd_step
from igd_lib.baselines.pixels import fresh_network, generator_of
from igd_lib.data.augment import cutmix
from igd_lib.data.datasets import image_folder
from igd_lib.data.dsa import apply, diffaug, draw
from igd_lib.data.images import ImageData, from_tensors
from igd_lib.tools.progress import Interrupted, Pace

SHORT = IDC(outer=2, inner=3, network="convnet2-w8", batch_real=4, net_images=8, lr=2.0, base_side=8)
MEAN, STD = (torch.tensor(values).reshape(-1, 1, 1) for values in (SHORT.mean, SHORT.std))


@pytest.fixture
def toy() -> ImageData:
    """Three classes of seven images of 8 px, each about a colour of its own."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 120, (21, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(3).repeat(7)
    images[torch.arange(21), labels] += 100
    return from_tensors("toy", "train", ("a", "b", "c"), images, labels)


def run_of(data: ImageData, ipc: int, settings: IDC = SHORT, **options) -> module._Run:
    values = {"labels": None, "seed": 0, "device": "cpu", "state": None} | options
    run = module._Run(data, ipc, settings, **values)
    run.load()
    return run


def two_layers() -> nn.Module:
    layers = nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Conv2d(2, 2, 2), nn.GroupNorm(2, 2), nn.Tanh(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(2 * 3 * 3, 3)).double()


def images_of(found: ImageData) -> torch.Tensor:
    return found.fetch(torch.arange(len(found)))


# --- the loss


def cross_entropy(net: nn.Module, images: torch.Tensor, label: int) -> float:
    """Image by image, logit by logit."""
    with torch.no_grad():
        rows = [net(image[None])[0].tolist() for image in images]
    return sum(math.log(sum(math.exp(x) for x in row)) - row[label] for row in rows) / len(rows)


@pytest.mark.parametrize("metric", ["l1", "mse"])
def test_the_loss_is_its_definition(metric):
    """Each weight of the two convolutions moved a little, and no other parameter's gradient in the sum."""
    net, eps, total = two_layers(), 1e-5, 0.0
    real, synthetic = torch.rand(3, 3, 5, 5).double(), torch.rand(2, 3, 5, 5).double()
    for weights in (net[0].weight, net[2].weight):
        for number in range(weights.numel()):
            gradients = []
            for images in (real, synthetic):
                values = []
                for sign in (1, -1):
                    with torch.no_grad():
                        weights.view(-1)[number] += sign * eps
                    values.append(cross_entropy(net, images, 1))
                    with torch.no_grad():
                        weights.view(-1)[number] -= sign * eps
                gradients.append((values[0] - values[1]) / (2 * eps))
            gap = gradients[0] - gradients[1]
            total += abs(gap) if metric == "l1" else gap * gap
    found = matching_loss(net, real, synthetic, 1, metric)
    assert found.ndim == 0 and abs(found.item() - total) < 1e-6 * total


@pytest.mark.parametrize("metric", ["l1", "mse"])
def test_its_gradient_is_that_of_finite_differences(metric):
    """With respect to synthetic images, through two orders and the change that both sides get."""
    net, real = two_layers(), torch.rand(3, 3, 5, 5).double().requires_grad_()
    params = draw(diffaug(), 1, 5, generator_of(1), per_sample=False)
    synthetic = torch.rand(2, 3, 5, 5).double().requires_grad_()

    def loss(own: torch.Tensor) -> torch.Tensor:
        both = apply(torch.cat([real.detach(), own]), params)
        return matching_loss(net, both[:3], both[3:], 2, metric)

    assert gradcheck(loss, (synthetic,))
    assert torch.autograd.grad(loss(synthetic), synthetic)[0].abs().max() > 1e-4
    direct = matching_loss(net, real, synthetic, 2, metric)
    assert torch.autograd.grad(direct, real, allow_unused=True) == (None,)


def test_only_convolutions_count_and_equal_images_match():
    net = fresh_network("resnetap10-cifar", classes=3, image_size=16, device="cpu", seed=(0,))
    kernels = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(kernels) == 12 and {id(p) for p in conv_weights(net)} == {id(p) for p in kernels}
    small, images = two_layers(), torch.rand(3, 3, 5, 5).double()
    for metric in ("l1", "mse"):
        assert matching_loss(small, images, images.clone(), 0, metric).item() < 1e-12
        assert matching_loss(small, images, images.flip(3), 0, metric).item() > 1e-6


# --- the steps


def test_coasting_by_hand():
    """v = 0.5 v + g, x = x - lr v; without a gradient along what is left."""
    x, v = torch.tensor([1.0, 2.0]), torch.tensor([0.4, 0.0])
    sgd_step(x, v, torch.tensor([1.0, -1.0]), lr=0.1, momentum=0.5)
    torch.testing.assert_close((x, v), (torch.tensor([0.88, 2.1]), torch.tensor([1.2, -1.0])))
    sgd_step(x, v, None, lr=0.1, momentum=0.5)
    torch.testing.assert_close((x, v), (torch.tensor([0.82, 2.15]), torch.tensor([0.6, -0.5])))


def pixels(data: ImageData, indices: torch.Tensor) -> torch.Tensor:
    return data.fetch(indices).float() / 255


def net_loss(net: nn.Module, data: ImageData, settings: IDC, seed: int, number: int) -> torch.Tensor:
    """Of a batch of real images, each changed by itself, without cutout, mixed at times."""
    per_pass = math.ceil(len(data) / settings.batch_real)
    order = torch.randperm(len(data), generator=generator_of(seed, module.PASS, number // per_pass))
    start = number % per_pass * settings.batch_real
    indices, generator = order[start : start + settings.batch_real], generator_of(seed, module.TRAIN, number)
    x, y = (pixels(data, indices) - MEAN) / STD, data.labels[indices]
    x = apply(x, draw(diffaug("color_crop"), len(x), x.shape[-1], generator, per_sample=True))
    if torch.rand((), generator=generator) >= settings.mix:
        return F.cross_entropy(net(x), y)
    x, other, share = cutmix(x, y, 1.0, generator)
    logits = net(x).log_softmax(1)
    losses = [-(share * row[a] + (1 - share) * row[b]) for row, a, b in zip(logits, y, other, strict=True)]
    return torch.stack(losses).mean()


def naive(data: ImageData, ipc: int, settings: IDC, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All images in one tensor and one optimiser, a step after each class, zero gradients for the others.

    Its draws are the module's. Also the images before each clamp.
    """
    classes, side, before = len(data.classes), data.image_size, []
    first = [(data.labels == c).nonzero().flatten()[:ipc] for c in range(classes)]
    images = pixels(data, torch.cat(first)).requires_grad_()
    rate = settings.lr * ipc / 10 * (side / settings.base_side) ** 2
    optimizer = torch.optim.SGD([images], lr=rate, momentum=settings.momentum)
    batches = math.ceil(len(data) / settings.batch_real)
    number = 0  # of the network's batch
    for t in range(settings.outer):
        net = fresh_network(
            settings.network, classes=classes, image_size=side, device="cpu", seed=(seed, module.NETWORK, t)
        )
        net_optimizer = torch.optim.SGD(
            net.parameters(), lr=settings.net_lr, momentum=0.9, weight_decay=settings.net_weight_decay
        )

        def train(count: int, net=net, net_optimizer=net_optimizer) -> None:
            nonlocal number
            for _ in range(count):
                net_optimizer.zero_grad()
                net_loss(net, data, settings, seed, number).backward()
                net_optimizer.step()
                number += 1

        train(settings.early * batches)
        before.append(images.detach().clone())
        images.data.clamp_(0, 1)
        for i in range(settings.inner):
            for c in range(classes):
                step = t * settings.inner + i
                mine = (data.labels == c).nonzero().flatten()
                whole = len(mine) // settings.batch_real
                order = torch.randperm(
                    len(mine), generator=generator_of(seed, module.CLASS_PASS, c, step // whole)
                )
                start = step % whole * settings.batch_real
                real = pixels(data, mine[order[start : start + settings.batch_real]])
                own, generator = images[c * ipc : (c + 1) * ipc], generator_of(seed, module.MATCH, step, c)
                torch.randperm(ipc, generator=generator)  # of which images; here all
                both = (torch.cat([real, own]) - MEAN) / STD
                both = apply(both, draw(diffaug("color_crop_cutout"), 1, side, generator, per_sample=False))
                parameters = list(net.parameters())
                target = torch.full((len(both),), c)
                n = len(real)
                g_real = torch.autograd.grad(F.cross_entropy(net(both[:n]), target[:n]), parameters)
                loss = F.cross_entropy(net(both[n:]), target[n:])
                g_own = torch.autograd.grad(loss, parameters, create_graph=True)
                gaps = [a.detach() - b for a, b in zip(g_real, g_own, strict=True) if a.ndim not in (1, 2)]
                sums = [gap.abs().sum() if settings.metric == "l1" else gap.pow(2).sum() for gap in gaps]
                optimizer.zero_grad(set_to_none=False)
                sum(sums).backward()
                optimizer.step()
            train(min(math.ceil(settings.net_images / settings.batch_real), batches))
    return images.detach(), torch.stack(before)


@pytest.mark.parametrize(
    ("metric", "lr", "early"), [("mse", 2.0, 0), ("l1", 0.06, 1)], ids=["mse", "l1 after early epochs"]
)
def test_it_is_one_optimiser_of_all_classes(toy, metric, lr, early):
    """Class by class, each coasting by itself, against the authors' loop; some pixels leave [0, 1]."""
    settings = replace(SHORT, metric=metric, lr=lr, early=early)
    run = run_of(toy, 2, settings, seed=4)
    first = torch.cat([images.detach().clone() for images in run.images])
    run.optimise()
    found = torch.cat([images.detach() for images in run.images])
    expected, before = naive(toy, 2, settings, 4)
    assert (found - first).abs().mean() > 0.01 and (before[1] - before[1].clamp(0, 1)).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_class_does_not_depend_on_the_others(toy):
    whole = idc(toy, 2, SHORT, seed=3)
    some = idc(toy, 2, SHORT, labels=[2, 0], seed=3)
    assert some.labels.tolist() == [2, 2, 0, 0] and some.classes == toy.classes
    for label in (0, 2):
        assert torch.equal(some.of_class(label), whole.of_class(label))


def test_the_first_step_by_hand(toy):
    """The first class's: its gradient times the rate, and half of that and a quarter as it coasts."""
    run = run_of(toy, 2, replace(SHORT, outer=1, inner=1, net_images=0))
    images = run.images[0].detach().clone()
    gradient = run._gradient(0, 0, run.images[0])
    run.optimise()
    rate = 2.0 * 2 / 10
    torch.testing.assert_close(run.images[0].data, images - rate * 1.75 * gradient, rtol=0, atol=1e-6)
    assert (rate * gradient).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("metric", "lr", "names", "ratio"), [("mse", 0.3, "color", 0.7), ("l1", 0.003, "", 0.85)]
)
def test_the_loss_falls(toy, metric, lr, names, ratio):
    """On the network of the loop, between all real images of a class and the synthetic ones."""
    settings = replace(SHORT, outer=1, inner=20, batch_real=7, net_images=0)
    run = run_of(toy, 2, replace(settings, metric=metric, lr=lr, augmentation=names))
    first = [images.detach().clone() for images in run.images]
    run.optimise()
    for label in range(3):
        real = (toy.of_class(label).float() / 255 - MEAN) / STD
        before, after = (
            matching_loss(run.network, real, (images.detach() - MEAN) / STD, label, metric).item()
            for images in (first[label], run.images[label])
        )
        assert after < ratio * before


def test_a_large_class_is_matched_a_random_part_at_a_time(toy):
    run = run_of(toy, 5, replace(SHORT, batch_synthetic=2))
    parts = []
    for step in range(8):
        moved = run._gradient(step, 1, run.images[1]).flatten(1).abs().amax(1) > 0
        assert moved.sum() == 2
        parts.append(tuple(moved.nonzero().flatten().tolist()))
    assert len(set(parts)) > 2


# --- what is drawn


def test_both_sides_get_one_draw_a_step_and_the_networks_images_one_each(toy, monkeypatch):
    calls = []

    def spied(images, params):
        calls.append((len(images), [change.operation for change in params], len(params[0].values)))
        return apply(images, params)

    monkeypatch.setattr(module, "apply", spied)
    run_of(toy, 2, replace(SHORT, outer=1, inner=1)).optimise()
    colour = ["brightness", "saturation", "contrast"]
    assert calls == [(6, [*colour, "crop", "cutout"], 1)] * 3 + [(4, [*colour, "crop"], 4)] * 2


@pytest.mark.parametrize("drop_last", [True, False])
def test_passes_see_every_image_before_any_twice(drop_last):
    passes = Passes(11, 4, (7,), drop_last)
    assert passes.per_pass == (2 if drop_last else 3)
    seen = []
    for whole in range(3):
        numbers = range(whole * passes.per_pass, (whole + 1) * passes.per_pass)
        batches = [passes.batch(number) for number in numbers]
        assert [len(batch) for batch in batches] == ([4, 4] if drop_last else [4, 4, 3])
        seen.append(torch.cat(batches).tolist())
        assert len(set(seen[-1])) == len(seen[-1])
    assert seen[0] != seen[1] != seen[2]
    assert torch.equal(passes.batch(1), Passes(11, 4, (7,), drop_last).batch(1))
    assert not torch.equal(passes.batch(1), Passes(11, 4, (8,), drop_last).batch(1))


def test_the_network_is_new_in_each_outer_loop_and_trained_between_steps(toy, monkeypatch):
    seen = []
    match = module._Run._match

    def spied(run, step, label, *rest):
        seen.append((step, label, torch.cat([p.detach().flatten() for p in run.network.parameters()])))
        match(run, step, label, *rest)

    monkeypatch.setattr(module._Run, "_match", spied)
    run = run_of(toy, 1)
    run.optimise()
    weights = {step: state for step, label, state in seen if label == 0}
    assert all(torch.equal(state, weights[step]) for step, _, state in seen)  # not within a step
    for outer in range(2):
        fresh = fresh_network("convnet2-w8", classes=3, image_size=8, device="cpu", seed=(0, 0, outer))
        start = torch.cat([p.detach().flatten() for p in fresh.parameters()])
        assert torch.equal(weights[3 * outer], start)
        moved = [(weights[3 * outer + i] - start).norm().item() for i in range(3)]
        assert 0 < moved[1] < moved[2]


def test_training_teaches_it(toy):
    """Early epochs: it tells the real classes apart; without any it does not."""
    accuracy = {}
    for early in (0, 30):
        run = run_of(toy, 1, replace(SHORT, early=early, net_lr=0.05))
        run._begin(0)
        with torch.no_grad():
            logits = run.network((pixels(toy, torch.arange(21)) - MEAN) / STD)
        accuracy[early] = (logits.argmax(1) == toy.labels).float().mean().item()
    assert accuracy[0] < 0.7 and accuracy[30] == 1


def test_it_starts_from_the_first_real_images(toy):
    still = replace(SHORT, lr=1e-12)
    for seed in (0, 1):
        found = idc(toy, 3, still, seed=seed)
        assert all(torch.equal(found.of_class(label), toy.of_class(label, 3)) for label in range(3))


# --- what it makes


def test_count_order_and_labels(toy):
    found = idc(toy, 2, SHORT)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.classes == toy.classes
    assert found.image_size == 8 and found.name == "toy" and found.split == "IDC-1, ipc 2, seed 0"
    assert images_of(found).float().mean((2, 3)).argmax(1).tolist() == found.labels.tolist()


def test_a_seed_gives_the_same_bytes_and_leaves_the_generator_alone(toy):
    state = torch.get_rng_state()
    first, again, other = (images_of(idc(toy, 2, SHORT, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_pixels_are_clamped_and_rounded_at_the_end(toy):
    run = run_of(toy, 2, replace(SHORT, lr=6.0))
    run.optimise()
    plain = torch.cat([images.detach() for images in run.images])
    assert plain.min() < -0.01
    assert torch.equal(images_of(run.found()), (plain.clamp(0, 1) * 255).round().to(torch.uint8))


# --- resuming


class Stop(Exception):
    pass


@pytest.mark.parametrize("last", [2, 3, 4])
def test_an_interrupted_run_goes_on_where_it_was_saved(toy, tmp_path, monkeypatch, last):
    """Within an outer loop or at its beginning, after early epochs, momenta and network included."""
    settings, state = replace(SHORT, early=1), tmp_path / "state.safetensors"
    whole = idc(toy, 2, settings, seed=5)
    monkeypatch.setattr(Pace, "due", True)
    match, done, broken = module._Run._match, [], []

    def breaking(run, step, label, *rest):
        if (step, label) == (last, 1) and not broken:
            broken.append(step)
            raise KeyboardInterrupt
        done.append((step, label))
        match(run, step, label, *rest)

    monkeypatch.setattr(module._Run, "_match", breaking)
    with pytest.raises(Interrupted, match=f"{last} of 6 steps of IDC-1 are in"):
        idc(toy, 2, settings, seed=5, state=state)
    again = len(done)
    found = idc(toy, 2, settings, seed=5, state=state)
    assert done[again] == (last, 0) and len(done[again:]) == 3 * (6 - last)
    assert torch.equal(images_of(found), images_of(whole))


def test_early_epochs_are_not_repeated(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Pace, "due", True)
    state, train, counts = tmp_path / "state.safetensors", module._Run._train, []

    def counted(run, numbers):
        counts.append(len(numbers))
        if len(counts) == 2:
            raise Stop
        train(run, numbers)

    monkeypatch.setattr(module._Run, "_train", counted)
    settings = replace(SHORT, outer=1, inner=1, early=2)
    with pytest.raises(Stop):
        idc(toy, 1, settings, state=state)
    idc(toy, 1, settings, state=state)
    assert counts == [12, 2, 2]


def test_a_state_of_another_run_is_refused(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Pace, "due", True)
    state = tmp_path / "state.safetensors"
    idc(toy, 2, SHORT, state=state)
    assert state.is_file()
    with pytest.raises(ValueError, match=r"is of another run \(metric = mse, wanted l1\); delete it"):
        idc(toy, 2, replace(SHORT, metric="l1"), state=state)
    for options in ({"seed": 1}, {"labels": [1]}):
        with pytest.raises(ValueError, match="is of another run"):
            idc(toy, 2, SHORT, state=state, **options)


# --- settings and refusals


def test_the_settings_are_the_authors():
    assert asdict(IDC()) == {
        "outer": 2000,
        "inner": 100,
        "metric": "mse",
        "lr": 5e-3,
        "base_side": 32,
        "momentum": 0.5,
        "batch_real": 64,
        "batch_synthetic": 128,
        "augmentation": "color_crop_cutout",
        "network": "convnet3",
        "early": 0,
        "net_images": 2000,
        "net_lr": 0.01,
        "net_momentum": 0.9,
        "net_weight_decay": 5e-4,
        "mix": 0.5,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
    }
    assert IDC.paper("cifar-10", 10) == IDC.paper("cifar-100", 10) == IDC()
    grey = IDC(metric="l1", lr=1e-4, net_images=500, mean=(0.2861,) * 3, std=(0.3530,) * 3)
    assert IDC.paper("fashion-mnist", 10) == grey
    photographs = IDC(
        outer=500,
        metric="l1",
        lr=3e-3,
        base_side=224,
        network="resnetap10",
        early=10,
        net_images=500,
        mix=1.0,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    assert IDC.paper("imagenette", 10) == IDC.paper("imagewoof", 50) == photographs
    many = {"lr": 1e-3, "early": 5, "net_lr": 0.1, "net_weight_decay": 1e-4, "batch_real": 128}
    assert IDC.paper("food-101", 10) == replace(photographs, **many)
    assert IDC.paper(image_folder("images", image_size=64), 10).network == "convnet4"
    assert IDC.small() == IDC(outer=10, inner=20, network="convnet3-w64", net_images=500)


def test_the_rate_follows_ipc_and_side():
    assert IDC().rate(10, 32) == 5e-3 and IDC().rate(1, 32) == pytest.approx(5e-4)
    assert IDC.paper("imagenette", 50).rate(50, 256) == pytest.approx(3e-3 * 5 * (256 / 224) ** 2)


def test_what_cannot_be_had_is_refused(toy):
    for ipc, words in (
        (8, r"ipc 8 is more than class 'a' of toy has, 7 images in 'train'"),
        (0, "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            idc(toy, ipc, SHORT)
    for labels in ([3], [0, 0], []):
        with pytest.raises(ValueError, match="labels are some of 0 ... 2, each once"):
            idc(toy, 1, SHORT, labels=labels)
    with pytest.raises(ValueError, match="'convnet2-bn' has, or is another library's: choose convnetN"):
        idc(toy, 1, replace(SHORT, network="convnet2-bn"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outer": 0}, "at least 1, early and net_images at least 0, got .0, 3, 4, 128, 8., 0 and 8"),
        ({"early": -1}, "got .2, 3, 4, 128, 8., -1 and 8"),
        ({"metric": "cos"}, "metric is 'l1' or 'mse', got 'cos'"),
        ({"lr": 0.0}, "lr and net_lr > 0"),
        ({"net_lr": 0.0}, "lr and net_lr > 0"),
        ({"momentum": 1.0}, "0 <= momentum < 1"),
        ({"mix": 1.5}, "0 <= mix <= 1"),
        ({"augmentation": "zoom"}, "unknown augmentation 'zoom'"),
    ],
)
def test_settings_out_of_range_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SHORT, **change)


def test_a_loss_that_is_not_finite_stops_it(toy):
    with pytest.raises(FloatingPointError, match=r"IDC-1: the loss is \S+ in step \d, .*lower lr \(1e\+36\)"):
        idc(toy, 1, replace(SHORT, lr=1e36, inner=1, net_images=0))
    with pytest.raises(FloatingPointError, match=r"in the network's batch \d; lower net_lr \(1e\+36\)"):
        idc(toy, 1, replace(SHORT, net_lr=1e36))
