"""The small stem of timm's networks: their map becomes larger, and what has no such stem says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backbones import build_backbone
from timm_stem import has_stem_to_make_small, make_stem_small

# 7x7 and max-pool; three convolutions; a Sequential with its pool; one convolution; names inside `features`
REDUCTION = {"resnet18": 4, "resnet10t": 4, "resnetv2_18": 4, "regnetx_002": 2, "densenet121": 4, "rexnet_100": 2}


def timm_model(name: str) -> nn.Module:
    """timm's model without a classifier and without memory."""
    import timm

    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


@pytest.mark.parametrize("name", REDUCTION)
def test_a_small_stem_keeps_the_images_size(name):
    """The last map is as many times larger as the standard stem reduces; no convolution is wider than 3; names stay."""
    standard, small = timm_model(name).eval(), timm_model(name).eval()
    make_stem_small(name, small)
    x = torch.zeros(1, 3, 128, 128, device="meta")
    before, after = standard.forward_features(x).shape[-1], small.forward_features(x).shape[-1]
    assert (before, after) == (4, 4 * REDUCTION[name])
    assert list(small.state_dict()) == list(standard.state_dict())
    first = next(layer for layer in small.modules() if isinstance(layer, nn.Conv2d))
    assert (first.kernel_size, first.stride) == ((3, 3), (1, 1))


def test_a_shrunk_kernel_starts_from_random_weights():
    """Its weights have the deviation of the other convolutions: sqrt(2 / fan out)."""
    import timm

    torch.manual_seed(0)
    body = timm.create_model("resnetv2_18", num_classes=0)
    make_stem_small("resnetv2_18", body)
    expected = (2 / (9 * 64)) ** 0.5  # 1,728 numbers: the estimate lies within 2 %, one standard error
    assert body.stem.conv.weight.std().item() == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("name", ["test_vit", "convnext_atto", "vgg11"])
def test_what_has_no_such_stem_says_so(name):
    """Patches, and stems without a stride, can't be made small."""
    assert not has_stem_to_make_small(name)
    with pytest.raises(ValueError, match=f"{name}.*stem"):
        make_stem_small(name, timm_model(name))
    with pytest.raises(ValueError, match=f"{name} has no stem of strided convolutions"):
        build_backbone(name, img_size=64, stem="small")


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_built_with_any_pooling(mode):
    """At 32 pixels SimPool attends to 4 x 4 cells instead of one."""
    model = build_backbone("test_resnet", mode, img_size=32, stem="small").eval()
    _, positions, attention = model.forward_dense(torch.zeros(2, 3, 32, 32))
    assert positions.shape[1] == 16
    assert attention is None or attention.shape == (2, 1, 16)
