"""load: an exported file, or any checkpoint, as a model in one line.

    import portable

    model = portable.load("model.safetensors")      # in eval mode
    feature = model(images)                         # (B, 3, H, W), normalised by ImageNet's mean and deviation

It needs torch, the files of the backbones and, for safetensors, the package of that name; none of the programs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import backbones
import pretrained


def load(path: str | Path, checkpoint_key: str = "teacher", classifier: bool = False) -> nn.Module:
    """The backbone that a file holds, in eval mode and float32; its settings are in the attribute `settings`.

    Args:
        path: an export (safetensors or torch), or a training checkpoint, ours or published.
        checkpoint_key: which network of a training checkpoint, "teacher" or "student".
        classifier: add the linear classifier that lies with the backbone: the result is then a chain of `backbone` and
            `head`, which gives logits.

    Raises:
        ValueError: if the file is damaged, does not fit the model it records, lacks a setting (the message names
            the setting; torch.hub's entry points take it as a keyword), or has no classifier though one is asked for.
        OSError: if the file cannot be opened.
    """
    content = pretrained.read(path)
    found = pretrained.interpret(content, path, checkpoint_key)
    if found.unknown or "arch" not in found.settings:
        missing = ", ".join([*found.unknown, *(["arch"] if "arch" not in found.settings else [])])
        raise ValueError(f"{path} does not tell {missing}; load it through hubconf, whose entry points take it by name")
    with torch.device("meta"):  # compared before memory is allocated: a small file can name a model of any size
        pretrained.check_fit(backbones.build_backbone(**found.settings), found.weights, path)
    model = backbones.build_backbone(**found.settings)
    pretrained.load_weights(model, found.weights, path)
    if classifier:
        head = _head(content, checkpoint_key, path, model.num_features)
        model = nn.Sequential(OrderedDict(backbone=model, head=head))
    model.settings = dict(found.settings)
    return model.eval()


def _head(content: Mapping[str, Any], checkpoint_key: str, path: str | Path, width: int) -> nn.Linear:
    found = pretrained.find_classifier(content, checkpoint_key, path, width)
    if found is None:
        raise ValueError(f"{path} holds no linear classifier of {width} features; load it with classifier=False")
    weight, bias = found
    head = nn.Linear(width, len(bias))
    head.load_state_dict({"weight": weight, "bias": bias})
    return head
