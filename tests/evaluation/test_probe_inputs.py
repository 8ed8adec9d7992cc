"""What probes see of each kind of model."""

from __future__ import annotations

import pytest
import torch

import backbones
from evaluation.forms import Form, probe_features
from evaluation.probe_inputs import extract_inputs, grid_of
from evaluation.probe_names import read_probes
from tests.reference import tensor

TINY = {"patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2}
EP, BOTH, LINEAR = read_probes(["ep"]), read_probes(["linear", "ep", "ep_all"]), read_probes(["linear"])


def build(**settings):
    torch.manual_seed(0)
    return backbones.build_backbone(**settings).eval()


@torch.no_grad()
def test_an_official_vit_gives_normed_tokens_and_the_linear_probes_features():
    """Patches and [CLS] are the last block's through the final norm; features are those of a run without probes."""
    model, images, forms = build(arch="vit_small", **TINY), tensor(1, (2, 3, 32, 32)), [Form(1), Form(2, True)]
    seen = extract_inputs(model, images, forms, BOTH)
    tokens = model.norm(model.forward_features(images))
    assert torch.equal(seen.with_cls, tokens)
    assert torch.equal(seen.patches, tokens[:, 1:])
    for mine, theirs in zip(seen.features, probe_features(model, images, forms), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"arch": "vit_small", "mode": "simpool", **TINY},
        {"arch": "vit_small", "mode": "gem", **TINY},
        {"arch": "resnet18", "mode": "simpool", "img_size": 64},
        {"arch": "resnet18", "img_size": 64},
    ],
)
@torch.no_grad()
def test_positions_of_the_last_features_are_tokens(settings):
    """Without [CLS] the tokens are the last tokens, or the map's positions row by row, after the final norm."""
    model, images = build(**settings), tensor(1, (2, 3, settings["img_size"], settings["img_size"]))
    seen = extract_inputs(model, images, [Form()], read_probes(["linear", "ep"]))
    last = model.forward_features(images)
    tokens = last if last.ndim == 3 else last.permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(seen.patches, model.normed(tokens))
    assert torch.equal(seen.features[0], model(images))
    assert seen.with_cls is None
    rows, columns = grid_of(model, images)
    assert rows * columns == seen.patches.shape[1]


@torch.no_grad()
def test_timm_models_give_their_tokens():
    """A timm ViT's [CLS] and patches are its own normed tokens, its feature its own; in mode gap there is no [CLS]."""
    images = tensor(1, (2, 3, 32, 32))
    model = build(arch="vit_tiny_patch16_224", img_size=32)
    seen = extract_inputs(model, images, [Form()], BOTH)
    assert torch.equal(seen.with_cls, model.body.forward_features(images))
    assert torch.equal(seen.features[0], model(images))
    assert torch.equal(model.forward_dense(images)[1], seen.patches)
    with pytest.raises(ValueError, match=r"mode gap\) has no \[CLS\]"):
        extract_inputs(build(arch="vit_tiny_patch16_224", img_size=32, mode="gap"), images, [], BOTH)


class OnlyFeatures(torch.nn.Module):
    """A timm-like backbone whose features are pooled already."""

    mode, has_classifier = "official", False

    def kind_of_model(self):
        return "pooled_model"

    def forward_tokens(self, images):
        raise ValueError("pooled_model (timm) gives neither tokens nor a map ((2, 3))")

    def forward(self, images):
        return images.mean((2, 3))


def test_a_model_that_cannot_serve_a_probe_says_why():
    """ep_all needs [CLS], every attentive probe tokens; the linear probe is content with the feature."""
    images = tensor(1, (2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"ep_all pools \[CLS\] and patches, .*mode simpool.* has no \[CLS\].*use ep"):
        extract_inputs(build(arch="vit_small", mode="simpool", **TINY), images, [], BOTH)
    with pytest.raises(ValueError, match=r"neither tokens nor a map.*use --probes linear"):
        extract_inputs(OnlyFeatures(), images, [], EP)
    assert extract_inputs(OnlyFeatures(), images, [Form()], LINEAR).features[0].shape == (2, 3)
    with pytest.raises(ValueError, match="n_last_blocks 2"):
        extract_inputs(build(arch="vit_small", mode="simpool", **TINY), images, [Form(2)], EP)
