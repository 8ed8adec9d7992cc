"""ResNet-18 to -152, with global average pooling ("official"), SimPool or another operator.

Follows "Deep Residual Learning for Image Recognition" with the stride on the 3x3 convolution (v1.5), and torchvision's
parameter names, so that published weights load. Written out here rather than imported: torchvision adds a second to
start-up, and its model does not expose its last map. The operator pools that map, and no norm follows.

For images of 32 pixels, whose last map would be a single cell, there is the usual small stem: one 3x3 convolution
without stride in place of the 7x7 one with stride 2, and no max-pooling. The parameters keep their names.

Departure from the published code: `mode` works for ResNet-18 and -34 too.

Shape letters: B batch, C channels, h, w the map's size (image size / 32, with the small stem / 8), D width of the
feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from pooled_backbone import PooledBackbone, fewer_blocks

STEMS = ("standard", "small")


def _conv3x3(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)


def _conv7x7(in_planes: int, planes: int) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, kernel_size=7, stride=2, padding=3, bias=False)


def _conv1x1(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_planes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)).add_(shortcut))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide, and a shortcut."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = _conv1x1(in_planes, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)).add_(shortcut))


class ResNet(PooledBackbone):
    """ResNet that returns logits, or features (B, D) if num_classes is 0.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks in each of the four stages.
        mode: "official" (global average pooling) or an operator's name, such as "simpool".
        gamma: SimPool's exponent, or None; other modes do not use it.
        value_min, use_beta, pool_position, pooling_args: of the pooling, see PooledBackbone. There is no norm, so its
            position makes no difference.
        pool_depth: number of the last stage's blocks that are not built.
        stem: "standard", or "small" for images below 64 pixels.

    Raises:
        ValueError: for an unknown mode or stem, settings that the pooling does not have, and in forward for an empty
            image.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        mode: str = "official",
        gamma: float | None = 2.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        value_min: str = "image",
        use_beta: bool | None = None,
        pool_position: str = "before",
        pool_depth: int = 0,
        pooling_args: Mapping[str, Any] | None = None,
        stem: str = "standard",
    ) -> None:
        super().__init__(mode, gamma, value_min, use_beta, pool_position, pooling_args)
        if stem not in STEMS:
            raise ValueError(f"unknown stem {stem!r}; choose {' or '.join(STEMS)}")
        small = stem == "small"
        self.conv1 = _conv3x3(in_chans, 64) if small else _conv7x7(in_chans, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(block, 64, 64, layers[0], stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, layers[1], stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, layers[2], stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, fewer_blocks(layers[3], pool_depth), stride=2)
        self.make_pooling(512 * block.expansion, "map")
        self.norm = nn.Identity()
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.initialise(_init_weights)

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last map, (B, D, h, w). Raises ValueError if there is a mask."""
        self.refuse_mask(mask)
        if 0 in x.shape[-2:]:
            raise ValueError(f"image size {x.shape[-2]}x{x.shape[-1]} has no pixels; give images of at least 1x1")
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = self.run_block(block, x)
        return x

    def second_pass(self, block: nn.Module) -> AbstractContextManager:
        """A checkpointed block's BatchNorm must not count its batch twice."""
        return _statistics_untouched(block)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_features), or (B, num_classes)"""
        return self.fc(self.feature_of(self.forward_features(x), tuple(x.shape[-2:])))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@contextmanager
def _statistics_untouched(module: nn.Module) -> Iterator[None]:
    """Keep BatchNorm from updating its running statistics, for the second pass of a checkpointed block."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in kept:  # a throwaway counter, because SyncBatchNorm requires one
        norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count


def _stage(block, in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    out_planes = planes * block.expansion
    downsample = None
    if stride != 1 or in_planes != out_planes:
        downsample = nn.Sequential(_conv1x1(in_planes, out_planes, stride), nn.BatchNorm2d(out_planes))
    first = block(in_planes, planes, stride, downsample)
    return nn.Sequential(first, *(block(out_planes, planes) for _ in range(blocks - 1)))


def resnet18(mode: str = "official", **kwargs) -> ResNet:
    """512 features; keywords as ResNet's."""
    return ResNet(BasicBlock, (2, 2, 2, 2), mode, **kwargs)


def resnet34(mode: str = "official", **kwargs) -> ResNet:
    """512 features; keywords as ResNet's."""
    return ResNet(BasicBlock, (3, 4, 6, 3), mode, **kwargs)


def resnet50(mode: str = "official", **kwargs) -> ResNet:
    """2048 features; keywords as ResNet's."""
    return ResNet(Bottleneck, (3, 4, 6, 3), mode, **kwargs)


def resnet101(mode: str = "official", **kwargs) -> ResNet:
    """2048 features; keywords as ResNet's."""
    return ResNet(Bottleneck, (3, 4, 23, 3), mode, **kwargs)


def resnet152(mode: str = "official", **kwargs) -> ResNet:
    """2048 features; keywords as ResNet's."""
    return ResNet(Bottleneck, (3, 8, 36, 3), mode, **kwargs)
