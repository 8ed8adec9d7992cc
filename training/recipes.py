"""Published recipes: from an architecture's name to the defaults of its family.

The SimPool recipes are those of its paper's 100-epoch ImageNet-1k runs, for ViT-S/16, ResNet-50 and ConvNeXt-S, with
DINO and with labels; `dino` is DINO's own for ViT-S/16, `finetune` is AttMask's transfer; those for small
images and for continuing are in recipes_small.py. A recipe sets only what differs between those of its method; the
user's flags win.
"""

from __future__ import annotations

import argparse
from typing import Any

from backbones import family
from runtime.cli import near_hint
from training import recipes_attmask, recipes_small

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

_DEMO_MODEL = {
    "arch": "vit_small",
    "mode": "simpool",
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "img_size": 32,
    "epochs": 12,
}

# What `--data_path demo` trains if no model is chosen: a small ViT, in minutes on a laptop. The values are those of the
# quick start, for hundreds of steps instead of DINO's hundred thousand; docs/LOG.md describes how they were found.
_DEMO = {
    **_DINO,
    **_DEMO_MODEL,
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

_SUPERVISED_VIT = {
    "batch_size_per_gpu": 74,
    "optimizer": "adamw",
    "lr": 5e-4,
    "min_lr": 1e-6,
    "warmup_lr": 1e-6,
    "warmup_epochs": 5,
    "weight_decay": 0.05,
    "clip_grad": 0.0,
    "drop_rate": 0.1,
    "drop_path_rate": 0.1,
    "layer_decay": 1.0,
    "smoothing": 0.1,
    "mixup": 0.2,
    "cutmix": 0.0,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "aug_splits": 0,
    "jsd_loss": False,
    "split_bn": False,
    "reprob": 0.25,
    "resplit": False,
    "aug_repeats": 1,
    "model_ema_decay": 0.99996,
    "crop_pct": 0.9,
}

_SUPERVISED_RESNET = {
    **_SUPERVISED_VIT,
    "batch_size_per_gpu": 128,
    "optimizer": "nesterov",
    "lr": 0.4,
    "weight_decay": 2e-5,
    "drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "mixup": 0.0,
    "aug_splits": 3,
    "jsd_loss": True,
    "split_bn": True,
    "reprob": 0.6,
    "resplit": True,
    "model_ema_decay": 0.0,
    "crop_pct": 0.95,
}

_SUPERVISED_CONVNEXT = {
    **_SUPERVISED_VIT,
    "batch_size_per_gpu": 128,
    "lr": 1e-3,
    "drop_rate": 0.0,
    "drop_path_rate": 0.4,
    "mixup": 0.8,
    "cutmix": 1.0,
    "model_ema_decay": 0.9999,
    "crop_pct": 0.875,
}

# AttMask's transfer: DeiT's recipe, from pretrained weights. lr 7.5e-6 per 512 images, for a global batch of 900.
_FINETUNE = {
    **_SUPERVISED_VIT,
    "epochs": 500,
    "batch_size_per_gpu": 100,
    "lr": 7.5e-6 * 900 / 512,
    "drop_rate": 0.0,
    "mixup": 0.8,
    "cutmix": 1.0,
    "aug_repeats": 3,
}

# What `--data_path demo` trains with labels if no model is chosen; docs/LOG.md tells what it reaches.
_SUPERVISED_DEMO = {
    **_SUPERVISED_VIT,
    **_DEMO_MODEL,
    "batch_size_per_gpu": 64,
    "lr": 1e-3,
    "warmup_epochs": 1,
    "drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "auto_augment": "none",
    "reprob": 0.0,
    "model_ema_decay": 0.99,
    "crop_pct": 1.0,
    "num_workers": 0,
}

# The global batch for which a recipe's learning rate is meant, if the method does not scale it with the batch.
PUBLISHED_BATCH = {"vit": 592, "resnet": 1024, "convnext": 1024, "finetune": 900}

# method -> recipe -> values of flags
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "dino": {
        "simpool_vit": _SIMPOOL_VIT,
        "simpool_resnet": _SIMPOOL_RESNET,
        "simpool_convnext": _SIMPOOL_CONVNEXT,
        "dino": _DINO,
        "demo": _DEMO,
        **recipes_small.RECIPES,
        "continue_vit": recipes_small.continued(_SIMPOOL_VIT),
        "continue_resnet": recipes_small.continued(_SIMPOOL_RESNET),
        "continue_convnext": recipes_small.continued(_SIMPOOL_CONVNEXT),
    },
    "attmask": recipes_attmask.RECIPES,
    "supervised": {
        "vit": _SUPERVISED_VIT,
        "resnet": _SUPERVISED_RESNET,
        "convnext": _SUPERVISED_CONVNEXT,
        "finetune": _FINETUNE,
        "demo": _SUPERVISED_DEMO,
    },
}


def find(method: str, arch: str, recipe: str = "auto") -> tuple[str, dict[str, Any]]:
    """The full name and the values of a recipe; a method without recipes has an empty one, named "none".

    `auto` and `simpool` mean the recipe of the architecture's family; `official` does too, in supervised training,
    whose poolings share one. A name such as `cifar`, of which there is one for each family, means
    `cifar_FAMILY`. Raises ValueError for an unknown recipe, and for one that the family does not have.
    """
    known = RECIPES.get(method, {})
    if recipe == "auto" and not known:
        return "none", {}
    if recipe == "auto" and "published" in known:
        recipe = "published"
    name = recipe
    if recipe in ("auto", "simpool", "official"):
        named = [family(arch)] if recipe == "official" else [f"simpool_{family(arch)}", family(arch)]
        name = next((n for n in named if n in known), recipe)
    if name not in known and f"{recipe}_{family(arch)}" in known:
        name = f"{recipe}_{family(arch)}"
    families = [other.removeprefix(f"{recipe}_") for other in known if other.startswith(f"{recipe}_")]
    if name not in known and families:
        raise ValueError(f"--recipe {recipe!r} has no values for {arch}; it is for {' and '.join(families)} networks")
    if name not in known:
        short = [other.removesuffix(f"_{family(arch)}") for other in known]
        hint = near_hint(recipe, ["auto", *short])
        raise ValueError(f"--recipe {recipe!r} is unknown; choose {', '.join(['auto', *known])}{hint}")
    return name, known[name]


def is_demo(data_path: str | None) -> bool:
    """Whether the images are the built-in ones."""
    return (data_path or "").partition(":")[0] == "demo"


def note_batch(args: argparse.Namespace, global_batch: int) -> None:
    """A note if a recipe's learning rate, which is not scaled, meets a global batch that it is not meant for."""
    source = args.sources.get("lr", "")
    published = PUBLISHED_BATCH.get(source.removeprefix("recipe "))
    if source.startswith("recipe ") and published not in (None, global_batch):
        args.notes.append(
            f"lr {args.lr:.3g} is the recipe's for a global batch of {published}, and this one is {global_batch}: "
            f"--global_batch_size {published} restores it; {args.lr * global_batch / published:.3g} is in proportion"
        )
