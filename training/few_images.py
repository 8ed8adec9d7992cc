"""Settings for a few hundred or thousand images, unless the user chose others.

The published recipes are for 1.28 million images. With a few thousand, the same numbers mean only hundreds of steps:
the teacher or average hardly moves, some prototypes are never reached by any image, and the warm-up lasts as long as
the run. The values here come from runs on 4,000 to 10,000 images (docs/LOG.md); they are a starting point, not an
optimum.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from backbones import family
from runtime.distributed import get_world_size
from training.recipes import PUBLISHED_BATCH

FEW = 20_000
_SPAN = 0.1  # part of a supervised run that the average of its model spans; published: 25,000 steps of 216,000


def applies(args: argparse.Namespace, images: int) -> bool:
    """Whether the settings of a run of `images` images are fitted to so few."""
    return images < FEW and args.recipe == "auto"


def fit_to_few_images(args: argparse.Namespace, images: int, begun_with: Mapping[str, Any]) -> None:
    """Replace values from a published recipe, noting which and why; explicit flags and an explicit --recipe win.

    begun_with: the arguments of the run that is continued, which keeps its values; empty for a new run.
    """
    if not applies(args, images):
        return
    chosen = []
    for key, value, why in _choices(args, images):
        if key in begun_with:
            value, why = begun_with[key], "as the run began"
        source = args.sources.get(key, "")
        if source.startswith("recipe ") and source != "recipe demo" and getattr(args, key) != value:
            chosen.append(f"{key} {getattr(args, key)} -> {value} ({why})")
            setattr(args, key, value)
            args.sources[key] = f"for {images} images"
    if chosen:
        args.notes.append(f"{images} images are few for the published recipe; chosen instead: {'; '.join(chosen)}")


def _choices(args: argparse.Namespace, images: int) -> list[tuple[str, Any, str]]:
    batch = min(args.batch_size_per_gpu, 32 if images < 5_000 else 64, max(1, images // 2))
    if hasattr(args, "model_ema_decay"):
        return _supervised_choices(args, images, max(2, batch - batch % 2))  # mixing needs pairs
    choices = [
        ("batch_size_per_gpu", batch if args.global_batch_size is None else args.batch_size_per_gpu, "more steps"),
        ("out_dim", 1024 if images < 5_000 else 4096, "as many prototypes as so few images can fill"),
        ("momentum_teacher", 0.98 if images < 5_000 else 0.99, "so that the teacher moves within few steps"),
        ("teacher_temp", 0.04, "low: with few steps a higher one tends to collapse"),
        ("teacher_patch_temp", 0.04, "the same"),
        ("warmup_teacher_temp_epochs", 0, "nothing to warm up to"),
        ("warmup_epochs", min(args.warmup_epochs, max(1, args.epochs // 10)), "a tenth of the run"),
    ]
    return [choice for choice in choices if hasattr(args, choice[0])]


def _supervised_choices(args: argparse.Namespace, images: int, batch: int) -> list[tuple[str, Any, str]]:
    given = args.global_batch_size
    choices = [
        ("batch_size_per_gpu", batch if given is None else args.batch_size_per_gpu, "more steps"),
        ("warmup_epochs", min(args.warmup_epochs, max(1, args.epochs // 10)), "a tenth of the run"),
    ]
    global_batch = given or batch * get_world_size() * (args.grad_accum or 1)
    if args.optimizer in ("sgd", "nesterov"):
        lr = args.lr * global_batch / PUBLISHED_BATCH[family(args.arch)]
        choices.append(("lr", lr, "in proportion to the batch"))
    if args.model_ema_decay:
        steps = max(1, args.epochs * images // global_batch)
        decay = min(args.model_ema_decay, max(0.5, round(1 - 1 / (_SPAN * steps), 6)))
        choices.append(("model_ema_decay", decay, "so that the average spans a tenth of the run"))
    return choices
