"""Maps and features for localisation: heads, padding, keys, dilation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backbones import build_backbone
from evaluation.object_maps import choose_head, dilated, last_qkv, lost_features, map_step, one_map, padded
from runtime.guards import InputError

VIT = {"arch": "vit_tiny", "patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture
def image():
    return torch.randn(1, 3, 40, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_keys_are_those_of_the_last_block_without_cls(mode, image):
    """The features are the middle third of the last block's qkv, one row per patch."""
    model = build_backbone(mode=mode, **VIT).eval()
    features, grid = lost_features(model, image, map_step(model, 32, 3))
    assert grid == (5, 8)
    with torch.no_grad():
        tokens = model.prepare_tokens(image)
        tokens = model.blocks[0](tokens)
        expected = model.blocks[1].attn.qkv(model.blocks[1].norm1(tokens))[0, :, 24:48]
    torch.testing.assert_close(features, expected[-40:])
    assert not model.blocks[-1].attn.qkv._forward_hooks


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_dilated_stage_has_the_plain_map_at_every_second_position(arch, image):
    """Stride 16 in place of 32, with the same values where both have one; afterwards the model is as before."""
    model = build_backbone(arch, mode="simpool").eval()
    assert (map_step(model, 64, 3), map_step(model, 64, 3, dilate=True)) == (32, 16)
    with torch.no_grad():
        image = padded(image, 32)
        plain = model.forward_features(image)
        with dilated(model):
            fine = model.forward_features(image)
        again = model.forward_features(image)
    assert fine.shape[-2:] == (4, 4)
    torch.testing.assert_close(fine[..., ::2, ::2], plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    assert torch.equal(again, plain)


def test_features_of_maps_are_normed_together(image):
    """A map's features have mean 0 and variance 1 over positions and channels together."""
    model = build_backbone("resnet18").eval()
    assert last_qkv(model) is None
    features, grid = lost_features(model, padded(image, 16), 16)
    assert features.shape == (grid[0] * grid[1], 512) == (12, 512)
    assert features.mean().abs() < 1e-5
    assert features.var(correction=0) == pytest.approx(1, rel=1e-4)  # less by eps / variance


def test_other_networks_have_their_own_stride():
    """ConvNeXt has 32 pixels per position, and a map of one position is as large as its image."""
    model = build_backbone("convnext_tiny", mode="simpool").eval()
    assert map_step(model, 64, 3) == 32
    assert map_step(build_backbone("resnet18", mode="simpool").eval(), 32, 3) == 32


def test_zeros_are_added_to_the_right_and_below(image):
    """The image itself stays in the upper left corner."""
    larger = padded(image[..., :39, :], 16)
    assert larger.shape == (1, 3, 48, 64)
    assert torch.equal(larger[..., :39, :], image[..., :39, :])
    assert not larger[..., 39:, :].any()


def test_the_head_is_the_asked_one_or_the_default_or_the_mean():
    """Heads count from 0; 4 is DINO-seg's for [CLS] attention, if it is there; pooled models give the mean."""
    model = nn.Module()
    model.mode = "official"
    assert choose_head(model, 6, None) is None
    assert choose_head(model, 6, None, 4) == 4
    assert choose_head(model, 3, None, 4) is None
    assert choose_head(model, 3, 0, 4) == 0
    with pytest.raises(InputError, match="--head 3: the model has heads 0 to 2"):
        choose_head(model, 3, 3)
    with pytest.raises(InputError, match="the model has one head, 0"):
        choose_head(model, 1, 1)
    model.mode = "simpool"
    assert choose_head(model, 6, None, 4) is None
    attention = torch.rand(2, 3, 4, 5)
    assert torch.equal(one_map(attention, 1), attention[:, 1])
    assert torch.equal(one_map(attention, None), attention.mean(1))
