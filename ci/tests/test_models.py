"""The protocol's networks: sizes known from the released code, shapes, names."""

import pytest
import torch

from igd_lib.models.networks import ConvNet, network


def test_convnet6_has_the_released_size():
    assert sum(p.numel() for p in network("convnet6", num_classes=10, image_size=224).parameters()) == 754_570


def test_convnet6_has_2048_features_at_256_pixels():
    assert network("convnet6", num_classes=10, image_size=256).classifier.in_features == 2048


@pytest.mark.parametrize(
    ("name", "blocks", "stem"),
    [("resnetap10", 1, "average"), ("resnetap18", 2, "average"), ("resnet18", 2, "max")],
)
def test_resnets_have_the_size_worked_out_by_hand(name, blocks, stem):
    """Convolutions without bias, two numbers a channel for each normalisation, one linear layer."""
    total = 3 * 64 * 49 + 2 * 64
    inputs = 64
    for outputs in (64, 128, 256, 512):
        for index in range(blocks):
            total += 9 * inputs * outputs + 9 * outputs * outputs + 4 * outputs
            total += inputs * outputs + 2 * outputs if inputs != outputs and index == 0 else 0
            inputs = outputs
    model = network(name, num_classes=10, image_size=224)
    assert sum(p.numel() for p in model.parameters()) == total + 512 * 10 + 10
    assert any(isinstance(module, torch.nn.MaxPool2d) for module in model.modules()) == (stem == "max")
    strides = [
        module.stride
        for module in model.modules()
        if isinstance(module, torch.nn.Conv2d) and module.stride != (1, 1)
    ]
    assert (not strides) == (stem == "average")  # ResNetAP's strides are average pools


def test_resnets_start_as_he_initialised():
    """Normal weights of variance 2 / fan-out; ConvNets keep PyTorch's own initialisation."""
    torch.manual_seed(0)
    for weight in (
        p
        for p in network("resnetap10", num_classes=10, image_size=64).parameters()
        if p.ndim == 4 and p.numel() > 30_000
    ):
        assert weight.std().item() == pytest.approx(
            (2 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5, rel=0.03
        )
    weight = network("convnet3", num_classes=10, image_size=32).features[4].weight
    assert weight.abs().max().item() <= (1 / (128 * 9)) ** 0.5  # uniform in +- 1 / sqrt(fan-in)


@pytest.mark.parametrize(
    ("name", "count"),
    [("mobilenetv2_100", 2_236_682), ("efficientnet_b0", 4_020_358), ("timm/resnet18", 11_181_642)],
)
def test_timms_networks_have_their_published_size(name, count):
    assert sum(p.numel() for p in network(name, num_classes=10, image_size=224).parameters()) == count


def test_timms_resnet18_is_the_one_with_batch_normalisation():
    assert any(
        isinstance(module, torch.nn.BatchNorm2d)
        for module in network("timm/resnet18", num_classes=2, image_size=64).modules()
    )
    assert not any(
        isinstance(module, torch.nn.BatchNorm2d)
        for module in network("resnet18", num_classes=2, image_size=64).modules()
    )


def test_transformers_are_built_for_the_image_size():
    model = network("swinv2_tiny_window8_256", num_classes=2, image_size=64).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "size"), [("convnet3", 32), ("resnetap10", 64), ("resnet18", 64), ("mobilenetv3_small_050", 64)]
)
def test_logits_depend_on_the_image(name, size):
    torch.manual_seed(0)
    model = network(name, num_classes=7, image_size=size).eval()
    with torch.no_grad():
        logits = model(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 7)
    assert (logits[0] - logits[1]).abs().max() > 0


@pytest.mark.parametrize(("name", "size"), [("convnet3", 32), ("resnetap10", 64), ("resnet18", 64)])
def test_the_protocols_networks_keep_no_batch_statistics(name, size):
    """Instance normalisation: one image's logits do not depend on its batch, in training mode too."""
    torch.manual_seed(0)
    model = network(name, num_classes=7, image_size=size).train()
    images = torch.rand(3, 3, size, size)
    assert not list(model.buffers())
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-4)


def test_first_convolution_takes_other_channels():
    assert network("convnet3", num_classes=2, image_size=32, in_channels=1)(
        torch.rand(1, 1, 32, 32)
    ).shape == (1, 2)


def test_convnet_is_instance_normalised():
    """GroupNorm(C, C) is instance normalisation: the first block by hand."""
    torch.manual_seed(0)
    model = ConvNet(1, 5, 8, width=4).double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    x = torch.nn.functional.conv2d(images, model.features[0].weight, model.features[0].bias, padding=1)
    x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    x = x.relu().reshape(2, 4, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(
        model(images), x.flatten(1) @ model.classifier.weight.T + model.classifier.bias
    )


def test_unknown_network_raises():
    with pytest.raises(ValueError, match="unknown network 'resnet19'"):
        network("resnet19", num_classes=10, image_size=32)


def test_too_small_images_raise():
    with pytest.raises(ValueError, match="32 px are too few"):
        network("convnet6", num_classes=10, image_size=32)


@pytest.mark.parametrize("name", ["resnetap10", "resnet18"])
def test_images_that_shrink_to_one_pixel_raise(name):
    """At 32 px the last normalisation sees one pixel, so the logits would not depend on the image."""
    with pytest.raises(ValueError, match="32 px are too few"):
        network(name, num_classes=10, image_size=32)
