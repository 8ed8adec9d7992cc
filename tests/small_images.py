"""A small labelled image root, and a checkpoint of ours to evaluate on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import backbones
from runtime.checkpoint import save_checkpoint


def small_root(images: Path, folder: Path, classes: int = 4, train: int = 24, val: int = 8) -> Path:
    """The first images of the first classes of an image-folder root, linked into `folder`."""
    for split, count in (("train", train), ("val", val)):
        for source in sorted(p for p in (images / split).iterdir() if p.is_dir())[:classes]:
            target = folder / split / source.name
            target.mkdir(parents=True)
            for image in sorted(source.iterdir())[:count]:
                os.link(image, target / image.name)
    return folder


def tiny_checkpoint(path: Path, mode: str = "simpool", seed: int = 0, epoch: int = 3) -> Path:
    """A checkpoint in our format with a 3-block ViT of width 24 for 32-pixel images."""
    torch.manual_seed(seed)
    config = {
        "arch": "vit_small", "mode": mode, "gamma": 1.25 if mode == "simpool" else None, "patch_size": 8,
        "img_size": 32, "in_chans": 3, "embed_dim": 24, "depth": 3, "num_heads": 2, "pos_embed_policy": "exact",
        "value_min": "image",
    }  # fmt: skip
    model = backbones.build_backbone(**config)
    teacher = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint({"teacher": teacher, "epoch": epoch, "config": config}, path)
    return path


def labelled_checkpoint(path: Path, classes: int = 5, **settings: Any) -> Path:
    """A checkpoint as training with labels writes it: a student alone, of a backbone and a linear head."""
    torch.manual_seed(0)
    config = {"arch": "vit_small", "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    config = settings or config
    model = backbones.build_backbone(**config)
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):  # not the initial ones
            value.add_(torch.rand_like(value))
        if name.startswith("stages.") and name.endswith(".gamma"):  # layer scale: at first blocks hardly count
            value.fill_(0.3)
    head = torch.nn.Linear(model.num_features, classes)
    student = {f"module.backbone.{name}": value for name, value in model.state_dict().items()}
    student |= {f"module.head.{name}": value for name, value in head.state_dict().items()}
    save_checkpoint({"student": student, "epoch": 3, "config": {**config, "method": "supervised"}}, path)
    return path
