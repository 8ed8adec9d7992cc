"""Refused steps: counting them, writing the last one to a replay file, and repeating it."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.datasets import open_images
from data.source import ImageSource
from runtime.checkpoint import read_checkpoint, save_checkpoint
from runtime.distributed import all_gather_objects, is_main_process
from runtime.guards import EXIT_DONE, EXIT_NON_FINITE, InputError, NonFiniteError
from runtime.terminal import say
from training.method import Method
from training.run import Run, Wishes
from training.state import load_training_state, replay_arguments


class RefusedSteps:
    """Counts consecutive non-finite steps, and stops the run with a replay file if there are too many."""

    def __init__(self, run: Run, method: Method, train: ImageSource, folder: Path) -> None:
        self.run, self.method, self.train, self.folder = run, method, train, folder
        self.in_a_row = 0
        self._recent: dict[int, list[list[int]]] = {}  # images of the last steps, by micro-batch

    def remember(self, step: int, batches: list[Any]) -> None:
        """Remember the images of a step until its result is read."""
        self._recent = {**dict(list(self._recent.items())[-3:]), step: [batch.index.tolist() for batch in batches]}

    def handle(self, step: int, result: dict[str, float], state: Callable[[], dict[str, Any]]) -> None:
        """Report a refused step, and stop the run on all ranks if there were too many in a row.

        `state` returns the checkpoint, which contains nothing of the step.
        """
        terms = ", ".join(f"{name} {result[name]:.4g}" for name in (*self.method.terms, "grad_norm"))
        if self.run.scaler.is_enabled() and math.isfinite(result[self.method.terms[0]]):
            # fp16 finds its scale by letting gradients overflow; a scale below 1 means that they overflow at any scale.
            scale = self.run.scaler.get_scale()
            if scale >= 1:
                return
            self._stop(f"the fp16 loss scale fell to {scale:g} and gradients still overflow", step, terms, state)
        self.in_a_row += 1
        say(f"warning: step {step} is not finite ({terms}); nothing was updated ({self.in_a_row} in a row)")
        if self.in_a_row >= self.run.args.max_bad_steps:
            self._stop(f"{self.in_a_row} steps in a row were not finite", step, terms, state)

    def _stop(self, why: str, step: int, terms: str, state: Callable[[], dict[str, Any]]) -> None:
        replay = self._write_replay(step, state())
        raise NonFiniteError(
            f"{why}, the last at step {step}: {terms}. Its images and the state before it are in {replay}; the same "
            f"program with --replay {replay} runs it again. A lower --lr, --clip_grad 3.0, a longer --warmup_epochs "
            "or --amp bf16 in place of fp16 usually help"
        )

    def _write_replay(self, step: int, state: dict[str, Any]) -> Path:
        """A checkpoint with the images of a refused step, by rank."""
        path = self.folder / f"replay_step{step:08d}.pth"
        indices = all_gather_objects(self._recent.get(step, []))
        schedules = {name: float(values[step]) for name, values in self.run.schedules.items()}
        replay = {"step": step, "images": indices, "schedules": schedules}
        if is_main_process():
            names = [[[self.train.name(i % len(self.train)) for i in batch] for batch in rank] for rank in indices]
            try:
                save_checkpoint({**state, "replay": {**replay, "names": names}}, path)
            except (OSError, RuntimeError) as error:  # the run is stopping for a more important reason
                say(f"warning: {path} could not be written ({error}); the images of step {step} were {names}")
        return path


def replay_step(args: argparse.Namespace, method: Method) -> int:
    """Repeat the refused step of a replay file, rank by rank in one process, and print each rank's result.

    Returns the exit code of a non-finite stop if any rank's numbers are not finite, else 0.
    """
    content = read_checkpoint(args.replay)
    if not _is_replay(content):
        raise InputError(f"--replay {args.replay} is no replay file of this version; look for replay_stepNNNNNNNN.pth")
    recorded = content["config"].get("method", "dino")
    if recorded != method.name:
        raise InputError(f"--replay {args.replay} is of a run by {recorded}; replay it with that program")
    saved, replay = replay_arguments(args, content), content["replay"]
    fraction = saved.val_fraction
    train = open_images(saved.data_path, "train", saved.subset, saved.in_chans, val_fraction=fraction)
    run = method.build(saved, len(train), args.torch_device)
    # The run's schedules depended on the batch and the epochs of all its processes.
    step, epoch, refused = replay["step"], replay["step"] // content["config"]["steps_per_epoch"], False
    run.schedules = {name: np.full(step + 1, value) for name, value in replay["schedules"].items()}
    images = run.views.dataset(train, saved.seed, "substitute")
    for rank, groups in enumerate(replay["images"]):
        load_training_state(run, method, content, Path(args.replay))
        run.plan = dataclasses.replace(run.plan, rank=rank, steps_per_epoch=content["config"]["steps_per_epoch"])
        batches = [images.__getitems__([(epoch, i) for i in group]).to(args.torch_device) for group in groups]
        result = dict(zip(method.results, method.step(run, batches, step, Wishes()).tolist(), strict=True))
        terms = ", ".join(f"{name} {result[name]:.6g}" for name in (*method.terms, "grad_norm"))
        say(f"step {step}, rank {rank}: {terms}: {'not finite, refused' if result['bad'] else 'finite'}")
        refused = refused or bool(result["bad"])
    return EXIT_NON_FINITE if refused else EXIT_DONE


def _is_replay(content: dict[str, Any]) -> bool:
    """Whether a file's content is that of a replay file."""
    replay, config = content.get("replay"), content.get("config")
    if not isinstance(replay, dict) or not isinstance(config, dict) or not isinstance(content.get("args"), dict):
        return False
    schedules, images = replay.get("schedules"), replay.get("images")
    numbers = [replay.get("step"), config.get("steps_per_epoch")]
    try:
        indices = [index for rank in images for group in rank for index in group]
        values = [float(value) for value in schedules.values()]
    except (TypeError, AttributeError, ValueError):
        return False
    whole = all(type(number) is int and number >= 0 for number in (*numbers, *indices))
    return whole and numbers[1] > 0 and bool(values) and bool(indices) and len(images[0][0]) > 0
