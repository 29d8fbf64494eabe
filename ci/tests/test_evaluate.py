"""The protocols: optimiser, schedule, soft labels, a network that learns, runs that resume."""

import copy
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torchvision

from igd_lib import evaluation as module
from igd_lib.config import STANDARD
from igd_lib.data.images import ImageData, from_tensors
from igd_lib.evaluation import Cell, evaluate, evaluate_all, make_optimizer, schedule, soft_label_loss
from igd_lib.experiment.scales import paper_scale
from igd_lib.models.networks import network
from igd_lib.protocols import (
    IGD_CIFAR,
    IGD_HARD,
    MINIMAX_HARD,
    PROTOCOLS,
    RDED_MIXUP,
    RDED_SOFT,
    RDED_SOFT_32,
    RDED_SOFT_64,
    RDED_SOFT_128,
    SMALL_HARD,
    SMALL_SOFT,
    Protocol,
    Training,
)
from igd_lib.teachers import Teacher, accuracy, check_class_order, check_teacher, predict, test_inputs
from igd_lib.tools import files, progress

HALF = (0.5, 0.5, 0.5)
PLAIN = Protocol(
    "plain",
    32,
    HALF,
    HALF,
    "adamw",
    1e-3,
    0.01,
    epochs=12,
    crop_scale=(1.0, 1.0),
    flip=False,
    jitter=0.0,
    lighting=0.0,
    cutmix=0.0,
    evaluations=3,
)


# --- the numbers of each protocol


def test_cifars_protocol_is_the_released_codes():
    """1,000 epochs at every IPC and number of classes, nothing but CutMix on every other batch, one test."""
    assert IGD_CIFAR.image_size == 32 and IGD_CIFAR.labels == "hard"
    assert IGD_CIFAR.mean == (0.4914, 0.4822, 0.4465) and IGD_CIFAR.std == (0.2023, 0.1994, 0.2010)
    assert (IGD_CIFAR.crop_scale, IGD_CIFAR.flip) == ((1.0, 1.0), False)
    assert (IGD_CIFAR.jitter, IGD_CIFAR.lighting) == (0, 0)
    assert (IGD_CIFAR.cutmix, IGD_CIFAR.cutmix_probability) == (1.0, 0.5)
    for ipc, classes in ((10, 10), (1000, 10), (10, 100), (50, 101)):
        assert IGD_CIFAR.training("convnet3", ipc, classes) == Training(1000, 64, 1e-3, 0.01)
    assert IGD_CIFAR.tests(1000) == [1000]
    assert (IGD_CIFAR.optimizer, IGD_CIFAR.schedule, IGD_CIFAR.milestones) == (
        "adamw",
        "multistep",
        (2 / 3, 5 / 6),
    )


def test_cifar_is_evaluated_by_its_own_protocol_at_the_papers_scale():
    def protocol(dataset, classes, side):
        made = paper_scale(
            dataset, fidelity=STANDARD, ipc=10, labels="hard", num_classes=classes, image_size=side
        )
        return made.protocol

    assert protocol("cifar-10", 10, 32) == protocol("cifar-100", 100, 32) == IGD_CIFAR
    assert protocol("food-101", 101, 256) == IGD_HARD


def test_over_100_classes_batches_are_128_at_least():
    """IGD's AdamW keeps its rate and decay there, Minimax's SGD does not."""
    assert IGD_HARD.training("resnet18", 10, 1000) == Training(2000, 128, 1e-3, 0.01)
    assert IGD_HARD.training("resnet18", 10, 100) == Training(1300, 64, 1e-3, 0.01)
    assert MINIMAX_HARD.training("resnet18", 10, 101) == Training(2000, 128, 0.1, 1e-4)


@pytest.mark.parametrize(
    ("protocol", "size", "resized", "factor", "batches"),
    [
        (RDED_SOFT, 224, 256, 2, [10, 50, 100]),
        (RDED_SOFT_128, 128, 144, 2, [10, 50, 100]),
        (RDED_SOFT_64, 64, 72, 1, [100, 100, 100]),
        (RDED_SOFT_32, 32, 32, 1, [10, 50, 100]),
    ],
)
def test_rdeds_sizes(protocol, size, resized, factor, batches):
    """Test images are resized to size // 7 * 8; Tiny-ImageNet's batch is 100 at any IPC."""
    assert (protocol.image_size, protocol.test_resize, size // 7 * 8) == (size, resized, resized)
    assert protocol.patch_factor == factor and protocol.crop_scale == (1 / factor, 1.0)
    found = [protocol.training("convnet4-bn", ipc, 200).batch_size for ipc in (1, 10, 50)]
    assert found == batches
    assert protocol.double_pass and protocol.made_for == 1000 and not protocol.mixed_precision


@pytest.mark.parametrize(
    ("network", "lr"),
    [
        ("vgg11", 5e-4),
        ("alexnet", 1e-4),
        ("vit_b_16", 1e-4),
        ("torchvision/swin_v2_t", 1e-4),
        ("mobilenet_v2", 2.5e-3),
        ("torchvision/efficientnet_b0", 2e-3),
        ("timm/mobilenetv2_100", 2.5e-3),
        ("convnet5-bn", 1e-3),
        ("resnet18_modified", 1e-3),
        ("torchvision/resnet18", 1e-3),
        ("torchvision/resnet101", 1e-3),
    ],
)
def test_rdeds_rates(network, lr):
    assert RDED_SOFT.training(network, 10, 1000).lr == lr


def test_rdeds_mixup_variant():
    assert (RDED_MIXUP.mixup, RDED_MIXUP.temperature, RDED_MIXUP.cutmix) == (0.8, 4.0, 0.0)
    assert replace(RDED_MIXUP, mixup=0.0, temperature=20.0, cutmix=1.0, name="rded-soft") == RDED_SOFT


def test_only_the_stand_ins_protocols_are_in_mixed_precision():
    assert {name for name, found in PROTOCOLS.items() if found.mixed_precision} == {
        "small-hard",
        "small-hard-colour",
        "small-soft",
        "small-gvbsm",
    }
    assert {found.tf32 for found in PROTOCOLS.values()} == {"convolutions"}  # torch's default


# --- the optimiser and the schedule


def test_optimizers():
    model = torch.nn.Linear(2, 2)
    adamw = make_optimizer(model, IGD_HARD, lr=1e-3, weight_decay=0.01)
    assert (
        isinstance(adamw, torch.optim.AdamW)
        and adamw.defaults["lr"] == 1e-3
        and adamw.defaults["weight_decay"] == 0.01
    )
    assert adamw.defaults["betas"] == (0.9, 0.999)
    sgd = make_optimizer(model, MINIMAX_HARD, lr=0.01, weight_decay=5e-4)
    assert (
        isinstance(sgd, torch.optim.SGD)
        and sgd.defaults["momentum"] == 0.9
        and sgd.defaults["weight_decay"] == 5e-4
    )


def test_soft_labels_decay_weight_matrices_alone():
    """RDED: no decay on biases and normalisations; the hard-label protocols decay everything."""
    model = network("torchvision/resnet18", num_classes=3, image_size=32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = make_optimizer(model, RDED_SOFT, lr=1e-3, weight_decay=0.01).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    kept = {names[id(parameter)] for parameter in decayed["params"]}
    assert {"conv1.weight", "fc.weight", "layer2.0.downsample.0.weight"} <= kept
    assert not any(
        "bn" in name or name.endswith("bias") or name == "layer2.0.downsample.1.weight" for name in kept
    )
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    (everything,) = make_optimizer(model, IGD_HARD, lr=1e-3, weight_decay=0.01).param_groups
    assert everything["weight_decay"] == 0.01 and len(everything["params"]) == len(names)


@pytest.mark.parametrize(
    ("evaluations", "expected"),
    [(5, [2, 4, 6, 8, 10]), (1, [10]), (10, list(range(1, 11))), (100, list(range(1, 11)))],
)
def test_tests_are_spread_over_the_training(toy_data, monkeypatch, evaluations, expected):
    """About `evaluations` tests, evenly, the last epoch among them; at most one an epoch."""
    steps, at = [], []
    real = module.make_optimizer

    def counting(*arguments, **options):
        optimizer = real(*arguments, **options)
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        return optimizer

    monkeypatch.setattr(module, "make_optimizer", counting)
    monkeypatch.setattr(module, "accuracy", lambda *_: at.append(len(steps)) or (50.0, 80.0))
    protocol = replace(
        PLAIN, image_size=16, epochs=10, evaluations=evaluations, batch_size=18
    )  # one step an epoch
    score = evaluate(toy_data, toy_data, network="convnet2", protocol=protocol, seed=0)
    assert at == expected
    assert (score.epochs, score.best_epoch) == (10, expected[0])


def test_best_and_last_are_both_there(toy_data, monkeypatch):
    values = iter([(30.0, 60.0), (70.0, 80.0), (40.0, 90.0)])
    monkeypatch.setattr(module, "accuracy", lambda *_: next(values))
    protocol = replace(PLAIN, image_size=16, epochs=3)
    score = evaluate(toy_data, toy_data, network="convnet2", protocol=protocol, seed=4)
    assert (score.best, score.best_epoch, score.last, score.reported, score.seed) == (70.0, 2, 40.0, 70.0, 4)
    assert (score.best_top5, score.last_top5) == (80.0, 90.0)
    values = iter([(30.0, 60.0), (70.0, 80.0), (40.0, 90.0)])
    assert (
        evaluate(
            toy_data, toy_data, network="convnet2", protocol=replace(protocol, reported="last"), seed=4
        ).reported
        == 40.0
    )


def test_the_rate_falls_at_the_milestones(toy_data, monkeypatch):
    rates, real = [], module.make_optimizer

    def watching(*arguments, **options):
        optimizer = real(*arguments, **options)
        optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(module, "make_optimizer", watching)
    monkeypatch.setattr(module, "accuracy", lambda *_: (0.0, 0.0))
    evaluate(
        toy_data, toy_data, network="convnet2", protocol=replace(PLAIN, image_size=16, batch_size=18), seed=0
    )
    assert rates == pytest.approx([1e-3] * 8 + [2e-4] * 2 + [4e-5] * 2)


def test_half_cosine_by_hand():
    """From 1 towards 0.5 (1 + cos(pi / 2)) = 0.5, a third of the way at cos(pi / 6)."""
    assert [schedule(RDED_SOFT, epoch, 300) for epoch in (0, 100, 150)] == pytest.approx(
        [1.0, 0.5 * (1 + 3**0.5 / 2), 0.5 * (1 + 0.5**0.5)]
    )
    assert (
        schedule(RDED_SOFT, 299, 300) == pytest.approx(0.5, abs=0.003) and schedule(RDED_SOFT, 299, 300) > 0.5
    )


def test_multistep_by_hand():
    assert [schedule(IGD_HARD, epoch, 2000) for epoch in (0, 1332, 1333, 1665, 1666, 1999)] == pytest.approx(
        [1, 1, 0.2, 0.2, 0.04, 0.04]
    )


def test_epochs_follow_the_images_a_class(toy_data, monkeypatch):
    asked = []
    monkeypatch.setattr(Protocol, "epochs_for", lambda self, ipc, classes: asked.append((ipc, classes)) or 1)
    evaluate(toy_data, toy_data, network="convnet2", protocol=replace(PLAIN, image_size=16), seed=0)
    assert asked == [(6, 3)]


def test_one_training_step_by_hand(toy_data, monkeypatch):
    """Cross-entropy with the mixed labels, share by share, and one step of SGD with weight decay."""
    finals = []
    monkeypatch.setattr(
        module, "accuracy", lambda model, *_: finals.append(copy.deepcopy(model)) or (0.0, 0.0)
    )
    monkeypatch.setattr(module, "augment", lambda pixels, *_: pixels)
    monkeypatch.setattr(module, "cutmix", lambda inputs, labels, *_: (inputs, (labels + 1) % 3, 0.75))
    protocol = replace(
        PLAIN,
        image_size=16,
        optimizer="sgd",
        lr=0.1,
        weight_decay=0.5,
        epochs=1,
        milestones=(),
        batch_size=18,
    )
    evaluate(
        toy_data, toy_data, network="convnet2", protocol=protocol, seed=7, device="cpu", mixed_precision=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = module.make_network("convnet2", num_classes=3, image_size=16).double()
    images = toy_data.fetch(torch.arange(18)).double() / 127.5 - 1  # mean and sd 0.5
    log_p = model(images).log_softmax(1)
    rows = torch.arange(18)
    loss = -(0.75 * log_p[rows, toy_data.labels] + 0.25 * log_p[rows, (toy_data.labels + 1) % 3]).mean()
    loss.backward()
    for found, parameter in zip(finals[0].parameters(), model.parameters(), strict=True):
        by_hand = parameter - 0.1 * (parameter.grad + 0.5 * parameter)
        torch.testing.assert_close(found.double(), by_hand, rtol=1e-3, atol=1e-5)


# --- class order


def test_other_class_orders_are_refused_at_the_first_difference(toy_data):
    other = replace(toy_data, classes=("a", "c", "b"))
    with pytest.raises(ValueError, match="label 1 is 'b' in the distilled set and 'c' in the test set"):
        evaluate(toy_data, other, network="convnet2", protocol=PLAIN, seed=0)
    with pytest.raises(ValueError, match="2 classes in the distilled set, 3 in the test set"):
        check_class_order(("a", "b"), ("a", "b", "c"))


# --- accuracy and learning


def test_accuracy_by_hand(toy_data):
    """A network that says the red mean's third: normalised pixels go in, argmax comes out."""

    class Brightness(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            mean = images.mean((1, 2, 3))
            return torch.stack([-mean, mean, torch.full_like(mean, -9.0)], dim=1) * self.scale

    images = (
        torch.tensor([10, 250, 20, 240], dtype=torch.uint8)
        .reshape(4, 1, 1, 1)
        .expand(-1, 3, 16, 16)
        .contiguous()
    )
    data = from_tensors("toy", "test", ("dark", "light", "none"), images, torch.tensor([0, 1, 0, 2]))
    protocol = replace(PLAIN, image_size=16)
    assert predict(Brightness(), data, protocol).argmax(1).tolist() == [0, 1, 0, 1]
    assert accuracy(Brightness(), data, protocol) == (75.0, 100.0)


def test_a_network_learns_from_real_images(fashion_train, fashion_test):
    """10 images a class for 10 epochs, tested on 500 test images."""
    few, test = fashion_train.per_class(10, seed=0), fashion_test.per_class(50, seed=0)
    score = evaluate(
        few,
        test,
        network="convnet3",
        protocol=replace(PLAIN, flip=True, epochs=10, evaluations=2, mixed_precision=True),
        seed=0,
        device="cpu",
    )
    assert score.last > 30  # chance is 10
    assert score.best >= score.last and score.best_epoch in (5, 10)


def test_evaluation_is_deterministic_in_the_seed(toy_data, monkeypatch):
    """The final weights too, with every augmentation on and other global random numbers before."""
    finals = []
    monkeypatch.setattr(
        module,
        "accuracy",
        lambda model, *_: finals.append(model.classifier.weight.detach().clone()) or (0.0, 0.0),
    )
    protocol = replace(IGD_HARD, image_size=16, epochs=3, batch_size=8, evaluations=1)
    for other, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(other)
        state = torch.random.get_rng_state()
        evaluate(toy_data, toy_data, network="convnet2", protocol=protocol, seed=seed, device="cpu")
        assert torch.equal(torch.random.get_rng_state(), state)  # and it leaves them alone
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], finals[2])


def test_mixed_precision_changes_only_the_rounding(toy_data, monkeypatch):
    finals = []
    monkeypatch.setattr(
        module,
        "accuracy",
        lambda model, *_: finals.append(model.classifier.weight.detach().clone()) or (0.0, 0.0),
    )
    protocol = replace(PLAIN, image_size=16, optimizer="sgd", lr=0.01, epochs=3, evaluations=1)
    for mixed in (False, True):
        evaluate(
            toy_data,
            toy_data,
            network="convnet2",
            protocol=protocol,
            seed=0,
            device="cpu",
            mixed_precision=mixed,
        )
    assert finals[1].dtype == torch.float32 and not torch.equal(*finals)
    torch.testing.assert_close(finals[1], finals[0], rtol=0, atol=0.02 * finals[0].abs().max().item())


def test_images_are_resized_to_the_protocol(toy_data):
    score = evaluate(
        toy_data, toy_data, network="convnet2", protocol=replace(PLAIN, image_size=24, epochs=1), seed=0
    )
    assert 0 <= score.last <= 100


def test_a_non_finite_loss_raises(toy_data):
    protocol = replace(PLAIN, image_size=16, optimizer="sgd", lr=1e30, epochs=20)
    with pytest.raises(FloatingPointError, match="lower lr"):
        evaluate(toy_data, toy_data, network="convnet2", protocol=protocol, seed=0)


@pytest.mark.parametrize("name", ["convnet2-bn", "mobilenetv3_small_050"])
def test_networks_with_dropout_or_batch_statistics_are_deterministic_too(toy_data, name):
    """Drop-out draws from the global generator, which a run seeds for itself."""
    options = dict(
        network=name,
        protocol=replace(IGD_HARD, image_size=32, epochs=2, batch_size=9),
        seed=0,
        device="cpu",
        mixed_precision=False,
    )
    finals = []
    for other in (1, 2):
        torch.manual_seed(other)
        finals.append(evaluate(toy_data, toy_data, **options))
    assert replace(finals[0], seconds=0) == replace(finals[1], seconds=0)


# --- mixing


@pytest.mark.parametrize(("probability", "low", "high"), [(1.0, 200, 200), (0.5, 75, 125), (0.0, 0, 0)])
def test_cutmix_comes_with_its_probability(toy_data, probability, low, high):
    protocol = replace(PLAIN, image_size=16, cutmix=1.0, cutmix_probability=probability)
    run = module._Training(Cell.of(toy_data, toy_data, "convnet2", protocol, 0, device="cpu"))
    pixels, labels = torch.rand(8, 3, 16, 16), torch.arange(8)
    found = [run.mix(pixels, labels) for _ in range(200)]
    mixed = sum(images is not pixels for images, *_ in found)
    assert low <= mixed <= high
    assert all(share == 1.0 and other is labels for images, other, share in found if images is pixels)


def test_mixup_takes_cutmixs_place(toy_data):
    protocol = replace(PLAIN, image_size=16, cutmix=1.0, mixup=0.8)
    run = module._Training(Cell.of(toy_data, toy_data, "convnet2", protocol, 0, device="cpu"))
    pixels = torch.rand(8, 3, 16, 16)
    for _ in range(5):
        mixed, other, share = run.mix(pixels, torch.arange(8))
        torch.testing.assert_close(mixed, share * pixels + (1 - share) * pixels[other])


# --- the second pass, the outputs, the precision


def after_one_batch(data, monkeypatch, mixed, **changes):
    """The network as it is tested after one batch of the whole set, mixed to `mixed`, and as it began."""
    finals = []
    monkeypatch.setattr(
        module, "accuracy", lambda model, *_: finals.append(copy.deepcopy(model)) or (0.0, 0.0)
    )
    for name in ("cutmix", "mixup"):
        monkeypatch.setattr(module, name, lambda pixels, labels, *_: (mixed(pixels), labels, 0.5))
    options = dict(image_size=16, epochs=1, batch_size=len(data), double_pass=True, made_for=None)
    protocol = replace(PLAIN, **(options | changes))
    evaluate(data, data, network="convnet2-bn", protocol=protocol, seed=3, device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = network("convnet2-bn", num_classes=len(data.classes), image_size=16)
    return finals[0], first


def statistics(model, pixels):
    """Mean and unbiased variance of the first convolution's maps, in float64, of pixels in [0, 1]."""
    inputs = (pixels.double() - 0.5) / 0.5
    maps = torch.nn.functional.conv2d(
        inputs, model.features[0].weight.double(), model.features[0].bias.double(), padding=1
    )
    return maps.mean((0, 2, 3)).detach(), maps.transpose(0, 1).flatten(1).var(1).detach()


@pytest.mark.parametrize("variant", ["cutmix", "mixup", "single"])
def test_running_statistics_move_twice_a_batch(toy_data, monkeypatch, variant):
    """RDED passes the batch first: as CutMix left it, but as it was before mixup. Momentum 0.1 each time."""
    order = torch.randperm(18, generator=torch.Generator().manual_seed(3))
    pixels = toy_data.fetch(order).double() / 255
    change = dict(mixup=0.8) if variant == "mixup" else dict(double_pass=variant == "cutmix")
    found, first = after_one_batch(toy_data, monkeypatch, lambda images: 0.5 * images, **change)
    passes = {"cutmix": [0.5, 0.5], "mixup": [1.0, 0.5], "single": [0.5]}[variant]
    mean, variance = torch.zeros(128, dtype=torch.float64), torch.ones(128, dtype=torch.float64)
    for factor in passes:
        own_mean, own_variance = statistics(first, factor * pixels)
        mean, variance = 0.9 * mean + 0.1 * own_mean, 0.9 * variance + 0.1 * own_variance
    norm = found.features[1]
    assert norm.num_batches_tracked == len(passes)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
def test_the_first_pass_leaves_the_step_alone(toy_data, monkeypatch, mixed):
    """In bfloat16 too, where the casts of the first pass, which has no gradient, must not be used again."""
    monkeypatch.setattr(module, "has_bfloat16", lambda _: True)
    (single, first), (double, _) = (
        after_one_batch(toy_data, monkeypatch, lambda x: x, double_pass=double, mixed_precision=mixed)
        for double in (False, True)
    )
    for a, b, before in zip(*(model.parameters() for model in (single, double, first)), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, before)


def test_networks_without_running_statistics_are_passed_once(toy_data):
    protocol = replace(PLAIN, image_size=16, double_pass=True)
    for name, double in (("convnet2", False), ("convnet2-bn", True)):
        run = module._Training(Cell.of(toy_data, toy_data, name, protocol, 0, device="cpu"))
        assert run.double == double


def test_students_are_cut_from_networks_of_1000_classes(toy_data):
    """RDED's EfficientNet-B0 starts with a last layer in +- 1 / sqrt(1000), not +- 1 / sqrt(3)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = torchvision.models.efficientnet_b0(num_classes=1000)
        torch.manual_seed(0)
        teacher, protocol = perfect(toy_data), replace(RDED_SOFT_32, patch_factor=1)
        cell = Cell.of(toy_data, toy_data, "efficientnet_b0", protocol, 0, teacher, "cpu")
        model = module._Training(cell).model
    last = model.classifier[1]
    assert torch.equal(last.weight, expected.classifier[1].weight[:3]) and last.bias.shape == (3,)
    assert torch.equal(model.features[0][0].weight, expected.features[0][0].weight)
    assert last.weight.abs().max() <= 1000**-0.5
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match="does not end with a weight and a bias of 9 outputs"):
        module.keep_outputs(model, 9, 2)


@pytest.mark.parametrize(
    ("protocol", "mixed", "native", "precision"),
    [
        (IGD_HARD, None, True, "float32"),
        (RDED_SOFT, None, True, "float32"),
        (IGD_HARD, True, True, "bfloat16"),
        (IGD_HARD, True, False, "bfloat16"),
        (SMALL_HARD, None, True, "bfloat16"),
        (SMALL_SOFT, None, False, "float32"),
        (SMALL_HARD, False, True, "float32"),
    ],
)
def test_precision_is_the_protocols_unless_it_is_chosen(
    toy_data, monkeypatch, protocol, mixed, native, precision
):
    monkeypatch.setattr(module, "has_bfloat16", lambda _: native)
    teacher = perfect(toy_data) if protocol.labels == "soft" else None
    protocol = replace(protocol, image_size=16, test_resize=None)
    cell = Cell.of(toy_data, toy_data, "convnet2", protocol, 0, teacher, "cpu", mixed)
    assert cell.precision == cell.settings["precision"] == precision


@pytest.mark.parametrize(
    ("tf32", "capability", "precision"),
    [("convolutions", (8, 0), "tf32"), ("convolutions", (7, 5), "float32"), ("off", (9, 0), "float32")],
)
def test_a_score_says_where_a_gpu_uses_tf32(monkeypatch, tf32, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(module, "has_bfloat16", lambda _: True)
    assert module._precision("cuda", replace(IGD_HARD, tf32=tf32), None) == precision
    assert module._precision("cuda", replace(SMALL_HARD, tf32=tf32), None) == "bfloat16"
    assert module._precision("cpu", IGD_HARD, None) == "float32"


def gpu_products():
    """Where the processor of CUDA's products and convolutions may use TF32."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("tf32", "inside"),
    [("off", (False, False)), ("convolutions", (False, True)), ("all", (True, True))],
)
@pytest.mark.parametrize("before", [(False, True), (True, True), (True, False)])
def test_tf32_is_set_for_the_evaluation_alone(toy_data, monkeypatch, tf32, inside, before):
    cell = Cell.of(toy_data, toy_data, "convnet2", replace(PLAIN, image_size=16, tf32=tf32), 0, device="cpu")
    own = gpu_products()
    try:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        with pytest.raises(KeyboardInterrupt), module.tf32("cuda", cell.protocol.tf32):
            assert gpu_products() == inside
            raise KeyboardInterrupt
        assert gpu_products() == before
        with module.tf32(cell.device, cell.protocol.tf32):  # nothing to set on a CPU
            assert gpu_products() == before
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = own


# --- sizes


def test_images_are_resized_once_from_their_originals(toy_data):
    """To the protocol's sizes, for training and tests, though both were loaded at another one."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (18, 3, 60, 60), generator=generator, dtype=torch.uint8)
    originals = from_tensors("toy", "train", toy_data.classes, pixels, toy_data.labels)
    loaded = originals.at(44)
    everything = torch.arange(18)
    protocol = replace(PLAIN, image_size=28, test_resize=32)
    cell = Cell.of(loaded, loaded, "convnet2", protocol, 0, device="cpu")
    assert torch.equal(cell.train.fetch(everything), originals.at(28).fetch(everything))
    assert torch.equal(cell.test.fetch(everything), originals.at(32).fetch(everything))
    twice = from_tensors("toy", "train", toy_data.classes, loaded.fetch(everything), toy_data.labels)
    assert not torch.equal(cell.train.fetch(everything), twice.at(28).fetch(everything))
    stored = Cell.of(loaded, loaded, "convnet2", replace(protocol, train_resize=0), 0, device="cpu")
    assert stored.train is loaded


# --- soft labels


def perfect(data, wrong=0, extra=0, order=None):
    """A teacher for random images that it knows by heart: right for all but `wrong` of them."""
    images = data.fetch(torch.arange(len(data))).float().flatten(1)

    class Lookup(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.known = torch.nn.Parameter(images / 127.5 - 1)
            labels = data.labels.clone()
            labels[:wrong] = (labels[:wrong] + 1) % len(data.classes)
            self.labels = torch.nn.functional.one_hot(labels, len(data.classes) + extra).float() * 30

        def forward(self, inputs):
            return torch.softmax(-torch.cdist(inputs.flatten(1), self.known) * 10, 1) @ self.labels

    return Teacher(Lookup(), "lookup", "made here", order or data.classes, HALF, HALF)


SOFT = replace(PLAIN, name="soft", image_size=16, labels="soft", temperature=4.0, epochs=2)


def test_soft_label_loss_against_a_float64_reference():
    """Sum over classes of p (log p - log q), mean over the batch, no T^2; and its gradient."""
    torch.manual_seed(0)
    logits, teacher = (torch.randn(5, 7, dtype=torch.float64) * 9 for _ in range(2))
    logits.requires_grad_()
    for temperature in (1.0, 20.0):
        total = 0.0
        for row, target in zip(logits.tolist(), teacher.tolist(), strict=True):
            q, p = ([math.exp(v / temperature) for v in values] for values in (row, target))
            total += sum(
                a / sum(p) * (math.log(a / sum(p)) - math.log(b / sum(q))) for a, b in zip(p, q, strict=True)
            )
        loss = soft_label_loss(logits, teacher, temperature)
        assert loss.item() == pytest.approx(total / 5, rel=1e-10)
        (gradient,) = torch.autograd.grad(loss, logits)
        by_hand = ((logits / temperature).softmax(1) - (teacher / temperature).softmax(1)) / temperature / 5
        torch.testing.assert_close(gradient, by_hand)
    assert soft_label_loss(teacher, teacher, 20.0).item() == pytest.approx(0, abs=1e-12)


def test_the_teacher_sees_the_mixed_batch_in_its_own_normalisation(toy_data, monkeypatch):
    """One step of SGD by hand, labels made on the mixed images."""
    finals, seen = [], []
    monkeypatch.setattr(
        module, "accuracy", lambda model, *_: finals.append(copy.deepcopy(model)) or (0.0, 0.0)
    )
    monkeypatch.setattr(module, "augment", lambda pixels, *_: pixels)
    monkeypatch.setattr(module, "cutmix", lambda pixels, labels, *_: (0.5 * pixels, labels, 0.5))
    teacher = replace(perfect(toy_data), mean=(0.25,) * 3, std=(0.25,) * 3)
    monkeypatch.setattr(module, "check_teacher", lambda *_: 100.0)
    teacher.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    protocol = replace(
        SOFT, optimizer="sgd", lr=0.5, weight_decay=0.0, epochs=1, milestones=(), batch_size=18
    )
    evaluate(
        toy_data,
        toy_data,
        network="convnet2",
        protocol=protocol,
        seed=3,
        teacher=teacher,
        device="cpu",
        mixed_precision=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = module.make_network("convnet2", num_classes=3, image_size=16).double()
    order = torch.randperm(18, generator=torch.Generator().manual_seed(3))
    pixels = 0.5 * toy_data.fetch(order).double() / 255
    torch.testing.assert_close(seen[0].double(), (pixels - 0.25) / 0.25, rtol=0, atol=1e-6)
    q = (model((pixels - 0.5) / 0.5) / 4).log_softmax(1)
    p = (teacher.model(seen[0]).detach().double() / 4).softmax(1)
    ((p * (p.log() - q)).sum() / 18).backward()
    for found, parameter in zip(finals[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.double(), parameter - 0.5 * parameter.grad, rtol=1e-3, atol=1e-5)


def test_soft_labels_teach_real_classes(fashion_train, fashion_test):
    """A teacher trained on real images; its soft labels alone train a network well above chance."""
    few, test = fashion_train.per_class(40, seed=1), fashion_test.per_class(20, seed=0)
    model = network("convnet3", num_classes=10, image_size=32)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):
        for images, labels in few.batches(50, torch.Generator().manual_seed(0)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images.float() / 127.5 - 1), labels).backward()
            optimizer.step()
    teacher = Teacher(model, "convnet3", "trained here", test.classes, HALF, HALF)
    distilled = fashion_train.per_class(10, seed=0)
    unlabelled = replace(
        distilled, labels=distilled.labels[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    )
    score = evaluate(
        unlabelled,
        test,
        network="convnet3",
        protocol=replace(SOFT, image_size=32, epochs=5, mixed_precision=True),
        seed=0,
        teacher=teacher,
        device="cpu",
    )
    assert score.last > 35  # the hard labels are shuffled: what it knows is the teacher's


def test_a_wrong_teacher_is_refused(toy_data):
    options = dict(network="convnet2", protocol=SOFT, seed=0, device="cpu")
    assert check_teacher(perfect(toy_data), toy_data, SOFT) == 100.0
    with pytest.raises(ValueError, match="2 classes in the teacher, 3 in the data"):
        evaluate(toy_data, toy_data, teacher=replace(perfect(toy_data), classes=("a", "b")), **options)
    with pytest.raises(ValueError, match="label 0 is 'b' in the teacher and 'a' in the data"):
        evaluate(toy_data, toy_data, teacher=perfect(toy_data, order=("b", "a", "c")), **options)
    with pytest.raises(ValueError, match=r"has 5 logits for 3 classes"):
        evaluate(toy_data, toy_data, teacher=perfect(toy_data, extra=2), **options)
    with pytest.raises(ValueError, match=r"gets 33\.3 % of 18 real images"):
        evaluate(toy_data, toy_data, teacher=perfect(toy_data, wrong=12), **options)


def test_labels_and_teacher_go_together(toy_data):
    with pytest.raises(ValueError, match="soft labels: it needs teacher"):
        evaluate(toy_data, toy_data, network="convnet2", protocol=SOFT, seed=0)
    with pytest.raises(ValueError, match="hard labels: it takes no teacher"):
        evaluate(toy_data, toy_data, network="convnet2", protocol=PLAIN, seed=0, teacher=perfect(toy_data))


def test_soft_protocol_tests_on_the_centre_of_the_resized_image():
    """RDED: shorter side 256, centre 224."""
    ramp = (torch.arange(256) % 256).to(torch.uint8).expand(1, 3, 256, 256)
    data = from_tensors("toy", "test", ("a",), ramp.contiguous(), torch.tensor([0]))
    (inputs,) = test_inputs(data, replace(RDED_SOFT, mean=(0.0,) * 3, std=(1.0,) * 3), "cpu")
    assert inputs.shape == (1, 3, 224, 224)
    assert inputs[0, 0, 0, [0, -1]].mul(255).tolist() == pytest.approx([16, 239])


# --- runs that resume, and whole cells

RUN = """
import sys, torch
from dataclasses import replace
from pathlib import Path
torch.set_num_threads(1)
from igd_lib import evaluation as module
from igd_lib.data.images import ImageData, from_tensors
from igd_lib.protocols import IGD_HARD
module.CHECKPOINT_SECONDS = 0.0
generator = torch.Generator().manual_seed(2)
images = torch.randint(0, 256, (30, 3, 32, 32), generator=generator, dtype=torch.uint8)
data = from_tensors("toy", "train", ("a", "b", "c"), images, torch.arange(3).repeat(10))
protocol = replace(IGD_HARD, image_size=32, epochs=int(sys.argv[3]), batch_size=10, evaluations=5)
options = dict(seed=1, device="cpu", mixed_precision=False, folder=sys.argv[1])
score = module.evaluate(data, data, network=sys.argv[2], protocol=protocol, **options)
print(replace(score, seconds=0.0))
"""


def test_a_killed_evaluation_ends_with_the_same_score(tmp_path):
    """kill -9 at the first training state, then on from there; a network with drop-out and batch norm."""

    def start(folder):
        return subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder), "mobilenetv3_small_050", "8"],
            stdout=subprocess.PIPE,
            text=True,
        )

    whole, _ = start(tmp_path / "whole").communicate()
    broken, state = start(tmp_path / "broken"), tmp_path / "broken" / "training.safetensors"
    while not state.is_file() and broken.poll() is None:
        time.sleep(0.002)
    broken.kill()
    broken.wait()
    assert state.is_file() and not (tmp_path / "broken" / "score.json").exists(), (
        "killed too late to show anything"
    )
    again, _ = start(tmp_path / "broken").communicate()
    assert again == whole and whole.startswith("Score(")
    assert sorted(
        path.name for path in (tmp_path / "broken").iterdir() if not path.name.endswith(".tmp")
    ) == ["score.json", "settings.json"]


def test_a_finished_evaluation_is_read(toy_data, tmp_path, monkeypatch):
    options = dict(
        network="convnet2",
        protocol=replace(PLAIN, image_size=16, epochs=2),
        seed=0,
        device="cpu",
        folder=tmp_path,
    )
    first = evaluate(toy_data, toy_data, **options)
    monkeypatch.setattr(module, "train_network", lambda *_: pytest.fail("trained again"))
    assert evaluate(toy_data, toy_data, **options) == first


def test_a_folder_of_other_settings_is_refused(toy_data, tmp_path):
    options = dict(
        network="convnet2",
        protocol=replace(PLAIN, image_size=16, epochs=1),
        seed=0,
        device="cpu",
        folder=tmp_path,
    )
    evaluate(toy_data, toy_data, **options)
    with pytest.raises(ValueError, match="other settings: seed = 0, wanted 1"):
        evaluate(toy_data, toy_data, **{**options, "seed": 1})
    changed = from_tensors(
        "toy", "train", toy_data.classes, 255 - toy_data.fetch(torch.arange(18)), toy_data.labels
    )
    with pytest.raises(ValueError, match="other settings: train"):
        evaluate(changed, toy_data, **options)
    (tmp_path / "score.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        evaluate(toy_data, toy_data, **options)


def test_a_whole_cell_equals_its_single_runs(toy_data, tmp_path):
    options = dict(protocol=replace(IGD_HARD, image_size=16, epochs=2), device="cpu")
    found = evaluate_all(
        toy_data, toy_data, networks=["convnet1", "convnet2"], seeds=[0, 1], folder=tmp_path, **options
    )
    assert [(score.network, score.seed) for score in found] == [
        ("convnet1", 0),
        ("convnet1", 1),
        ("convnet2", 0),
        ("convnet2", 1),
    ]
    alone = evaluate(toy_data, toy_data, network="convnet2", seed=0, **options)
    assert replace(found[2], seconds=0) == replace(alone, seconds=0)
    assert len(list(tmp_path.glob("*/score.json"))) == 4


# --- within an epoch, beside another process, and of several sets


@pytest.fixture
def batches(monkeypatch):
    """A clock by which each training batch takes a minute, and what may be done before Ctrl-C."""
    loss, count = module._Training.loss, {"done": 0, "end": 10**6}

    def counted(self, *batch):
        if count["done"] == count["end"]:
            raise KeyboardInterrupt
        count["done"] += 1
        return loss(self, *batch)

    monkeypatch.setattr(module._Training, "loss", counted)
    monkeypatch.setattr(progress.time, "monotonic", lambda: 60.0 * count["done"])
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 120.0)
    return count


NAMES = ["convnet2-bn", "mobilenetv3_small_050"]


@pytest.mark.parametrize(("name", "end"), [(NAMES[0], 3), (NAMES[0], 7), (NAMES[1], 12)])
def test_an_evaluation_goes_on_within_an_epoch(toy_data, tmp_path, batches, name, end):
    """Five batches an epoch, saved at every second: statistics, drop-out and CutMix go on as they were."""
    protocol = replace(IGD_HARD, image_size=32, epochs=3, batch_size=4, evaluations=3)
    cell = Cell.of(toy_data, toy_data, name, protocol, 1, device="cpu", mixed_precision=False)
    whole, expected = module.train_network(cell, tmp_path / "whole" / "state")
    batches["done"], batches["end"] = 0, end
    with pytest.raises(KeyboardInterrupt, match=f"{end // 5} of 3 epochs of {name} are in .*; run the same"):
        module.train_network(cell, tmp_path / "cut" / "state")
    batches["end"] = 10**6
    assert files.load_tensors(tmp_path / "cut" / "state")[1]["batches"] == end // 2 * 2 % 5
    found, score = module.train_network(cell, tmp_path / "cut" / "state")
    assert batches["done"] == 15 + end % 2 and replace(score, seconds=0) == replace(expected, seconds=0)
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


def test_epochs_of_any_length_are_saved_within_ten_minutes(toy_data, tmp_path, batches, monkeypatch):
    """A batch takes a minute here, an epoch eighteen, and nobody would wait for the end of it."""
    saved = []
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 60.0)
    monkeypatch.setattr(module.files, "save_training", lambda *_, **__: saved.append(batches["done"]))
    protocol = replace(PLAIN, image_size=16, epochs=2, batch_size=1)
    cell = Cell.of(toy_data, toy_data, "convnet1", protocol, 0, device="cpu")
    module.train_network(cell, tmp_path / "state")
    assert saved[0] <= 10 and max(b - a for a, b in zip(saved, saved[1:], strict=False)) <= 10


def test_long_evaluations_say_how_long_they_take_and_short_ones_nothing(
    toy_data, batches, monkeypatch, capsys
):
    monkeypatch.delenv("IGD_QUIET")
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    protocol = replace(PLAIN, image_size=16, epochs=4, batch_size=9)
    options = dict(network="convnet1", seed=0, device="cpu")
    evaluate(toy_data, toy_data, protocol=protocol, **options)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "convnet1, epoch 1/4, 2 min, 6 min left" and len(said) == 3
    monkeypatch.setattr(progress.time, "monotonic", lambda: batches["done"] / 100)
    evaluate(toy_data, toy_data, protocol=protocol, **options)
    assert capsys.readouterr().out == ""


def test_of_two_that_want_a_cell_one_trains(toy_data, tmp_path, monkeypatch, capsys):
    loss, trained, begun = module._Training.loss, [], threading.Event()

    def slow(self, *batch):
        trained.append(threading.current_thread().name)
        begun.set()
        time.sleep(0.05)
        return loss(self, *batch)

    monkeypatch.setattr(module._Training, "loss", slow)
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    options = dict(network="convnet1", protocol=replace(PLAIN, image_size=16, epochs=3, batch_size=6), seed=0)
    options |= dict(device="cpu", folder=tmp_path)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(evaluate, toy_data, toy_data, **options)
        assert begun.wait(5)
        second = evaluate(toy_data, toy_data, **options)
    assert len(trained) == 9 and len(set(trained)) == 1 and second == first.result()
    said = capsys.readouterr().out
    assert f"waiting for an evaluation of convnet1 (process {os.getpid()} on " in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["score.json", "settings.json"]


def test_cells_of_several_sets_come_in_their_order(toy_data, tmp_path, monkeypatch):
    """Each set is read and resized once, though it has several cells; the test images once for all."""
    made, at = [], ImageData.at

    def counted(self, size, *how):
        found = at(self, size, *how)
        made.extend([self.split] if found is not self else [])
        return found

    sets = [toy_data.per_class(2, seed=seed) for seed in (0, 1)]
    cells = [(0, "convnet1", 0), (0, "convnet2", 0), (1, "convnet1", 3)]
    options = dict(protocol=replace(PLAIN, image_size=18, epochs=2), device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(ImageData, "at", counted)
        found = module.evaluate_sets(sets, toy_data, cells, folder=tmp_path, **options)
    assert made == ["train", sets[0].split, sets[1].split]
    for (number, name, seed), score in zip(cells, found, strict=True):
        alone = evaluate(sets[number], toy_data, network=name, seed=seed, **options)
        assert replace(score, seconds=0) == replace(alone, seconds=0)
