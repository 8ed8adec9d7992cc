"""Pictures of masks: what they hide, and how much."""

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.mask_figure import HIDDEN, TITLES, mask_figure, masks_of, without
from resnet_simpool import resnet18
from vision_transformer import vit_tiny


def test_masks_hide_the_ratio_of_what_they_are_named_for():
    """High and Low hide int(r N) patches at either end of the attention, Hint reveals some of the highest."""
    attention = torch.rand(3, 10, 12)
    masks = masks_of(attention, ratio=0.35, show_max=0.2)
    assert masks.keys() == TITLES.keys()
    counts = {name: mask.flatten(1).sum(1).tolist() for name, mask in masks.items()}
    assert counts["attmask_high"] == counts["attmask_low"] == counts["rand"] == [42] * 3
    assert counts["attmask_hint"] == [42 - int(0.07 * 120)] * 3
    assert all(0 < count <= 42 for count in counts["block"])
    high, low = (attention[masks[name]].view(3, -1) for name in ("attmask_high", "attmask_low"))
    assert (high.amin(1) > low.amax(1)).all()
    assert (masks["attmask_hint"] <= masks["attmask_high"]).all()


def test_a_hidden_patch_is_gray_and_the_rest_untouched():
    """Each patch covers its own pixels."""
    picture = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    shown = without(picture, torch.tensor([[True, False, False], [False, False, True]]))
    assert (shown[:4, :4] == HIDDEN).all()
    assert (shown[4:, 8:] == HIDDEN).all()
    assert (shown[:4, 4:] == picture[:4, 4:]).all()
    assert (shown[4:, :8] == picture[4:, :8]).all()


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_the_figure_has_a_row_per_image(tmp_path, mode):
    """A labelled PNG with the image, its attention and five masks."""
    model = vit_tiny(mode, patch_size=8, img_size=32, depth=1)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    path = mask_figure(model, images, tmp_path / "masks.png", side=48)
    with Image.open(path) as picture:
        width, height = picture.size
    assert width >= 7 * 48
    assert height >= 2 * 48


def test_a_model_without_a_map_is_refused(tmp_path):
    """A ResNet pooled by averaging has no attention to mask by."""
    with pytest.raises(ValueError, match="no attention map"):
        mask_figure(resnet18(num_classes=0), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), tmp_path / "masks.png")
