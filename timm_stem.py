"""The small stem, for images of 32 pixels or so, of timm's convolutional networks.

The stem of most of them reduces an image to a quarter of its side before the first block. Made small it keeps the
image's size, as in our own ResNets: strides of 1, no pooling, and 3x3 in place of larger kernels. timm's constructors
offer no such stem (`stem_type` chooses among strided ones), so the layers are changed after the model is built. Names
of parameters stay.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

_PLACES = ("conv1", "conv_stem", "stem", "features.conv0")  # ResNet, EfficientNet, ResNetV2 and RegNet, DenseNet
_POOLS = ("maxpool", "stem.pad", "stem.pool", "features.pool0")


def make_stem_small(name: str, body: nn.Module) -> None:
    """Change the stem of timm's model `name` in place. Raises ValueError if it has none that can be changed."""
    strided = _strided_convolutions(body)
    if not strided:
        raise ValueError(f"{name} (timm) has no stem of strided convolutions, so stem small can't be honoured")
    for convolution in strided:
        convolution.stride = (1, 1)
        if max(convolution.kernel_size) > 3:
            _shrink_kernel(convolution)
    for place in _POOLS:
        owner, _, attribute = place.rpartition(".")
        module = _find(body, owner) if owner else body
        if getattr(module, attribute, None) is not None:
            setattr(module, attribute, nn.Identity())


@cache
def has_stem_to_make_small(name: str) -> bool:
    """Whether `make_stem_small` works for timm's model of this name, which is built without memory to find out."""
    import timm

    with torch.device("meta"):
        return bool(_strided_convolutions(timm.create_model(name, pretrained=False)))


def _strided_convolutions(body: nn.Module) -> list[nn.Conv2d]:
    """The stem's convolutions with a stride; none if there is no stem, or if it cuts the image into patches."""
    layers = [layer for place in _PLACES if (found := _find(body, place)) is not None for layer in found.modules()]
    strided = [layer for layer in layers if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1]
    return [] if any(min(layer.kernel_size) <= max(layer.stride) for layer in strided) else strided


def _find(body: nn.Module, place: str) -> nn.Module | None:
    """The layer at a dotted place, None if there is none."""
    module: nn.Module | None = body
    for attribute in place.split("."):
        module = getattr(module, attribute, None)
    return module if isinstance(module, nn.Module) else None


def _shrink_kernel(convolution: nn.Conv2d) -> None:
    """Make a convolution 3x3 in place, with new random weights."""
    weight = convolution.weight
    convolution.weight = nn.Parameter(weight.new_empty(*weight.shape[:2], 3, 3))
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    convolution.kernel_size = (3, 3)
    if convolution.padding != (0, 0):  # timm's "same" convolutions have none and pad as they run
        convolution.padding = (1, 1)
