"""Validating a saved head, linear or attentive, also on images without the patches that another model attends to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation import cached, heads, identity, occlusion, options, records
from evaluation.forms import Form, probe_features
from evaluation.linear import Probe, hits_and_losses, in_double
from evaluation.linear_task import Task
from evaluation.models import LoadedModel, load_checkpoint_model
from evaluation.probe_heads import ProbeHead, is_attentive, read_attentive
from evaluation.probe_inputs import extract_inputs
from evaluation.probe_names import ProbeName
from evaluation.probe_plan import draw_maps
from poolings.base import no_autocast
from runtime.checkpoint import read_checkpoint
from runtime.guards import InputError, input_errors
from runtime.terminal import say


class Logits:
    """Counts the hits of an attentive head from its logits (B, C), as `Probe` counts those of linear heads."""

    heads = ("",)

    def __init__(self, classes: int, device: torch.device) -> None:
        self.logits_per_image, self.device = classes, device

    @torch.no_grad()
    def count(self, logits: list[Tensor], target: Tensor) -> Tensor:
        """Hits at top-1, hits at top-5 and the sum of losses, (1, 3) float64."""
        return in_double(hits_and_losses(logits[0].unsqueeze(1), target))


@dataclass
class Saved:
    """A head that has been read: what it sees of images, as (B, width), and what counts its hits on that."""

    forward: Callable[[Tensor], Tensor]
    width: int
    probe: Probe | Logits
    settings: dict[str, Any]
    attentive: tuple[ProbeName, ProbeHead] | None = None


def run_saved(task: Task) -> dict[str, Any]:
    """Validate a saved head, ours or the published format."""
    args, path = task.args, find_head(task)
    content = read_checkpoint(path)
    saved = attentive_head(task, path, content) if is_attentive(content) else linear_head(task, path)
    if args.probe_maps is not None and saved.attentive is None:
        raise InputError(f"--probe_maps draws what queries look at, and {path} is a linear head: leave it out")
    settings = {"linear_weights": str(path), **saved.settings}
    looker = load_looker(task) if args.mask_ratios is not None else None
    (top1, top5, loss), *rest = counts(task, saved, looker.model if looker else None)
    masked = {}
    if looker is None:
        say(records.table(["head", "val top-1", "val top-5"], [[str(path), top1, top5]]))
    else:
        settings |= {"mask_by": str(looker.path), "mask_by_sha256": looker.sha256}
        rows = [{"hidden": r, "top1": a, "top5": b} for r, (a, b, _) in zip(args.mask_ratios, rest, strict=True)]
        table = [["0", top1, top5, 0.0], *([f"{r['hidden']:g}", r["top1"], r["top5"], r["top1"] - top1] for r in rows)]
        say(records.table(["hidden", "val top-1", "val top-5", "change"], table))
        masked = {"masked": rows}
    if args.probe_maps is not None:
        draw_maps(task, {saved.attentive[0].label: saved.attentive})
    return task.write("eval_linear_saved", settings, {"val_top1": top1, "val_top5": top5, "val_loss": loss} | masked)


def find_head(task: Task) -> Path:
    """The file of --linear_weights, or the run's own best head. Raises InputError if there is none."""
    given = task.args.linear_weights
    candidates = [given] if given else [task.folder / name for name in ("best.pth.tar", "checkpoint.pth.tar")]
    path = next((Path(candidate) for candidate in candidates if Path(candidate).is_file()), None)
    if path is None:
        raise InputError(
            f"--evaluate needs a saved head, but {' and '.join(map(str, candidates))} do not exist; train one first, "
            "or name the file with --linear_weights"
        )
    return path


def check_identity(task: Task, path: Path, made_by: Mapping[str, Any], forms: list[Form]) -> None:
    """Raise InputError if a head was trained on other features than the model's."""
    mine = task.identity(forms)
    keys = [key for key in mine if key != "forms"]
    identity.require_same(
        made_by, mine, identity.recorded(made_by, keys, str(path)), f"{path} was trained on other features",
        "Give the checkpoint, settings and classes that it belongs to",
    )  # fmt: skip


def linear_head(task: Task, path: Path) -> Saved:
    """A linear head. Raises InputError if it does not fit the model or the classes."""
    head = heads.read_head(path)
    form = head.form or task.forms()[0]
    if head.identity is not None:
        check_identity(task, path, head.identity, [form])
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
    settings = {"n_last_blocks": form.n, "avgpool_patchtokens": form.avgpool}
    return Saved(lambda images: probe_features(task.model, images, [form])[0], width, probe, settings)


def attentive_head(task: Task, path: Path, content: Mapping[str, Any]) -> Saved:
    """An attentive head. Raises InputError if it does not fit the model or the classes."""
    name, head = read_attentive(content, str(path))
    check_identity(task, path, content.get("config") or {}, [])
    head = head.to(task.device)
    side, channels = task.extraction["img_size"], options.channels(task.loaded.config)
    with input_errors(), torch.no_grad():
        blank = torch.zeros(1, channels, side, side, device=task.device)
        width = extract_inputs(task.model, blank, [], [name]).of(name).shape[2]
    if width != head.pool.dim or head.num_classes < len(task.train.classes):
        raise InputError(
            f"{path} is a probe ({name.label}) of tokens of width {head.pool.dim} with {head.num_classes} outputs; "
            f"the model's are {width} wide and the images have {len(task.train.classes)} classes: check "
            "--arch and --data_path"
        )

    def logits(images: Tensor) -> Tensor:
        tokens = extract_inputs(task.model, images, [], [name]).of(name)
        with no_autocast(tokens.device.type):
            return head(tokens.float())

    return Saved(logits, head.num_classes, Logits(head.num_classes, task.device), {"probe": name.label}, (name, head))


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


def counts(task: Task, saved: Saved, looker: nn.Module | None) -> list[list[float]]:
    """[top-1, top-5, loss] of a head on val as it is, then with each of --mask_ratios hidden, in one pass."""
    forward, views = saved.forward, 1
    if looker is not None:
        forward = occlusion.at_every_ratio(forward, looker, task.args.mask_ratios)
        views += len(task.args.mask_ratios)
    found = cached.cache(
        task.model, task.val, [Form()] * views, [saved.width] * views, task.extraction, "validation features",
        forward=forward,
    )  # fmt: skip
    return [cached.Cached([part], found.labels).count(saved.probe)[0].tolist() for part in found.features]
