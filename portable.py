"""load: an exported file, or any checkpoint, as a model in one line.

    import portable

    model = portable.load("model.safetensors")      # in eval mode
    feature = model(images)                         # (B, 3, H, W), normalised by ImageNet's mean and deviation

It needs torch, the files of the backbones and, for safetensors, the package of that name; none of the programs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import backbones
import pretrained


def load(path: str | Path, checkpoint_key: str = "teacher") -> nn.Module:
    """The backbone that a file holds, in eval mode and float32; its settings are in the attribute `settings`.

    Args:
        path: an export (safetensors or torch), or a training checkpoint, ours or published.
        checkpoint_key: which network of a training checkpoint, "teacher" or "student".

    Raises:
        ValueError: if the file is damaged, does not fit the model it records, or lacks a setting (the message names
            the setting; torch.hub's entry points take it as a keyword).
        OSError: if the file cannot be opened.
    """
    found = pretrained.open_pretrained(path, checkpoint_key)
    if found.unknown or "arch" not in found.settings:
        missing = ", ".join([*found.unknown, *(["arch"] if "arch" not in found.settings else [])])
        raise ValueError(f"{path} does not tell {missing}; load it through hubconf, whose entry points take it by name")
    with torch.device("meta"):  # compared before memory is allocated: a small file can name a model of any size
        pretrained.check_fit(backbones.build_backbone(**found.settings), found.weights, path)
    model = backbones.build_backbone(**found.settings)
    pretrained.load_weights(model, found.weights, path)
    model.settings = dict(found.settings)
    return model.eval()
