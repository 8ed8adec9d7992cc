"""Watching a run between epochs: signs of collapse, an evaluation, and pictures at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

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

    def monitor(self, epoch: int) -> tuple[dict[str, float], str | None]:
        """Values that show how training is going, and a warning if they look bad; all processes must call this."""

    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, dict[str, Any]]:
        """Values for log.txt, such as {"k-NN": {"10": {"top1": ..., "top5": ...}}}, in percent, on all processes.

        Raises evaluation.features.Interrupted once `should_stop` returns True.
        """

    def pictures(self, folder: Path) -> list[Path]:
        """Draw a finished run's pictures as PNG files; all processes call this, one draws. Raises ValueError."""


class TeacherWatch:
    """The teacher of a self-supervised run: signs of collapse on a few fixed images, k-NN, attention maps."""

    def __init__(self, run: Run, train: ImageSource, val: ImageSource | None) -> None:
        self.run, self.train, self.val = run, train, val
        self.can_evaluate = val is not None
        self._probe = self._probe_images()

    def _probe_images(self) -> Tensor | None:
        """The images that the monitors use throughout the run, on rank 0."""
        if not is_main_process():
            return None
        try:
            return monitors.probe_batch(self.train, self.run.args.img_size)
        except InputError as error:  # an unreadable image must not prevent training
            say(f"no collapse monitors: {error}")
            return None

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

    def pictures(self, folder: Path) -> list[Path]:
        """attention.png: the teacher's maps of photographs or probe images, next to those of an untrained model."""
        from evaluation.attention_figure import attention_figure

        teacher, args = self.run.whole_teacher(), self.run.args
        if self._probe is None:
            return []
        untrained = build_backbone(args).to(self.run.hardware.device).eval()
        models = {"trained": teacher.backbone, "untrained": untrained}
        return [attention_figure(models, self._shown(), folder / "attention.png")]

    def _shown(self, count: int = 6) -> Tensor:
        """uint8 images (B, C, H, W); for the demo whole photographs, enlarged for a model of small images."""
        args = self.run.args
        if not is_demo(args.data_path) or args.in_chans != 3:
            return self._probe[:count]
        from evaluation import attention, examples

        side = args.img_size if args.img_size > 96 else 6 * args.img_size
        photographs = examples.Photographs()
        return torch.stack([attention.fit(photographs.load(i), (side, side)) for i in range(count)])
