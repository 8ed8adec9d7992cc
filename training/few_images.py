"""Settings for a few hundred or thousand images, unless the user chose others.

The published recipes are for 1.28 million images. With a few thousand, the same numbers mean only hundreds of steps:
the teacher hardly moves, some prototypes are never reached by any image, and the warm-up lasts as long as the run. The
values here come from runs on 4,000 images (docs/LOG.md); they are a starting point, not an optimum.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

FEW = 20_000


def fit_to_few_images(args: argparse.Namespace, images: int, begun_with: Mapping[str, Any]) -> None:
    """Replace values from a published recipe, noting which and why; explicit flags and an explicit --recipe win.

    begun_with: the arguments of the run that is continued, which keeps its values; empty for a new run.
    """
    if images >= FEW or args.recipe != "auto":
        return
    chosen = []
    for key, value, why in _choices(args, images):
        if key in begun_with:
            value, why = begun_with[key], "as the run began"
        if args.sources.get(key, "").startswith("recipe simpool") and getattr(args, key) != value:
            chosen.append(f"{key} {getattr(args, key)} -> {value} ({why})")
            setattr(args, key, value)
            args.sources[key] = f"for {images} images"
    if chosen:
        args.notes.append(f"{images} images are few for the published recipe; chosen instead: {'; '.join(chosen)}")


def _choices(args: argparse.Namespace, images: int) -> list[tuple[str, Any, str]]:
    batch = min(args.batch_size_per_gpu, 32 if images < 5_000 else 64, max(1, images // 2))
    choices = [
        ("batch_size_per_gpu", batch if args.global_batch_size is None else args.batch_size_per_gpu, "more steps"),
        ("out_dim", 1024 if images < 5_000 else 4096, "as many prototypes as so few images can fill"),
        ("momentum_teacher", 0.98 if images < 5_000 else 0.99, "so that the teacher moves within few steps"),
        ("teacher_temp", 0.04, "low: with few steps a higher one tends to collapse"),
        ("warmup_teacher_temp_epochs", 0, "nothing to warm up to"),
        ("warmup_epochs", min(args.warmup_epochs, max(1, args.epochs // 10)), "a tenth of the run"),
    ]
    return [choice for choice in choices if hasattr(args, choice[0])]
