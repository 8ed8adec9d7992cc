"""The benchmarks of evaluation in quick form: both sides find the same; times are never judged here."""

from __future__ import annotations

import pytest
import torch

import backbones
from benchmarks import knn, linear_probe, probes


def test_both_knns_find_the_same():
    """The published algorithm's accuracies, to the last digit, for all k."""
    found = list(knn.compare(images=600, queries=200, width=16, classes=20, rounds=1))
    assert [comparison.ks for comparison in found] == [[20, 200], [10, 20, 100, 200]]
    assert all(comparison.differ == 0 for comparison in found)
    assert all(comparison.seconds.keys() == {"published", "ours", "product"} for comparison in found)


def test_another_knn_is_found(monkeypatch):
    """A temperature of its own shows as a difference."""
    real = knn.knn.knn_classifier
    monkeypatch.setattr(knn.knn, "knn_classifier", lambda *args: real(*args[:-1], 10.0))
    assert any(c.differ > 0 for c in knn.compare(images=600, queries=200, width=16, classes=20, rounds=1))


def test_memory_of_knn_is_counted(monkeypatch, capsys):
    """The line for the whole holds the features' own bytes by count: 1.33 million x 2048 in fp16 and their labels."""
    real = knn.features
    monkeypatch.setattr(knn, "features", lambda n, q, width, *args: real(n, q, 8, *args))
    knn.large(part=1000)
    assert f"stored {(1_331_167 * (2048 * 2 + 8)) / 2**30:.2f} GiB" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet18"])
def test_probes_of_every_size_are_timed(arch):
    """The heads' part is a part of the step."""
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2} if arch == "vit_tiny" else {}
    model = backbones.build_backbone(arch, mode="simpool", img_size=32, **sizes).eval()
    images, target = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    seconds = linear_probe.compare(model, images, target, classes=5, heads=[1, 3], rounds=1)
    assert seconds.keys() == {1, 3}
    assert all(whole > 0 and heads > 0 for whole, heads in seconds.values())


def test_every_probe_is_timed_beside_the_backbone():
    """Each probe has a time, and so has the pass that they share."""
    model = backbones.build_backbone("vit_tiny", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2).eval()
    images, target = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    names = ["linear", "ep:queries=8", "ep_all:queries=8"]
    seconds = probes.compare(model, images, target, classes=5, probes=names, heads=2, rounds=1)
    assert list(seconds) == ["backbone", *names]
    assert all(value > 0 for value in seconds.values())
