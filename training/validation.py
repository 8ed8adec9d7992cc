"""Validation of a classifier: top-1, top-5 and loss of the model and of its average, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data.loader import build_eval_loader, normalize
from data.sampler import shard_for_eval
from data.source import ImageSource
from evaluation.features import Interrupted, eval_mode, report_skipped
from runtime.distributed import all_gather_objects, get_rank, get_world_size
from training.run import Run
from training.watch import draw_attention, probe_images

BATCH = 128


class Validation:
    """The watch of a supervised run: every validation image once, resized to img_size / crop_pct and cut centrally."""

    tells_before_training = False  # a random head is at chance

    def __init__(self, run: Run, train: ImageSource, val: ImageSource | None) -> None:
        self.run, self.val = run, val
        self.can_evaluate = val is not None
        self._probe = probe_images(train, run.args.img_size, "pictures")

    def monitor(self, epoch: int) -> tuple[dict[str, float], str | None]:
        """Nothing: the loss tells how training is going."""
        return {}, None

    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, dict[str, Any]]:
        """{"val": {"model": {"top1", "top5", "loss"}, "average": the same}}; no "average" in a run without one.

        top1 and top5 in percent, loss the mean cross-entropy of the labels. Raises Interrupted on all ranks.
        """
        models = {"model": self.run.whole_student()}
        if self.run.teacher is not None:
            models["average"] = self.run.whole_teacher()
        return {"val": validate(models, self.val, self.run, should_stop)}

    def score(self, row: dict[str, Any]) -> float | None:
        """Top-1 of the average, or of the model without one."""
        return (row["val"].get("average") or row["val"]["model"])["top1"]

    def pictures(self, folder: Path) -> list[Path]:
        """attention.png: the maps of the average, or of the model without one, next to those of an untrained one."""
        model = self.run.whole_student() if self.run.teacher is None else self.run.whole_teacher()
        return draw_attention(self.run, model.backbone, self._probe, folder)


@torch.no_grad()
def validate(
    models: dict[str, nn.Module], val: ImageSource, run: Run, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, dict[str, float]]:
    """Results of several classifiers on the same images; all ranks take part, and all get the results.

    Raises Interrupted, on all ranks, if `should_stop` said so on any of them.
    """
    args, device = run.args, run.hardware.device
    for model in models.values():
        _share_buffers(model)
    share = shard_for_eval(len(val), get_rank(), get_world_size())
    loader = build_eval_loader(
        val, BATCH, args.num_workers, args.img_size, math.floor(args.img_size / args.crop_pct), share,
        pin_memory=device.type == "cuda", on_bad_image="skip",
    )  # fmt: skip
    counts = {name: torch.zeros(3, dtype=torch.float64) for name in models}  # top-1, top-5, loss
    labels, seen, stopped = torch.as_tensor(val.labels), [], False
    for images, index in loader:
        stopped = stopped or should_stop()
        if stopped:
            break
        seen.append(index)
        if not len(images):  # a batch of bad files only
            continue
        images = normalize(images.to(device, non_blocking=True)).contiguous(memory_format=run.hardware.memory_format)
        targets = labels[index].to(device)
        for name, model in models.items():
            with eval_mode(model), run.hardware.autocast():
                logits = model(images).float()  # (B, classes)
            counts[name] += _hits(logits, targets).to("cpu", torch.float64)
    if any(all_gather_objects(stopped)):
        raise Interrupted
    good = torch.cat([torch.empty(0, dtype=torch.int64), *seen])
    total = len(val) - report_skipped(val, np.setdiff1d(share, good.numpy()).tolist(), "validation")
    of_ranks = all_gather_objects({name: count.tolist() for name, count in counts.items()})
    means = {
        name: [sum(column) / total for column in zip(*(of[name] for of in of_ranks), strict=True)] for name in models
    }
    return {name: {"top1": 100 * top1, "top5": 100 * top5, "loss": loss} for name, (top1, top5, loss) in means.items()}


def _hits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(images with the right class first, among the first five, sum of the cross-entropy), (3,)."""
    hit = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="none")
    return torch.stack([hit[:, 0].float().sum(), hit.float().sum(), loss.sum()])


def _share_buffers(model: nn.Module) -> None:
    """Give all ranks rank 0's buffers, which are those that a checkpoint holds: BatchNorm's differ between ranks."""
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
