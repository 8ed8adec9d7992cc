"""torch.hub entry points: every backbone of ours, official and pooled by SimPool.

    model = torch.hub.load("PATH_OR_REPOSITORY", "vit_small_simpool")
    model = torch.hub.load("PATH_OR_REPOSITORY", "resnet50", pretrained="checkpoint.pth", checkpoint_key="teacher")

Each entry point takes build_backbone's keywords, and `pretrained`: a path or URL of weights, given by the caller.
Without it the model is randomly initialised, and nothing is fetched. Weights may be a training checkpoint (ours or a
published one) or a plain state dict; they are read as tensors only, never executed.

A hub user's own modules may be named utils, data or runtime, so nothing here imports ours. torch.hub lists every public
callable of this file, so imports that are callables carry an underscore.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import typing

import torch
from torch import nn

from backbones import available as _available
from backbones import build_backbone as _build_backbone

dependencies = ["torch"]


def _entry_point(
    arch: str,
    mode: str,
    pretrained: str | None = None,
    checkpoint_key: str = "teacher",
    **settings: typing.Any,
) -> nn.Module:
    """A backbone that returns features (B, num_features).

    Args:
        pretrained: path or http(s) URL of weights; None starts from random ones.
        checkpoint_key: which weights of a training checkpoint, "teacher" or "student".
        settings: build_backbone's keywords (gamma, patch_size, img_size, num_classes ...). They must be those that
            the weights were trained with; gamma, patch_size and the position policy of a checkpoint of ours are read
            from it where they are not given.

    Raises:
        ValueError: where the weights don't fit the model; the message names the keys.
    """
    if pretrained is None:
        return _build_backbone(arch, mode, **settings)
    content = _read(pretrained)
    if isinstance(content.get("config"), dict):
        recorded = content["config"]
        for name in ("gamma", "patch_size", "img_size", "in_chans", "pos_embed_policy", "value_min"):
            if name in recorded:
                settings.setdefault(name, recorded[name])
    elif mode == "simpool" and arch.startswith("vit"):
        settings.setdefault("pos_embed_policy", "reference")  # what published SimPool ViTs were trained with
    model = _build_backbone(arch, mode, **settings)
    _load(model, _backbone_weights(content, checkpoint_key), pretrained)
    return model


def _read(source: str) -> dict:
    """A checkpoint as tensors and plain values; anything that would run code is refused by torch."""
    with torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath]):
        if source.startswith(("http://", "https://")):
            content = torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
        elif not pathlib.Path(source).is_file():
            raise ValueError(f"no weights at {source!r}; give the path of a file or a URL")
        else:
            content = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds a {type(content).__name__}, not a checkpoint or a state dict")
    return content


def _backbone_weights(content: dict, checkpoint_key: str) -> dict:
    """The backbone's state dict inside a checkpoint, without the prefixes of wrappers and without the head."""
    for key in (checkpoint_key, "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {key.removeprefix("module."): value for key, value in content.items()}
    if any(key.startswith("backbone.") for key in weights):
        weights = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    return weights


def _load(model: nn.Module, weights: dict, source: str) -> None:
    """Loads all of the model's weights, or says which are missing, unexpected or of another shape."""
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - weights.keys())
    unexpected = sorted(weights.keys() - wanted.keys())
    reshaped = [k for k in wanted.keys() & weights.keys() if wanted[k].shape != weights[k].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": sorted(reshaped)}
    if any(problems.values()):
        listed = "; ".join(f"{what}: {', '.join(keys[:5])}" for what, keys in problems.items() if keys)
        raise ValueError(f"the weights in {source} are not this model's ({listed}); check its name, mode and settings")
    model.load_state_dict(weights)


for _arch in _available():
    for _mode, _name in (("official", _arch), ("simpool", f"{_arch}_simpool")):
        _point = functools.update_wrapper(functools.partial(_entry_point, _arch, _mode), _entry_point)
        _point.__name__ = _name
        globals()[_name] = _point
