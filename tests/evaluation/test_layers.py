"""Features from inside a model: an earlier block's are those of a model that ends there."""

from __future__ import annotations

import pytest
import torch

from backbones import build_backbone
from evaluation.layers import at_layer, feature_function

VIT = {"arch": "vit_small", "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_an_earlier_block_is_a_shorter_models_last(mode):
    """Block -2 of three gives what the model built without its last block gives, and the model stays whole."""
    torch.manual_seed(0)
    model = build_backbone(**VIT, mode=mode).eval()
    shorter = build_backbone(**{**VIT, "depth": 2}, mode=mode).eval()
    shorter.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("blocks.2")})
    with torch.no_grad():
        before = model(images())
        assert torch.equal(at_layer(model, -2)(images()), shorter(images()))
        assert torch.equal(at_layer(model, 1)(images()), shorter(images()))
        assert torch.equal(feature_function(model, "patches", 1)(images()), shorter.forward_dense(images())[1])
        assert torch.equal(model(images()), before)
        assert at_layer(model, -1) is model


def test_patches_of_an_official_vit_are_its_normed_tokens():
    """--tokens patches gives the tokens after [CLS] that get_intermediate_layers gives, block by block."""
    torch.manual_seed(0)
    model = build_backbone(**VIT).eval()
    with torch.no_grad():
        for n in (1, 2, 3):
            tokens = model.get_intermediate_layers(images(), n)[0][:, 1:]
            assert torch.allclose(feature_function(model, "patches", -n)(images()), tokens, atol=1e-6)


def test_stages_of_a_resnet_are_its_layers():
    """Layer 1 of a ResNet is its second stage: 128 channels on an eighth of the side; SimPool can't pool that width."""
    torch.manual_seed(0)
    model = build_backbone(arch="resnet18", img_size=64).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert feature_function(model, "patches", 1)(pixels).shape == (1, 64, 128)
        assert feature_function(model, "pooled", 1)(pixels).shape == (1, 128)
        assert feature_function(model, "pooled", -1)(pixels).shape == (1, 512)
    with pytest.raises(ValueError, match="can't pool an earlier one"):
        at_layer(build_backbone(arch="resnet18", mode="simpool", img_size=64), 1)


def test_timms_blocks_count_too():
    """A timm vision transformer has its blocks cut in the same way."""
    model = build_backbone(arch="vit_tiny_patch16_224", img_size=32).eval()
    with torch.no_grad():
        short, whole = (feature_function(model, "patches", n)(images()) for n in (3, -1))
    assert short.shape == whole.shape == (2, 4, 192)
    assert not torch.allclose(short, whole)


def test_layers_that_do_not_exist_are_named():
    """Outside the blocks, and for a model without a plain chain of them, the error says what there is."""
    with pytest.raises(ValueError, match="has 3 blocks, so give -3 to 2"):
        at_layer(build_backbone(**VIT), 3)
    with pytest.raises(ValueError, match="no plain chain"):
        at_layer(build_backbone(arch="convnext_tiny", img_size=32), -2)
