"""Discovery over images: memory of the model's attention, and broken maps."""

from __future__ import annotations

import pytest
import torch

from backbones import build_backbone
from benchmarks.measure import peak_bytes
from evaluation.discover import dino_seg_finder, lost_finder

VIT = {"arch": "vit_tiny", "patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.mark.parametrize("mode", ["official", "simpool"])
@pytest.mark.parametrize("side", [48, pytest.param(128, marks=pytest.mark.full)])
def test_no_attention_matrix_per_head_is_made(mode, side):
    """At N = side^2 patches, keys and maps cost far less than one N x N matrix of every head."""
    model = build_backbone(mode=mode, **VIT).eval()
    image = torch.randn(1, 3, 8 * side, 8 * side)
    for find in (lost_finder(model, 32, 3), dino_seg_finder(model, None, 32, 3)):
        peak = peak_bytes(lambda find=find: find(image), torch.device("cpu"))
        matrices = 4 * 3 * (side * side) ** 2
        similarities = 40e6  # LOST's blocks
        assert peak < matrices / 3 + similarities


def test_a_map_covers_the_image_without_its_padding():
    """A map of patches gives one value per pixel, cut to the image."""
    model = build_backbone(mode="simpool", **VIT).eval()
    sight = dino_seg_finder(model, None, 32, 3)(torch.randn(1, 3, 30, 45))
    assert sight.map.shape == (4, 6)
    large = sight.over(30, 45)
    assert large.shape == (30, 45)
    assert torch.equal(large[::8, ::8], sight.map)


def test_a_model_that_has_diverged_gives_no_box():
    """NaN in the weights makes maps and features that are not finite."""
    model = build_backbone(mode="simpool", **VIT).eval()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0] = float("nan")
    for find in (lost_finder(model, 32, 3), dino_seg_finder(model, None, 32, 3)):
        assert find(torch.randn(1, 3, 32, 32)).box is None
