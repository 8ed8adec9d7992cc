"""Faults for runs under test: what `processes.start(patch=...)` calls in a child before its run begins."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import gc
import itertools
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import main_dino
from data.augment import ColourStage
from distill.losses import DINOLoss
from evaluation import features
from runtime import preempt

# Where a run writes to the disk: whole files, and of these files some functions only (they also print and count).
_WRITERS = ("runtime/saver.py", "runtime/checkpoint.py", "runtime/lock.py")
_FUNCTIONS = {"runtime/json_log.py": {"append", "cut_json_lines"}, "runtime/tensorboard.py": {"flush"}}


def replace_step(step: Any) -> None:
    """Let the program take `step` for its training step."""
    main_dino.METHOD = dataclasses.replace(main_dino.METHOD, step=step)


def _writes(code: CodeType) -> bool:
    name = code.co_filename
    return name.endswith(_WRITERS) or any(
        name.endswith(file) and code.co_name in functions for file, functions in _FUNCTIONS.items()
    )


def count_lines_that_write(rank: int, path: Path) -> None:
    """Count the lines of code that write, over the whole run and all threads, into `path`."""
    count = itertools.count(1)
    _trace(lambda: path.write_text(str(next(count))))


def kill_at_line_that_writes(rank: int, number: int) -> None:
    """SIGKILL this process when it is about to execute the `number`-th line of code that writes to the disk."""
    count = itertools.count(1)
    _trace(lambda: os.kill(os.getpid(), signal.SIGKILL) if next(count) == number else None)


def _trace(at_line: Any) -> None:
    def local(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            at_line()
        return local

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        return local if _writes(frame.f_code) else None

    threading.settrace(trace)
    sys.settrace(trace)


def note_steps(rank: int, folder: Path) -> None:
    """Append to `folder/steps-RANK` the number of each step and when the run last asked, before it, whether to stop;
    and make `folder/armed-RANK` as soon as the run catches signals.
    """
    real_step, real_enter = main_dino.METHOD.step, preempt.StopRequest.__enter__
    asked = 0.0

    def requested(self: preempt.StopRequest) -> bool:
        nonlocal asked
        asked = time.monotonic()
        return flag(self)  # Python runs the handlers of signals that came before this call at its begin

    def flag(self: preempt.StopRequest) -> bool:
        return vars(self)["flag"]

    def train_step(run: Any, batches: Any, step: int, *args: Any) -> Any:
        with open(folder / f"steps-{rank}", "a") as file:
            file.write(f"{step} {asked}\n")
        return real_step(run, batches, step, *args)

    def enter(self: preempt.StopRequest) -> preempt.StopRequest:
        entered = real_enter(self)
        (folder / f"armed-{rank}").touch()
        return entered

    preempt.StopRequest.__enter__ = enter
    replace_step(train_step)
    preempt.StopRequest.requested = property(requested, lambda self, value: vars(self).update(flag=value))


def slow_evaluation(rank: int, seconds: float) -> None:
    """Print "evaluating" at each batch of an evaluation, which takes `seconds` longer."""
    real = features.normalize

    def normalize(images: Any) -> Any:
        print("evaluating", flush=True)
        time.sleep(seconds)
        return real(images)

    features.normalize = normalize


# ---- a disk that fails


class Disk:
    """Writes, fsyncs, replaces and links under `folder` fail with `error` while `failing` is true."""

    def __init__(self, folder: Path, error: int = errno.ENOSPC) -> None:
        self.failing, self._folder, self._error = False, str(folder), error
        for name in ("mkstemp", "NamedTemporaryFile"):
            self._wrap(tempfile, name, lambda args, kwargs: kwargs.get("dir"))
        for name in ("replace", "link", "fsync"):
            self._wrap(os, name, lambda args, kwargs: args[0])

    def _wrap(self, module: Any, name: str, where: Any) -> None:
        real = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            place = where(args, kwargs)
            path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else str(place)
            if self.failing and path.startswith(self._folder):
                raise OSError(self._error, os.strerror(self._error), path)
            return real(*args, **kwargs)

        setattr(module, name, wrapped)


def disk_fails_during(rank: int, folder: Path, steps: range, error: int = errno.ENOSPC) -> None:
    """From the begin of the first step of `steps` to the begin of the one after the last nothing can be written."""
    disk, real = Disk(folder, error), main_dino.METHOD.step

    def train_step(run: Any, batches: Any, step: int, *args: Any) -> Any:
        disk.failing = step in steps
        return real(run, batches, step, *args)

    replace_step(train_step)


def folder_vanishes_during(rank: int, folder: Path, steps: range) -> None:
    """As a mount that is lost and comes back: for some steps the folder is not there."""
    hidden, real = folder.with_name("elsewhere"), main_dino.METHOD.step

    def train_step(run: Any, batches: Any, step: int, *args: Any) -> Any:
        if rank == 0 and (step in steps) != hidden.exists():
            source, target = (folder, hidden) if step in steps else (hidden, folder)
            source.rename(target)
        return real(run, batches, step, *args)

    replace_step(train_step)


# ---- numbers that are not finite


def nan_loss(rank: int, first: int) -> None:
    """The loss of rank 1 is NaN from its `first` step on."""
    real, calls = DINOLoss.step_terms, itertools.count()

    def step_terms(self: DINOLoss, *args: Any) -> Any:
        loss, *others = real(self, *args)
        return (loss * float("nan") if rank == 1 and next(calls) >= first else loss), *others

    DINOLoss.step_terms = step_terms


def infinite_gradient(rank: int, first: int) -> None:
    """One gradient of rank 1 is infinite from its `first` step on, while its loss stays finite."""
    real, calls = DINOLoss.step_terms, itertools.count()

    def step_terms(self: DINOLoss, student_output: Any, *args: Any) -> Any:
        if rank == 1 and next(calls) >= first:
            student_output = student_output.clone()
            student_output.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), float("inf")))
        return real(self, student_output, *args)

    DINOLoss.step_terms = step_terms


def black_images_become_nan(rank: int) -> None:
    """As a normalisation that divides by an image's brightness: crops that are black all over turn to NaN."""
    real = ColourStage.__call__

    def colour(self: ColourStage, crops: Any, parameters: Any) -> Any:
        black = [group.flatten(2).amax(2).view(-1) == 0 for group in crops]  # per resolution (V·B,)
        return [
            out.masked_fill(dark[:, None, None, None], float("nan"))
            for out, dark in zip(real(self, crops, parameters), black, strict=True)
        ]

    ColourStage.__call__ = colour


# ---- memory


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def bytes_in_use() -> int:
    """Bytes in use from malloc, from Python's allocator (at most: a block has 512) and of shared memory.

    Resident memory tells less: it jumps by some MiB with the gaps between what is in use.
    """
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd + 512 * sys.getallocatedblocks() + resident_bytes("RssShmem")


def resident_bytes(kind: str = "VmRSS") -> int:
    """Bytes of this process in memory, or of one kind, as the kernel counts them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[kind].split()[0])


def note_memory(rank: int, path: Path, every: int) -> None:
    """Append a line to `path` every `every` steps: step, bytes in use, resident bytes, open file descriptors."""
    real = main_dino.METHOD.step

    def train_step(run: Any, batches: Any, step: int, *args: Any) -> Any:
        if step % every == 0:
            for thread in threading.enumerate():
                if thread.name == "checkpoint-writer":  # it holds a copy of the state while it writes
                    thread.join()
            gc.collect()
            with open(path, "a") as file:
                print(step, bytes_in_use(), resident_bytes(), len(os.listdir("/proc/self/fd")), file=file)
        return real(run, batches, step, *args)

    replace_step(train_step)


# ---- processes


def own_group(rank: int) -> None:
    """Lead a process group, as a program started from a shell does."""
    os.setpgid(0, 0)


def slow_steps(rank: int, first: int, seconds: float) -> None:
    """Steps from `first` on take `seconds` longer."""
    real = main_dino.METHOD.step

    def train_step(run: Any, batches: Any, step: int, *args: Any) -> Any:
        if step >= first:
            time.sleep(seconds)
        return real(run, batches, step, *args)

    replace_step(train_step)
