"""DM: its loss and steps against loops, where it starts, that classes are independent, and resuming."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from igd_lib.baselines import dm as module
from igd_lib.baselines.dm import DM, dm, feature_network, matching_loss
from igd_lib.baselines.pixels import entropy, generator_of, stored
from igd_lib.data.datasets import image_folder
from igd_lib.data.dsa import apply, draw, dsa
from igd_lib.data.images import ImageData, from_tensors
from igd_lib.tools.progress import Interrupted, Pace

SHORT = DM("convnet2-w8", iterations=4, lr=0.5, batch_real=4)
MEAN, STD = (torch.tensor(values).reshape(-1, 1, 1) for values in (SHORT.mean, SHORT.std))


@pytest.fixture
def toy() -> ImageData:
    """Three classes of seven images of 8 px, each about a colour of its own."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 120, (21, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(3).repeat(7)
    images[torch.arange(21), labels] += 100
    return from_tensors("toy", "train", ("a", "b", "c"), images, labels)


def run_of(data: ImageData, ipc: int, settings: DM = SHORT, **options) -> module._Run:
    values = {"labels": None, "seed": 0, "device": "cpu", "state": None} | options
    run = module._Run(data, ipc, settings, **values)
    run.load()
    return run


def two_layers() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Flatten())
    return net.double().requires_grad_(False)


def images_of(found: ImageData) -> torch.Tensor:
    return found.fetch(torch.arange(len(found)))


# --- the loss


def test_the_loss_is_its_definition():
    """Feature by feature and image by image: sums over features, means over images."""
    net, real, synthetic = two_layers(), torch.randn(5, 3, 6, 6).double(), torch.randn(3, 3, 6, 6).double()
    with torch.no_grad():
        a, b = ([net(x[None])[0].tolist() for x in images] for images in (real, synthetic))
    total = 0.0
    for d in range(len(a[0])):
        means = [sum(row[d] for row in rows) / len(rows) for rows in (a, b)]
        total += (means[0] - means[1]) ** 2
    found = matching_loss(net, real, synthetic)
    assert found.ndim == 0 and abs(found.item() - total) < 1e-12 * total


@pytest.mark.parametrize("family", ["color", "crop", "scale"])
def test_its_gradient_is_that_of_finite_differences(family):
    """With respect to the synthetic images, through the change that both sides get; none to the real ones."""
    net, real = two_layers(), torch.randn(4, 3, 6, 6).double().requires_grad_()
    params = draw(dsa(family), 4, 6, generator_of(1), per_sample=False)
    synthetic = torch.randn(2, 3, 6, 6).double().requires_grad_()
    assert gradcheck(
        lambda s: matching_loss(net, apply(real.detach(), params), apply(s, params)), (synthetic,)
    )
    assert torch.autograd.grad(matching_loss(net, real, synthetic), real, allow_unused=True) == (None,)


def test_the_first_step_by_hand(toy, monkeypatch):
    """Of features that are the pixels: the gradient is -2 / ipc times the difference of the means."""
    monkeypatch.setattr(module, "feature_network", lambda *_, **__: nn.Flatten())
    run = run_of(toy, 2, replace(SHORT, iterations=1, lr=0.3, augmentation="", batch_real=7))
    first = [images.detach().clone() for images in run.images]
    run.optimise()
    for label in range(3):
        real = (toy.of_class(label).double() / 255 - MEAN) / STD
        expected = first[label] + 0.3 * 2 / 2 * (real.mean(0) - first[label].double().mean(0))
        torch.testing.assert_close(run.images[label].double(), expected, rtol=0, atol=1e-5)


def naive(data: ImageData, ipc: int, settings: DM, seed: int) -> torch.Tensor:
    """All classes in one float64 tensor, one backward pass of the summed loss, SGD written out.

    Its draws and networks are the module's; what is made of them is not.
    """

    def pixels(label: int, count: int, generator: torch.Generator) -> torch.Tensor:
        indices = (data.labels == label).nonzero().flatten()
        chosen = indices[torch.randperm(len(indices), generator=generator)][:count]
        return (data.fetch(chosen).double() / 255 - MEAN.double()) / STD.double()

    classes, side = len(data.classes), data.image_size
    synthetic = torch.cat([pixels(c, ipc, generator_of(seed, 0, c, module.INITIAL)) for c in range(classes)])
    velocity = torch.zeros_like(synthetic)
    for iteration in range(settings.iterations):
        synthetic.requires_grad_()
        net = feature_network(
            settings.network,
            classes=classes,
            image_size=side,
            device="cpu",
            seed=(seed, iteration, 0, module.NETWORK),
        ).double()
        loss = torch.zeros((), dtype=torch.float64)
        for c in range(classes):
            generator = generator_of(seed, iteration, c, module.BATCH)
            real = pixels(c, settings.batch_real, generator)
            params = draw(dsa(settings.augmentation), len(real), side, generator, per_sample=False)
            with torch.no_grad():
                target = net(apply(real, params))
            own = net(apply(synthetic[c * ipc : (c + 1) * ipc], params))
            loss = loss + torch.sum((target.mean(0) - own.mean(0)) ** 2)
        gradient = torch.autograd.grad(loss, synthetic)[0]
        velocity = settings.momentum * velocity + gradient
        synthetic = synthetic.detach() - settings.lr * velocity
    return synthetic


@pytest.mark.parametrize("network", ["convnet2-w8", "resnetap10-cifar"])
def test_it_is_one_step_of_all_classes_at_a_time(toy, network):
    data = toy if network == "convnet2-w8" else toy.at(16)
    settings = replace(SHORT, network=network, iterations=3, lr=0.5 if data is toy else 0.1)
    run = run_of(data, 2, settings, seed=4)
    first = torch.cat([images.detach().clone() for images in run.images])
    run.optimise()
    found, expected = torch.cat([images.detach() for images in run.images]), naive(data, 2, settings, 4)
    assert (found - first).abs().mean() > 0.005
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_features_are_what_the_classifier_would_get():
    options = {"classes": 5, "image_size": 16, "device": "cpu", "seed": (0, 0)}
    convnet, resnet = (feature_network(name, **options) for name in ("convnet2-w8", "resnetap10-cifar"))
    images = torch.randn(2, 3, 16, 16)
    assert convnet(images).shape == (2, 8 * 4 * 4) and resnet(images).shape == (2, 256)
    torch.testing.assert_close(convnet(images), convnet.features(images).flatten(1))
    assert convnet.training and not any(p.requires_grad for p in convnet.parameters())


# --- what is drawn


def test_every_iteration_has_a_network_of_its_own(toy, monkeypatch):
    seen, make = [], module.feature_network

    def spied(*args, **options):
        seen.append(make(*args, **options))
        return seen[-1]

    run = run_of(toy, 1)
    monkeypatch.setattr(module, "feature_network", spied)
    run.optimise()
    weights = [next(net.parameters()).sum().item() for net in seen]
    assert len(set(weights)) == len(weights) == SHORT.iterations


def test_both_sides_get_one_draw_a_class_and_iteration(toy, monkeypatch):
    calls = []

    def spied(images, params):
        calls.append((len(images), params))
        return apply(images, params)

    monkeypatch.setattr(module, "apply", spied)
    run_of(toy, 2, replace(SHORT, augmentation="rotate")).optimise()
    assert [count for count, _ in calls] == [4, 2] * (3 * SHORT.iterations)
    angles = [params[0].values for _, params in calls]
    assert all(angle.shape == (1, 1) for angle in angles)
    drawn = [angle.item() for angle in angles]
    assert drawn[::2] == drawn[1::2] and len(set(drawn)) == 3 * SHORT.iterations


def test_it_starts_from_random_real_images(toy):
    """Of the class, each once; of noise where that is asked for."""
    still = replace(SHORT, iterations=1, lr=1e-12)
    found = dm(toy, 3, still, seed=1)
    for label in range(3):
        real, own = toy.of_class(label), found.of_class(label)
        places = [(real == image).flatten(1).all(1).nonzero().item() for image in own]
        assert len(set(places)) == 3
    assert not torch.equal(images_of(dm(toy, 3, still, seed=2)), images_of(found))
    noise = run_of(toy, 7, replace(still, init="noise")).images[0]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_real_images_are_drawn_without_replacement(toy):
    run = run_of(toy, 1, replace(SHORT, batch_real=5))
    batches = [run._batch(iteration, 1)[0] for iteration in range(40)]
    assert all(len(batch) == 5 == len(batch.flatten(1).unique(dim=0)) for batch in batches)
    assert len(torch.cat(batches).flatten(1).unique(dim=0)) == 7  # all are, sooner or later
    assert len(run_of(toy, 1, replace(SHORT, batch_real=64))._batch(0, 1)[0]) == 7


def test_entropy_depends_on_every_number_and_its_place():
    numbers = [(0,), (0, 0), (1, 0), (0, 1), (1,), (2**40, 1), (2**40,)]
    assert len({entropy(*given) for given in numbers}) == len(numbers)
    assert all(0 <= entropy(*given) < 2**63 for given in numbers)


# --- what it makes


def test_the_loss_falls_on_networks_it_has_not_seen(toy):
    network = "convnet2-w32"
    run = run_of(toy, 2, replace(SHORT, network=network, iterations=30, lr=1.0, batch_real=7))
    first = [images.detach().clone() for images in run.images]
    run.optimise()

    def losses(images) -> torch.Tensor:
        found = []
        for number in range(1000, 1008):
            net = feature_network(network, classes=3, image_size=8, device="cpu", seed=(number,))
            real = [(toy.of_class(label).float() / 255 - MEAN) / STD for label in range(3)]
            found.append(sum(matching_loss(net, a, b.detach()) for a, b in zip(real, images, strict=True)))
        return torch.stack(found)

    assert (losses(run.images) < 0.85 * losses(first)).all()  # eight of eight; it ends at about 0.6


def test_count_order_and_labels(toy):
    found = dm(toy, 2, SHORT)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.classes == toy.classes
    assert found.image_size == 8 and found.name == "toy" and found.split == "DM, ipc 2, seed 0"
    pixels = images_of(found).float().mean((2, 3))
    assert pixels.argmax(1).tolist() == found.labels.tolist()  # each class kept its colour


def test_a_class_does_not_depend_on_the_others(toy):
    whole = dm(toy, 2, SHORT, seed=3)
    some = dm(toy, 2, SHORT, labels=[2, 0], seed=3)
    assert some.labels.tolist() == [2, 2, 0, 0] and some.classes == toy.classes
    for label in (0, 2):
        assert torch.equal(some.of_class(label), whole.of_class(label))


def test_a_seed_gives_the_same_bytes_and_leaves_the_generator_alone(toy):
    state = torch.get_rng_state()
    first, again, other = (images_of(dm(toy, 2, SHORT, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_pixels_are_clamped_and_rounded_once_at_the_end(toy):
    run = run_of(toy, 2, replace(SHORT, lr=30.0))
    run.optimise()
    plain = torch.cat([images.detach() * STD + MEAN for images in run.images])
    assert plain.min() < -0.05 and plain.max() > 1.05
    assert torch.equal(images_of(run.found()), (plain.clamp(0, 1) * 255).round().to(torch.uint8))
    levels = torch.tensor([-0.2, 0.4 / 255, 0.6 / 255, 1.3]).expand(1, 3, 4, 4)
    assert images_of(stored(toy, "s", [levels], [1], "M"))[0, 0, 0].tolist() == [0, 0, 1, 255]


# --- resuming


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_interrupted_run_goes_on_where_it_was_saved(toy, tmp_path, monkeypatch, error):
    """As if nothing had happened, momenta included."""
    whole, state = dm(toy, 2, SHORT, seed=5), tmp_path / "state.safetensors"
    monkeypatch.setattr(Pace, "due", True)
    step, done = module._Run._step, []

    def broken(run, iteration):
        if iteration == 2 and len(done) == 2:
            raise error
        done.append(iteration)
        step(run, iteration)

    monkeypatch.setattr(module._Run, "_step", broken)
    expected = Interrupted if error is KeyboardInterrupt else error
    words = "2 of 4 iterations of DM are in" if expected is Interrupted else None
    with pytest.raises(expected, match=words):
        dm(toy, 2, SHORT, seed=5, state=state)
    done.append(None)
    found = dm(toy, 2, SHORT, seed=5, state=state)
    assert done == [0, 1, None, 2, 3] and torch.equal(images_of(found), images_of(whole))


def test_a_state_of_another_run_is_refused(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Pace, "due", True)
    state = tmp_path / "state.safetensors"
    dm(toy, 2, SHORT, state=state)
    assert state.is_file()
    with pytest.raises(ValueError, match=r"is of another run \(lr = 0.5, wanted 0.25\); delete it"):
        dm(toy, 2, replace(SHORT, lr=0.25), state=state)
    for options in ({"seed": 1}, {"labels": [1]}):
        with pytest.raises(ValueError, match="is of another run"):
            dm(toy, 2, SHORT, state=state, **options)


# --- settings and refusals


def test_the_settings_are_the_authors():
    assert asdict(DM()) == {
        "network": "convnet3",
        "iterations": 20_000,
        "lr": 1.0,
        "momentum": 0.5,
        "batch_real": 256,
        "augmentation": "color_crop_cutout_flip_scale_rotate",
        "init": "real",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
    }
    assert DM.paper("cifar-10", 1) == DM.paper("cifar-10", 50) == DM()
    assert DM.paper("cifar-10", 100) == DM.paper("cifar-10", 1000) == DM(lr=10.0)
    hundred = DM(mean=(0.5071, 0.4866, 0.4409), std=(0.2673, 0.2564, 0.2762))
    assert DM.paper("cifar-100", 10) == DM.paper("cifar-100", 100) == hundred
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert DM.paper(image_folder("images", image_size=64), 10) == DM("convnet4", mean=mean, std=std)
    photographs = DM("convnet6", 5000, batch_real=128, mean=mean, std=std)
    assert DM.paper("imagenette", 10) == DM.paper("food-101", 100) == photographs
    assert DM.paper(image_folder("images", image_size=224), 10) == photographs
    assert DM.small(10) == DM("convnet3-w64", 500, batch_real=64)


def test_what_cannot_be_had_is_refused(toy):
    for ipc, words in (
        (8, r"ipc 8 is more than class 'a' of toy has, 7 images in 'train'"),
        (0, "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            dm(toy, ipc, SHORT)
    for labels in ([3], [-1], [0, 0], []):
        with pytest.raises(ValueError, match="labels are some of 0 ... 2, each once"):
            dm(toy, 1, SHORT, labels=labels)
    for network in ("convnet2-bn", "timm/test_vit"):
        with pytest.raises(
            ValueError, match=f"no batch statistics; '{network}' has, or is another .*: choose convnetN"
        ):
            dm(toy.at(16), 1, replace(SHORT, network=network))
    with pytest.raises(ValueError, match="8 px are too few"):
        dm(toy, 1, replace(SHORT, network="convnet4"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"iterations": 0}, "iterations and batch_real are at least 1, got 0 and 4"),
        ({"batch_real": 0}, "got 4 and 0"),
        ({"lr": 0.0}, "lr > 0 and 0 <= momentum < 1, got 0.0"),
        ({"momentum": 1.0}, "lr > 0 and 0 <= momentum < 1"),
        ({"init": "mix"}, "init is 'real' or 'noise', got 'mix'"),
        ({"augmentation": "zoom"}, "unknown augmentation 'zoom'"),
    ],
)
def test_settings_out_of_range_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SHORT, **change)


def test_a_loss_that_is_not_finite_stops_it(toy):
    with pytest.raises(
        FloatingPointError, match=r"DM: the loss is \S+ in iteration \d, .*lower lr \(1e\+30\)"
    ):
        dm(toy, 1, replace(SHORT, lr=1e30))
    with pytest.raises(FloatingPointError, match="M: pixels are not finite; lower its lr"):
        stored(toy, "s", [torch.full((1, 3, 8, 8), float("nan"))], [0], "M")
