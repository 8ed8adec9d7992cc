"""timm_models: what timm's users do with a model works with each of ours."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.models import group_parameters, is_model, list_models
from timm.optim import create_optimizer_v2

import backbones
import timm_models
from tests.small_images import tiny_checkpoint

NAMES = sorted(list_models(module="timm_models"))
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
QUICK = {"simpool_vit_tiny_patch16_224": TINY, "simpool_resnet18": {}, "simpool_convnext_tiny": {"pool_depth": 2}}
SMALLEST = (*QUICK, "simpool_vit_small_patch16_224", "simpool_vit_tiny_patch8_224", "simpool_resnet50")
SIZE = 64


def family_of(name: str) -> str:
    return name.split("_")[1].rstrip("0123456789")


def create(name: str, **settings) -> torch.nn.Module:
    """A model in eval mode; quick ones are small."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**QUICK.get(name, {}), **settings}).eval()


@pytest.fixture(scope="module")
def photographs(imagenet_sample) -> torch.Tensor:
    """Two real photographs, (2, 3, 64, 64)."""
    from PIL import Image

    from evaluation.models import load_checkpoint_model

    loaded = load_checkpoint_model("", arch="resnet18", img_size=SIZE)
    return torch.cat([loaded.preprocess(Image.open(path)) for path in sorted(imagenet_sample.iterdir())[:2]])


def test_every_backbone_has_a_name():
    """ViTs with patches of 16 and 8, each ResNet and each ConvNeXt; none hides a model of timm's own."""
    assert len(NAMES) == 2 * 3 + 5 + 5
    for arch in backbones.available():
        assert is_model(f"simpool_{arch}_patch16_224" if arch.startswith("vit") else f"simpool_{arch}")


@pytest.mark.parametrize(
    "name", [name if name in SMALLEST else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_the_configuration_is_the_models(name):
    """pretrained_cfg names layers that are there, and the model gives what it says of itself."""
    with torch.device("meta"):
        model = timm.create_model(name)
        cfg, state = model.pretrained_cfg, model.state_dict()
        assert cfg["architecture"] == name
        assert state[f"{cfg['classifier']}.weight"].shape == (cfg["num_classes"], model.num_features)
        assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0]
        x = torch.zeros(2, *cfg["input_size"])
        assert model(x).shape == (2, 1000)
        features = model.forward_features(x)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
        if cfg.get("pool_size"):
            assert features.shape[-2:] == cfg["pool_size"]
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", QUICK)
def test_the_classifier_can_be_replaced_and_removed(name, photographs):
    """reset_classifier and num_classes=0 agree; without pooling the last features come out as they are."""
    model = create(name, num_classes=7)
    with torch.no_grad():
        assert model(photographs).shape == (2, 7)
        feature = model.forward_head(model.forward_features(photographs), pre_logits=True)
        assert torch.equal(model(photographs), model.get_classifier()(feature))
        model.reset_classifier(3)
        assert (model.num_classes, model.get_classifier().out_features) == (3, 3)
        assert model(photographs).shape == (2, 3)
        model.reset_classifier(0)
        assert torch.equal(model(photographs), feature)
        bare = create(name, num_classes=0)
        bare.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(bare(photographs), feature)
        model.reset_classifier(0, "")
        assert torch.equal(model(photographs), model.forward_features(photographs))
    for wrong in (lambda: model.reset_classifier(0, "avg"), lambda: model.reset_classifier(5, "")):
        with pytest.raises(ValueError, match="pool"):
            wrong()


@pytest.mark.parametrize("name", QUICK)
def test_intermediate_features(name, photographs):
    """They have the widths and strides of feature_info, and the last features are forward_features' own."""
    model = create(name)
    with torch.no_grad():
        last, found = model.forward_intermediates(photographs)
        assert torch.equal(last, model.forward_features(photographs))
        for feature, info in zip(found, model.feature_info, strict=True):
            assert feature.shape == (2, info["num_chs"], SIZE // info["reduction"], SIZE // info["reduction"])
            assert info["module"] in dict(model.named_modules())
        early, two = model.forward_intermediates(photographs, indices=[0, -2], stop_early=True)
        assert len(two) == 2
        assert torch.equal(two[0], found[0])
        assert torch.equal(two[1], found[-2])
        assert early.numel() == two[1].numel()
        (normed,) = model.forward_intermediates(photographs, indices=1, norm=True, intermediates_only=True)
        if family_of(name) == "resnet":
            assert torch.equal(normed, found[-1])
        else:
            expected = model.norm(found[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            assert torch.allclose(normed, expected, atol=1e-6)
        if family_of(name) == "vit":
            tokens = model.forward_intermediates(photographs, 1, output_fmt="NLC", intermediates_only=True)[0]
            assert torch.equal(tokens, last)
    for wrong in ({"indices": 99}, {"indices": [-9]}, {"output_fmt": "NHWC"}):
        with pytest.raises(ValueError, match=r"intermediate features|output_fmt"):
            model.forward_intermediates(photographs, **wrong)


def test_strides_of_a_small_stem(photographs):
    """feature_info tells those of the model that was built, not those of its name."""
    model = create("simpool_resnet18", stem="small", features_only=True)
    with torch.no_grad():
        sizes = [feature.shape[-1] for feature in model(photographs)]
    assert sizes == [SIZE // stride for stride in model.feature_info.reduction()] == [64, 64, 32, 16, 8]


@pytest.mark.parametrize("name", QUICK)
def test_features_only(name, photographs):
    """timm's wrapper gives the same features, with what follows the last one removed."""
    model = create(name)
    every = range(len(model.feature_info))
    for indices in (tuple(every), (0, 1)):
        wrapped = create(name, features_only=True, out_indices=indices)
        state = model.state_dict()
        wrapped.model.load_state_dict({key: state[key] for key in wrapped.model.state_dict()})
        with torch.no_grad():
            found = wrapped(photographs)
            expected = model.forward_intermediates(photographs, indices, intermediates_only=True)
        assert [f.shape[1] for f in found] == wrapped.feature_info.channels()
        assert [SIZE // f.shape[2] for f in found] == wrapped.feature_info.reduction()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        names = set(wrapped.model.state_dict())
        assert not any(key.startswith(("simpool.", model.classifier_name)) for key in names)
    assert len(names) < len(state) / 2 + 5  # two of three or more parts


@pytest.mark.parametrize("name", QUICK)
def test_training(name, photographs):
    """Every parameter gets a gradient, the same with checkpointing; weight decay and layer decay find their groups."""
    model, gradients = create(name, num_classes=5), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(photographs).square().mean().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})  # fails if one has none
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][key], atol=1e-6), key
    kept = {key for key, p in model.named_parameters() if p.ndim > 1} - model.no_weight_decay()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for key, p in model.named_parameters() if key in kept}
    assert ("pos_embed" in dict(model.named_parameters())) == (model.no_weight_decay() == {"pos_embed"})
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert set(groups) == {key for key, _ in model.named_parameters()}
        classifier = groups[f"{model.classifier_name}.weight"]
        first = groups[f"{model.pretrained_cfg['first_conv']}.weight"]
        assert first == min(groups.values()) < classifier == max(groups.values())
        assert groups["simpool.wq.weight"] > first


@pytest.mark.parametrize("name", ["simpool_vit_tiny_patch16_224", "simpool_resnet18"])
def test_copies(name, photographs):
    """A model is copied and pickled with its weights and its interface."""
    model = create(name)
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(photographs), model(photographs))
            assert isinstance(other, timm_models.TimmInterface)


def test_a_checkpoints_settings_are_keywords(tmp_path, photographs):
    """build_backbone's keywords are taken, and what it refuses is refused; our file's weights are read strictly."""
    from portable import load

    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    torch.save(load(checkpoint).state_dict(), tmp_path / "weights.pth")
    path = str(tmp_path / "weights.pth")
    model = create("simpool_vit_small_patch8_224", checkpoint_path=path, num_classes=0, **TINY)
    with torch.no_grad():
        images = photographs[..., :32, :32]
        assert torch.equal(model(images), load(checkpoint)(images))
    assert create("simpool_resnet18", gamma="none", in_chans=1).simpool.gamma is None
    with pytest.raises(ValueError, match="stochastic depth"):
        create("simpool_resnet18", drop_path_rate=0.1)
    with pytest.raises(ValueError, match="global_pool 'avg'"):
        create("simpool_resnet18", global_pool="avg")
