"""Any pooling on any backbone: widths, norms, maps, depth, initial weights; and what a mode refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from backbones import build_backbone
from convnext_simpool import ConvNeXt
from pooled_backbone import MODES, check_pooling, fewer_blocks
from poolings.base import WITH_ATTENTION
from poolings.choose import POOLINGS, build_pooling
from resnet_simpool import BasicBlock, ResNet
from tests.reference import tensor

SETTINGS = {"how": {"width": 24}, "kmeans": {"k": 2}, "slot": {"eval_seed": 1}}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": (32, 48)}
MODELS = {
    "vit": lambda mode, **settings: build_backbone("vit_small", mode, **{**VIT, **settings}),
    "resnet": lambda mode, **settings: ResNet(BasicBlock, (1, 1, 1, 2), mode, num_classes=0, **settings),
    "convnext": lambda mode, **settings: ConvNeXt((1, 1, 2, 2), (8, 12, 16, 24), mode, num_classes=0, **settings),
    "test_vit": lambda mode, **settings: build_backbone("test_vit", mode, img_size=64, **settings),
    "test_convnext": lambda mode, **settings: build_backbone("test_convnext", mode, img_size=64, **settings),
}
WIDTH = {"vit": 32, "resnet": 512, "convnext": 24, "test_vit": 64, "test_convnext": 64}
GRID = {"vit": (4, 6), "resnet": (2, 3), "convnext": (2, 3), "test_vit": (4, 4), "test_convnext": (2, 2)}
PATCH = {"vit": 8, "test_vit": 16}


def built(arch: str, mode: str, **settings) -> nn.Module:
    return MODELS[arch](mode, **{"pooling_args": SETTINGS.get(mode), **settings})


def images(arch: str, batch: int = 2) -> torch.Tensor:
    return tensor(1, (batch, 3, *(side * PATCH.get(arch, 32) for side in GRID[arch])))


def test_a_mode_is_official_or_an_operator():
    """Every operator is a mode, and the architecture's own pooling is one."""
    assert ("official", *POOLINGS) == MODES


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("arch", MODELS)
def test_every_pooling_trains_on_every_backbone(arch, mode):
    """Grids that are not square, crops of several sizes: a feature of the stated width, gradients everywhere."""
    model, x = built(arch, mode), images(arch)
    feature = model(x)
    assert feature.shape == (2, model.num_features)
    assert model.num_features == (
        24 if mode == "how" else model.forward_features(x[:1]).shape[1 if "vit" not in arch else 2]
    )
    feature.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    kinds = {name.split(".")[0] for name in model.state_dict()}
    assert ("simpool" in kinds) == (mode == "simpool")
    assert ("pool" in kinds) == (mode not in ("simpool", "gap", "max", "avgmax", "kmeans"))
    if arch == "vit":
        assert model(tensor(2, (2, 3, 16, 24))).shape == feature.shape
        assert model.num_prefix_tokens == 0
        assert "cls_token" not in model.state_dict()


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("arch", ["vit", "convnext", "resnet", "test_convnext"])
def test_the_feature_is_operator_and_norm_in_the_order_of_pool_position(arch, mode, position):
    """forward is norm(operator(tokens)) or operator(norm(tokens)); a result of another width has its own norm."""
    model, x = built(arch, mode, pool_position=position).eval(), images(arch)
    features = model.forward_features(x)
    tokens = features if features.ndim == 3 else features.flatten(2).transpose(1, 2)
    grid = {"grid": GRID[arch]}
    operator = model.simpool if mode == "simpool" else model.pool
    norm = model.norm
    if "2d" in type(norm).__name__.lower():
        norm = nn.LayerNorm(norm.weight.shape, eps=norm.eps)
        norm.load_state_dict(model.norm.state_dict())
    with torch.no_grad():
        wanted = norm(operator(tokens, **grid)) if position == "before" else operator(norm(tokens), **grid)
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    if arch != "resnet":
        assert norm.weight.shape == (model.num_features if position == "before" else tokens.shape[-1],)


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("arch", ["vit", "resnet", "test_vit"])
def test_maps_of_operators(arch, mode):
    """get_attention_map and forward_dense give the operator's weights on the grid; an operator without any says so."""
    model, x = built(arch, mode).eval(), images(arch)
    feature, positions, attention = model.forward_dense(x)
    torch.testing.assert_close(feature, model(x))
    grid = GRID[arch]
    assert positions.shape[:2] == (2, grid[0] * grid[1])
    assert model.has_attention_map == (mode in WITH_ATTENTION)
    if mode in WITH_ATTENTION:
        maps = model.get_attention_map(x)
        assert maps.shape[0] == 2
        assert maps.shape[2:] == grid
        torch.testing.assert_close(maps.flatten(2), attention)
    else:
        assert attention is None
        with pytest.raises(ValueError, match=f'"{mode}" has no attention map; build it with mode="simpool"'):
            model.get_attention_map(x)


@pytest.mark.parametrize("arch", ["vit", "resnet", "convnext", "test_vit"])
def test_only_our_vits_have_a_map_of_their_own(arch):
    """In official mode [CLS] attends in our ViT; no other architecture's own pooling weighs positions."""
    model = built(arch, "official").eval()
    assert model.has_attention_map == (arch == "vit")
    if model.has_attention_map:
        assert model.get_attention_map(images(arch)).shape[2:] == GRID[arch]
    else:
        with pytest.raises(ValueError, match="no attention map"):
            model.get_attention_map(images(arch))


@pytest.mark.parametrize("arch", ["vit", "resnet", "convnext"])
def test_operators_keep_their_own_initial_weights(arch):
    """In a backbone an operator starts as it does alone: the backbone's initialisation does not touch it."""
    for mode in ("cls", "se", "how", "slot"):
        torch.manual_seed(5)
        model = built(arch, mode)
        inside = {name: (p.mean().item(), p.std().item()) for name, p in model.pool.named_parameters() if p.numel() > 9}
        alone = build_pooling(mode, WIDTH[arch], **SETTINGS.get(mode, {}))
        for name, p in alone.named_parameters():
            if p.numel() > 9:  # means and deviations of as many draws from one distribution
                mean, std = inside[name]
                assert abs(mean - p.mean().item()) <= 6 * max(std, p.std().item()) / p.numel() ** 0.5 + 1e-9, name
                assert std == pytest.approx(p.std().item(), rel=0.5 if p.numel() < 2000 else 0.1, abs=1e-9), name


@pytest.mark.parametrize(
    ("arch", "n", "blocks"),
    [("vit", 1, "blocks.1."), ("resnet", 1, "layer4.1."), ("convnext", 1, "stages.3.1."), ("test_vit", 2, "blocks.4.")],
)  # fmt: skip
def test_pool_depth_leaves_the_last_blocks_out(arch, n, blocks):
    """n blocks fewer, not built, in every mode; what remains is the same; none may be left."""
    for mode in ("official", "simpool", "gem"):
        whole, cut = (built(arch, mode, pool_depth=depth) for depth in (0, n))
        names = {name for name in whole.state_dict() if blocks in name}
        assert names
        assert not names & set(cut.state_dict())
        assert {name: p.shape for name, p in cut.state_dict().items()}.items() <= {
            name: p.shape for name, p in whole.state_dict().items()
        }.items()
        assert cut(images(arch)).shape == (2, cut.num_features)
    with pytest.raises(ValueError, match=r"pool_depth 99.* give 0 to"):
        built(arch, "simpool", pool_depth=99)


def test_models_without_a_chain_of_blocks_refuse_pool_depth():
    """A timm ResNet has no blocks to leave out."""
    with pytest.raises(ValueError, match=r"resnet10t \(timm\) has no plain chain of blocks: pool_depth 1"):
        build_backbone("resnet10t", "simpool", pool_depth=1, img_size=64)


def test_beta_belongs_to_tokens_pooled_before_the_norm():
    """As published: the self-supervised ViT has one, the supervised one (after the norm) and maps have none."""
    for arch, position, beta in (("vit", "before", True), ("vit", "after", False),
                                 ("resnet", "before", False), ("test_vit", "before", True)):  # fmt: skip
        model = built(arch, "simpool", pool_position=position)
        assert (model.simpool.beta is not None) == beta
        assert model.pooling_config["use_beta"] == beta
    assert built("vit", "simpool", pool_position="after", use_beta=True).simpool.beta is not None
    assert built("vit", "simpool", use_beta=False).simpool.beta is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", ["vit", "convnext"])
def test_pooling_config_builds_the_model_again(arch, mode):
    """What a checkpoint records is enough, with the shape, to build the same names and shapes."""
    model = built(arch, mode, pool_position="before" if mode == "official" else "after", gamma="auto")
    again = MODELS[arch](mode, **copy.deepcopy(model.pooling_config))
    shapes, wanted = ([(name, p.shape) for name, p in m.state_dict().items()] for m in (again, model))
    assert shapes == wanted
    assert ("gamma" in model.pooling_config) == (mode == "simpool")


@pytest.mark.parametrize(
    ("mode", "settings", "message"),
    [
        ("gme", {}, "unknown mode 'gme'; choose one of official, gap"),
        ("gem", {"gamma": 2.0}, "gem has no gamma, got 2.0"),
        ("gem", {"pooling_args": {"pp": 2}}, r"gem has no setting 'pp' \(did you mean p\?\); it has p, learn"),
        ("gem", {"pooling_args": {"dim": 2}}, "gem has no setting 'dim'"),
        ("gem", {"pooling_args": {"p": -1}}, "p must be a positive number, got -1"),
        ("gap", {"use_beta": True}, "use_beta is a setting of simpool"),
        ("official", {"pooling_args": {"p": 2}}, "p=2: the architecture's own pooling"),
        ("official", {"pool_position": "after"}, "pool_position after: the architecture's own pooling"),
        ("simpool", {"pooling_args": {"gamma": 2}}, "simpool's gamma is set by gamma itself"),
        ("simpool", {"pooling_args": {"beta": 2}}, "simpool has no setting 'beta'"),
        ("gap", {"pool_position": "behind"}, "unknown pool_position 'behind'; choose before or after"),
        ("cls", {"pooling_args": {"heads": 5}}, "width 32 is not divisible into 5 heads"),
        ("gap", {"pool_depth": -1}, "pool_depth -1"),
        ("gap", {"pool_depth": True}, "pool_depth True"),
        ("gap", {"drop_rate": 2.0}, "dropout"),
    ],
)  # fmt: skip
def test_what_the_pooling_does_not_have_is_refused(mode, settings, message):
    """Unknown modes and settings, and those of another mode, are ValueErrors with the value."""
    with pytest.raises(ValueError, match=message):
        build_backbone("vit_small", mode, **{**VIT, **settings})
    if mode == "official" or ("pooling_args" in settings and mode != "cls"):
        with pytest.raises(ValueError, match=message):
            build_backbone("resnet18", mode, **settings)


def test_tokens_of_another_width_than_the_norm():
    """Behind how, whose norm is as wide as its result, tokens stay un-normed; before it they have the norm's width."""
    x = images("vit")
    before, after = (built("vit", "how", pool_position=p).eval() for p in ("before", "after"))
    assert torch.equal(before.forward_dense(x)[1], before.forward_features(x))
    assert torch.equal(after.forward_dense(x)[1], after.norm(after.forward_features(x)))
    assert after.get_intermediate_layers(x, 1)[0].shape == (2, 24, 32)
    with pytest.raises(ValueError, match='the tokens are 32 wide, and the final norm of mode "how" is 24'):
        before.get_intermediate_layers(x, 1)


def test_an_operator_of_another_width_than_it_said_is_named():
    """cbam's flattened map has the width of one image size; another one is refused in words."""
    model = built("vit", "cbam", pooling_args={"flatten": True})
    with pytest.raises(ValueError, match=r"cbam makes 768 numbers of images of 32x48, .* 1568; set pooling_args"):
        model(images("vit"))
    assert built("vit", "cbam", pooling_args={"flatten": True, "map_size": (4, 6)})(images("vit")).shape == (2, 768)


def test_fewer_blocks():
    """At least one block stays."""
    assert [fewer_blocks(3, n) for n in (0, 1, 2)] == [3, 2, 1]
    for bad in (3, -1, 1.0):
        with pytest.raises(ValueError, match="give 0 to 2"):
            fewer_blocks(3, bad)


def test_check_pooling_accepts_what_build_takes():
    """No mode is refused with its own settings."""
    for mode in MODES:
        check_pooling(mode, None, "before", SETTINGS.get(mode, {}))
