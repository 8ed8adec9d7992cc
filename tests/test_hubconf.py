"""torch.hub entry points: they build, load what they are given, and fetch nothing."""

import argparse
import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import backbones
import hubconf
from tests.reference import reference_checkpoint_path

ROOT = Path(hubconf.__file__).parent
REFERENCE = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def test_every_backbone_has_two_entry_points():
    """torch.hub lists every model of ours, official and SimPool, and nothing else."""
    listed = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    assert listed == {name + end for name in backbones.available() for end in ("", "_simpool")}


def test_loads_through_torch_hub():
    """torch.hub.load builds the named model in its mode with the caller's settings."""
    model = torch.hub.load(str(ROOT), "vit_tiny_simpool", source="local", img_size=32, gamma=None)
    assert (model.mode, model.simpool.gamma) == ("simpool", None)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


# large, or no other code path than one that is tested
DEEP = ("vit_base", "resnet34", "resnet50", "resnet101", "resnet152", "convnext_small", "convnext_base")
DEEP += ("convnext_large", "convnext_xlarge")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name + end, marks=[pytest.mark.full] if name in DEEP else [])
        for name in backbones.available()
        for end in ("", "_simpool")
    ],
)
def test_every_entry_loads_through_torch_hub(name):
    """hub.load from a checkout builds each entry point with trust_repo=True; on the meta device, so without memory."""
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), name, source="local", trust_repo=True, img_size=32)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, model.num_features)
    assert model.mode == ("simpool" if name.endswith("_simpool") else "official")


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_loads_a_published_checkpoint(key):
    """The backbone of a published training checkpoint loads, teacher and student, prefixes and head left out."""
    path = reference_checkpoint_path()
    model = hubconf.vit_small(pretrained=str(path), checkpoint_key=key, **REFERENCE)
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        weights = torch.load(path, weights_only=True)[key]
    prefix = "backbone." if key == "teacher" else "module.backbone."
    assert torch.equal(model.state_dict()["norm.weight"], weights[prefix + "norm.weight"])


def test_settings_come_with_our_checkpoints(tmp_path):
    """A checkpoint of ours brings its gamma, sizes and position policy; an explicit keyword wins."""
    settings = {"img_size": 32, "patch_size": 8, "gamma": 1.5, "pos_embed_policy": "reference"}
    model = hubconf.vit_tiny_simpool(**settings)
    teacher = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    path = str(tmp_path / "checkpoint.pth")
    torch.save({"teacher": teacher, "config": settings}, path)
    loaded = hubconf.vit_tiny_simpool(pretrained=path)
    x = torch.ones(1, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert hubconf.vit_tiny_simpool(pretrained=path, gamma=2.0).simpool.gamma == 2.0


def test_every_recorded_setting_is_honoured(tmp_path):
    """Width, depth and heads too, which the shapes of a ViT's weights tell only in part."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}
    model = hubconf.vit_small_simpool(**settings, gamma=1.5, pos_embed_policy="exact").eval()
    path, x = str(tmp_path / "c.pth"), torch.ones(1, 3, 32, 32)
    teacher = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    config = {"arch": "vit_small", "mode": "simpool", "gamma": 1.5, "pos_embed_policy": "exact", **settings}
    torch.save({"teacher": teacher, "config": config}, path)
    assert torch.equal(hubconf.vit_small_simpool(pretrained=path).eval()(x), model(x))
    torch.save({"teacher": teacher}, path)
    with pytest.raises(ValueError, match="does not tell num_heads"):
        hubconf.vit_small_simpool(pretrained=path)


def test_other_poolings_under_the_plain_name(tmp_path):
    """mode= builds any pooling, and a file that records one brings it with its settings; SimPool keeps its own name."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    more = {"pooling_args": {"p": 2.0, "learn": False}, "pool_position": "after", "pool_depth": 1}
    model = hubconf.vit_small(mode="gem", **settings, **more).eval()
    path, x = str(tmp_path / "c.pth"), torch.ones(1, 3, 32, 32)
    teacher = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"teacher": teacher, "config": {"arch": "vit_small", "mode": "gem", **settings, **more}}, path)
    for found in (hubconf.vit_small(pretrained=path), hubconf.vit_small(mode="gem", pretrained=path)):
        assert torch.equal(found.eval()(x), model(x))
    with pytest.raises(ValueError, match="are for mode gem, not simpool"):
        hubconf.vit_small_simpool(pretrained=path)
    with pytest.raises(ValueError, match="are for mode gem, not official"):
        hubconf.vit_small(pretrained=path, mode="official")
    with pytest.raises(ValueError, match="use vit_small with mode='gem'"):
        hubconf.vit_small_simpool(mode="gem")
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match="does not tell num_heads, mode; give it by name, as in num_heads=3"):
        hubconf.vit_small(pretrained=path)


@pytest.mark.parametrize("gamma", [1.75, None])
def test_the_gamma_of_published_arguments(tmp_path, gamma):
    """args.gamma of a published file becomes the model's, even if it is None; numpy's numbers are read."""
    state = hubconf.resnet18_simpool(num_classes=0).state_dict()
    args = argparse.Namespace(arch="resnet18", gamma=gamma, lr=np.float64(0.3))
    torch.save({"teacher": {f"module.backbone.{name}": value for name, value in state.items()}, "args": args,
                "optimizer": {"lr": np.float32(0.5)}}, tmp_path / "c.pth")  # fmt: skip
    model = hubconf.resnet18_simpool(pretrained=str(tmp_path / "c.pth"), num_classes=0)
    assert model.simpool.gamma == gamma


def test_content_that_would_run_is_a_value_error(tmp_path):
    """Code in a file is refused by name, not by an error of the unpickler."""
    torch.save({"teacher": {"w": torch.ones(1)}, "x": print}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"print, which is code"):
        hubconf.vit_tiny(pretrained=str(tmp_path / "c.pth"))


def test_published_simpool_weights_mean_the_reference_policy(tmp_path):
    """A plain state dict of a SimPool ViT is taken to be trained with the published position embeddings."""
    path = str(tmp_path / "weights.pth")
    torch.save(hubconf.vit_tiny_simpool(img_size=32).state_dict(), path)
    assert hubconf.vit_tiny_simpool(pretrained=path, img_size=32).pos_embed_policy == "reference"


def test_weights_of_another_model_are_refused(tmp_path):
    """Weights that don't fit are a ValueError that names keys, and a missing file one that names the path."""
    path = str(tmp_path / "weights.pth")
    torch.save(hubconf.resnet18(num_classes=0).state_dict(), path)
    with pytest.raises(ValueError, match=r"are for mode official, not simpool"):
        hubconf.resnet18_simpool(pretrained=path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        hubconf.resnet18(pretrained="nowhere.pth")


def test_imports_only_what_a_hub_user_has():
    """hubconf and the backbones import neither utils nor data nor runtime, at the top or inside functions."""
    files = ["hubconf", "backbones", "sp", "vision_transformer", "resnet_simpool", "convnext_simpool"]
    files += ["timm_stem", "timm_backbone"]
    for file in files:
        for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"utils", "data", "runtime", "evaluation"}, file
