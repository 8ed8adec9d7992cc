"""Where the queries of probes extract_inputs, as maps and pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import backbones
from data.datasets import open_images
from data.loader import normalize
from evaluation.probe_figures import draw_probe_maps, plot_probes, probe_maps
from evaluation.probe_heads import build_head
from evaluation.probe_names import read_probes
from tests.reference import assert_close


@pytest.fixture
def images(small):
    source = open_images(str(small), "val")
    return torch.stack([torch.from_numpy(source.load(i).copy()).permute(2, 0, 1) for i in range(3)])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return backbones.build_backbone(arch="vit_small", patch_size=8, img_size=32, embed_dim=24, depth=1, num_heads=2)


def opened(path):
    with Image.open(path) as picture:
        return np.array(picture)


def named(*texts):
    """Heads whose queries are long, so that their maps are not uniform."""
    heads = {}
    for probe in read_probes(texts):
        heads[probe.label] = (probe, build_head(probe, 24, 5))
        for parameter in heads[probe.label][1].pool.parameters():
            torch.nn.init.normal_(parameter.data)
    return heads


def test_maps_are_the_poolings_weights_on_the_grid(model, images):
    """Query j's map at (r, c) is its weight on patch 4 r + c; [CLS]'s weight is shared out among the patches."""
    heads = named("ep:queries=4", "ep_all:queries=4", "simpool")
    maps = probe_maps(model, images, heads, batch_size=2)
    with torch.no_grad():
        tokens = model.eval().get_intermediate_layers(normalize(images), 1)[0]
        plain = heads["ep:queries=4"][1].pool(tokens[:, 1:], return_attention=True)[1]
        every = heads["ep_all:queries=4"][1].pool(tokens, return_attention=True)[1]
    assert_close(maps["ep:queries=4"], plain.unflatten(-1, (4, 4)))
    assert_close(maps["ep_all:queries=4"], (every[..., 1:] / (1 - every[..., :1])).unflatten(-1, (4, 4)), rel=1e-4)
    assert maps["simpool"].shape == (3, 1, 4, 4)
    for found in maps.values():
        assert_close(found.sum((-2, -1)), torch.ones(found.shape[:2]))


def test_pictures_compare_probes_and_show_every_query(model, images, tmp_path):
    """One picture has the map and overlay of every probe, another a column for each query; one query needs none."""
    paths = draw_probe_maps(model, images, named("ep:queries=4", "simpool"), tmp_path / "maps")
    assert [path.name for path in paths] == ["probes.png", "ep_queries=4.png"]
    both, queries = map(opened, paths)
    assert both.shape[1] >= 5 * 224  # the image, and two probes with two pictures each
    assert queries.shape[1] >= 7 * 112  # the image, the mean and its overlay, four queries
    assert both.shape[0] >= 3 * 224
    assert len(np.unique(both.reshape(-1, 3), axis=0)) > 100


def test_the_plot_is_written(tmp_path):
    """A line per probe over the rates, whatever the number of decays."""
    rows = [{"probe": p, "lr": lr, "weight_decay": wd, "val_top1": 10.0 * lr} for p in ("linear", "ep")
            for lr in (0.1, 1) for wd in (0, 1)]  # fmt: skip
    plot_probes(rows, {"linear": rows[0], "ep": rows[-1]}, tmp_path / "plot.png")
    assert opened(tmp_path / "plot.png").shape[1] > 500
