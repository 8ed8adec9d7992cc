"""The record of a run with several probes: the best head of each one, and the best overall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation import probe_figures, records
from evaluation.probe_heads import ProbeHead, read_attentive
from evaluation.probe_names import ProbeName
from evaluation.probes import Probes
from evaluation.sweep import Sweep, end_of_grid
from runtime.checkpoint import read_checkpoint, save_on_master
from runtime.distributed import is_main_process
from runtime.terminal import say


class ProbeSweep(Sweep):
    """A sweep whose heads belong to several probes. Each probe's best head is in best_NAME.pth.tar."""

    probe: Probes

    def __init__(self, folder: Path, probe: Probes, made_by: dict[str, Any]) -> None:
        super().__init__(folder, probe, made_by)
        self.best_of: dict[str, dict[str, Any]] = {}

    def path_of(self, label: str) -> Path:
        """The file of a probe's best head."""
        name = next(name for name in self.probe.names if name.label == label)
        return self.folder / f"best_{name.file_name}.pth.tar"

    def validated(self, epoch: int, losses: list[float], val: Tensor, selection: Tensor) -> None:
        """Note a validation as Sweep does, and the best head of each probe so far."""
        super().validated(epoch, losses, val, selection)
        for label in dict.fromkeys(row["probe"] for row in self.rows):
            mine = [i for i, row in enumerate(self.rows) if row["probe"] == label]
            leader = max(mine, key=lambda i: self.rows[i]["selection_top1"])
            row, before = self.rows[leader], self.best_of.get(label)
            if before is None or row["selection_top1"] > before["selection_top1"]:
                self.best_of[label] = {**row, "epoch": epoch, "number": leader}
                content = {"epoch": epoch + 1, "best_acc": row["val_top1"], **self.probe.content(leader, self.identity)}
                save_on_master(content, self.path_of(label))

    def best_heads(self) -> dict[str, tuple[ProbeName, ProbeHead]]:
        """The best head of each attentive probe, from its file."""
        paths = {name.label: self.path_of(name.label) for name in self.probe.names if name.is_attentive}
        return {label: read_attentive(read_checkpoint(path), str(path)) for label, path in paths.items()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `extra` gave."""
        self.best_of = saved["best_of"]

    def extra(self) -> dict[str, Any]:
        """What checkpoint.pth.tar holds besides a sweep's."""
        return {"best_of": self.best_of}

    def finish(self, selected_on: str) -> dict[str, Any]:
        """A table with a row per probe, and a plot; returns the results for the JSON."""
        header = ["probe", "parameters", "best head", "epoch", selected_on, "val top-1", "val top-5"]
        if selected_on == "val":  # the two columns would be one
            header.remove("val")
        rows = []
        for label, row in self.best_of.items():
            head = row["head"].removeprefix(label).removeprefix(" on ").removeprefix(", ")
            numbers = [row["selection_top1"], row["val_top1"], row["val_top5"]]
            rows.append([label, f"{row['parameters']:,}", head, row["epoch"], *numbers[-(len(header) - 4) :]])
        say(records.table(header, rows))
        best = self.best
        say(
            f"selected on {selected_on}: {best['head']} at epoch {best['epoch']}: "
            f"val top-1 {best['val_top1']:.2f}, top-5 {best['val_top5']:.2f}"
        )
        if selected_on == "val":
            say("heads and epochs were chosen on val itself, as published protocols do: these figures are optimistic")
        notes: dict[str, list[str]] = {}
        for label, row in self.best_of.items():
            note = end_of_grid(row["lr"], [other["lr"] for other in self.rows if other["probe"] == label])
            notes.setdefault(note or "", []).append(label)
        for note, labels in notes.items():
            if note:
                say(f"{', '.join(labels)}: {note}")
        if is_main_process() and len(self.rows) > 1:
            probe_figures.plot_probes(self.rows, self.best_of, self.folder / "eval_linear.png")
        return {**self.results(), "probes": self.best_of}
