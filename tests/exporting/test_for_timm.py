"""Exports for timm: timm's own function reads them strictly, and its model gives the checkpoint's numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import export
import portable
from evaluation.models import load_checkpoint_model
from runtime.guards import InputError, RunStopped
from tests.small_images import labelled_checkpoint, tiny_checkpoint

VIT = {"arch": "vit_small", "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
MODELS = {
    "vit": VIT,
    "vit_fewer_blocks": {**VIT, "depth": 3, "pool_depth": 1, "in_chans": 1},
    "resnet": {"arch": "resnet18", "img_size": 32, "pool_depth": 1},
    "convnext": {"arch": "convnext_tiny", "img_size": 32, "pool_depth": 2},
    "timm_vit": {"arch": "test_vit", "img_size": 64},
    "timm_resnet": {"arch": "resnet10t", "img_size": 32},
    "simpool_vit": {**VIT, "mode": "simpool", "gamma": 1.5, "pos_embed_policy": "reference"},
    "simpool_resnet": {"arch": "resnet18", "mode": "simpool", "gamma": None, "img_size": 32, "stem": "small"},
    "simpool_convnext": {"arch": "convnext_tiny", "mode": "simpool", "value_min": "batch", "img_size": 32},
}
QUICK = ("vit", "resnet", "convnext", "simpool_vit", "simpool_resnet")
CALLS = {
    "vit": 'timm.create_model("vit_small_patch8_224", checkpoint_path="FILE", num_classes=0, img_size=32, '
    "embed_dim=24, depth=2, num_heads=2)",
    "simpool_vit": 'timm.create_model("simpool_vit_small_patch8_224", checkpoint_path="FILE", num_classes=0, '
    "img_size=32, embed_dim=24, depth=2, num_heads=2, gamma=1.5)",
    "resnet": 'timm.create_model("resnet18", checkpoint_path="FILE", num_classes=0, layers=(2, 2, 2, 1))',
    "simpool_resnet": 'timm.create_model("simpool_resnet18", checkpoint_path="FILE", num_classes=0, '
    "stem='small', gamma='none')",
}


def run(checkpoint: Path, output: Path, *flags: str) -> str:
    """Export for timm; returns the call that the program suggests."""
    arguments = ["--pretrained_weights", str(checkpoint), "--format", "timm", "--output", str(output), *flags]
    assert export.main(arguments) == 0
    return json.loads((output.parent / "config.json").read_text())["files"][output.name]["call"]


def photographs(settings: dict) -> torch.Tensor:
    """Real pixels for a model of these settings, (4, C, S, S)."""
    from exporting.prepare import photographs as pictures

    loaded = load_checkpoint_model("", **settings)
    count = settings.get("in_chans", 3)
    return pictures(loaded, (settings["img_size"],) * 2, ((0.5,) * count, (0.25,) * count))


def created(call: str, folder: Path) -> torch.nn.Module:
    """The model that a suggested call makes, run in this process."""
    import timm

    import timm_models  # noqa: F401

    name = call.split('checkpoint_path="')[1].split('"')[0]
    return eval(call.replace(f'"{name}"', repr(str(folder / name))), {"timm": timm}).eval()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in MODELS])
def test_the_suggested_call_gives_the_checkpoints_features(tmp_path, name):
    """Official models under timm's names, pooled ones under ours, with the keywords that differ from the name's."""
    settings = MODELS[name]
    labelled = labelled_checkpoint(tmp_path / "c.pth", **settings)
    output = tmp_path / "out" / ("m.safetensors" if name == "vit" else "m.pth")
    call = run(labelled, output, "--with_head", "false")
    if name in CALLS:
        assert call == CALLS[name].replace("FILE", output.name)
    images = photographs(settings)
    with torch.no_grad():
        expected = load_checkpoint_model(labelled).model(images)
        # timm's attention is another kernel, and ConvNeXt's norms are other layouts: sums in another order
        assert torch.allclose(created(call, output.parent)(images), expected, atol=1e-5)
    assert call in (output.parent / "README.md").read_text()
    assert ("import timm_models" in (output.parent / "README.md").read_text()) == ("simpool" in name)


@pytest.mark.parametrize("name", [n if n in QUICK[:2] else pytest.param(n, marks=pytest.mark.full) for n in MODELS])
def test_a_classifier_travels_along(tmp_path, name):
    """The head of a training with labels is timm's classifier, and num_classes its width."""
    labelled = labelled_checkpoint(tmp_path / "c.pth", **MODELS[name])
    call = run(labelled, tmp_path / "out" / "m.pth")
    assert "num_classes=5" in call
    images = photographs(MODELS[name])
    with torch.no_grad():
        expected = portable.load(labelled, classifier=True)(images)
        assert torch.allclose(created(call, tmp_path / "out")(images), expected, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param("vit", marks=pytest.mark.full), "simpool_vit"])
def test_a_folder_in_the_hubs_layout_is_timms(tmp_path, name):
    """Next to model.safetensors lies what timm asks of a model's folder, also after another format joined it."""
    import timm

    import timm_models  # noqa: F401

    if not hasattr(timm.models._hub, "load_model_config_from_path"):
        pytest.skip("this timm does not read folders yet")
    labelled = labelled_checkpoint(tmp_path / "c.pth", **MODELS[name])
    run(labelled, tmp_path / "hub" / "model.safetensors")
    export.main(
        ["--pretrained_weights", str(labelled), "--format", "torch", "--output", str(tmp_path / "hub" / "m.pt")]
    )
    images = photographs(MODELS[name])
    with torch.no_grad():
        model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
        assert torch.allclose(model(images), portable.load(labelled, classifier=True)(images), atol=1e-5)
    assert list(model.pretrained_cfg["input_size"]) == [3, 32, 32]
    assert "# vit_small, pooled by" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.full
def test_timm_alone_reads_an_official_model(tmp_path):
    """Without this code on the path: the name, the file and num_classes=0 are enough, but for sizes of our own."""
    labelled = labelled_checkpoint(tmp_path / "c.pth", arch="resnet18", img_size=32)
    run(labelled, tmp_path / "out" / "m.pth", "--with_head", "false")
    code = (
        "import sys, timm; m = timm.create_model('resnet18', checkpoint_path='m.pth', num_classes=0)\n"
        "assert 'backbones' not in sys.modules; print(m.num_features)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "512"


@pytest.mark.full
@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_a_vit_small_of_the_usual_size(tmp_path, mode):
    """The call has the name, the file and num_classes=0, and nothing else."""
    checkpoint = labelled_checkpoint(tmp_path / "c.pth", arch="vit_small", mode=mode, img_size=224)
    call = run(checkpoint, tmp_path / "out" / "model.safetensors", "--with_head", "false")
    name = "vit_small_patch16_224" if mode == "official" else "simpool_vit_small_patch16_224"
    assert call == f'timm.create_model("{name}", checkpoint_path="model.safetensors", num_classes=0)'


def test_half_and_another_size(tmp_path):
    """float16 on disk, and positions resampled once for the size that is asked for."""
    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    call = run(checkpoint, tmp_path / "out" / "m.pth", "--half", "--img_size", "48")
    assert "img_size=48" in call
    weights = torch.load(tmp_path / "out" / "m.pth", weights_only=True)["state_dict"]
    assert {value.dtype for value in weights.values()} == {torch.float16}
    images = photographs({**VIT, "img_size": 48})
    with torch.no_grad():
        difference = created(call, tmp_path / "out")(images) - load_checkpoint_model(checkpoint).model(images)
    assert 0 < difference.abs().max() < 0.05  # rounded weights keep 11 bits, features are of order one


def test_what_timm_cannot_take_is_one_line(tmp_path, monkeypatch):
    """Another pooling, a timm backbone under SimPool, and weights that timm's model refuses; nothing is written."""
    for settings, message in (
        ({**VIT, "mode": "gem"}, "timm has no model for vit_small pooled by gem; export it as safetensors or torch"),
        ({"arch": "resnet10t", "mode": "simpool", "img_size": 32}, "no model for resnet10t pooled by simpool"),
        ({"arch": "resnet18", "stem": "small", "img_size": 32}, "no model for resnet18 with a small stem"),
    ):
        checkpoint = labelled_checkpoint(tmp_path / "c.pth", **settings)
        with pytest.raises(InputError, match=message) as caught:
            run(checkpoint, tmp_path / "out" / "m.pth")
        assert "\n" not in str(caught.value)
    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    monkeypatch.setattr(export.for_timm, "weights_of", lambda *_: {"w": torch.ones(1)})
    with pytest.raises(InputError, match=r"timm's simpool_vit_small_patch8_224 does not take these weights") as caught:
        run(checkpoint, tmp_path / "out" / "m.pth")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_model_that_differs_in_timm_is_not_kept(tmp_path, monkeypatch):
    """The comparison on photographs decides: exit code 1, and nothing lies under the name."""
    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    weights_of = export.for_timm.weights_of
    monkeypatch.setattr(
        export.for_timm, "weights_of", lambda *args: {k: v + (k == "norm.bias") for k, v in weights_of(*args).items()}
    )
    with pytest.raises(RunStopped, match=r"timm's numbers differ by .* nothing was written") as caught:
        run(checkpoint, tmp_path / "out" / "m.pth")
    assert caught.value.exit_code == 1
    assert not list((tmp_path / "out").iterdir())
