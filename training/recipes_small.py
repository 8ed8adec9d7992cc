"""Recipes for small images, and for continuing on images of one's own: published runs, and what was found here.

docs/recipes.md tells how to choose among them, docs/LOG.md what was tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# lightly's Imagenette benchmark: ResNet-18, 128 pixels, 200 epochs, a constant teacher; 87.3 % k-NN (k = 200) of the
# student as published there.
_IMAGENETTE = {
    "arch": "resnet18",
    "img_size": 128,
    "epochs": 200,
    "batch_size_per_gpu": 256,
    "optimizer": "sgd",
    "lr": 0.06,
    "min_lr": 0.0,
    "warmup_epochs": 0,
    "weight_decay": 5e-4,
    "weight_decay_end": 5e-4,
    "clip_grad": 0.0,
    "freeze_last_layer": 0,
    "drop_path_rate": 0.0,
    "out_dim": 2048,
    "head_layers": 3,
    "head_hidden_dim": 2048,
    "bottleneck_dim": 256,
    "use_bn_in_head": True,
    "norm_last_layer": True,
    "momentum_teacher": 0.99,
    "momentum_teacher_end": 0.99,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 0,
    "global_crops_number": 2,
    "global_crops_scale": (0.4, 1.0),
    "local_crops_number": 6,
    "local_crops_scale": (0.05, 0.4),
    "local_crops_size": 64,
}

# lightly's CIFAR-10 benchmark, as far as it differs: two crops of 32 pixels, no blur, a head of two layers, batch 128;
# 84.0 % published there. The rest is Imagenette's.
_CIFAR_RESNET = {
    **{key: value for key, value in _IMAGENETTE.items() if key != "arch"},
    "img_size": 32,
    "batch_size_per_gpu": 128,
    "head_layers": 2,
    "blur_prob": (0.0, 0.0, 0.0),
    "local_crops_number": 0,
    "local_crops_size": 16,
}

# The same views and head for a ViT with patches of 4, trained as the demo's is: AdamW, a warm-up, clipping. There is no
# published run of these values.
_CIFAR_VIT = {
    **_CIFAR_RESNET,
    "patch_size": 4,
    "optimizer": "adamw",
    "lr": 0.002,
    "min_lr": 1e-5,
    "warmup_epochs": 10,
    "weight_decay": 0.04,
    "weight_decay_end": 0.04,
    "clip_grad": 3.0,
    "freeze_last_layer": 1,
    "use_bn_in_head": False,
    "momentum_teacher_end": 1.0,
}


def continued(published: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture's published recipe, changed for a backbone that is trained already and should lose nothing.

    A tenth of the rate, a slow teacher (which is what the evaluations read), and a new head that learns for two epochs
    before the backbone does. Fewer prototypes and a low teacher temperature, because such sets are small.
    """
    return {
        **published,
        "checkpoint_key": "teacher",
        "epochs": 20,
        "batch_size_per_gpu": 64,
        "lr": published["lr"] / 10,
        "min_lr": published["min_lr"] / 10,
        "warmup_epochs": 4,
        "freeze_backbone_epochs": 2,
        "weight_decay_end": published["weight_decay"],
        "out_dim": 4096,
        "norm_last_layer": True,
        "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.04,
        "warmup_teacher_temp_epochs": 0,
        "momentum_teacher": 0.999,
        "drop_path_rate": 0.0,
    }


RECIPES: dict[str, dict[str, Any]] = {
    "imagenette": _IMAGENETTE,
    "cifar_vit": _CIFAR_VIT,
    "cifar_resnet": _CIFAR_RESNET,
}
