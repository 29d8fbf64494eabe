"""The protocol's networks: sizes known from the released code, shapes, names."""

import pytest
import torch

from igd_lib.models import ConvNet, network


def test_convnet6_has_the_released_size():
    assert sum(p.numel() for p in network("convnet6", num_classes=10, image_size=224).parameters()) == 754_570


def test_convnet6_has_2048_features_at_256_pixels():
    assert network("convnet6", num_classes=10, image_size=256).classifier.in_features == 2048


@pytest.mark.parametrize(("name", "size"), [("convnet3", 32), ("resnetap10", 64), ("resnet18", 64), ("mobilenetv3_small_050", 64)])
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
    assert network("convnet3", num_classes=2, image_size=32, in_channels=1)(torch.rand(1, 1, 32, 32)).shape == (1, 2)


def test_convnet_is_instance_normalised():
    """GroupNorm(C, C) is instance normalisation: the first block by hand."""
    torch.manual_seed(0)
    model = ConvNet(1, 5, 8, width=4).double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    x = torch.nn.functional.conv2d(images, model.features[0].weight, model.features[0].bias, padding=1)
    x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    x = x.relu().reshape(2, 4, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(model(images), x.flatten(1) @ model.classifier.weight.T + model.classifier.bias)


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
