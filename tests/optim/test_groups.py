"""Which parameters are regularised."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import backbones
from optim.groups import get_params_groups, layered_groups, layers_of


def test_groups():
    """Biases and 1-D parameters get no weight decay; everything else does; frozen ones are left out."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(False)
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 2, 3)))
    regularised, rest = get_params_groups(model)
    assert [p.shape for p in regularised["params"]] == [(1, 2, 3)]
    assert len(rest["params"]) == 3
    assert rest["weight_decay"] == 0.0


class Classifier(nn.Module):
    """A backbone and a head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.num_features, 3)


VIT = {"patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2}


def test_layered_groups_without_layer_decay_are_timms():
    """Biases, 1-D parameters, positions and tokens get no weight decay, as in timm's factory; one rate for all."""
    model = Classifier(backbones.build_backbone("vit_small", **VIT))
    decayed, plain = layered_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("lr_scale" not in group for group in (decayed, plain))
    assert ("weight_decay" in decayed, plain["weight_decay"]) == (False, 0.0)
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight"}
    assert {"backbone.pos_embed", "backbone.cls_token", "backbone.norm.weight"} <= {
        names[id(p)] for p in plain["params"]
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_rates_fall_by_a_factor_per_block():
    """Embeddings first, then each block, then norm, pooling and head with the whole rate."""
    model = Classifier(backbones.build_backbone("vit_small", "simpool", **VIT))
    groups = layered_groups(nn.ModuleDict({"module": model}), layer_decay=0.5)  # named as DistributedDataParallel does
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    found = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert {found["backbone.pos_embed"], found["backbone.patch_embed.proj.weight"]} == {0.5**4}
    assert [found[f"backbone.blocks.{i}.attn.qkv.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert {found[n] for n in ("backbone.norm.weight", "backbone.simpool.wq.weight", "head.weight")} == {1.0}


@pytest.mark.parametrize(
    ("arch", "first", "last", "layers"),
    [
        ("resnet18", ["conv1.weight", "bn1.bias"], [], 8 + 1),
        ("convnext_tiny", ["downsample_layers.0.0.weight"], ["norm.weight"], 18 + 2),
        ("swin_tiny_patch4_window7_224", ["body.patch_embed.proj.weight"], [], None),
    ],
)
def test_layers_of_every_family(arch, first, last, layers):
    """Stem, blocks in their order across stages, the rest; ConvNeXt's downsampling goes with the block after it."""
    with torch.device("meta") if not arch.startswith("swin") else torch.device("cpu"):
        names = [name for name, _ in backbones.build_backbone(arch).named_parameters()]
    found = layers_of(names)
    order = [found[name] for name in names if "downsample_layers" not in name]
    assert order == sorted(order)
    assert all(found[name] == 0 for name in first)
    assert all(found[name] == max(found.values()) for name in last)
    if layers is not None:
        assert set(found.values()) == set(range(layers))
    if arch == "convnext_tiny":
        assert found["downsample_layers.2.1.weight"] == found["stages.2.0.dwconv.weight"]
