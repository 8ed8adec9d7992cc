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
    """Form(n) is the normed [CLS] of the last n blocks side by side; with avgpool the mean patch token follows."""
    model, images = tiny_vit("official"), tensor(1, (2, 3, 32, 32))
    with torch.no_grad():
        one, two, pooled = forms.probe_features(model, images, [Form(1), Form(2), Form(1, True)])
        layers = model.get_intermediate_layers(images, 2)
    assert torch.allclose(one, model(images), atol=1e-6)
    assert torch.equal(two, torch.cat([tokens[:, 0] for tokens in layers], dim=1))
    assert torch.equal(pooled[:, 12:], layers[-1][:, 1:].mean(1))


def test_simpool_uses_its_own_feature_and_refuses_cls_forms():
    """A SimPool model is probed on model(x); asking it for four blocks is an error that says what to give."""
    model, images = tiny_vit("simpool"), tensor(1, (2, 3, 32, 32))
    with torch.no_grad():
        (feature,) = forms.probe_features(model, images, [Form()])
        assert torch.equal(feature, model(images))
    with pytest.raises(ValueError, match="n_last_blocks 1"):
        forms.probe_features(model, images, [Form(4)])
    assert forms.default_forms(model) == [Form()]
    with pytest.raises(ValueError, match="exceeds the 3 blocks"):
        forms.probe_features(tiny_vit("official"), images, [Form(4)])
