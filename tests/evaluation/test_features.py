"""Features: each image once, in order, stored so that they can be trusted later."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from data.datasets import open_images
from evaluation import features
from runtime.guards import InputError
from tests.small_images import small_root

SETTINGS = {"img_size": 32, "batch_size": 7, "num_workers": 0, "show_progress": False}


class Pixels(torch.nn.Module):
    """A model whose feature tells which image it saw, and whether it was in eval mode."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) * self.weight


@pytest.fixture(scope="module")
def root(cifar10, tmp_path_factory):
    return small_root(cifar10, tmp_path_factory.mktemp("root"))


def test_features_come_in_the_order_of_the_data_set(root):
    """Row i is the feature of image i, whatever the batches; the model runs in eval mode and gets its mode back."""
    source, model = open_images(root, "train"), Pixels().train()
    whole = features.extract(model, source, **SETTINGS)
    assert whole.shape == (96, 48)
    assert not any(model.modes)
    assert model.training
    for i in (0, 50, 95):
        alone, index = features.extract_shard(model, source, indices=np.array([i]), **SETTINGS)
        assert index.tolist() == [i]
        assert torch.equal(alone[0], whole[i])
    half = features.extract(model, source, dtype=torch.float16, **SETTINGS)
    assert torch.equal(half, whole.half())


def test_features_that_are_not_finite_are_refused(root):
    """A diverged model is an error before anything is computed from its features."""
    model = Pixels()
    model.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        features.extract(model, open_images(root, "val"), **SETTINGS)


def stored():
    train, test = (torch.nn.functional.normalize(torch.randn(n, 6), dim=1) for n in (8, 4))
    labels = torch.arange(8) % 2, torch.arange(4) % 2
    description = {"checkpoint_sha256": "abc", "train_data": "t1", "classes": ["a", "b"]}
    return features.FeatureSet(train, test, *labels, description)


def test_dumped_features_come_back_and_name_their_maker(tmp_path):
    """What is dumped is loaded bit for bit; another checkpoint's hash or another data set is an error showing both."""
    original = stored()
    features.dump_features(tmp_path, original)
    back = features.load_features(tmp_path, {"checkpoint_sha256": "abc", "train_data": None})
    assert torch.equal(back.train_features, original.train_features)
    assert torch.equal(back.test_labels, original.test_labels)
    assert back.description["classes"] == ["a", "b"]
    with pytest.raises(InputError, match=r"'abc'.*'def'"):
        features.load_features(tmp_path, {"checkpoint_sha256": "def"})
    with pytest.raises(InputError, match="train_data 't1'"):
        features.load_features(tmp_path, {"train_data": "t2"})


def test_published_dumps_are_used_with_a_warning(tmp_path, capsys):
    """Four tensors without a description load, and the output says that they cannot be checked."""
    features.dump_features(tmp_path, stored())
    (tmp_path / "features.json").unlink()
    assert features.load_features(tmp_path, {"checkpoint_sha256": "def"}).description == {}
    assert "cannot be checked" in capsys.readouterr().out


def test_mixed_up_or_damaged_dumps_are_refused(tmp_path):
    """Labels of another length, a torn file, a missing one, and a description of other tensors are errors."""
    features.dump_features(tmp_path, stored())
    for name, action, message in (
        ("trainlabels.pth", lambda p: torch.save(torch.arange(5), p), "do not belong together"),
        ("testfeat.pth", lambda p: p.write_bytes(p.read_bytes()[:100]), "can't be read"),
        ("testlabels.pth", lambda p: p.unlink(), "does not exist"),
        ("features.json", lambda p: p.write_text(json.dumps({"train_shape": [1, 2]})), "describes other tensors"),
    ):
        copy = tmp_path / f"copy_{name}"
        shutil.copytree(tmp_path, copy, ignore=lambda *_: [n for n in _[1] if n.startswith("copy_")])
        action(copy / name)
        with pytest.raises(InputError, match=message):
            features.load_features(copy, {})


def test_embeddings_carry_names_with_and_without_labels(root, tmp_path):
    """npz and npy + csv hold the same rows, with the file of each, for labelled and unlabelled images."""
    source = open_images(root, "val")
    array = features.extract(Pixels(), source, **SETTINGS)
    features.write_embeddings(tmp_path / "a.npz", array, source, {"checkpoint": "x"})
    files = features.write_embeddings(tmp_path / "b.npy", array, source, {"checkpoint": "x"})
    with np.load(tmp_path / "a.npz") as loaded:
        assert np.array_equal(loaded["features"], np.load(tmp_path / "b.npy"))
        assert loaded["names"].tolist() == [source.name(i) for i in range(len(source))]
        assert np.array_equal(loaded["labels"], source.labels)
        assert json.loads(str(loaded["description"])) == {"checkpoint": "x"}
    rows = (tmp_path / "b.csv").read_text().splitlines()
    assert rows[0] == "index,name,label,class"
    assert len(rows) == len(source) + 1
    assert [f.suffix for f in files] == [".npy", ".csv", ".json"]
    with pytest.raises(InputError, match=r"\.npz"):
        features.write_embeddings(tmp_path / "c.txt", array, source, {})


def test_an_image_of_another_number_of_channels_is_named(tmp_path):
    """One npy of 4 channels among those of 5: extraction stops, naming the file, its shape and the flag."""
    for i in range(6):
        np.save(tmp_path / f"{i}.npy", np.full((40, 40, 4 if i == 3 else 5), 9 * i, np.uint8))
    with pytest.raises(InputError, match=r"3\.npy has shape \(40, 40, 4\).*--in_chans"):
        features.extract(Pixels(), open_images(tmp_path, in_chans=5), **SETTINGS)


def test_labels_must_be_there_agree_and_fill_every_class(root, tmp_path):
    """Unlabelled images, classes that differ, one class only, and an empty class are errors that name them."""
    train, val = open_images(root, "train"), open_images(root, "val")
    features.require_labels(train, val)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, image in enumerate(sorted((root / "val").rglob("*.*"))[:4]):
        shutil.copy(image, flat / f"{i}{image.suffix}")
    with pytest.raises(InputError, match="no labels"):
        features.require_labels(open_images(flat), val)
    name = train.classes[0]
    shutil.copytree(root, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "val" / name)
    with pytest.raises(InputError, match=name):
        features.require_labels(open_images(tmp_path / "other", "train"), open_images(tmp_path / "other", "val"))
    for split in ("train", "val"):
        shutil.copytree(root / split / name, tmp_path / "one" / split / name)
    with pytest.raises(InputError, match=f"one class only.*{name}"):
        features.require_labels(open_images(tmp_path / "one", "train"), open_images(tmp_path / "one", "val"))
    lines = [f"{image} {label}" for image, label in zip(sorted((root / "val").rglob("*.*"))[:2], (0, 2), strict=True)]
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    with pytest.raises(InputError, match="no image of class '1'"):
        features.require_labels(open_images(tmp_path, "train"), open_images(tmp_path, "val"))


def test_small_images_are_evaluated_whole():
    """224 pixels are cut from 256 as published; images under 96 pixels are not cut at all."""
    assert features.eval_resize(224) == 256
    assert features.eval_resize(32) == 32
