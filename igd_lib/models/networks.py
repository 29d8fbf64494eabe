"""Networks that are trained and tested: the hard-label protocol's own, and everything timm has.

ConvNet-N, ResNetAP-N and ResNet-18 follow Minimax's evaluation code: instance normalisation written
as affine GroupNorm(C, C), so no network of the protocol keeps batch statistics.
"""

from __future__ import annotations

import re

import timm
from torch import Tensor, nn


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels, channels)


class ConvNet(nn.Module):
    """ConvNet-N: N x [conv 3x3, norm, ReLU, average pool 2], linear on the flattened map."""

    def __init__(self, depth: int, num_classes: int, image_size: int, in_channels: int = 3, width: int = 128):
        super().__init__()
        side = image_size // 2**depth
        if side < 1:
            raise ValueError(f"convnet{depth} halves the image {depth} times; {image_size} px are too few")
        layers: list[nn.Module] = []
        for index in range(depth):
            layers += [
                nn.Conv2d(in_channels if index == 0 else width, width, 3, padding=1),
                _norm(width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * side * side, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; `pool` replaces strides by average pooling (ResNetAP)."""

    def __init__(self, inputs: int, outputs: int, stride: int, pool: bool):
        super().__init__()
        strided, shrink = (
            (1, nn.AvgPool2d(stride) if stride > 1 else nn.Identity()) if pool else (stride, nn.Identity())
        )
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, strided, 1, bias=False),
            _norm(outputs),
            nn.ReLU(),
            shrink,
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            _norm(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, strided, bias=False), shrink, _norm(outputs)
            )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNetAP-10 (7x7 stem, average pool 4, strides by pooling) or ResNet-18 (7x7 stride 2, max pool)."""

    def __init__(self, blocks: tuple[int, ...], pool: bool, num_classes: int, in_channels: int = 3):
        super().__init__()
        tail = nn.AvgPool2d(4) if pool else nn.MaxPool2d(3, 2, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 64, 7, 1 if pool else 2, 3, bias=False), _norm(64), nn.ReLU(), tail
        )
        layers: list[nn.Module] = []
        inputs = 64
        for stage, count in enumerate(blocks):
            outputs = 64 * 2**stage
            for index in range(count):
                layers.append(BasicBlock(inputs, outputs, 2 if stage > 0 and index == 0 else 1, pool))
                inputs = outputs
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(self.stem(images)).mean((-2, -1)))


def network(name: str, *, num_classes: int, image_size: int, in_channels: int = 3) -> nn.Module:
    """A freshly initialised network by its name.

    "convnetN", "resnetapN", "resnet18" (the hard-label protocol's own) or a timm name.

    "timm/NAME" is timm's where a name means both: "timm/resnet18" has batch normalisation, as the soft-label
    tables' networks have. Input (B, in_channels, image_size, image_size), output logits (B, num_classes).
    Raises ValueError for a name that neither this module nor timm knows.
    """
    if match := re.fullmatch(r"convnet(\d+)", name):
        return ConvNet(int(match[1]), num_classes, image_size, in_channels)
    own = {
        "resnetap10": ((1, 1, 1, 1), True),
        "resnetap18": ((2, 2, 2, 2), True),
        "resnet18": ((2, 2, 2, 2), False),
    }
    if name in own and image_size < (64 if own[name][1] else 33):
        raise ValueError(
            f"{name} shrinks the image 32 times, so that its last normalisation sees one pixel; "
            f"{image_size} px are too few"
        )
    if name in own:
        return ResNet(*own[name], num_classes, in_channels)
    name = name.removeprefix("timm/")
    if name not in timm.list_models():
        raise ValueError(
            f"unknown network {name!r}: convnetN, {', '.join(own)}, or one of timm.list_models()"
        )
    fixed = timm.get_pretrained_cfg(name).fixed_input_size  # transformers are built for one size
    return timm.create_model(
        name, num_classes=num_classes, in_chans=in_channels, **({"img_size": image_size} if fixed else {})
    )
