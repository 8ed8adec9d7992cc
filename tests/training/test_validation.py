"""Validation: every image once, by the right labels, leaving the models as they were."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.datasets import open_images
from data.eval_set import EvalSet
from data.loader import normalize
from evaluation.features import Interrupted
from runtime import hardware
from training.validation import Validation, validate


@pytest.fixture(scope="module")
def val():
    return open_images("demo:32", "val", subset=8)  # 152 images: two batches


@pytest.fixture
def run():
    args = argparse.Namespace(num_workers=0, img_size=28, crop_pct=0.875)
    return SimpleNamespace(args=args, hardware=hardware.Choice(torch.device("cpu"), "none", "highest", False))


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Flatten(), nn.Dropout(0.5), nn.Linear(392, 19))
    return layers.train()


def test_results_are_those_of_all_images_at_once(val, run):
    """Top-1, top-5 and cross-entropy of two models, resized to img_size / crop_pct and cut centrally."""
    models = {"model": model(), "average": nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 19))}
    found = validate(models, val, run)
    images, _ = EvalSet(val, 28, 32).__getitems__(range(len(val)))
    labels = torch.as_tensor(val.labels)
    for name, one in models.items():
        with torch.no_grad():
            logits = one.eval()(normalize(images))
        right = logits.topk(5).indices == labels[:, None]
        assert found[name]["top1"] == pytest.approx(100 * right[:, 0].float().mean().item())
        assert found[name]["top5"] == pytest.approx(100 * right.any(dim=1).float().mean().item())
        assert found[name]["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_the_model_stays_in_training_mode(val, run):
    """Statistics and modes are those of before."""
    one = model()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    validate({"model": one}, val, run)
    assert all(module.training for module in one.modules())
    assert all(torch.equal(before[name], value) for name, value in one.state_dict().items())


def test_a_broken_image_is_left_out_and_said(val, run, tmp_path, capsys):
    """The means are over the readable images."""
    from PIL import Image

    for name, colour in (("a", 0), ("b", 255)):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (32, 32), (colour,) * 3).save(tmp_path / "val" / name / f"{i}.png")
    (tmp_path / "train").symlink_to(tmp_path / "val")
    (tmp_path / "val" / "b" / "0.png").write_bytes(b"no image")
    source = open_images(tmp_path, "val")
    bright = nn.Linear(3 * 28 * 28, 2)
    with torch.no_grad():
        bright.weight[0], bright.weight[1] = -1, 1
        bright.bias.zero_()
    found = validate({"model": nn.Sequential(nn.Flatten(), bright)}, source, run)
    assert found["model"]["top1"] == found["model"]["top5"] == 100
    assert "1 of 6 validation images left out" in capsys.readouterr().out


def test_it_stops_when_asked(val, run):
    """A request to stop raises Interrupted."""
    with pytest.raises(Interrupted):
        validate({"model": model()}, val, run, should_stop=lambda: True)


def test_the_score_is_the_averages_top1():
    """The model's in a run without an average."""
    watch = Validation.__new__(Validation)
    assert watch.score({"val": {"model": {"top1": 7.0}, "average": {"top1": 5.0}}}) == 5.0
    assert watch.score({"val": {"model": {"top1": 7.0}}}) == 7.0
