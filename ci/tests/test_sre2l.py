"""SRe2L: the loss, the views and the steps by hand, what is kept of a run, and what is refused."""

from __future__ import annotations

import copy
import io
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from igd_lib.baselines import recovery
from igd_lib.baselines import sre2l as module
from igd_lib.baselines.recovery import CROPPED, ROLLED, Run, Views, by_index, frozen, layers_of, view
from igd_lib.baselines.sre2l import Objective, SRe2L, recoverer, sre2l
from igd_lib.data.augment import crop_boxes
from igd_lib.teachers import Teacher
from igd_lib.tools.progress import Interrupted

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TINY = SRe2L(size=8, batch=3, iterations=4, views=Views(flip=True, roll=2), jpeg_quality=None)


def small_network(classes: int = 3) -> nn.Sequential:
    """Two convolutions with batch normalisation, that has seen some images."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, classes),
    )
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(0.5 * torch.randn(12, 3, 8, 8) + torch.tensor([0.2, -0.1, 0.3]).reshape(3, 1, 1))
    return model


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(1)
    return Teacher(small_network(), "two layers", "random", ("a", "b", "c"), MEAN, STD, least=0.0)


def pixels_of(found):
    return found.fetch(torch.arange(len(found)))


# --- the loss


def naive_statistics(x: torch.Tensor) -> list[tuple[float, float]]:
    """Mean and variance of each channel, number by number."""
    found = []
    for channel in range(x.shape[1]):
        values = [float(value) for image in x for value in image[channel].flatten()]
        mean = sum(values) / len(values)
        found.append((mean, sum((value - mean) ** 2 for value in values) / len(values)))
    return found


def naive_loss(model, images, labels, weight: float, first: float) -> tuple[float, list[float]]:
    """CE + weight sum_l w_l (norm of means + norm of variances), layer by layer; and the sum's terms."""
    x, terms = images, []
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            found = naive_statistics(x)
            means = sum((a - float(b)) ** 2 for (a, _), b in zip(found, layer.running_mean, strict=True))
            variances = sum((a - float(b)) ** 2 for (_, a), b in zip(found, layer.running_var, strict=True))
            terms.append(math.sqrt(means) + math.sqrt(variances))
            scale = layer.weight / (layer.running_var + layer.eps).sqrt()
            shift = layer.bias - layer.running_mean * scale
            x = x * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
        else:
            x = layer(x)
    ce = 0.0
    for logits, label in zip(x.tolist(), labels.tolist(), strict=True):
        ce += math.log(sum(math.exp(value) for value in logits)) - logits[label]
    weights = [first] + [1.0] * (len(terms) - 1)
    return ce / len(labels) + weight * sum(w * term for w, term in zip(weights, terms, strict=True)), terms


@pytest.fixture
def doubled(teacher):
    """The network in float64, images and labels."""
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    return frozen(teacher, "cpu").double(), images, torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize(("weight", "first"), [(0.01, 10.0), (0.7, 10.0), (0.7, 1.0), (0.0, 10.0)])
def test_the_loss_against_a_naive_float64_one(doubled, weight, first):
    """The statistics are of what enters a layer, biased; norms are not squared; the first counts tenfold."""
    model, images, labels = doubled
    settings = replace(TINY, statistics_weight=weight, first_layer=first, views=Views())
    found = Objective(model, labels, settings)(0, images, torch.Generator())
    expected, terms = naive_loss(model, images.detach(), labels, weight, first)
    assert found.item() == pytest.approx(expected, rel=1e-10) and len(terms) == 2
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_first_layer_s_factor_is_nine_more_of_its_term(doubled):
    model, images, labels = doubled
    tenfold, once = (
        Objective(model, labels, replace(TINY, statistics_weight=0.3, first_layer=first, views=Views()))(
            0, images, torch.Generator()
        )
        for first in (10.0, 1.0)
    )
    _, terms = naive_loss(model, images.detach(), labels, 0.3, 1.0)
    assert (tenfold - once).item() == pytest.approx(0.3 * 9 * terms[0], rel=1e-9)


@pytest.mark.parametrize("views", [Views(), ROLLED, CROPPED, Views(pad=2, flip=True, roll=3)])
def test_gradients_by_finite_differences(doubled, views):
    """Through every view, with the same draws."""
    model, images, labels = doubled
    objective = Objective(model, labels, replace(TINY, statistics_weight=0.5, views=views))

    def loss(x):
        return objective(0, x, torch.Generator().manual_seed(5))

    (gradient,) = torch.autograd.grad(loss(images), images)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        step = 1e-6 * direction
        difference = (loss(images.detach() + step) - loss(images.detach() - step)).item() / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-5)


def test_statistics_of_real_batches_are_far_nearer_than_those_of_noise(fashion_train):
    """A network's running statistics come from such images, whatever it has learned."""
    model = nn.Sequential(*list(small_network(10).children()))
    real = [images.float() / 127.5 - 1 for images, _ in fashion_train.first(40).batches(100)]
    with torch.no_grad():
        for layer in layers_of(model, (nn.BatchNorm2d,)).values():
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over batches
        for images in real[:3]:
            model.train()(images)
    model.eval()
    settings = replace(TINY, views=Views(), statistics_weight=1.0)

    def statistics(images):
        labels = torch.zeros(len(images), dtype=torch.long)
        return (
            Objective(model, labels, settings)(0, images, torch.Generator()).item()
            - F.cross_entropy(model(images), labels).item()
        )

    with torch.no_grad():
        assert statistics(real[3]) < 0.2 * statistics(torch.randn_like(real[3]))


# --- views


def test_a_roll_moves_all_images_alike_by_zero_to_its_most():
    images, seen = torch.randn(2, 3, 8, 8), Counter()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        found = view(images, Views(roll=2), generator)
        [shift] = [
            (down, right)
            for down in range(8)
            for right in range(8)
            if torch.equal(found, images.roll((down, right), (2, 3)))
        ]
        seen[shift] += 1
    assert set(seen) == {(down, right) for down in range(3) for right in range(3)}
    assert min(seen.values()) > 15  # of 33 each


def test_a_crop_is_one_box_for_the_batch_at_the_image_s_size():
    """torchvision's crop and resizing, of the box that torchvision's rule draws."""
    images = torch.rand(3, 3, 16, 16)
    found = view(images, Views(crop_scale=(0.08, 1.0)), torch.Generator().manual_seed(3))
    box = crop_boxes(1, 16, (0.08, 1.0), torch.Generator().manual_seed(3))[0].tolist()
    torch.testing.assert_close(found, TF.resized_crop(images, *box, size=[16, 16], antialias=True))
    assert box[2:] != [16, 16]


def test_a_window_is_cut_from_the_padded_image():
    images = torch.randn(2, 3, 8, 8)
    padded, seen = F.pad(images, [4] * 4), set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        found = view(images, Views(pad=4), generator)
        [corner] = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if torch.equal(found, padded[:, :, top : top + 8, left : left + 8])
        ]
        seen.add(corner)
    assert len(seen) > 75  # of 81


def test_flips_come_half_the_time_for_the_batch_or_for_each():
    images = torch.randn(100, 3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    flipped = [bool((view(images, Views(flip=True), generator) != images).any()) for _ in range(200)]
    assert 70 < sum(flipped) < 130
    found = view(images, Views(flip=True), generator, each=True)
    own = [not torch.equal(a, b) for a, b in zip(found, images, strict=True)]
    assert 30 < sum(own) < 70
    assert all(torch.equal(a, b.flip(2)) for a, b, is_own in zip(found, images, own, strict=True) if is_own)


@pytest.mark.parametrize("views", [Views(crop_scale=(0.08, 1.0)), Views(pad=4)])
def test_boxes_and_windows_of_each_image_differ(views):
    """In real batches; a recovered one has one draw."""
    image = torch.randn(1, 3, 16, 16)
    same, own = (
        view(image.expand(6, -1, -1, -1), views, torch.Generator().manual_seed(1), each=each)
        for each in (False, True)
    )
    assert torch.equal(same, same[:1].expand_as(same))
    assert len({found.numpy().tobytes() for found in own}) > 3


# --- steps, and what is stored


def test_the_first_steps_by_hand(teacher):
    """Adam with betas 0.5 and 0.9 from N(0, 1), the rate falling by a cosine, then the clamp; in float64."""
    settings = replace(TINY, iterations=5, views=ROLLED, lr=0.25)
    labels = torch.tensor([2, 0, 1])
    run = Run(3, settings, teacher, 7, "cpu")
    loss = Objective(frozen(teacher, "cpu"), labels, settings)
    own = Objective(frozen(teacher, "cpu").double(), labels, settings)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 3, 8, 8, generator=generator).double()
    torch.testing.assert_close(run.images.pixels.double(), x, rtol=0, atol=0)
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (MEAN, STD))
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(3):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(own(step, x, generator), x)
        first, second = 0.5 * first + 0.5 * gradient, 0.9 * second + 0.1 * gradient**2
        rate = 0.25 * (1 + math.cos(math.pi * step / 5)) / 2
        unbiased = first / (1 - 0.5 ** (step + 1)), second / (1 - 0.9 ** (step + 1))
        x = x.detach() - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        x = torch.minimum(torch.maximum(x, (0 - mean) / std), (1 - mean) / std)
        run.step(loss, step)
        assert (run.images.pixels.double() - x).abs().mean() < 1e-5
        torch.testing.assert_close(run.images.pixels.detach().double(), x, rtol=0, atol=2e-3)


def test_pixels_stay_in_what_zero_to_one_is_after_normalisation(teacher):
    settings = replace(TINY, lr=3.0)
    run = Run(3, settings, teacher, 0, "cpu")
    loss = Objective(frozen(teacher, "cpu"), torch.tensor([0, 1, 2]), settings)
    for iteration in range(3):
        run.step(loss, iteration)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        values = run.images.pixels[:, channel]
        assert values.min().item() == pytest.approx(-mean / std, abs=1e-6)
        assert values.max().item() == pytest.approx((1 - mean) / std, abs=1e-6)


def test_the_loss_falls(teacher):
    """In 50 iterations, measured without a view."""
    settings = replace(TINY, iterations=50, lr=0.25)
    labels = torch.tensor([0, 1, 2])
    run = Run(3, settings, teacher, 0, "cpu")
    model = frozen(teacher, "cpu")
    plain = Objective(model, labels, replace(settings, views=Views()))
    before = plain(0, run.images.pixels, torch.Generator()).item()
    run.optimise(Objective(model, labels, settings), "test")
    assert plain(0, run.images.pixels, torch.Generator()).item() < 0.7 * before


def test_images_are_truncated_and_go_through_jpeg_where_the_settings_have_it(teacher):
    """254.9 is 254, and what leaves [0, 1] its end; PIL's file of quality 75 where they say so."""
    run = Run(1, replace(TINY, jpeg_quality=None), teacher, 0, "cpu")
    wanted = (torch.arange(192, dtype=torch.float64) * 1.4).floor().reshape(1, 3, 8, 8) + 0.9
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        run.images.pixels.copy_((wanted / 255 - mean) / std)
    plain = run.finished()
    assert plain.dtype == torch.uint8 and torch.equal(plain, wanted.clamp(0, 255).floor().to(torch.uint8))
    file = io.BytesIO()
    Image.fromarray(plain[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=75)
    stored = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    run.settings = replace(run.settings, jpeg_quality=75)
    assert torch.equal(run.finished()[0], stored) and not torch.equal(stored, plain[0])


# --- batches


@pytest.mark.parametrize(
    ("classes", "ipc", "batch", "sizes"),
    [
        (1000, 2, 100, [100] * 20),
        (150, 2, 100, [100, 50, 100, 50]),
        (10, 10, 100, [100]),
        (10, 25, 100, None),
    ],
)
def test_a_batch_has_one_image_of_each_class_or_several_of_few(classes, ipc, batch, sizes):
    parts = by_index(classes, ipc, batch)
    assert [len(part) for part in parts] == (sizes or [100, 100, 50])
    assert sorted(image for part in parts for image in part) == [
        (label, index) for label in range(classes) for index in range(ipc)
    ]
    assert parts[0][:3] == ((0, 0), (1, 0), (2, 0))
    for part in parts:
        share = Counter(label for label, _ in part)
        assert len(set(share.values())) == 1 and (classes < batch or max(share.values()) == 1)


def test_sets_come_class_after_class(teacher, toy_data):
    """Each image in its place, whatever batch it was in: as the network's class tells, and by hand."""
    settings = replace(TINY, batch=6, iterations=60, lr=0.25, views=Views())
    found = sre2l(toy_data.at(8), teacher, 3, settings, seed=4)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and found.classes == toy_data.classes
    assert (found.name, found.image_size) == ("toy", 8)
    inputs = (pixels_of(found).float() / 255 - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(
        STD
    ).reshape(3, 1, 1)
    assert teacher.model.eval()(inputs).argmax(1).tolist() == found.labels.tolist()
    work = recoverer(toy_data.at(8), teacher, 3, settings, seed=4, device="cpu", state=None)
    work.run(1)  # the third images of all classes alone
    images = work.batches.made(1)["images"]
    for label in range(3):
        assert torch.equal(found.of_class(label)[2], images[label])


def test_a_batch_depends_on_the_seed_and_its_number_alone(teacher, toy_data, tmp_path):
    """So they are made in any order, in as many processes as there are."""
    data = toy_data.at(8)
    whole = sre2l(data, teacher, 2, TINY, seed=3)
    work = recoverer(data, teacher, 2, TINY, seed=3, device="cpu", state=tmp_path)
    assert work.batches.lacking() == [0, 1]
    work.to("cpu").run(1)
    assert work.batches.lacking() == [0]
    work.run(0)
    assert torch.equal(pixels_of(work.batches.all()), pixels_of(whole))
    other = sre2l(data, teacher, 2, TINY, seed=4)
    assert not torch.equal(pixels_of(other)[0], pixels_of(whole)[0])
    assert not torch.equal(pixels_of(whole)[0], pixels_of(whole)[1])


def test_a_seed_gives_the_same_bytes_and_nothing_else_is_touched(teacher, toy_data):
    data, before = toy_data.at(8), copy.deepcopy(teacher.model.state_dict())
    teacher.model.train()
    state = torch.get_rng_state()
    first, again = (sre2l(data, teacher, 1, TINY, seed=5) for _ in range(2))
    assert torch.equal(pixels_of(first), pixels_of(again))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in teacher.model.parameters())


# --- runs that go on


class Killed(BaseException):
    """What nothing catches, as nothing catches kill -9."""


@pytest.mark.parametrize("how", [Killed, KeyboardInterrupt])
def test_an_interrupted_run_ends_with_the_same_bytes(teacher, toy_data, tmp_path, monkeypatch, how):
    """Cut off within the second of two batches; what was done is not done again."""
    monkeypatch.setattr(recovery, "CHECKPOINT_SECONDS", 0.0)
    data, settings = toy_data.at(8), replace(TINY, iterations=6)
    whole = pixels_of(sre2l(data, teacher, 2, settings, seed=1))
    calls, call = [], Objective.__call__

    def counted(self, iteration, *rest):
        calls.append(iteration)
        if len(calls) == 10:
            raise how
        return call(self, iteration, *rest)

    monkeypatch.setattr(Objective, "__call__", counted)
    left = "3 of 6 iterations are in .*training-00001" if how is KeyboardInterrupt else None
    with pytest.raises(Interrupted if how is KeyboardInterrupt else how, match=left):
        sre2l(data, teacher, 2, settings, seed=1, state=tmp_path)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        "settings.json",
        "batch-00000.safetensors",
        "training-00001.safetensors",
    }
    found = sre2l(data, teacher, 2, settings, seed=1, state=tmp_path)
    assert torch.equal(pixels_of(found), whole)
    assert calls == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 3, 4, 5]
    assert not list(tmp_path.glob("training-*"))
    again = sre2l(data, teacher, 2, settings, seed=1, state=tmp_path)
    assert torch.equal(pixels_of(again), whole) and len(calls) == 13


def test_states_are_written_at_most_once_a_minute(teacher, toy_data, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(recovery.files, "save_training", lambda *given, **_: saved.append(given))
    sre2l(toy_data.at(8), teacher, 1, TINY, state=tmp_path)
    assert not saved
    monkeypatch.setattr(recovery, "CHECKPOINT_SECONDS", 0.0)
    sre2l(toy_data.at(8), teacher, 1, TINY, state=tmp_path / "other")
    assert len(saved) == TINY.iterations


def test_a_state_of_other_settings_is_refused(teacher, toy_data, tmp_path):
    data = toy_data.at(8)
    sre2l(data, teacher, 1, TINY, state=tmp_path)
    for change, message in (
        (dict(settings=replace(TINY, lr=0.1)), r"lr = 0.25, wanted 0.1"),
        (
            dict(settings=replace(TINY, views=ROLLED)),
            r"views.flip = True, wanted False|views.roll = 2, wanted",
        ),
        (dict(ipc=2), "ipc = 1, wanted 2"),
        (dict(seed=1), "seed = 0, wanted 1"),
        (dict(teacher=replace(teacher, weights="others")), r"network\[1\] = random, wanted others"),
    ):
        given = dict(teacher=teacher, ipc=1, settings=TINY) | change
        with pytest.raises(ValueError, match=f"holds the state of other settings: .*({message}); choose"):
            sre2l(data, state=tmp_path, **given)
    (tmp_path / "batch-00000.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"batch-00000.safetensors is damaged .* delete it and run again"):
        sre2l(data, teacher, 1, TINY, state=tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json is damaged .* delete its folder"):
        sre2l(data, teacher, 1, TINY, state=tmp_path)


# --- settings, and what is refused


def test_the_settings_are_the_authors():
    """Their scripts for ImageNet-1K and CIFAR-100; none is for CIFAR-10."""
    paper = SRe2L.paper("imagenet", 10)
    assert (paper.size, paper.batch, paper.iterations, paper.lr) == (224, 100, 4000, 0.25)
    assert (paper.statistics_weight, paper.first_layer, paper.jpeg_quality) == (0.01, 10.0, 75)
    assert paper.views == Views(crop_scale=(0.08, 1.0), pad=0, flip=True, roll=32)
    cifar = SRe2L.paper("cifar-100", 50)
    assert (cifar.size, cifar.batch, cifar.iterations, cifar.lr) == (32, 100, 1000, 0.25)
    assert (cifar.statistics_weight, cifar.first_layer, cifar.jpeg_quality) == (0.01, 10.0, 75)
    assert cifar.views == Views(crop_scale=None, pad=0, flip=False, roll=4)
    assert SRe2L.paper("cifar-10", 10) == cifar == SRe2L() and SRe2L.paper("food-101", 10) == paper
    assert SRe2L.small(50) == replace(cifar, iterations=500, jpeg_quality=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(iterations=0), "size, batch and iterations are at least 1, got 8, 3 and 0"),
        (dict(lr=0.0), "lr is above 0, statistics_weight and first_layer at least 0, got 0.0, 0.01"),
        (dict(statistics_weight=-1.0), "first_layer at least 0, got 0.25, -1.0 and 10.0"),
        (dict(jpeg_quality=100), "jpeg_quality is 1 ... 95 or None, got 100"),
    ],
)
def test_settings_out_of_their_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize("views", [dict(crop_scale=(0.5, 0.2)), dict(crop_scale=(0.0, 1.0)), dict(roll=-1)])
def test_views_out_of_their_range_are_refused(views):
    with pytest.raises(ValueError, match=r"crop_scale is two shares of the area .* at least 0 px"):
        Views(**views)


def test_what_cannot_be_had_is_refused(teacher, toy_data):
    data = toy_data.at(8)
    plain = Teacher(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), "linear", "", data.classes, MEAN, STD, 0.0
    )
    with pytest.raises(
        ValueError, match=r"linear keeps no batch statistics .* train another network, such as"
    ):
        sre2l(data, plain, 1, TINY)
    with pytest.raises(ValueError, match="ipc is at least 1, got 0"):
        sre2l(data, teacher, 0, TINY)
    with pytest.raises(ValueError, match="class orders differ: label 0 is 'b' in the teacher"):
        sre2l(data, replace(teacher, classes=("b", "a", "c")), 1, TINY)
    with pytest.raises(ValueError, match=r"two layers \(random\) gets .* real images of toy, below 99 %"):
        sre2l(data, replace(teacher, least=99.0), 1, TINY)


def test_the_teacher_is_checked_before_anything_is_made(teacher, toy_data, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "Run", None)
    with pytest.raises(ValueError, match="below 99 %"):
        sre2l(toy_data.at(8), replace(teacher, least=99.0), 1, TINY, state=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_non_finite_loss_raises(teacher, toy_data):
    with torch.no_grad():
        teacher.model[-1].bias.fill_(math.inf)
    message = (
        r"the loss is .* in iteration 1 of 4; lower lr \(0.25\) or statistics_weight \(0.01\) in the settings"
    )
    with pytest.raises(FloatingPointError, match=message):
        sre2l(toy_data.at(8), teacher, 1, TINY)
