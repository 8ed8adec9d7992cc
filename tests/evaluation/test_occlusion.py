"""Images without the patches that a model attends to."""

import pytest
import torch

from data.loader import normalize
from evaluation.occlusion import at_every_ratio, hide_attended


def test_the_most_attended_patches_are_black():
    """int(r N) patches have the value of a black pixel; the others are untouched; of equal ones the first is hidden."""
    images = normalize(torch.randint(1, 256, (2, 3, 8, 12), dtype=torch.uint8))
    attention = torch.tensor([[[1.0, 5, 2], [0, 4, 4]], [[1, 1, 1], [1, 1, 1]]])
    shown = hide_attended(images, attention, 0.4)  # int(2.4) = 2 of 6 patches of 4 x 4
    black = normalize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))[0]
    hidden = torch.tensor([[[0, 1, 0], [0, 1, 0]], [[1, 1, 0], [0, 0, 0]]]).bool()
    for b in range(2):
        for row in range(2):
            for column in range(3):
                place = b, slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
                expected = black if hidden[b, row, column] else images[place]
                assert torch.equal(shown[place], expected)


def test_features_of_every_ratio_stand_side_by_side():
    """The first block is of the images as they are; ratio 1 hides everything; each forward sees its own images."""

    class Looker(torch.nn.Module):
        def get_attention_map(self, x):
            return x.mean(1, keepdim=True)[:, :, ::4, ::4].repeat(1, 2, 1, 1)

    images = torch.rand(3, 3, 8, 8) + 1
    joined = at_every_ratio(lambda x: x.mean((2, 3)), Looker(), [0.5, 1.0])(images)
    assert joined.shape == (3, 9)
    assert torch.equal(joined[:, :3], images.mean((2, 3)))
    black = normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))[0, :, 0, 0]
    torch.testing.assert_close(joined[:, 6:], black.expand(3, 3))
    half = (joined[:, 3:6] - black) / (images.mean((2, 3)) - black)
    assert ((half > 0.4) & (half < 0.6)).all()


def test_a_diverged_model_is_named():
    """Attention that is not finite can't decide anything."""
    with pytest.raises(ValueError, match="not finite"):
        hide_attended(torch.zeros(1, 3, 4, 4), torch.tensor([[[float("nan")]]]), 0.5)
