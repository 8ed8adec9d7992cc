"""torchfile.safe: safetensors files of ours and of others."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import save_file

from torchfile import safe

WEIGHTS = {"w": torch.arange(6.0).view(2, 3).T, "n": torch.tensor(3), "b": torch.ones(2, dtype=torch.bfloat16)}


def test_weights_settings_and_epoch_come_back(tmp_path):
    """Every type and layout of a tensor, and what JSON holds."""
    safe.write(tmp_path / "m.bin", WEIGHTS, {"arch": "vit_tiny", "gamma": None}, epoch=7)
    assert safe.is_safetensors(tmp_path / "m.bin")
    content = safe.read(tmp_path / "m.bin")
    assert content["config"] == {"arch": "vit_tiny", "gamma": None}
    assert content["epoch"] == 7
    for name, value in WEIGHTS.items():
        assert content["state_dict"][name].dtype == value.dtype
        assert torch.equal(content["state_dict"][name], value)


def test_a_file_of_others_is_read_as_weights(tmp_path):
    """Without our texts there is nothing but weights."""
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    assert list(safe.read(tmp_path / "m.safetensors")) == ["state_dict"]
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pth")
    assert not safe.is_safetensors(tmp_path / "m.pth")


def test_every_flipped_bit_of_a_tensor_is_found(tmp_path):
    """The digest covers names, types, shapes and bytes."""
    first = safe.digest(WEIGHTS)
    assert safe.digest({**WEIGHTS, "n": torch.tensor(2)}) != first
    assert safe.digest({**WEIGHTS, "w": WEIGHTS["w"].reshape(2, 3)}) != first
    assert safe.digest({("v" if name == "w" else name): value for name, value in WEIGHTS.items()}) != first
    assert safe.digest(dict(reversed(WEIGHTS.items()))) == first


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Settings that are not JSON, a file that is not there, and the missing package with its pip command."""
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, path, metadata={"config": "{"})
    with pytest.raises(ValueError, match=r"m.safetensors is damaged: its config is not JSON"):
        safe.read(path)
    with pytest.raises(FileNotFoundError, match=r"n.safetensors does not exist"):
        safe.read(tmp_path / "n.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        safe.read(path)
