"""Validating a saved head, also on images without the patches that another model attends to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from evaluation import cached, heads, identity, occlusion, options, records
from evaluation.forms import Form, probe_features
from evaluation.linear import Probe
from evaluation.linear_task import Task
from evaluation.models import LoadedModel, load_checkpoint_model
from runtime.guards import InputError, input_errors
from runtime.terminal import say


def run_saved(task: Task) -> dict[str, Any]:
    """Validate a saved head, ours or the published format."""
    args = task.args
    candidates = (
        [args.linear_weights]
        if args.linear_weights
        else [task.folder / n for n in ("best.pth.tar", "checkpoint.pth.tar")]
    )
    path = next((Path(c) for c in candidates if Path(c).is_file()), None)
    if path is None:
        raise InputError(
            f"--evaluate needs a saved head, but {' and '.join(map(str, candidates))} do not exist; train one first, "
            "or name the file with --linear_weights"
        )
    head = heads.read_head(path)
    form = head.form or task.forms()[0]
    if head.identity is not None:
        keys = [key for key in task.identity([form]) if key != "forms"]
        identity.require_same(
            head.identity, task.identity([form]), identity.recorded(head.identity, keys, str(path)),
            f"{path} was trained on other features", "Give the checkpoint, settings and classes that it belongs to",
        )  # fmt: skip
    width = task.widths([form])[0]
    if head.weight.shape[1] != width or head.weight.shape[0] < len(task.train.classes):
        raise InputError(
            f"{path} is a head of {head.weight.shape[1]} inputs and {head.weight.shape[0]} outputs; the model gives "
            f"{width} with {form.name} and the images have {len(task.train.classes)} classes: check --n_last_blocks, "
            "--avgpool_patchtokens, --arch and --data_path"
        )
    probe = Probe([width], [form], [1.0], head.weight.shape[0], 256, task.device)
    probe.groups[0].weight.copy_(head.weight[None])
    probe.groups[0].bias.copy_(head.bias[None])
    settings = {"linear_weights": str(path), "n_last_blocks": form.n, "avgpool_patchtokens": form.avgpool}
    if args.mask_ratios is None:
        top1, top5, loss = task.cache(task.val, [form], "validation features").count(probe)[0].tolist()
        say(records.table(["head", "val top-1", "val top-5"], [[str(path), top1, top5]]))
        masked = {}
    else:
        looker = load_looker(task)
        settings |= {"mask_by": str(looker.path), "mask_by_sha256": looker.sha256}
        (top1, top5, loss), *rest = masked_counts(task, form, width, probe, looker.model)
        rows = [{"hidden": r, "top1": a, "top5": b} for r, (a, b, _) in zip(args.mask_ratios, rest, strict=True)]
        table = [["0", top1, top5, 0.0], *([f"{r['hidden']:g}", r["top1"], r["top5"], r["top1"] - top1] for r in rows)]
        say(records.table(["hidden", "val top-1", "val top-5", "change"], table))
        masked = {"masked": rows}
    return task.write("eval_linear_saved", settings, {"val_top1": top1, "val_top5": top5, "val_loss": loss} | masked)


def load_looker(task: Task) -> LoadedModel:
    """The model of --mask_by. Raises InputError if it has no attention map, or takes other images."""
    path, size = task.args.mask_by, task.extraction["img_size"]
    looker = load_checkpoint_model(path, checkpoint_key=task.args.checkpoint_key, device=task.device)
    channels = options.channels(task.loaded.config)
    if options.channels(looker.config) != channels:
        raise InputError(
            f"--mask_by {path}: it takes images of {options.channels(looker.config)} channels, not {channels}"
        )
    with input_errors(f"--mask_by {path} can't decide what to hide"), torch.no_grad():
        looker.model.get_attention_map(torch.zeros(1, channels, size, size, device=task.device))
    return looker


def masked_counts(task: Task, form: Form, width: int, probe: Probe, looker: nn.Module) -> list[list[float]]:
    """[top-1, top-5, loss] of a head on val as it is, then with each of --mask_ratios hidden, in one pass."""
    count = 1 + len(task.args.mask_ratios)
    forward = occlusion.at_every_ratio(
        lambda images: probe_features(task.model, images, [form])[0], looker, task.args.mask_ratios
    )
    found = cached.cache(
        task.model, task.val, [form] * count, [width] * count, task.extraction, "validation features", forward=forward
    )
    return [cached.Cached([part], found.labels).count(probe)[0].tolist() for part in found.features]
