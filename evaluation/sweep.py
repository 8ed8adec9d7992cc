"""Training a sweep of linear heads: one epoch over all of them, and the record of a run that can be resumed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import normalize
from evaluation import identity, plots, records
from evaluation.linear import Probe
from runtime.checkpoint import read_checkpoint, save_on_master
from runtime.distributed import barrier, is_main_process
from runtime.guards import InputError, input_errors
from runtime.json_log import JsonLog, cut_json_lines
from runtime.progress import progress
from runtime.terminal import say


def train_epoch(
    model: nn.Module,
    probe: Probe,
    loader: Iterable,
    lr_scale: float | Sequence[float],
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    desc: str = "",
) -> list[float]:
    """One pass over the training images, each of which passes through the model once; returns each head's mean loss.

    lr_scale: part of the peak learning rates, one for the epoch or one for each of its steps.
    """
    scales = itertools.repeat(lr_scale) if isinstance(lr_scale, float) else lr_scale
    total, steps = torch.zeros(len(probe.heads), device=device), 0
    for (images, target), scale in zip(progress(loader, len(loader), desc), scales, strict=False):
        half = torch.autocast(device.type, dtype=amp_dtype or torch.bfloat16, enabled=amp_dtype is not None)
        if isinstance(images, Tensor):
            with torch.no_grad(), half:
                batch = probe.inputs(model, normalize(images.to(device, non_blocking=True)))
        else:  # what the heads see, computed beforehand
            batch = images.map(lambda x: x.to(device, non_blocking=True))
        total += probe.learn(batch, target.to(device, non_blocking=True), scale)
        steps += 1
    return (total / steps).tolist()


def end_of_grid(best: float, lrs: Iterable[float]) -> str | None:
    """A note if the best rate is the smallest or largest of several that were tried: a better one may lie beyond."""
    tried = sorted(set(lrs))
    if len(tried) < 2 or best not in (tried[0], tried[-1]):
        return None
    side, factors = ("largest", (3, 10)) if best == tried[-1] else ("smallest", (0.3, 0.1))
    further = " ".join(f"{best * factor:g}" for factor in factors)
    return f"note: the best rate, {best:g}, is the {side} that was tried; try further ones too: --lr {further}"


PROBE_KEYS = ("probes", "probe_recipe", "wds")  # of a run's identity, if it has --probes


class Sweep:
    """A sweep's record: the best head so far, the numbers of the last validation, and the files."""

    def __init__(self, folder: Path, probe: Probe, made_by: dict[str, Any]):
        self.folder, self.probe, self.identity = folder, probe, made_by
        self.best: dict[str, Any] = {"selection_top1": -1.0}
        self.rows: list[dict[str, Any]] = []
        self.last_path, self.best_path = folder / "checkpoint.pth.tar", folder / "best.pth.tar"
        self.log_path = folder / "eval_linear_log.txt"
        self.log = JsonLog(self.log_path)
        self.started = time.monotonic()

    def resume(self) -> int:
        """Continue from checkpoint.pth.tar if there is one; returns the first epoch to train."""
        if not self.last_path.is_file():
            return 0
        saved = read_checkpoint(self.last_path)
        theirs = saved.get("config")
        if theirs is None:
            raise InputError(
                f"{self.last_path} is a published head, which cannot be resumed here: give another --output_dir, or "
                "validate it with --evaluate"
            )
        keys = dict.fromkeys([*self.identity, *(key for key in PROBE_KEYS if key in theirs)])
        identity.require_same(
            theirs, self.identity, keys, f"{self.last_path} is of another run",
            "Restore the settings, give another --output_dir, or remove the file to start over",
        )  # fmt: skip
        with input_errors(str(self.last_path)):
            self.probe.load(saved["optimizer"]["heads"])
        self.best, self.rows = saved["best"], saved["rows"]
        self.restore(saved)
        if is_main_process():
            cut_json_lines(self.log_path, saved["epoch"])
        say(f"resuming from {self.last_path} at epoch {saved['epoch']}")
        return saved["epoch"]

    def validated(self, epoch: int, losses: list[float], val: Tensor, selection: Tensor) -> None:
        """Note a validation: the rows of the table, the log line, and the best head so far."""
        self.rows = [
            {
                "head": head.name,
                **head.settings,
                "train_loss": loss,
                "val_loss": v[2],
                "selection_top1": s[0],
                "val_top1": v[0],
                "val_top5": v[1],
            }
            for head, loss, v, s in zip(self.probe.heads, losses, val.tolist(), selection.tolist(), strict=True)
        ]
        leader = max(range(len(self.rows)), key=lambda i: self.rows[i]["selection_top1"])
        row = self.rows[leader]
        if row["selection_top1"] > self.best["selection_top1"]:
            self.best = {**row, "epoch": epoch, "number": leader}
            save_on_master(self._content(epoch + 1, leader), self.best_path)
        if is_main_process():
            self.log.append({"epoch": epoch, "heads": self.rows})
        say(
            f"epoch {epoch}: best head {row['head']}: selection {row['selection_top1']:.2f}, val top-1 "
            f"{row['val_top1']:.2f}, top-5 {row['val_top5']:.2f}"
        )

    def _content(self, epoch: int, number: int) -> dict[str, Any]:
        """One head under the published names, and what made it."""
        content = self.probe.content(number, self.identity)
        return {"epoch": epoch, "best_acc": self.best.get("val_top1", 0.0), **content}

    def save(self, epoch: int) -> None:
        """checkpoint.pth.tar: the leading head as it is now, and all that is needed to continue."""
        content = self._content(epoch, self.best.get("number", 0))
        content |= {
            "optimizer": {"heads": self.probe.state()},
            "scheduler": {"last_epoch": epoch},
            "best": self.best,
            "rows": self.rows,
            **self.extra(),
        }
        save_on_master(content, self.last_path)
        barrier()

    def extra(self) -> dict[str, Any]:
        """What a kind of sweep adds to checkpoint.pth.tar."""
        return {}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `extra` gave."""

    def results(self) -> dict[str, Any]:
        """The results for the JSON: the selected head, the last numbers of all, and the time since the start."""
        return {"selected": self.best, "heads": self.rows, "seconds": round(time.monotonic() - self.started, 1)}

    def finish(self, selected_on: str) -> dict[str, Any]:
        """Table and plot; returns the results for the JSON."""
        header = ["head", "train loss", selected_on, "val top-1", "val top-5"]
        keys = ("head", "train_loss", "selection_top1", "val_top1", "val_top5")
        say(records.table(header, [[row[key] for key in keys] for row in self.rows]))
        best = self.best
        say(
            f"selected on {selected_on}: {best['head']} at epoch {best['epoch']}: "
            f"val top-1 {best['val_top1']:.2f}, top-5 {best['val_top5']:.2f}"
        )
        note = end_of_grid(best["lr"], [row["lr"] for row in self.rows])
        if note:
            say(note)
        if is_main_process() and len(self.rows) > 1:
            plots.plot_heads(self.rows, best, selected_on, self.folder / "eval_linear.png")
        return self.results()
