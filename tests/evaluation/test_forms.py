"""What a linear head sees of each kind of model."""

from __future__ import annotations

import pytest
import torch

import vision_transformer as vits
from evaluation import forms
from evaluation.forms import Form
from tests.reference import tensor


def tiny_vit(mode):
    return vits.VisionTransformer(
        mode=mode, img_size=[32], patch_size=8, embed_dim=12, depth=3, num_heads=2, qkv_bias=True
    ).eval()


def test_official_vit_features_are_cls_of_the_last_blocks():
    """Form(n) is the normed [CLS] of the last n blocks side by side; with avgpool the mean patch joins as in DINO."""
    model, images = tiny_vit("official"), tensor(1, (2, 3, 32, 32))
    with torch.no_grad():
        one, two, pooled = forms.probe_features(model, images, [Form(1), Form(2), Form(1, True)])
        layers = model.get_intermediate_layers(images, 2)
    assert torch.allclose(one, model(images), atol=1e-6)
    assert torch.equal(two, torch.cat([tokens[:, 0] for tokens in layers], dim=1))
    mean = layers[-1][:, 1:].mean(1)
    # the published expression, for x of one block
    published = torch.cat((layers[-1][:, 0].unsqueeze(-1), mean.unsqueeze(-1)), dim=-1).reshape(2, -1)
    assert torch.equal(pooled, published)
    assert torch.equal(forms.with_mean_patch(two, mean), torch.cat([two, mean], dim=1))  # DINO's code fails here


def test_simpool_uses_its_own_feature_and_refuses_cls_forms():
    """A SimPool model is probed on model(x); asking it for four blocks is an error that says what to give."""
    model, images = tiny_vit("simpool"), tensor(1, (2, 3, 32, 32))
    with torch.no_grad():
        (feature,) = forms.probe_features(model, images, [Form()])
        assert torch.equal(feature, model(images))
    with pytest.raises(ValueError, match=r"n_last_blocks 4.*SimPool.*leave"):
        forms.probe_features(model, images, [Form(4)])
    assert forms.default_forms(model) == [Form()]
    with pytest.raises(ValueError, match="exceeds the 3 blocks"):
        forms.probe_features(tiny_vit("official"), images, [Form(4)])


def test_a_head_on_cls_followed_by_the_mean_converts_exactly():
    """Reordered weights give the published order's features the logits that they gave the older order's."""
    cls, mean, weight = tensor(1, (4, 6)), tensor(2, (4, 6)), tensor(3, (5, 12))
    before = torch.cat([cls, mean], dim=1) @ weight.T
    after = forms.with_mean_patch(cls, mean) @ forms.interleaved_weight(weight).T
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5)  # the same products, summed in another order
