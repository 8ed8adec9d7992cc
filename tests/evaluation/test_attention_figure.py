"""The grid of attention maps."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from evaluation import attention_figure
from evaluation.attention import pictures
from evaluation.attention_figure import GAP
from tests.evaluation.test_attention import photographs, tiny_vit


def test_a_grid_shows_every_image_under_every_model(tmp_path):
    """One row per image; per model a map, an overlay and a mask next to the unchanged image, all at print size."""
    images = photographs(size=(32, 32))
    models = {"official": tiny_vit("official"), "SimPool": tiny_vit("simpool")}
    path = attention_figure.attention_figure(models, images, tmp_path / "grid.png", threshold=0.5, per_head=True)
    picture = np.asarray(Image.open(path))
    columns = 1 + (3 + 2) + 3
    assert picture.shape[1] == GAP + columns * (224 + GAP) + 2 * 3 * GAP
    assert picture.shape[0] > 2 * (224 + GAP)
    shown = pictures(images[0], torch.rand(4, 4), side=224)["image"]
    line = round(1.9 * round(224 / 14))  # of a title; two of them above the rows
    row = 2 * line
    assert np.array_equal(picture[row : row + 224, GAP : GAP + 224], shown)
