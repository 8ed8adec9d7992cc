"""The rows of masked patches, chosen without reading the mask."""

import torch

from distill.masked_multicrop import masks_with_rows


def test_rows_hold_every_masked_patch_with_its_weight():
    """Each masked patch is among the rows once, with 1 / (crops · masked patches of its crop); others weigh 0."""
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[0, [1, 7]] = mask[2, [0, 3, 9]] = True
    masks = masks_with_rows(mask, most=3)
    weights = torch.zeros(40).index_add_(0, masks.chosen, masks.weights).view(4, 10)
    expected = mask / mask.sum(1, keepdim=True).clamp(min=1) / 4
    torch.testing.assert_close(weights, expected)
    assert len(masks.chosen.unique()) == len(masks.chosen) == 12


def test_only_the_named_crops_are_looked_at():
    """Crops that are known to be unmasked take no rows; no masked crop at all gives none."""
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[2, :5] = True
    masks = masks_with_rows(mask, 5, torch.tensor([2]))
    assert sorted(masks.chosen.tolist()) == [20, 21, 22, 23, 24]
    torch.testing.assert_close(masks.weights, torch.full((5,), 0.05))
    for crops in (torch.tensor([2]), torch.zeros(0, dtype=torch.int64)):
        assert len(masks_with_rows(torch.zeros_like(mask), 0, crops).chosen) == 0
