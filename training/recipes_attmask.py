"""AttMask's recipes: the defaults of its published program, and the settings of its published runs."""

from __future__ import annotations

from typing import Any

# The defaults of the published main_attmask.py.
_PUBLISHED = {
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
    **_PUBLISHED,
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

# What `--data_path demo` trains if no model is chosen: a small ViT with patches small enough for masks to be seen.
_DEMO = {
    **_ATTMASK,
    "arch": "vit_small",
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "img_size": 32,
    "epochs": 6,
    "batch_size_per_gpu": 32,
    "lr": 0.005,
    "min_lr": 1e-5,
    "warmup_epochs": 1,
    "weight_decay_end": 0.04,
    "momentum_teacher": 0.98,
    "out_dim": 1024,
    "patch_out_dim": 1024,
    "warmup_teacher_temp_epochs": 0,
    "teacher_temp": 0.04,
    "teacher_patch_temp": 0.04,
    "drop_path_rate": 0.0,
    "global_crops_scale": (0.3, 1.0),
    "local_crops_number": 4,
    "local_crops_scale": (0.1, 0.4),
    "local_crops_size": 16,
    "pred_shape": "attmask_high",
    "num_workers": 0,
    "eval_every": 3,
    "nb_knn": [20],
}

RECIPES: dict[str, dict[str, Any]] = {
    "published": _PUBLISHED,
    "attmask": _ATTMASK,
    "attmask300": _ATTMASK_300,
    "attmask20": _ATTMASK_20,
    "ibot": _IBOT,
    "demo": _DEMO,
}
