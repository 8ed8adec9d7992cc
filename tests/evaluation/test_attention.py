"""Attention: maps that sum to one, masks that hold what they say, pictures of the right shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import backbones
import vision_transformer as vits
from evaluation import attention


def tiny_vit(mode, heads=2):
    return vits.VisionTransformer(
        mode=mode, img_size=[32], patch_size=8, embed_dim=12, depth=2, num_heads=heads, qkv_bias=True
    ).train()


def photographs(count=2, size=(32, 48)):
    from skimage import data

    source = [data.astronaut(), data.coffee()][:count]
    return torch.stack([attention.fit(pixels, size) for pixels in source])


@pytest.mark.parametrize(("mode", "heads"), [("official", 2), ("simpool", 1)])
def test_maps_are_distributions_over_patches(mode, heads):
    """Every head's map sums to one over the patches of a non-square image, and the model keeps its mode."""
    model = tiny_vit(mode)
    maps = attention.attention_maps(model, photographs(), batch_size=1)
    assert maps.shape == (2, heads, 4, 6)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(2, heads))
    assert model.training
    assert torch.allclose(maps, attention.attention_maps(model, photographs(), batch_size=2), atol=1e-6)


def test_convolutional_networks_show_simpool_and_refuse_averaging():
    """A SimPool ResNet has a map of its feature map's size; one pooled by averaging is an error naming SimPool."""
    images = photographs(size=(64, 96))
    maps = attention.attention_maps(backbones.build_backbone("resnet18", mode="simpool"), images)
    assert maps.shape == (2, 1, 2, 3)
    with pytest.raises(ValueError, match=r"(?i)simpool"):
        attention.attention_maps(backbones.build_backbone("resnet18"), images)


def test_masks_are_the_smallest_sets_that_hold_the_threshold():
    """A mask holds at least t of the attention, and without its weakest patch it would not."""
    maps = torch.rand(3, 5, 7)
    maps /= maps.sum((1, 2), keepdim=True)
    for threshold in (0.1, 0.6, 1.0):
        masks = attention.mass_mask(maps, threshold)
        for one, mask in zip(maps, masks, strict=True):
            assert one[mask].sum() >= threshold - 1e-5
            assert one[mask].sum() - one[mask].min() < threshold
            assert mask.all() or one[mask].min() >= one[~mask].max()
    with pytest.raises(ValueError, match=r"1\.5"):
        attention.mass_mask(maps, 1.5)


def test_images_are_fitted_without_distortion():
    """The input covers the wanted size: the longer side is cut at both ends, nothing is stretched."""
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    assert attention.fit(wide, (10, 10)).float().mean() == 255
    assert attention.fit(wide, (20, 20)).shape == (3, 20, 20)


def test_the_mask_picture_keeps_the_inside_and_dims_the_rest():
    """Pixels inside the mask are the image's own; outside they are gray and darker."""
    image = photographs(1)[0]
    weights = torch.zeros(4, 6)
    weights[:, :3] = 1.0
    mask = attention.pictures(image, weights, threshold=1.0)["mask"]
    assert np.array_equal(mask[:, :22], attention.displayable(image)[:, :22])
    right = mask[:, 26:].astype(int)
    assert (right.max(2) == right.min(2)).all()
    assert right.mean() < attention.displayable(image)[:, 26:].mean()


def test_uniform_and_random_maps_do_not_look_sure():
    """On the common scale a nearly uniform map stays dim, whereas stretched it would reach both ends."""
    flat = torch.full((1, 14, 14), 1 / 196) * (1 + 0.05 * torch.rand(1, 14, 14))
    flat /= flat.sum()
    peaked = torch.zeros(1, 14, 14)
    peaked[0, 3:6, 3:6] = 1 / 9
    top = attention.common_top([flat, peaked])
    assert attention.common_top([flat]) == attention.LEAST_TOP
    assert attention.displayed(flat, top).amax() < 0.3
    assert attention.displayed(peaked, top)[0, 4, 4] == 1
    assert attention.displayed(flat, None).amax() == pytest.approx(1)
    assert attention.relative(flat).mean() == pytest.approx(1, rel=1e-5)


def test_nothing_is_tinted_where_attention_is_zero():
    """Pixels under patches without attention are the image's own in the overlay."""
    image = photographs(1)[0]
    weights = torch.zeros(4, 6)
    weights[:, :3] = 1 / 12
    overlay = attention.pictures(image, weights, smooth=False)["overlay"]
    assert np.array_equal(overlay[:, 24:], attention.displayable(image)[:, 24:])
    assert not np.array_equal(overlay[:, :24], attention.displayable(image)[:, :24])
