"""Published recipes: from an architecture's name to the defaults of its family.

The SimPool recipes are those of its paper's 100-epoch ImageNet-1k runs, for ViT-S/16, ResNet-50 and ConvNeXt-S;
`dino` is DINO's own for ViT-S/16. A recipe sets only what differs between them; the user's flags win.
"""

from __future__ import annotations

from typing import Any

from backbones import family

_SIMPOOL_VIT = {
    "batch_size_per_gpu": 100,
    "optimizer": "adamw",
    "lr": 5e-4,
    "min_lr": 1e-5,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "out_dim": 65536,
    "use_bn_in_head": False,
    "norm_last_layer": False,
    "momentum_teacher": 0.996,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.07,
    "warmup_teacher_temp_epochs": 30,
    "warmup_epochs": 10,
    "global_crops_scale": (0.25, 1.0),
    "local_crops_scale": (0.05, 0.25),
    "local_crops_number": 6,
    "clip_grad": 0.0,
    "freeze_last_layer": 1,
    "drop_path_rate": 0.1,
}

_SIMPOOL_RESNET = {
    **_SIMPOOL_VIT,
    "batch_size_per_gpu": 90,
    "optimizer": "lars",
    "lr": 0.3,
    "min_lr": 0.0048,
    "weight_decay": 1e-6,
    "weight_decay_end": 1e-6,
    "out_dim": 60000,
    "use_bn_in_head": True,
    "norm_last_layer": True,
    "warmup_teacher_temp_epochs": 50,
    "global_crops_scale": (0.14, 1.0),
    "local_crops_scale": (0.05, 0.14),
    "drop_path_rate": 0.0,
}

_SIMPOOL_CONVNEXT = {
    **_SIMPOOL_VIT,
    "batch_size_per_gpu": 60,
    "lr": 1e-3,
    "min_lr": 2e-6,
    "norm_last_layer": True,
    "warmup_teacher_temp_epochs": 50,
    "global_crops_scale": (0.14, 1.0),
    "local_crops_scale": (0.05, 0.14),
    "clip_grad": 0.3,
    "freeze_last_layer": 3,
    "drop_path_rate": 0.4,
}

_DINO = {
    **_SIMPOOL_VIT,
    "batch_size_per_gpu": 64,
    "min_lr": 1e-6,
    "norm_last_layer": True,
    "teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 0,
    "global_crops_scale": (0.4, 1.0),
    "local_crops_scale": (0.05, 0.4),
    "local_crops_number": 8,
    "clip_grad": 3.0,
}

# What `--data_path demo` trains if no model is chosen: a small ViT, in minutes on a laptop. The values are those of the
# quick start, for hundreds of steps instead of DINO's hundred thousand; docs/LOG.md describes how they were found.
_DEMO = {
    **_DINO,
    "arch": "vit_small",
    "mode": "simpool",
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "img_size": 32,
    "epochs": 12,
    "batch_size_per_gpu": 32,
    "lr": 0.005,
    "min_lr": 1e-5,
    "warmup_epochs": 1,
    "weight_decay_end": 0.04,
    "momentum_teacher": 0.98,
    "out_dim": 1024,
    "drop_path_rate": 0.0,
    "global_crops_scale": (0.3, 1.0),
    "local_crops_number": 6,
    "local_crops_scale": (0.1, 0.4),
    "local_crops_size": 16,
    "num_workers": 0,
    "eval_every": 4,
    "nb_knn": [20],
}

# The defaults of the published main_attmask.py.
_ATTMASK_PUBLISHED = {
    "batch_size_per_gpu": 128,
    "optimizer": "adamw",
    "lr": 5e-4,
    "min_lr": 1e-6,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "warmup_epochs": 10,
    "clip_grad": 3.0,
    "freeze_last_layer": 1,
    "drop_path_rate": 0.1,
    "out_dim": 65536,
    "patch_out_dim": 8192,
    "shared_head": False,
    "shared_head_teacher": True,
    "norm_last_layer": True,
    "momentum_teacher": 0.996,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04,
    "warmup_teacher_patch_temp": 0.04,
    "teacher_patch_temp": 0.07,
    "warmup_teacher_temp_epochs": 30,
    "global_crops_number": 2,
    "global_crops_scale": (0.14, 1.0),
    "local_crops_number": 0,
    "local_crops_scale": (0.05, 0.4),
    "pred_shape": "attmask_high",
    "pred_ratio": (0.3,),
    "pred_ratio_var": (0.0,),
    "pred_start_epoch": 0,
    "masking_prob": 0.5,
    "show_max": 0.1,
    "lambda1": 1.0,
    "lambda2": 1.0,
    "eval_every": 10,
    "saveckp_freq": 40,
}

# AttMask's 100 epochs of ImageNet-1k with ViT-S/16, on 4 GPUs.
_ATTMASK = {
    **_ATTMASK_PUBLISHED,
    "batch_size_per_gpu": 60,
    "epochs": 100,
    "out_dim": 8192,
    "shared_head": True,
    "norm_last_layer": False,
    "teacher_temp": 0.07,
    "global_crops_scale": (0.25, 1.0),
    "local_crops_number": 10,
    "local_crops_scale": (0.05, 0.25),
    "pred_shape": "attmask_hint",
    "pred_ratio_var": (0.2,),
}

# Its 300 epochs, on 8 GPUs.
_ATTMASK_300 = {
    **_ATTMASK,
    "batch_size_per_gpu": 100,
    "epochs": 300,
    "global_crops_scale": (0.32, 1.0),
    "local_crops_scale": (0.05, 0.32),
    "pred_shape": "attmask_high",
}

# A fifth of ImageNet-1k: the first 260 images of each class.
_ATTMASK_20 = {**_ATTMASK, "subset": 260, "momentum_teacher": 0.99, "local_crops_number": 6}

_IBOT = {**_ATTMASK, "pred_shape": "block", "pred_ratio": (0.0, 0.3), "pred_ratio_var": (0.0, 0.2)}

_ATTMASK_DEMO = {
    **_ATTMASK,
    **{key: value for key, value in _DEMO.items() if key not in ("use_bn_in_head", "mode")},
    "patch_size": 4,
    "local_crops_number": 4,
    "pred_shape": "attmask_high",
}

# method -> recipe -> values of flags
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "dino": {
        "simpool_vit": _SIMPOOL_VIT,
        "simpool_resnet": _SIMPOOL_RESNET,
        "simpool_convnext": _SIMPOOL_CONVNEXT,
        "dino": _DINO,
        "demo": _DEMO,
    },
    "attmask": {
        "published": _ATTMASK_PUBLISHED,
        "attmask": _ATTMASK,
        "attmask300": _ATTMASK_300,
        "attmask20": _ATTMASK_20,
        "ibot": _IBOT,
        "demo": _ATTMASK_DEMO,
    },
}
AUTOMATIC = {"attmask": "published"}


def find(method: str, arch: str, recipe: str = "auto") -> tuple[str, dict[str, Any]]:
    """The full name and the values of a recipe; a method without recipes has an empty one, named "none".

    For DINO, `auto` and `simpool` mean the SimPool recipe of the architecture's family.
    Raises ValueError for an unknown recipe.
    """
    known = RECIPES.get(method, {})
    if recipe == "auto" and not known:
        return "none", {}
    if recipe == "auto" and method in AUTOMATIC:
        recipe = AUTOMATIC[method]
    name = f"simpool_{family(arch)}" if recipe in ("auto", "simpool") else recipe
    if name not in known:
        raise ValueError(f"--recipe {recipe!r} is unknown; choose {', '.join(['auto', *known])}")
    return name, known[name]


def is_demo(data_path: str | None) -> bool:
    """Whether the images are the built-in ones."""
    return (data_path or "").partition(":")[0] == "demo"
