"""torch.hub entry points: each of our backbones, official and pooled by SimPool.

    model = torch.hub.load("PATH_OR_REPOSITORY", "vit_small_simpool")
    model = torch.hub.load("PATH_OR_REPOSITORY", "resnet50", pretrained="checkpoint.pth", checkpoint_key="teacher")

Each entry point takes build_backbone's keywords, and `pretrained`, a path or URL of weights. Without it the model is
randomly initialised and nothing is downloaded. The other poolings have no names of their own: `vit_small` builds them
with mode="gem", or from a file that records one. The weights may be a training checkpoint (ours or a published one) or
a plain state dict; no code in the file is executed.

A hub user's own modules may be named utils, data or runtime, so nothing here imports ours. torch.hub lists every public
callable of this file, so the names of imported callables begin with an underscore.
"""

from __future__ import annotations

import functools
import pathlib
import typing
import urllib.parse

import torch
from torch import nn

import pretrained as _pretrained
from backbones import ALIASES
from backbones import available as _available
from backbones import build_backbone as _build_backbone

dependencies = ["torch"]


def _entry_point(
    arch: str,
    named_mode: str,
    pretrained: str | None = None,
    checkpoint_key: str = "teacher",
    mode: str | None = None,
    **settings: typing.Any,
) -> nn.Module:
    """A backbone that returns features (B, num_features).

    Args:
        pretrained: path or http(s) URL of weights; None for random ones.
        checkpoint_key: which weights of a training checkpoint, "teacher" or "student".
        mode: a pooling other than the one that the entry point is named for.
        settings: build_backbone's keywords (gamma, patch_size, img_size, num_classes ...). Those not given are taken
            from the file: every setting that it records, or that follows from the shapes of its weights.

    Raises:
        ValueError: if the file cannot be read safely, holds a different model from the one named, has weights that
            don't fit, or lacks a setting, which must then be given.
        OSError: if the file or the URL cannot be opened.
    """
    if named_mode == "simpool" and mode not in (None, "simpool"):
        raise ValueError(f"{arch}_simpool is not for mode {mode}; use {arch} with mode={mode!r}")
    if pretrained is None:
        return _build_backbone(arch, mode or named_mode, **settings)
    found = _pretrained.open_pretrained(_local(pretrained), checkpoint_key)
    recorded = dict(found.settings)
    resized = arch in ALIASES.values() and "embed_dim" in recorded  # a ViT of custom size loads under any ViT's name
    there = recorded.pop("arch", arch)
    if ALIASES.get(there, there) != arch and not resized:
        raise ValueError(f"the weights in {pretrained} are for arch {there}, not {arch}; check the entry point's name")
    given = settings if mode is None else {"mode": mode, **settings}
    missing = [name for name in found.unknown if name not in given]
    if missing:
        raise ValueError(
            f"{pretrained} does not tell {', '.join(missing)}; give it by name, as in {_EXAMPLES[missing[0]]}"
        )
    mode = _mode_of(recorded.pop("mode", mode), named_mode, mode, pretrained)
    if mode != "simpool":
        recorded.pop("gamma", None)
    settings = {**recorded, **settings}
    with torch.device("meta"):  # compared before memory is allocated: a small file can name a model of any size
        _pretrained.check_fit(_build_backbone(arch, mode, **settings), found.weights, pretrained)
    model = _build_backbone(arch, mode, **settings)
    _pretrained.load_weights(model, found.weights, pretrained)
    return model


_EXAMPLES = {
    "num_heads": "num_heads=3", "mode": 'mode="gap"', "gamma": "gamma=1.25", "pool_position": 'pool_position="after"',
    "pooling_args": 'pooling_args={"p": 2}',
}  # fmt: skip


def _mode_of(there: str, named: str, asked: str | None, path: str) -> str:
    """The file's mode, if it is the one asked for, or, by default, one that the entry point's name allows."""
    fits = there == asked if asked is not None else there == named or (named == "official" and there != "simpool")
    if not fits:
        raise ValueError(
            f"the weights in {path} are for mode {there}, not {asked or named}; check the entry point's name and mode"
        )
    return there


def _local(source: str) -> str:
    """The path of the weights; a URL is first downloaded into torch.hub's folder, once."""
    if not source.startswith(("http://", "https://")):
        return source
    name = pathlib.PurePosixPath(urllib.parse.urlparse(source).path).name or "weights.pth"
    path = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(source, str(path))
    return str(path)


for _arch in _available():
    for _mode, _name in (("official", _arch), ("simpool", f"{_arch}_simpool")):
        _point = functools.update_wrapper(functools.partial(_entry_point, _arch, _mode), _entry_point)
        _point.__name__ = _name
        globals()[_name] = _point
