"""From a checkpoint to a model: every published format, and the flags that must agree with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import backbones
import vision_transformer as vits
from backbones import MODES
from evaluation import models
from runtime.checkpoint import save_checkpoint
from runtime.guards import InputError
from tests.reference import reference_checkpoint_path

TINY_VIT = {"arch": "vit_small", "patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}


def reference_vit() -> nn.Module:
    return vits.VisionTransformer(img_size=[64], patch_size=8, embed_dim=48, depth=2, num_heads=3, qkv_bias=True)


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_the_reference_checkpoint_loads(key, capsys):
    """Teacher and student of the published format load strictly, and differ from each other and from random."""
    model = reference_vit()
    before = model.blocks[0].attn.qkv.weight.detach().clone()
    models.load_pretrained_weights(model, reference_checkpoint_path(), key, "vit_small", 8)
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before)
    assert f"loaded {key}" in capsys.readouterr().out


def test_the_reference_checkpoint_builds_its_model():
    """Width, depth, patch and image size come from the weights; heads that no shape tells must be given."""
    loaded = models.load_checkpoint_model(reference_checkpoint_path(), num_heads=3)
    assert loaded.config["embed_dim"] == 48
    assert (loaded.config["patch_size"], loaded.config["img_size"], loaded.config["depth"]) == (8, 64, 2)
    assert loaded.model(torch.zeros(2, 3, 64, 64)).shape == (2, 48)
    assert loaded.epoch == 7
    assert not loaded.model.training


def test_a_missing_key_lists_those_there():
    """A checkpoint key that is not there is an error with the choices."""
    with pytest.raises(InputError, match=r"can be: student, teacher"):
        models.load_checkpoint_model(reference_checkpoint_path(), checkpoint_key="momentum")


def saved(tmp_path: Path, model: nn.Module, wrap) -> Path:
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(wrap(model.state_dict()), path)
    return path


def prefixed(prefix: str):
    return lambda state: {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s},
        lambda s: {"model": s},
        lambda s: {"teacher": prefixed("backbone.")(s)},
        lambda s: {"teacher": prefixed("module.backbone.")(s) | {"module.head.mlp.0.weight": torch.zeros(1)}},
        lambda s: {"teacher": prefixed("backbone.")(s), "ibot_loss": {"center": torch.zeros(1)}},
        lambda s: {"teacher": prefixed("backbone.")(s) | {"backbone.masked_embed": torch.zeros(1, 24),
                                                          "head.last_layer2.weight_g": torch.zeros(1)}},
    ],
    ids=["flat", "state_dict", "model", "full", "ddp", "ibot", "attmask"],
)  # fmt: skip
@pytest.mark.parametrize("arch", ["vit", "resnet", "convnext"])
def test_every_published_format(tmp_path, wrap, arch):
    """All formats of SPEC give the same features as the model that was saved, architecture told by the weights."""
    config = {"vit": TINY_VIT, "resnet": {"arch": "resnet18"}, "convnext": {"arch": "convnext_tiny"}}[arch]
    model = backbones.build_backbone(**config, mode="simpool").eval()
    flags = {"num_heads": 2, "pos_embed_policy": "exact"} if arch == "vit" else {}
    loaded = models.load_checkpoint_model(saved(tmp_path, model, wrap), **flags)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.model(x), model(x))
    assert loaded.config["mode"] == "simpool"
    assert loaded.config["gamma"] == (1.25 if arch == "vit" else 2.0)


def test_older_simpool_names(tmp_path):
    """Files with norm_patches, attn.wq and norm_output at the top level load; `attn.` inside blocks is untouched."""
    model = backbones.build_backbone(**TINY_VIT, mode="simpool").eval()

    def old(state):
        renamed = {}
        for name, value in state.items():
            name = name.replace("simpool.norm_patches", "norm_patches").replace("simpool.", "attn.")
            renamed["norm_output" + name[4:] if name.startswith("norm.") else name] = value
        return renamed

    path = saved(tmp_path, model, old)
    loaded = models.load_checkpoint_model(path, num_heads=2, pos_embed_policy="exact")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded.model(x), model(x))


def test_published_files_mean_the_published_positions(tmp_path):
    """A SimPool ViT without our configuration is read with the reference's position policy; a flag overrides."""
    model = backbones.build_backbone(**TINY_VIT, mode="simpool")
    path = saved(tmp_path, model, lambda s: s)
    assert models.load_checkpoint_model(path, num_heads=2).config["pos_embed_policy"] == "reference"
    flag = models.load_checkpoint_model(path, num_heads=2, pos_embed_policy="exact")
    assert flag.config["pos_embed_policy"] == "exact"


def test_gamma_comes_from_config_args_or_weights(tmp_path, capsys):
    """Our config first, then the published args, then beta's absence, then the default with a warning.

    Weights without beta that are in no self-supervised file can be a supervised model's, so gamma and position are
    asked for.
    """
    model = backbones.build_backbone(**TINY_VIT, mode="simpool")
    for content, gamma in (
        ({"config": {**TINY_VIT, "mode": "simpool", "gamma": 1.5}}, 1.5),
        ({"args": {"arch": "vit_small", "gamma": 1.75}}, 1.75),
        ({}, 1.25),
    ):
        path = saved(tmp_path, model, lambda s, c=content: {"teacher": prefixed("backbone.")(s), **c})
        assert models.load_checkpoint_model(path, num_heads=2).config["gamma"] == gamma
    assert "does not record gamma" in capsys.readouterr().out
    plain = backbones.build_backbone(**TINY_VIT, mode="simpool", gamma=None)
    path = saved(tmp_path, plain, lambda s: {"teacher": prefixed("backbone.")(s)})
    assert models.load_checkpoint_model(path, num_heads=2).config["gamma"] is None
    path = saved(tmp_path, plain, lambda s: {"state_dict": s})
    with pytest.raises(InputError, match=r"does not tell --gamma or --pool_position.*give --gamma --pool_position"):
        models.load_checkpoint_model(path, num_heads=2)
    x = torch.randn(1, 3, 32, 32)
    supervised = backbones.build_backbone(**TINY_VIT, mode="simpool", pool_position="after").eval()
    path = saved(tmp_path, supervised, lambda s: {"state_dict": s})
    told = {"num_heads": 2, "gamma": 1.25, "pool_position": "after", "pos_embed_policy": "exact"}
    torch.testing.assert_close(models.load_checkpoint_model(path, **told).model(x), supervised(x))


@pytest.mark.parametrize("mode", MODES)
def test_every_pooling_comes_back_from_its_checkpoint(tmp_path, mode):
    """Operator, settings, position and depth are the config's; a flag that contradicts it shows both values."""
    args = {"gem": {"p": 2.5, "learn": False}, "slot": {"eval_seed": 3}, "cbam": {"map_size": [4, 4], "flatten": True}}
    settings = {**TINY_VIT, "mode": mode, "pool_depth": 1, "pooling_args": args.get(mode, {})}
    settings |= {"pool_position": "before" if mode == "official" else "after"}
    model = backbones.build_backbone(**settings).eval()
    config = {**TINY_VIT, "mode": mode, "pool_depth": 1, **model.pooling_config, "format": 2}
    path = saved(tmp_path, model, lambda s: {"teacher": prefixed("backbone.")(s), "config": config})
    loaded = models.load_checkpoint_model(path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.model(x), model(x))
    assert models.load_checkpoint_model(path, mode=mode, pool_depth=1).config == loaded.config
    for flag, value in (("pool_depth", 2), ("pool_position", "before")):
        if flag in loaded.config and loaded.config[flag] != value:
            with pytest.raises(InputError, match=f"--{flag} .* but the checkpoint says"):
                models.load_checkpoint_model(path, **{flag: value})


def test_settings_of_a_pooling_and_those_of_its_evaluation(tmp_path):
    """Recorded settings and unrecorded defaults must not be contradicted; slot's noise in evaluation can be chosen."""
    model = backbones.build_backbone(**TINY_VIT, mode="slot", pooling_args={"slots": 2}).eval()
    config = {**TINY_VIT, "mode": "slot", **model.pooling_config}
    path = saved(tmp_path, model, lambda s: {"teacher": prefixed("backbone.")(s), "config": config})
    x = torch.randn(2, 3, 32, 32)
    uniform, told_apart = (
        models.load_checkpoint_model(path, pooling_args=args).model.get_attention_map(x)
        for args in ({"slots": 2, "iterations": 3}, {"eval_seed": 4})
    )
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / 16))
    assert told_apart.std() > 1e-6
    for args, message in (({"slots": 3}, "slots=3 but the checkpoint says 2"),
                          ({"iterations": 1}, "iterations=1 but the checkpoint says 3"),
                          ({"slot": 2}, r"slot has no setting 'slot' \(did you mean slots")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            models.load_checkpoint_model(path, pooling_args=args)


@pytest.mark.parametrize("mode", ["gap", "gem", "cait"])
def test_bare_weights_of_another_pooling_ask_for_its_name(tmp_path, mode):
    """Neither [CLS] nor SimPool in a ViT: nothing tells the operator, and --mode does."""
    model = backbones.build_backbone(**TINY_VIT, mode=mode).eval()
    path = saved(tmp_path, model, lambda s: s)
    with pytest.raises(InputError, match=r"does not tell --num_heads or --mode"):
        models.load_checkpoint_model(path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(models.load_checkpoint_model(path, num_heads=2, mode=mode).model(x), model(x))
    with pytest.raises(InputError, match="does not fit the model"):
        models.load_checkpoint_model(path, num_heads=2, mode="otk")


@pytest.mark.parametrize(
    ("flags", "both"),
    [
        ({"arch": "vit_base"}, "vit_base.*vit_small"), ({"mode": "official"}, "official.*simpool"),
        ({"patch_size": 16}, "16.*8"), ({"gamma": 2.0}, "2.0.*1.25"), ({"gamma": None}, "None.*1.25"),
        ({"img_size": 64}, "64.*32"),
    ],
)  # fmt: skip
def test_contradicting_flags_show_both_values(tmp_path, flags, both):
    """A flag that the checkpoint contradicts is an error with the two values; an equal one is fine."""
    config = {**TINY_VIT, "mode": "simpool", "gamma": 1.25}
    model = backbones.build_backbone(**config)
    path = saved(tmp_path, model, lambda s: {"teacher": prefixed("backbone.")(s), "config": config})
    with pytest.raises(InputError, match=both):
        models.load_checkpoint_model(path, **flags)
    models.load_checkpoint_model(path, arch="deit_small", mode="simpool", gamma=1.25, patch_size=8, img_size=32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "qkv" not in k}, "it lacks blocks.0.attn.qkv"),
        (lambda s: {**s, "blocks.0.extra": torch.zeros(1)}, "blocks.0.extra that the model lacks"),
        (lambda s: {"epoch": 3}, "holds no weights"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, content, message):
    """Missing and unknown names are listed: nothing is dropped before a `strict` load."""
    model = backbones.build_backbone(**TINY_VIT)
    with pytest.raises(InputError, match=message):
        models.load_checkpoint_model(saved(tmp_path, model, content), num_heads=2)


def test_no_checkpoint_says_so(capsys):
    """An empty path gives random weights, and says it."""
    loaded = models.load_checkpoint_model("", **TINY_VIT)
    assert "random weights" in capsys.readouterr().out
    assert loaded.sha256 is None


def test_unknown_architecture_has_near_matches():
    """The builder's message reaches the user as an input error."""
    with pytest.raises(InputError, match="vit_small"):
        models.load_checkpoint_model("", arch="vit_smal")


def test_linear_weights(tmp_path):
    """A published linear head loads from a path; without one nothing is fetched, and it is said."""
    torch.save({"state_dict": {"module.linear.weight": torch.ones(3, 4), "module.linear.bias": torch.zeros(3)}},
               tmp_path / "head.pth.tar")  # fmt: skip
    head = nn.Module()
    head.linear = nn.Linear(4, 3)
    models.load_pretrained_linear_weights(head, "vit_small", 16, tmp_path / "head.pth.tar")
    assert head.linear.weight.sum() == 12
    with pytest.raises(InputError, match="nothing is downloaded"):
        models.load_pretrained_linear_weights(head, "vit_small", 16)


def test_the_number_of_heads_is_asked_for(tmp_path):
    """Weights of no preset's shape: 2 heads and 4 give other features from the same numbers."""
    model = backbones.build_backbone(**TINY_VIT, mode="simpool").eval()
    path = saved(tmp_path, model, lambda s: s)
    with pytest.raises(InputError, match=r"does not tell --num_heads.*embed_dim 24, depth 2.*give --num_heads"):
        models.load_checkpoint_model(path)
    x = torch.randn(1, 3, 32, 32)
    loaded = models.load_checkpoint_model(path, num_heads=2, pos_embed_policy="exact")
    torch.testing.assert_close(loaded.model(x), model(x))


def test_nothing_is_built_before_the_shapes_agree(tmp_path, monkeypatch):
    """A small file can name a model of any size: it is compared on the meta device first."""
    content = {"teacher": {"backbone.cls_token": torch.zeros(1, 1, 768)}, "config": {"arch": "vit_base"}}
    save_checkpoint(content, tmp_path / "c.pth")
    devices = []
    real = backbones.build_backbone

    def build(**settings):
        model = real(**settings)
        devices.append(next(model.parameters()).device.type)
        return model

    monkeypatch.setattr(backbones, "build_backbone", build)
    with pytest.raises(InputError, match="does not fit the model"):
        models.load_checkpoint_model(tmp_path / "c.pth")
    assert devices == ["meta"]


def test_a_photograph_is_preprocessed_as_in_an_evaluation(imagenet_sample, tmp_path):
    """One image by hand gives the pixels that the evaluation's loader gives; arrays and grey pictures work too."""
    from PIL import Image

    from data.datasets import open_images
    from data.loader import build_eval_loader, normalize

    loaded = models.load_checkpoint_model("", arch="vit_tiny")
    source = open_images(imagenet_sample, "train")
    images, _ = next(iter(build_eval_loader(source, 1)))
    photograph = Image.open(source.name(0) if Path(source.name(0)).exists() else imagenet_sample / source.name(0))
    found = loaded.preprocess(photograph)
    # A JPEG may be decoded at a half, where the loader reduces it: a level or two on the way to 256 pixels.
    assert (found - normalize(images)).abs().mean() < 0.03
    assert torch.equal(loaded.preprocess(np.array(photograph.convert("RGB"))), found)
    assert loaded.preprocess(photograph.convert("L")).shape == (1, 3, 224, 224)
    with pytest.raises(ValueError, match="float64"):
        loaded.preprocess(np.zeros((4, 4, 3)))
