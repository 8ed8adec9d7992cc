"""portable.load: a file as a model in one line."""

from __future__ import annotations

import pytest
import torch

import portable
import pretrained
from tests.reference import reference_checkpoint_path
from tests.small_images import labelled_checkpoint, tiny_checkpoint


def test_a_checkpoint_is_loaded_with_its_settings(tmp_path):
    """The model is in eval mode and tells what it was built with."""
    model = portable.load(tiny_checkpoint(tmp_path / "c.pth"))
    assert not model.training
    assert (model.settings["img_size"], model.settings["mode"]) == (32, "simpool")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 24)


def test_what_a_file_does_not_tell_is_named(tmp_path):
    """A published file of another width leaves the heads open; a file of no known network its architecture."""
    with pytest.raises(ValueError, match="does not tell num_heads; load it through hubconf"):
        portable.load(reference_checkpoint_path())
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not tell arch"):
        portable.load(tmp_path / "w.pth")


@pytest.mark.parametrize("stem", ["small", "standard"])
def test_a_recorded_stem_is_built_again(tmp_path, stem):
    """By portable, torch.hub and the evaluations alike, from a checkpoint and from its weights alone."""
    import backbones
    import hubconf
    from utils import load_checkpoint_model

    model = backbones.build_backbone("resnet18", "simpool", img_size=32, stem=stem).eval()
    weights = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    config = {"arch": "resnet18", "mode": "simpool", "gamma": 2.0, "img_size": 32, "in_chans": 3, "stem": stem}
    torch.save({"teacher": weights, "config": config}, tmp_path / "c.pth")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    x = torch.ones(1, 3, 32, 32)
    for found in (
        portable.load(tmp_path / "c.pth"), portable.load(tmp_path / "w.pth"),
        hubconf.resnet18_simpool(pretrained=str(tmp_path / "c.pth")).eval(),
        load_checkpoint_model(tmp_path / "c.pth").model,
    ):  # fmt: skip
        assert torch.equal(found.get_attention_map(x), model.get_attention_map(x))


def test_a_classifier_is_added_on_request(tmp_path):
    """Logits are the features times the head that lies with them, here as training with labels writes it."""
    checkpoint = labelled_checkpoint(tmp_path / "c.pth")
    backbone, model = portable.load(checkpoint), portable.load(checkpoint, classifier=True)
    head, x = pretrained.read(checkpoint)["student"], torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = backbone(x) @ head["module.head.weight"].T + head["module.head.bias"]
        assert torch.allclose(model(x), expected, atol=1e-6)
    assert (model.training, model.settings) == (False, backbone.settings)
    with pytest.raises(ValueError, match="holds no linear classifier of 24 features"):
        portable.load(tiny_checkpoint(tmp_path / "d.pth"), classifier=True)
