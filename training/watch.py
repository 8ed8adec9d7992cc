"""Watching a run between epochs: signs of collapse, an evaluation, and pictures at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data.source import ImageSource
from evaluation import knn, monitors
from runtime.distributed import is_main_process
from runtime.guards import InputError
from runtime.terminal import say
from training.backbone import build_backbone
from training.recipes import is_demo
from training.run import Run


class Watch(Protocol):
    """What the loop calls; only the loop writes to log.txt, TensorBoard and the terminal."""

    can_evaluate: bool
    tells_before_training: bool  # whether an evaluation of the untrained model is worth reading

    def monitor(self, epoch: int) -> tuple[dict[str, float], str | None]:
        """Values that show how training is going, and a warning if they look bad; all processes must call this."""

    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, dict[str, Any]]:
        """Values for log.txt, such as {"k-NN": {"10": {"top1": ..., "top5": ...}}}, in percent, on all processes.

        Raises evaluation.features.Interrupted once `should_stop` returns True.
        """

    def score(self, row: dict[str, Any]) -> float | None:
        """How good an epoch's evaluation is, from its row of log.txt, for best.pth; higher is better."""

    def pictures(self, folder: Path) -> list[Path]:
        """Draw a finished run's pictures as PNG files; all processes call this, one draws. Raises ValueError."""


def result_lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """An evaluation's results in words: "k-NN 10 top-1 61.20 %, top-5 90.00 %"."""

    def words(metric: str, value: float) -> str:
        return f"{metric.replace('top', 'top-')} {value:.2f} %" if metric.startswith("top") else f"{metric} {value:.4f}"

    return [
        f"{name} {case} {', '.join(words(metric, value) for metric, value in values.items())}"
        for name, cases in results.items()
        for case, values in cases.items()
    ]


def result_scalars(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """An evaluation's results under TensorBoard's names: eval/knn10_top1, eval/val_average_top1."""
    return {
        f"eval/{name.replace('-', '').lower()}{'' if case.isdigit() else '_'}{case}_{metric}": value
        for name, cases in results.items()
        for case, values in cases.items()
        for metric, value in values.items()
    }


class TeacherWatch:
    """The teacher of a self-supervised run: signs of collapse on a few fixed images, k-NN, attention maps."""

    tells_before_training = True  # k-NN on features of random weights is far above chance

    def __init__(self, run: Run, train: ImageSource, val: ImageSource | None) -> None:
        self.run, self.train, self.val = run, train, val
        self.can_evaluate = val is not None
        self._probe = probe_images(train, run.args.img_size, "collapse monitors")

    def monitor(self, epoch: int) -> tuple[dict[str, float], str | None]:
        """Signs of collapse in the teacher (docs/evaluation.md explains them), on rank 0."""
        teacher = self.run.whole_teacher()
        if self._probe is None:
            return {}, None
        loss = self.run.loss
        values = monitors.monitor(teacher, self._probe, loss.probabilities, epoch, loss.center)
        return values, monitors.collapse_warning(values, self.run.args.out_dim)

    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, dict[str, Any]]:
        """k-NN of the teacher's features: {"k-NN": {k: {"top1", "top5"}}}."""
        run, args = self.run, self.run.args
        results = knn.evaluate(
            run.whole_teacher().backbone, self.train, self.val, args.nb_knn, args.temperature,
            device=run.hardware.device, img_size=args.img_size, num_workers=args.num_workers,
            amp_dtype=run.hardware.amp_dtype, should_stop=should_stop,
        )  # fmt: skip
        return {"k-NN": {str(k): {"top1": top1, "top5": top5} for k, (top1, top5) in results.items()}}

    def score(self, row: dict[str, Any]) -> float | None:
        """Top-1 of the first k."""
        return next(iter(row["k-NN"].values()))["top1"]

    def pictures(self, folder: Path) -> list[Path]:
        """attention.png: the teacher's maps, next to those of an untrained model."""
        return draw_attention(self.run, self.run.whole_teacher().backbone, self._probe, folder)


def probe_images(train: ImageSource, img_size: int, use: str) -> Tensor | None:
    """A few images that stay the same throughout a run, (B, C, S, S) uint8 on rank 0; None elsewhere.

    An unreadable image must not prevent training: then a line says that there is no `use`.
    """
    if not is_main_process():
        return None
    try:
        return monitors.probe_batch(train, img_size)
    except InputError as error:
        say(f"no {use}: {error}")
        return None


def draw_attention(run: Run, backbone: nn.Module, probe: Tensor | None, folder: Path) -> list[Path]:
    """attention.png: a backbone's maps of photographs or probe images, next to those of an untrained one."""
    from evaluation.attention_figure import attention_figure

    if probe is None:
        return []
    untrained = build_backbone(run.args).to(run.hardware.device).eval()
    models = {"trained": backbone, "untrained": untrained}
    return [attention_figure(models, shown_images(run.args, probe), folder / "attention.png")]


def shown_images(args: argparse.Namespace, probe: Tensor, count: int = 6) -> Tensor:
    """uint8 images (B, C, H, W); for the demo whole photographs, enlarged for a model of small images."""
    if not is_demo(args.data_path) or args.in_chans != 3:
        return probe[:count]
    from evaluation import attention, examples

    side = args.img_size if args.img_size > 96 else 6 * args.img_size
    photographs = examples.Photographs()
    return torch.stack([attention.fit(photographs.load(i), (side, side)) for i in range(count)])
