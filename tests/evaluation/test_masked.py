"""Black patches at a model's attention."""

from __future__ import annotations

import pytest
import torch

from backbones import build_backbone
from data.datasets import open_images
from data.loader import normalize
from evaluation.features import eval_resize
from evaluation.masked import blackened, masked_accuracies

EXTRACTION = {"img_size": 32, "resize": eval_resize(32), "batch_size": 16, "num_workers": 0, "show_progress": False}


def test_the_most_attended_patches_are_black():
    """int(r N) patches of each image are what a black pixel becomes after normalisation; the rest is untouched."""
    images = normalize(torch.randint(1, 256, (2, 3, 16, 24), dtype=torch.uint8))
    attention = torch.arange(6.0).view(1, 2, 3).repeat(2, 1, 1)
    attention[1] = 5 - attention[1]
    dark = blackened(images, attention, 0.4)  # two of six
    black = normalize(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))[0]
    for b, hidden in ((0, [(1, 1), (1, 2)]), (1, [(0, 0), (0, 1)])):
        for y in range(2):
            for x in range(3):
                cell = (slice(None), slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8))
                expected = black if (y, x) in hidden else images[b][cell]
                assert torch.equal(dark[b][cell], expected), (b, y, x)
    assert torch.equal(blackened(images, attention, 0), images)
    with pytest.raises(ValueError, match="16 x 24 pixels do not divide"):
        blackened(images, torch.rand(2, 5, 3), 0.5)


def test_each_ratio_is_scored_on_its_own_images(small):
    """Accuracies equal those of the classifier on images that are blackened one ratio at a time."""
    source = open_images(small, "val")
    masker = build_backbone("vit_tiny", patch_size=8, img_size=32, embed_dim=24, depth=1, num_heads=2).eval()

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        bright = images.mean((1, 2, 3))
        return torch.stack([bright, -bright], dim=1)

    found = masked_accuracies(logits_of, masker, source, [0.25, 0.75], EXTRACTION)
    images = torch.stack([torch.from_numpy(source.load(i).copy()).permute(2, 0, 1) for i in range(len(source))])
    images = normalize(images)
    with torch.no_grad():
        attention = masker.get_attention_map(images).mean(1)
    labels = torch.from_numpy(source.labels)
    for ratio, row in found.items():
        right = logits_of(blackened(images, attention, ratio)).argmax(1) == labels
        assert row["val_top1"] == pytest.approx(100 * right.double().mean().item())
        assert row["val_top5"] == 100


def test_logits_that_are_not_finite_are_an_error(small):
    """An accuracy of garbage is not reported."""
    masker = build_backbone("vit_tiny", patch_size=8, img_size=32, embed_dim=24, depth=1, num_heads=2).eval()
    with pytest.raises(ValueError, match="not finite"):
        masked_accuracies(lambda x: torch.full((len(x), 2), float("nan")), masker, open_images(small, "val"), [0.5],
                          EXTRACTION)  # fmt: skip
