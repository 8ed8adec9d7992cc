"""Features as files: what is stored comes back, and says what made it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from evaluation import stored_features
from runtime.guards import InputError


def stored():
    train, test = (torch.nn.functional.normalize(torch.randn(n, 6), dim=1) for n in (8, 4))
    labels = torch.arange(8) % 2, torch.arange(4) % 2
    description = {"checkpoint_sha256": "abc", "train_data": "t1", "classes": ["a", "b"]}
    return stored_features.FeatureSet(train, test, *labels, description)


def test_dumped_features_come_back_and_name_their_maker(tmp_path):
    """What is dumped is loaded bit for bit; another checkpoint's hash or another data set is an error showing both."""
    original = stored()
    stored_features.dump_features(tmp_path, original)
    back = stored_features.load_features(tmp_path, {"checkpoint_sha256": "abc"})
    assert torch.equal(back.train_features, original.train_features)
    assert torch.equal(back.test_labels, original.test_labels)
    assert back.description["classes"] == ["a", "b"]
    with pytest.raises(InputError, match="checkpoint_sha256 was abc and is def"):
        stored_features.load_features(tmp_path, {"checkpoint_sha256": "def"})
    with pytest.raises(InputError, match="train_data was t1 and is t2"):
        stored_features.load_features(tmp_path, {"train_data": "t2"})


def test_published_dumps_are_used_with_a_warning(tmp_path, capsys):
    """Four tensors without a description load, and the output says that they cannot be checked."""
    stored_features.dump_features(tmp_path, stored())
    (tmp_path / "features.json").unlink()
    assert stored_features.load_features(tmp_path, {"checkpoint_sha256": "def"}).description == {}
    assert "cannot be checked" in capsys.readouterr().out


def test_mixed_up_or_damaged_dumps_are_refused(tmp_path):
    """Labels of another length, a torn file, a missing one, and a description of other tensors are errors."""
    stored_features.dump_features(tmp_path, stored())
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
            stored_features.load_features(copy, {})


@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"\xff\xfe", b'{"classes": 3}', b"[" * 100_000])
def test_an_odd_description_is_one_line(tmp_path, content):
    """A features.json that is no description is an error that names it."""
    stored_features.dump_features(tmp_path, stored())
    (tmp_path / "features.json").write_bytes(content)
    with pytest.raises(InputError, match=r"features\.json.*dump the features again"):
        stored_features.load_features(tmp_path)
