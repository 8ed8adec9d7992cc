"""build_backbone: every name of ours and a choice of timm's, in both modes; nothing asked for is ignored."""

import subprocess
import sys

import pytest
import torch

import backbones
from backbones import build_backbone, resolve_gamma, resolve_stem
from tests.reference import tensor

# tokens; tokens with several prefix tokens; a map; a channels-last map; a map whose norm is in the head
TIMM = {
    "test_vit": "tokens",
    "deit_tiny_distilled_patch16_224": "tokens",
    "vit_little_patch16_reg4_gap_256": "tokens",
    "test_resnet": "map",
    "resnet10t": "map",
    "swin_tiny_patch4_window7_224": "map",
    "convnext_atto": "map",
}


@pytest.mark.parametrize("mode", ["official", "simpool"])
@pytest.mark.parametrize("arch", backbones.available())
def test_every_model_of_ours(arch, mode):
    """Every name builds in both modes, in its shape, with SimPool where asked for and nowhere else."""
    with torch.device("meta"):
        model = build_backbone(arch, mode, patch_size=8, img_size=32).eval()
        features = model(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, model.num_features)
    assert any(key.startswith("simpool.") for key in model.state_dict()) == (mode == "simpool")
    assert model.mode == mode


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet18", "convnext_tiny"])
def test_real_forward_and_map(arch):
    """One model of each family trains a step from build_backbone's defaults and gives its map."""
    model, x = build_backbone(arch, "simpool", img_size=64), tensor(1, (2, 3, 64, 64))
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    attention = model.eval().get_attention_map(x)
    assert attention.shape[:2] == (2, 1)
    torch.testing.assert_close(attention.sum((1, 2, 3)), torch.ones(2))


@pytest.mark.parametrize(("arch", "kind"), TIMM.items())
def test_timm_simpool(arch, kind):
    """A timm model pooled by SimPool: patches only, the kind's gamma and beta, a norm after, gradients everywhere."""
    model = build_backbone(arch, "simpool", img_size=64)
    assert model.simpool.gamma == backbones.DEFAULT_GAMMA[kind] == resolve_gamma(arch, "auto")
    assert (model.simpool.beta is not None) == (kind == "tokens")
    x = tensor(1, (2, 3, 64, 64))
    feature = model(x)
    assert feature.shape == (2, model.num_features)
    feature.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.requires_grad and p.grad is None for p in model.parameters())
    grid = (4, 4) if kind == "tokens" else (2, 2)
    assert model.eval().get_attention_map(x).shape == (2, 1, *grid)


def test_timm_pooling_stands_between_body_and_norm():
    """SimPool sees the tokens before timm's final norm, and that norm follows it."""
    model, x = build_backbone("test_vit", "simpool", img_size=64).eval(), tensor(1, (2, 3, 64, 64))
    body = model.body
    tokens = body.blocks(body.norm_pre(body.patch_drop(body._pos_embed(body.patch_embed(x)))))
    torch.testing.assert_close(model.forward_features(x), tokens[:, body.num_prefix_tokens :])
    torch.testing.assert_close(model(x), model.norm(model.simpool(tokens[:, body.num_prefix_tokens :])))
    assert isinstance(model.norm, torch.nn.LayerNorm)


@pytest.mark.parametrize("arch", ["test_vit", "convnext_atto", "resnet10t"])
def test_timm_official_keeps_its_own_pooling(arch):
    """In official mode the feature is timm's own, and there is no map to show."""
    timm = pytest.importorskip("timm")
    model, x = build_backbone(arch, img_size=64).eval(), tensor(1, (2, 3, 64, 64))
    theirs = timm.create_model(arch, num_classes=0, **({"img_size": 64} if "vit" in arch else {})).eval()
    theirs.load_state_dict(model.body.state_dict(), strict=True)
    torch.testing.assert_close(model(x), theirs(x))
    assert model.num_features == model(x).shape[1]
    with pytest.raises(ValueError, match="simpool"):
        model.get_attention_map(x)


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_timm_takes_crops_of_several_sizes(mode):
    """A timm ViT takes local crops of another size than its own, as multi-crop training needs."""
    model = build_backbone("test_vit", mode, img_size=64).eval()
    assert model(tensor(1, (1, 3, 32, 32))).shape == (1, model.num_features)


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet18", "convnext_tiny", "test_vit", "test_resnet"])
@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_channels_and_classes(arch, mode):
    """in_chans and num_classes reach every kind of model."""
    model = build_backbone(arch, mode, in_chans=1, num_classes=5, img_size=32).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


def test_aliases_and_overrides():
    """deit_* are vit_*, and a ViT's width, depth, heads, patches and positions can be set."""
    with torch.device("meta"):
        names = [{k: v.shape for k, v in build_backbone(a).state_dict().items()} for a in ("deit_small", "vit_small")]
        model = build_backbone("vit_tiny", "simpool", patch_size=4, img_size=(16, 32), embed_dim=24, depth=2,
                               num_heads=2, pos_embed_policy="reference", value_min="batch", gamma=None)  # fmt: skip
    assert names[0] == names[1]
    assert model.pos_embed.shape == (1, 32, 24)
    assert (len(model.blocks), model.blocks[0].attn.num_heads) == (2, 2)
    assert (model.pos_embed_policy, model.simpool.value_min, model.simpool.gamma) == ("reference", "batch", None)


@pytest.mark.parametrize("arch", ["vit_tiny", "convnext_tiny", "test_vit", "test_convnext"])
def test_drop_path_reaches_the_blocks(arch):
    """drop_path_rate is the last block's rate in ours and in timm's."""
    model = build_backbone(arch, drop_path_rate=0.3, img_size=32)
    assert max(getattr(m, "drop_prob", 0.0) for m in model.modules()) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arch", "gamma", "resolved"),
    [("vit_small", "auto", 1.25), ("deit_tiny", "auto", 1.25), ("resnet50", "auto", 2.0),
     ("convnext_base", "auto", 2.0), ("vit_small", None, None), ("vit_small", "None", None),
     ("resnet18", "1.5", 1.5), ("test_vit", 3, 3.0)],
)  # fmt: skip
def test_resolve_gamma(arch, gamma, resolved):
    """auto is the family's exponent, a number itself, None and its spelling none."""
    assert resolve_gamma(arch, gamma) == resolved


@pytest.mark.parametrize(
    ("arch", "stem", "size", "resolved"),
    [
        ("resnet18", "auto", 63, "small"), ("resnet18", "auto", 64, "standard"),
        ("resnet50", "auto", (32, 96), "small"), ("resnet18", "standard", 32, "standard"),
        ("resnet18", "small", 224, "small"), ("vit_tiny", "auto", 32, "standard"),
        ("convnext_tiny", "auto", 32, "standard"), ("vit_tiny", "standard", 32, "standard"),
        ("resnet10t", "auto", 32, "small"), ("vgg11", "auto", 32, "standard"), ("test_vit", "auto", 32, "standard"),
        ("efficientnet_b0", "auto", 32, "small"), ("convnext_atto", "auto", 32, "standard"),
    ],
)  # fmt: skip
def test_resolve_stem(arch, stem, size, resolved):
    """auto is small below 64 pixels for convolutional networks whose stem can be; what was chosen stays."""
    assert resolve_stem(arch, stem, size) == resolved


@pytest.mark.parametrize(
    ("arch", "stem", "message"),
    [
        ("vit_tiny", "small", "vit_tiny has no stem .*: leave stem out, or choose a smaller patch_size"),
        ("convnext_tiny", "small", "convnext_tiny has no stem .*: leave stem out$"),
        ("resnet18", "large", "unknown stem 'large'; choose standard, small or auto"),
    ],
)
def test_stems_that_cannot_be(arch, stem, message):
    """Patches have no stem, and there are only two."""
    with pytest.raises(ValueError, match=message):
        build_backbone(arch, img_size=32, stem=stem)


def test_the_builders_stem_is_the_standard_one():
    """Who does not ask gets the published model at any size, as before there was a choice; auto looks at the size."""
    sizes = {
        stem: build_backbone("resnet18", img_size=32, stem=stem).conv1.kernel_size for stem in ("auto", "standard")
    }
    assert sizes == {"auto": (3, 3), "standard": (7, 7)}
    assert build_backbone("resnet18", img_size=32).conv1.kernel_size == (7, 7)


@pytest.mark.parametrize(
    ("arch", "near"), [("vit_smal", "vit_small"), ("resnet51", "resnet50"), ("convnext_attto", "convnext_atto")]
)
def test_unknown_name_lists_near_ones(arch, near):
    """An unknown name is a ValueError with near matches, ours and timm's."""
    with pytest.raises(ValueError, match=f"unknown architecture '{arch}'; did you mean .*{near}"):
        build_backbone(arch)


@pytest.mark.parametrize("arch", ["hf-hub:timm/vit_tiny", "zzzzzzzz", "main_dino", ""])
def test_no_name_reaches_the_network(arch):
    """Hub addresses and names near to nothing are refused."""
    with pytest.raises(ValueError, match="unknown architecture"):
        build_backbone(arch)


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("vit_tiny", {"mode": "gep"}, "unknown mode 'gep'"),
        ("test_vit", {"mode": "gep"}, "unknown mode 'gep'"),
        ("vit_tiny", {"gamma": "big"}, "gamma 'big'"),
        ("vit_tiny", {"mode": "simpool", "gamma": -1.0}, "gamma .* -1.0"),
        ("vit_tiny", {"img_size": 30}, "30x30"),
        ("convnext_tiny", {"img_size": 16}, "img_size 16 is too small"),
        ("resnet18", {"drop_path_rate": 0.1}, "drop_path_rate 0.1"),
        ("resnet18", {"depth": 3}, "depth 3"),
        ("densenet121", {"drop_path_rate": 0.1}, "drop_path_rate 0.1"),
        ("resnet10t", {"num_heads": 3}, "num_heads 3"),
        ("test_vit", {"patch_size": 8}, "patch_size 8"),
        ("efficientformer_l1", {"img_size": 96, "mode": "simpool"}, "96x96"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(arch, settings, message):
    """A setting that the architecture can't honour is a ValueError with its value."""
    with pytest.raises(ValueError, match=message):
        build_backbone(arch, **settings)


def test_our_names_need_neither_timm_nor_torchvision():
    """Building one of ours imports neither timm nor torchvision."""
    code = (
        "import sys, backbones; backbones.build_backbone('vit_tiny', 'simpool'); "
        "sys.exit(any(m in sys.modules for m in ('timm', 'torchvision', 'utils', 'data', 'runtime')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=backbones.__file__.rpartition("/")[0]).returncode == 0


def test_timm_models_refuse_masks():
    """timm's models do not mask patches; ours say so on their behalf."""
    pytest.importorskip("timm")
    model = build_backbone("resnet10t", mode="simpool", img_size=64)
    with pytest.raises(ValueError, match=r"resnet10t takes no mask.*vit_small"):
        model.forward_features(torch.zeros(1, 3, 64, 64), torch.ones(1, 2, 2, dtype=torch.bool))


@pytest.mark.parametrize("mode", ["official", "simpool"])
@pytest.mark.parametrize("arch", TIMM)
def test_timm_dense_features(arch, mode):
    """One pass gives forward's feature, the patches after the final norm, and SimPool's map; masks are refused."""
    model, x = build_backbone(arch, mode, img_size=64).eval(), tensor(1, (2, 3, 64, 64))
    pooled, patches, attention = model.forward_dense(x)
    torch.testing.assert_close(pooled, model(x))
    assert patches.shape == (2, 16 if TIMM[arch] == "tokens" else 4, patches.shape[-1])
    assert (attention is None) == (mode == "official")
    if mode == "simpool":
        torch.testing.assert_close(attention, model.get_attention_map(x).flatten(2))
    if "resnet" not in arch:  # no final norm
        torch.testing.assert_close(patches.mean(-1), torch.zeros(patches.shape[:2]), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="takes no mask"):
        model.forward_dense(x, torch.ones(2, 4, 4, dtype=torch.bool))


def test_timm_dense_features_are_those_before_the_classifier():
    """A classifier does not change what forward_dense returns, in either mode."""
    x = tensor(1, (1, 3, 64, 64))
    for mode in ("official", "simpool"):
        for arch in ("test_vit", "resnet10t"):
            model = build_backbone(arch, mode, img_size=64, num_classes=5).eval()
            assert model(x).shape == (1, 5)
            assert model.forward_dense(x)[0].shape == (1, model.num_features)


def test_masks_only_for_our_vits():
    """masked_im_modeling reaches a ViT of ours; any other architecture refuses it by name."""
    assert build_backbone("deit_tiny", masked_im_modeling=True).masked_embed.shape == (1, 192)
    assert not hasattr(build_backbone("vit_tiny"), "masked_embed")
    for arch in ("resnet18", "convnext_tiny", "test_vit"):
        with pytest.raises(ValueError, match=f"{arch} takes no mask of patches.*vit_tiny, vit_small, vit_base"):
            build_backbone(arch, masked_im_modeling=True)
