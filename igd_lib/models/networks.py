"""Networks that are trained and tested: the protocols' own, and everything torchvision and timm have.

ConvNet-N, ResNetAP-N and ResNet-N follow Minimax's evaluation code: instance normalisation written as affine
GroupNorm(C, C), so they keep no batch statistics. `convnetN-bn` and the `_modified` ResNets are RDED's;
`resnetN-bn` and `separableN` are small networks with batch statistics, for methods that match those.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any, Literal

import timm
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model, list_models

Stem = Literal["small", "middle", "large"]
Norm = Callable[[int], nn.Module]  # of so many channels


def _instance(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels, channels)


class AvgPool2(nn.Module):
    """Average pooling by two, of even sides; on a CPU, where torch's takes a fifth of a training, in adds."""

    def forward(self, x: Tensor) -> Tensor:
        *rest, height, width = x.shape
        if x.is_cuda or height % 2 or width % 2:
            return F.avg_pool2d(x, 2)
        rows = x.reshape(*rest, height // 2, 2, width)
        pairs = (rows[..., 0, :] + rows[..., 1, :]).reshape(*rest, height // 2, width // 2, 2)
        return (pairs[..., 0] + pairs[..., 1]) / 4


class ConvNet(nn.Module):
    """ConvNet-N: N x [conv 3x3, norm, ReLU, average pool 2], linear on the flattened map."""

    def __init__(
        self,
        depth: int,
        num_classes: int,
        image_size: int,
        in_channels: int = 3,
        width: int = 128,
        norm: Norm = _instance,
    ):
        super().__init__()
        side = image_size // 2**depth
        if side < 1:
            raise ValueError(f"convnet{depth} halves the image {depth} times; {image_size} px are too few")
        layers: list[nn.Module] = []
        for index in range(depth):
            layers += [
                nn.Conv2d(in_channels if index == 0 else width, width, 3, padding=1),
                norm(width),
                nn.ReLU(),
                AvgPool2(),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * side * side, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; `pool` replaces strides by average pooling (ResNetAP)."""

    def __init__(self, inputs: int, outputs: int, stride: int, pool: bool, norm: Norm = _instance):
        super().__init__()
        strided, shrink = (
            (1, nn.AvgPool2d(stride) if stride > 1 else nn.Identity()) if pool else (stride, nn.Identity())
        )
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, strided, 1, bias=False),
            norm(outputs),
            nn.ReLU(),
            shrink,
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            norm(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, strided, bias=False), shrink, norm(outputs)
            )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem and four stages of BasicBlocks, `width` to 8 x `width` channels; `pool`: ResNetAP's pooling.

    The large stem is a 7x7 convolution that ends at a quarter of the side (average pool 4, or stride 2 and
    max-pool), the middle one a 3x3 that ends at half of it, the small one a 3x3 alone.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        pool: bool,
        num_classes: int,
        in_channels: int = 3,
        stem: Stem = "large",
        width: int = 64,
        norm: Norm = _instance,
    ):
        super().__init__()
        kernel, stride = (7, 1 if pool else 2) if stem == "large" else (3, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=False),
            norm(width),
            nn.ReLU(),
        )
        if stem != "small":
            self.stem.append(nn.AvgPool2d(4 if stem == "large" else 2) if pool else nn.MaxPool2d(3, 2, 1))
        layers: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            for index in range(count):
                layers.append(BasicBlock(inputs, outputs, 2 if stage > 0 and index == 0 else 1, pool, norm))
                inputs = outputs
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(self.stem(images)).mean((-2, -1)))


class SeparableNet(nn.Module):
    """A 3x3 stem and N separable blocks [depthwise 3x3, BN, ReLU, 1x1, BN, ReLU] (MobileNet's), mean, linear.

    Every second block, the first among them, halves the side and doubles the `width` channels.
    """

    def __init__(self, depth: int, num_classes: int, image_size: int, in_channels: int = 3, width: int = 32):
        super().__init__()
        if image_size < 2 ** ((depth + 1) // 2 + 1):
            raise ValueError(
                f"separable{depth} halves the image {(depth + 1) // 2} times; {image_size} px are too few"
            )
        layers = self._layers(in_channels, width, 3)
        for index in range(depth):
            layers += self._layers(width, width, 3, stride=2 - index % 2, groups=width)
            outputs = width if index % 2 else 2 * width
            layers += self._layers(width, outputs, 1)
            width = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, num_classes)

    @staticmethod
    def _layers(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((-2, -1)))


# --- by name

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2)}  # a stage, by a ResNet's depth
OWN = re.compile(
    r"(?P<kind>convnet)(?P<depth>\d+)(?P<variant>-bn)?(?:-w(?P<width>[1-9]\d*))?"
    r"|(?P<resnet>resnet|resnetap)(?P<layers>10|18)"
    r"(?:(?P<thin>-cifar)|(?P<batch>-bn)?(?:-w(?P<channels>[1-9]\d*))?)"
    r"|separable(?P<blocks>[1-9]\d*)(?:-w(?P<first>[1-9]\d*))?"
)
MODIFIED = ("resnet18_modified", "resnet101_modified")
# Without those that give more than one output in training.
TORCHVISION = tuple(
    name for name in list_models(module=torchvision.models) if name not in ("googlenet", "inception_v3")
)


def network(name: str, *, num_classes: int, image_size: int, in_channels: int = 3) -> nn.Module:
    """A freshly initialised network by its name.

    The protocols' own: "convnetN" of 128 channels, "convnetN-wM" of M; "resnet10", "resnet18", "resnetap10",
    "resnetap18" (with a 3x3 stem up to 128 px, unpooled up to 64), and these with "-cifar" for Minimax's
    CIFAR ResNets of half the width; RDED's "convnetN-bn", "resnet18_modified" and "resnet101_modified";
    "resnetN-bn-wM" and "separableN-wM", small ones with batch statistics that are M channels wide at first.
    "torchvision/NAME" and "timm/NAME" are those libraries'; any other bare name is torchvision's, where it
    has none timm's. Input (B, in_channels, image_size, image_size), output logits (B, num_classes). Raises
    ValueError for an unknown name, or an image size that the network cannot take.
    """
    if match := OWN.fullmatch(name):
        return _own(match, num_classes, image_size, in_channels)
    library, _, rest = name.rpartition("/")
    if rest in MODIFIED and not library:
        return _modified(rest, num_classes, in_channels)
    if rest in TORCHVISION and library in ("", "torchvision"):
        return _torchvision(rest, num_classes, image_size, in_channels)
    if rest in timm.list_models() and library in ("", "timm"):
        # Transformers are built for one size.
        fixed = timm.get_pretrained_cfg(rest).fixed_input_size
        options = {"img_size": image_size} if fixed else {}
        return timm.create_model(rest, num_classes=num_classes, in_chans=in_channels, **options)
    raise ValueError(_unknown(name))


def _own(match: re.Match[str], num_classes: int, image_size: int, in_channels: int) -> nn.Module:
    """A network of this module."""
    if match["kind"]:
        norm = nn.BatchNorm2d if match["variant"] else _instance
        width = int(match["width"] or 128)
        return ConvNet(int(match["depth"]), num_classes, image_size, in_channels, width, norm)
    if match["blocks"]:
        width = int(match["first"] or 32)
        return SeparableNet(int(match["blocks"]), num_classes, image_size, in_channels, width)
    return _resnet(match, num_classes, image_size, in_channels)


def _resnet(match: re.Match[str], num_classes: int, image_size: int, in_channels: int) -> nn.Module:
    """A ResNet of this module."""
    pool, thin = match["resnet"] == "resnetap", bool(match["thin"])
    stem: Stem = "small" if thin or image_size <= 64 else "middle" if image_size <= 128 else "large"
    if image_size < (16 if pool else 9):
        raise ValueError(
            f"{match[0]} halves the image three times, so that its last normalisation sees one pixel; "
            f"{image_size} px are too few"
        )
    blocks, width = BLOCKS[int(match["layers"])], 32 if thin else int(match["channels"] or 64)
    norm = nn.BatchNorm2d if match["batch"] else _instance
    return ResNet(blocks, pool, num_classes, in_channels, stem, width, norm)


def _torchvision(name: str, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
    """torchvision's own, with its initialisation, drop-out and stochastic depth."""
    if in_channels != 3:
        raise ValueError(f"torchvision's {name} takes 3 channels, not {in_channels}; timm's take others")
    options = {"image_size": image_size} if name.startswith("vit_") else {}
    return get_model(name, weights=None, num_classes=num_classes, **options)


def _modified(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """torchvision's ResNet with a 3x3 stem without pooling, for 32 and 64 px (RDED)."""
    model: Any = get_model(name.removesuffix("_modified"), weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def _unknown(name: str) -> str:
    """What to say of a name that nobody knows."""
    resnets = [f"{kind}{depth}" for kind in ("resnet", "resnetap") for depth in BLOCKS]
    own = ["convnetN", "convnetN-bn", "convnetN-wM", *resnets, "resnetN-bn-wM", "separableN-wM"]
    own += [*(f"{known}-cifar" for known in resnets), *MODIFIED]
    near = difflib.get_close_matches(name, [*own, *TORCHVISION, *timm.list_models()], n=3)
    return (
        f"unknown network {name!r}{' (' + ', '.join(near) + '?)' if near else ''}; known are "
        f"{', '.join(own)}; torchvision/NAME of {', '.join(TORCHVISION)}; and timm/NAME of timm.list_models()"
    )


def last_linear(model: nn.Module) -> nn.Linear:
    """A network's last linear layer, its classifier. Raises TypeError for a kind that is not known.

    Known are this module's networks, torchvision's ResNets and timm's.
    """
    own: Any = model
    if isinstance(model, (ConvNet, ResNet)):
        return own.classifier
    if isinstance(model, torchvision.models.ResNet):
        return own.fc
    if hasattr(model, "get_classifier") and hasattr(model, "forward_head"):
        return own.get_classifier()
    raise TypeError(
        "penultimate features are known for ConvNet, ResNet, torchvision's ResNets and timm networks, not "
        f"for {type(model).__name__}"
    )


def outputs(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What the last linear layer sees of inputs, the features (B, D), and the logits (B, C)."""
    seen: list[Tensor] = []
    watch = last_linear(model).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        logits = model(inputs)
    finally:
        watch.remove()
    return seen[0], logits


def keep_outputs(model: nn.Module, outputs: int, count: int) -> None:
    """Cut a network of so many outputs to the first `count`; its last two parameters are its classifier's.

    So RDED has its students, made for 1,000 classes: an EfficientNet's last layer starts the smaller the more
    classes it is made for. Raises ValueError where the last two parameters are of another size.
    """
    for parameter in list(model.parameters())[-2:]:
        if len(parameter) != outputs:
            raise ValueError(
                f"{type(model).__name__} does not end with a weight and a bias of {outputs} outputs; set "
                "made_for=None in the protocol"
            )
        parameter.data = parameter.data[:count].clone()
