"""From arguments to a finished run: lock, data, build, continue, loop, marker, report."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

from data.source import ImageSource
from runtime.checkpoint import check_writable, read_checkpoint, write_atomic, write_json_atomic, write_text_atomic
from runtime.distributed import (
    barrier,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    leave,
    lost_processes,
    on_main_process,
)
from runtime.guards import EXIT_DONE, EXIT_PREEMPTED, InputError, input_errors
from runtime.hardware import device_line
from runtime.json_log import JsonLog, cut_json_lines
from runtime.lock import FolderLock
from runtime.preempt import StopRequest, requeue_slurm_job
from runtime.reproduce import get_sha
from runtime.saver import BEST, NEWEST, CheckpointSaver, find_checkpoint
from runtime.tensorboard import TensorBoard
from runtime.terminal import say
from training import arguments
from training.backbone import keep_stem
from training.evaluate import evaluate_checkpoint
from training.few_images import fit_to_few_images
from training.images import open_data
from training.loop import Loop, Outputs
from training.method import Method
from training.page import write_page
from training.refused import replay_step
from training.run import Run


def train(args: argparse.Namespace, method: Method) -> int:
    """Train as `args` say; returns the exit code. A run found in `args.output_dir` is continued.

    `args` may come straight from the method's parser, or from `training.arguments.parse`.
    """
    if not hasattr(args, "sources"):
        args = arguments.resolve(args, method)
    if args.dry_run:
        for line in configuration(args, method):
            say(line)
        return EXIT_DONE
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by CUDA when it starts
        torch.use_deterministic_algorithms(True)
    with StopRequest() as stop:
        init_distributed_mode(args)
        torch.backends.cudnn.benchmark = args.torch_device.type == "cuda" and not args.deterministic
        try:
            with lost_processes():
                if args.replay:
                    return replay_step(args, method)
                if getattr(args, "evaluate", False):
                    return evaluate_checkpoint(args, method, stop)
                return _train_locked(args, method, stop)
        finally:
            leave()


def _train_locked(args: argparse.Namespace, method: Method, stop: StopRequest) -> int:
    folder = Path(args.output_dir)
    lock = on_main_process(lambda: _locked(folder), keep_local=True)
    try:
        return _train_in(folder, args, method, stop)
    finally:
        if lock is not None:
            lock.release()


def _locked(folder: Path) -> FolderLock:
    """Create the output folder, check that it can be written, and lock it for this run. Raises InputError."""
    check_writable(folder, "--output_dir")
    return FolderLock(folder)


def _train_in(folder: Path, args: argparse.Namespace, method: Method, stop: StopRequest) -> int:
    train, val = open_data(args, method)
    begun = on_main_process(lambda: begun_with(folder))
    keep_stem(args, begun)
    fit_to_few_images(args, len(train), begun)
    method.fit(args, train)
    run = build(args, method, len(train))
    loop = Loop(run, method, train, val, stop)
    found = continue_run(folder, loop)
    if on_main_process(lambda: loop.step >= run.total_steps and (folder / "DONE").exists()):
        say(f"nothing to do: the run in {folder} is complete ({loop.step} steps)")
        say("to start another, give a different --output_dir; to train this one longer, more --epochs and")
        say("  --allow_changed_args true")
        return EXIT_DONE
    for line in first_screen(loop, val, found):
        say(line)
    saver = on_main_process(lambda: open_run(folder, loop), keep_local=True)
    board = TensorBoard(folder / "tensorboard", loop.step)
    board.text("configuration", "\n".join(f"    {line}" for line in configuration(args, method)), loop.step)
    try:
        done = loop.go(Outputs(saver, JsonLog(folder / "log.txt"), board))
    finally:
        board.close()
        if saver is not None:
            saver.close()
    code = leave_marker(folder, done, loop, stop)
    if args.report:
        write_pictures_and_report(loop, done)
        board.close()  # a second time, to write the pictures
    if done:
        has_map = getattr(run.bare_student.backbone, "has_attention_map", False)  # a method may train any module
        for line in what_next(folder, args, has_map):
            say(line)
    return code


def begun_with(folder: Path) -> dict[str, Any]:
    """The arguments of the run in `folder`; none if it is a new one, or they can't be read."""
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        content = None
    if content is None and (folder / NEWEST).exists():  # a checkpoint alone, copied here to be continued
        with contextlib.suppress(InputError):  # which `continue_run` tells
            content = read_checkpoint(folder / NEWEST).get("args")
    return content if isinstance(content, dict) else {}


def build(args: argparse.Namespace, method: Method, images: int) -> Run:
    """Build the method's run. Raises InputError if it doesn't fit into memory."""
    try:
        return method.build(args, images, args.torch_device)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        raise InputError(
            f"the model does not fit into memory ({str(error).strip().splitlines()[0]}); choose a smaller --arch, "
            "--out_dim or --embed_dim, or divide it among processes with --fsdp true"
        ) from error


def continue_run(folder: Path, loop: Loop) -> Path | None:
    """Load the newest good checkpoint of `folder`, if there is one, on all processes; returns its path."""
    found = on_main_process(lambda: find_checkpoint(folder, say), keep_local=True)
    path = on_main_process(lambda: found and found[0])
    if path is None and loop.run.args.resume:
        path = Path(loop.run.args.resume)
        on_main_process(lambda: take_over_log(path.parent, folder))
    if path is not None:
        loop.load(found[1] if found else read_checkpoint(path), path)
    return path


def take_over_log(before: Path, folder: Path) -> None:
    """Copy the log and the best checkpoint of a run that continues in a new folder; later epochs are cut off."""
    if before.resolve() == folder.resolve():
        return
    if (before / "log.txt").is_file():
        write_text_atomic(folder / "log.txt", (before / "log.txt").read_text(errors="replace"))
    if (before / BEST).is_file():
        write_atomic(folder / BEST, lambda temporary: shutil.copyfile(before / BEST, temporary) and None)


def open_run(folder: Path, loop: Loop) -> CheckpointSaver:
    """Prepare `folder` for a run: remove markers and log rows that it will write again, and write its arguments."""
    args = loop.run.args
    with input_errors(f"--output_dir {folder} cannot be written"):
        for marker in ("DONE", "PREEMPTED"):
            (folder / marker).unlink(missing_ok=True)
        cut_json_lines(folder / "log.txt", loop.epoch)
        write_json_atomic(folder / "config.json", arguments.saved(args, loop.method))
    return CheckpointSaver(folder, args.keep_checkpoints, args.max_failed_saves, say)


# ------------------------------------------------------------------------------------------------ messages


def first_screen(loop: Loop, val: ImageSource | None, found: Path | None) -> list[str]:
    """What the user should know about a run before its first result; notes and warnings come last."""
    run, args, plan = loop.run, loop.run.args, loop.run.plan
    parameters = sum(p.numel() for p in run.student.parameters()) / 1e6
    start = f"continuing {found} at step {loop.step} (epoch {loop.epoch})" if found else "a new run"
    lines = [
        f"{loop.method.name}: {args.arch}, {args.mode}, {parameters:.1f} M parameters with its head",
        f"output: {loop.folder}; {start}",
        f"code: {get_sha()}",
        f"device: {device_line(run.hardware.device)}",
        *textwrap.wrap("; ".join(run.hardware.lines), 80, subsequent_indent="  "),
        f"images: {len(loop.train)} to train on" + (f", {len(val)} to evaluate on" if val is not None else ""),
        f"global batch: {plan.global_batch} = {plan.batch_size} images x {plan.accum} forward(s) x {get_world_size()} "
        f"process(es); {plan.steps_per_epoch} steps per epoch, {run.total_steps} in all; "
        f"peak lr {run.schedules['lr'].max():.3g}",
        *settings(args, loop.method),
    ]
    notes = [*args.notes, *run.views.notes()]
    if args.sources["output_dir"] == "default":
        notes.append(f"no --output_dir was given: checkpoints and logs go to the current folder, {Path.cwd()}")
    return lines + [f"note: {note}" for note in notes]


def settings(args: argparse.Namespace, method: Method) -> list[str]:
    """The settings that are not defaults, grouped by origin, in lines of 80 columns."""
    by_source: dict[str, list[str]] = {}
    for key, value in arguments.saved(args, method).items():
        source = args.sources.get(key, "default")
        if source != "default":
            by_source.setdefault(source, []).append(f"{key} {value}")
    lines = ["settings that are not defaults (config.json has all):"]
    for source, values in by_source.items():
        text = f"{'your flags' if source == 'flag' else source}: {', '.join(values)}"
        lines += textwrap.wrap(text, 80, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    return lines


def configuration(args: argparse.Namespace, method: Method) -> list[str]:
    """A line per argument: its value and its origin."""
    shown = arguments.saved(args, method)
    return [f"  {key:28} {value!s:28} {args.sources.get(key, '')}" for key, value in shown.items()]


# ------------------------------------------------------------------------------------------------ the end


def write_pictures_and_report(loop: Loop, done: bool) -> None:
    """Write a run's report, with pictures if it is finished. A failure here never affects the run."""
    try:
        if done and loop.watch is not None:
            for path in loop.watch.pictures(loop.folder):
                loop.out.board.picture(path.stem, path.read_bytes(), loop.step)
    except (ValueError, OSError) as error:
        say(f"no pictures: {error}")
    page = write_page(loop.run.args, loop.folder, "done" if done else "preempted")
    if page is not None:
        say(f"report: {page}")


def what_next(folder: Path, args: argparse.Namespace, has_map: bool) -> list[str]:
    """The commands to run after a finished run; has_map: whether the model has an attention map."""
    found = f"--pretrained_weights {folder / NEWEST} --data_path {args.data_path}"
    lines = ["next:", f"  python eval_knn.py {found}", f"  python eval_linear.py {found}"]
    return [*lines, f"  python visualize_attention.py {found}"] if has_map else lines


def leave_marker(folder: Path, done: bool, loop: Loop, stop: StopRequest) -> int:
    """Write DONE or PREEMPTED, requeue the job if requested, and return the exit code."""
    marker = {"epoch": loop.epoch, "iteration": loop.step, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
    if done:
        if is_main_process():
            _mark(folder / "DONE", marker)
        say(f"done: {loop.step} steps, {folder / NEWEST}")
        return EXIT_DONE
    if is_main_process():
        _mark(folder / "PREEMPTED", {**marker, "signal": stop.name})
        if loop.run.args.requeue:
            requeue_slurm_job(say)
    barrier()  # a launcher may end all processes when the first one exits with a code other than 0
    say(f"stopped by {stop.name or 'a signal to another process'} after step {loop.step}; start again to continue")
    # torchrun would treat a code other than 0 as a failure and restart the workers.
    return EXIT_DONE if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_PREEMPTED


def _mark(path: Path, content: dict[str, Any]) -> None:
    """Write a marker. If the disk fails now, after the last save, the marker is lost but not the exit code."""
    try:
        write_json_atomic(path, content)
    except OSError as error:
        say(f"warning: marker {path} not written ({error}); the last save is whole")
