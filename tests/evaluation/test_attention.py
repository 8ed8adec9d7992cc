"""Attention: maps that sum to one, masks that hold what they say, pictures of the right shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

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


def test_a_grid_shows_every_image_under_every_model(tmp_path):
    """One row per image; per model a map, an overlay and a mask beside the untouched image, all at print size."""
    images = photographs(size=(32, 32))
    models = {"official": tiny_vit("official"), "SimPool": tiny_vit("simpool")}
    path = attention.attention_figure(models, images, tmp_path / "grid.png", threshold=0.5, per_head=True)
    picture = np.asarray(Image.open(path))
    columns = 1 + (3 + 2) + 3
    assert picture.shape[1] == attention.GAP + columns * (224 + attention.GAP) + 2 * 3 * attention.GAP
    assert picture.shape[0] > 2 * (224 + attention.GAP)
    shown = attention.pictures(images[0], torch.rand(4, 4), side=224)["image"]
    row = picture.shape[0] - 2 * (224 + attention.GAP)
    assert np.array_equal(picture[row : row + 224, attention.GAP : attention.GAP + 224], shown)


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
