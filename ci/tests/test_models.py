"""The protocols' networks: sizes known from the released code, shapes, names."""

import pytest
import timm
import torch
import torchvision
from torch.nn import functional as F

from igd_lib.models.networks import AvgPool2, ConvNet, network


def test_convnet6_has_the_released_size():
    assert sum(p.numel() for p in network("convnet6", num_classes=10, image_size=224).parameters()) == 754_570


def test_convnet6_has_2048_features_at_256_pixels():
    assert network("convnet6", num_classes=10, image_size=256).classifier.in_features == 2048


@pytest.mark.parametrize(
    ("name", "blocks", "stem"),
    [
        ("resnetap10", 1, "average"),
        ("resnetap18", 2, "average"),
        ("resnet10", 1, "max"),
        ("resnet18", 2, "max"),
    ],
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


def largest_maps(model, size):
    """Sides of the maps that the stem and each stage of a ResNet give."""
    sides, hooks = [], []
    for module in [model.stem, *(b for b in model.body)]:
        hooks.append(module.register_forward_hook(lambda _, __, out: sides.append(out.shape[-1])))
    model(torch.rand(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return sides


@pytest.mark.parametrize(
    ("name", "size", "kernel", "sides"),
    [
        ("resnetap10", 32, 3, [32, 32, 16, 8, 4]),
        ("resnetap10", 64, 3, [64, 64, 32, 16, 8]),
        ("resnetap10", 128, 3, [64, 64, 32, 16, 8]),
        ("resnetap10", 130, 7, [32, 32, 16, 8, 4]),
        ("resnet10", 32, 3, [32, 32, 16, 8, 4]),
        ("resnet10", 66, 3, [33, 33, 17, 9, 5]),
        ("resnet10", 130, 7, [33, 33, 17, 9, 5]),
        ("resnet10-cifar", 32, 3, [32, 32, 16, 8, 4]),
    ],
)
def test_stems_follow_the_image_size(name, size, kernel, sides):
    """Minimax's: 3x3 unpooled up to 64 px, pooled by 2 up to 128, 7x7 down to a quarter beyond."""
    model = network(name, num_classes=10, image_size=size).eval()
    assert model.stem[0].kernel_size == (kernel, kernel)
    assert largest_maps(model, size) == sides


def test_cifar_resnets_are_half_as_wide():
    """Minimax's for CIFAR: 32 to 256 channels; two blocks a stage at depth 18."""
    model = network("resnet18-cifar", num_classes=10, image_size=32)
    assert [block.body[4].out_channels for block in model.body] == [32, 32, 64, 64, 128, 128, 256, 256]
    assert model.classifier.in_features == 256
    wide = network("resnet18", num_classes=10, image_size=32)
    assert [block.body[4].out_channels for block in wide.body] == [64, 64, 128, 128, 256, 256, 512, 512]


TORCHVISION = {
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "efficientnet_b0": torchvision.models.efficientnet_b0,
    "swin_v2_t": torchvision.models.swin_v2_t,
    "torchvision/resnet18": torchvision.models.resnet18,
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks_are_its_own(name):
    """Every value of the state, made from the same seed, and every module's settings."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = TORCHVISION[name](num_classes=7)
        torch.manual_seed(5)
        found = network(name, num_classes=7, image_size=224)
    assert repr(found) == repr(expected)  # drop-out and stochastic depth too
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_torchvisions_networks_start_and_drop_as_rded_has_them():
    """Where timm's differ: a block's last normalisation at 1, drop-out 0.2, stochastic depth up to 0.2."""
    own = network("torchvision/resnet18", num_classes=7, image_size=224)
    assert torch.equal(own.layer1[0].bn2.weight, torch.ones(64))
    timms = network("timm/resnet18", num_classes=7, image_size=224)
    assert torch.equal(timms.layer1[0].bn2.weight, torch.zeros(64))

    def rates(name, kind):
        modules = network(name, num_classes=7, image_size=224).modules()
        return [module.p for module in modules if isinstance(module, kind)]

    depth = torchvision.ops.StochasticDepth
    assert rates("mobilenet_v2", torch.nn.Dropout) == rates("efficientnet_b0", torch.nn.Dropout) == [0.2]
    assert max(rates("efficientnet_b0", depth)) == pytest.approx(0.2, abs=0.02)
    assert max(rates("swin_v2_t", depth)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mobilenet_v2", 2_236_682),
        ("efficientnet_b0", 4_020_358),
        ("torchvision/resnet18", 11_181_642),
        ("timm/resnet18", 11_181_642),
        ("timm/mobilenetv2_100", 2_236_682),
    ],
)
def test_the_libraries_networks_have_their_published_size(name, count):
    assert sum(p.numel() for p in network(name, num_classes=10, image_size=224).parameters()) == count


def test_a_name_says_whose_network_it_is():
    """Bare: this project's, else torchvision's, else timm's."""
    made = {
        name: network(name, num_classes=2, image_size=64)
        for name in ("resnet18", "torchvision/resnet18", "timm/resnet18", "resnet34", "mobilenetv3_small_050")
    }
    modules = {name: type(model).__module__.split(".")[0] for name, model in made.items()}
    assert modules == {
        "resnet18": "igd_lib",
        "torchvision/resnet18": "torchvision",
        "timm/resnet18": "timm",
        "resnet34": "torchvision",
        "mobilenetv3_small_050": "timm",
    }
    batch = {
        n: any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) for n, model in made.items()
    }
    assert [name for name, has in batch.items() if not has] == ["resnet18"]


@pytest.mark.parametrize(("depth", "size"), [(3, 32), (4, 64), (5, 128), (6, 128)])
def test_rdeds_convnets_are_batch_normalised(depth, size):
    """The convolutions and the classifier of ConvNet-N, from the same seed; the batch's statistics inside."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = network(f"convnet{depth}-bn", num_classes=10, image_size=size)
        torch.manual_seed(1)
        plain = network(f"convnet{depth}", num_classes=10, image_size=size)
    kinds = [type(module).__name__ for module in found.features]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "AvgPool2"] * depth
    for key, value in plain.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    images = torch.rand(3, 3, size, size)
    x = torch.nn.functional.conv2d(
        images, found.features[0].weight, found.features[0].bias, padding=1
    ).double()
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    found.train()
    torch.testing.assert_close(found.features[:2](images).double(), x, rtol=0, atol=1e-5)


def test_rdeds_modified_resnet():
    """torchvision's with a 3x3 stem that leaves the image's size."""
    model = network("resnet18_modified", num_classes=10, image_size=32).eval()
    assert model.conv1.kernel_size == (3, 3) and model.conv1.bias is None
    with torch.no_grad():
        images = torch.rand(1, 3, 32, 32)
        assert model.layer1(model.maxpool(model.conv1(images))).shape[-2:] == (32, 32)
        assert model(images).shape == (1, 10)


def test_transformers_are_built_for_the_image_size():
    for name in ("timm/swinv2_tiny_window8_256", "vit_b_16"):
        model = network(name, num_classes=2, image_size=64).eval()
        with torch.no_grad():
            assert model(torch.rand(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("convnet3", 32),
        ("resnetap10", 16),
        ("resnetap10", 32),
        ("resnet18", 9),
        ("resnet18", 96),
        ("mobilenetv3_small_050", 64),
    ],
)
def test_logits_depend_on_the_image(name, size):
    torch.manual_seed(0)
    model = network(name, num_classes=7, image_size=size).eval()
    with torch.no_grad():
        logits = model(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 7)
    assert (logits[0] - logits[1]).abs().max() > 0


@pytest.mark.parametrize(
    ("name", "size"), [("convnet3", 32), ("resnetap10", 32), ("resnet18", 66), ("resnetap10-cifar", 32)]
)
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


def test_unknown_network_raises_and_says_what_is_known():
    with pytest.raises(ValueError, match="unknown network 'resnet19'") as found:
        network("resnet19", num_classes=10, image_size=32)
    names = "convnetN-bn resnet10 resnetap18-cifar resnet18_modified torchvision/NAME swin_v2_t timm/NAME"
    assert all(name in str(found.value) for name in [*names.split(), "(resnet"])
    for name in ("torchvision/mobilenetv2_100", "timm/swin_v2_t", "other/resnet18", "torchvision/convnet3"):
        with pytest.raises(ValueError, match=f"unknown network '{name}'"):
            network(name, num_classes=10, image_size=32)
    assert "mobilenetv2_100" in timm.list_models()  # known there, under its own library's name


def test_torchvisions_networks_take_three_channels():
    with pytest.raises(ValueError, match="takes 3 channels, not 1"):
        network("mobilenet_v2", num_classes=10, image_size=32, in_channels=1)


def test_too_small_images_raise():
    with pytest.raises(ValueError, match="32 px are too few"):
        network("convnet6", num_classes=10, image_size=32)


@pytest.mark.parametrize(("name", "size"), [("resnetap10", 15), ("resnet18", 8)])
def test_images_that_shrink_to_one_pixel_raise(name, size):
    """The last normalisation sees one pixel, so the logits would not depend on the image."""
    with pytest.raises(ValueError, match=f"{size} px are too few"):
        network(name, num_classes=10, image_size=size)


@pytest.mark.parametrize("sides", [(8, 8), (2, 6), (7, 5), (1, 4)])
def test_pooling_by_two_is_torchs(sides):
    """Values and gradients, of odd sides too, and of images that `vmap` takes one by one."""
    torch.manual_seed(0)
    ours = torch.randn(3, 4, *sides, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    if 1 in sides:
        with pytest.raises(RuntimeError, match="[Oo]utput size"):
            AvgPool2()(ours)
        return
    found, wanted = AvgPool2()(ours), F.avg_pool2d(theirs, 2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-15)
    torch.testing.assert_close(torch.vmap(AvgPool2())(ours), wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "width"), [("convnet3", 128), ("convnet3-w32", 32), ("convnet3-bn-w16", 16)]
)
def test_a_convnets_width_is_in_its_name(name, width):
    """Three convolutions and normalisations and a linear layer on 4 x 4 positions, counted by hand."""
    model = network(name, num_classes=10, image_size=32)
    wanted = 9 * 3 * width + 2 * 9 * width * width + 3 * 3 * width + 10 * (16 * width + 1)
    assert sum(p.numel() for p in model.parameters()) == wanted


@pytest.mark.parametrize(("name", "width"), [("resnet10-bn-w16", 16), ("resnet10-bn", 64)])
def test_small_resnets_with_batch_statistics_have_the_size_worked_out_by_hand(name, width):
    """As the others with a 3x3 stem, but for the width and the normalisation."""
    total, inputs = 3 * width * 9 + 2 * width, width
    for outputs in (width, 2 * width, 4 * width, 8 * width):
        total += 9 * inputs * outputs + 9 * outputs * outputs + 4 * outputs
        total += inputs * outputs + 2 * outputs if inputs != outputs else 0
        inputs = outputs
    model = network(name, num_classes=10, image_size=32)
    assert sum(p.numel() for p in model.parameters()) == total + 8 * width * 10 + 10
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 1 + 4 * 2 + 3
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in model.modules())


def test_separable_networks_by_hand():
    """A stem, four blocks of a depthwise and a 1x1 convolution, all normalised; 32 px end at 8 px."""
    model = network("separable4-w32", num_classes=10, image_size=32)
    total, width = 3 * 32 * 9 + 64, 32
    for outputs in (64, 64, 128, 128):
        total += 9 * width + 2 * width + width * outputs + 2 * outputs
        width = outputs
    assert sum(p.numel() for p in model.parameters()) == total + 128 * 10 + 10
    kinds = [module for module in model.features if not isinstance(module, torch.nn.ReLU)]
    assert [type(module) for module in kinds] == [torch.nn.Conv2d, torch.nn.BatchNorm2d] * 9
    assert [module.groups for module in kinds[::2]] == [1, 32, 1, 64, 1, 64, 1, 128, 1]
    maps = model.features(torch.rand(2, 3, 32, 32))
    assert maps.shape == (2, 128, 8, 8)
    with pytest.raises(ValueError, match="separable4 halves the image 2 times; 7 px are too few"):
        network("separable4", num_classes=10, image_size=7)
