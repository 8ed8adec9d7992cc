"""The loader: worker processes that make whole batches, and how batches reach the device.

`build_loader` is torch's DataLoader for any data set that makes a whole batch at a time. It keeps workers alive while
the training process handles a signal, and turns what goes wrong in a worker into an error of one line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.augment import CropSpec
from data.colour import channel_statistics
from data.eval_set import EvalSet
from data.sampler import TrainSampler
from data.source import ImageSource
from data.train_set import TrainSet
from runtime.guards import InputError, RunStopped


def build_train_loader(
    source: ImageSource,
    spec: CropSpec,
    sampler: TrainSampler,
    num_workers: int = 0,
    seed: int = 0,
    pin_memory: bool = False,
    on_bad_image: str = "substitute",
    prefetch_factor: int = 2,
) -> Loader:
    """Batches of crops in the sampler's order; each iteration is one epoch from the sampler's position.

    pin_memory: page-locked batches, for a CUDA device. prefetch_factor: batches that each worker keeps ready.
    """
    return build_loader(TrainSet(source, spec, seed, on_bad_image), sampler, num_workers, pin_memory, prefetch_factor)


def ahead_on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches, moved to `device` by their `to`; on CUDA each travels while the step before it computes.

    The copy runs in its own stream, from pinned memory (`pin_memory` of `build_train_loader`).
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream, waiting = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = batch.to(device, non_blocking=True)
        if waiting is not None:
            yield waiting
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)  # the step after this one waits for its crops, and only for them
        for tensor in _tensors(moved):
            if tensor.is_cuda:
                tensor.record_stream(current)
        waiting = moved
    if waiting is not None:
        yield waiting


# ---- evaluation ----


def build_eval_loader(
    source: ImageSource,
    batch_size: int,
    num_workers: int = 0,
    img_size: int = 224,
    resize: int = 256,
    indices: Sequence[int] | np.ndarray | None = None,
    pin_memory: bool = False,
    on_bad_image: str = "raise",
) -> Loader:
    """uint8 images (B, C, S, S) and their indices (B,), in order; `indices` limits it to a part, in that order.

    on_bad_image: see `EvalSet`. With "skip" the images that never come are the bad ones; a batch may be empty.
    """
    indices = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    return build_loader(
        EvalSet(source, img_size, resize, on_bad_image), _InOrder(indices, batch_size), num_workers, pin_memory
    )


class _InOrder:
    """Batch sampler: the given indices in their order, the last batch as short as need be."""

    def __init__(self, indices: np.ndarray, batch_size: int):
        self.indices, self.batch_size = indices, batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield self.indices[start : start + self.batch_size].tolist()


def normalize(
    images: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> torch.Tensor:
    """(B, C, H, W) uint8 -> `dtype`, scaled to [0, 1] and normalised per channel, on the images' device.

    mean, std: of each channel; by default ImageNet's, as in training (`channel_statistics`).
    """
    mean, std = channel_statistics(images.shape[1], mean, std)
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(-1, 1, 1)
    return (images * scale + shift).to(dtype)


# ---- any data set ----


def build_loader(
    dataset: Dataset,
    batch_sampler: Iterable,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
) -> Loader:
    """A loader over any data set whose `__getitems__(batch of the sampler)` returns a whole batch.

    The batch may be a tensor, or (named) tuples and lists of tensors. An `InputError` that the data set raises in a
    worker arrives as one here; a lost worker or a full /dev/shm is a `RunStopped`.
    """
    if num_workers < 0:
        raise InputError(f"--num_workers {num_workers}: give 0 (load in the training process) or more")
    return Loader(
        _Answering(dataset),
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch_factor if num_workers else None,
        # Forked workers share the file list with the training process, and end with it whatever ends it.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
    )


class Loader(DataLoader):
    """torch's DataLoader with errors that can be read: bad input as `InputError`, a lost worker by its likely cause."""

    def __iter__(self) -> Iterator:
        with _own_child_signal():
            batches = super().__iter__()  # workers start now, not at the first batch
        return self._checked(batches)

    def _checked(self, batches: Iterator) -> Iterator:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not _worker_is_gone(error):
                    raise
                raise RunStopped(
                    f"a loader worker is gone ({' '.join(str(error).split())}). Most often the machine ran out of "
                    "memory: use fewer --num_workers, or ask the scheduler for more memory or a larger /dev/shm"
                ) from error
            if isinstance(batch, _Refusal):
                raise (InputError if batch.bad_input else RunStopped)(batch.message)
            yield batch


def _worker_is_gone(error: Exception) -> bool:
    """Whether torch noticed a dead worker, or could not fetch from one a batch that it had announced."""
    if "in DataLoader worker process" in str(error):  # raised by the data set, in a worker that lives
        return False
    return "DataLoader worker (pid" in str(error) or isinstance(error, (ConnectionError, FileNotFoundError, EOFError))


@contextlib.contextmanager
def _own_child_signal() -> Iterator[None]:
    """Restore SIGCHLD's handler: torch's raises wherever the program is when a worker dies, even in a save.

    Without it the loop learns of a lost worker when it waits for its batch: torch looks every 5 seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


class _Refusal(NamedTuple):
    """An error on its way from a worker: raised there, torch would wrap it in a traceback."""

    message: str
    bad_input: bool  # an `InputError`; else the run can't go on for another reason


class _Answering(Dataset):
    """A data set that returns a `_Refusal` instead of raising `InputError`, or an error for want of shared memory."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices):
        try:
            batch = self.dataset.__getitems__(indices)
            if get_worker_info() is not None:
                _share(batch)
            return batch
        except InputError as error:
            return _Refusal(str(error), True)
        except (RuntimeError, OSError) as error:
            if get_worker_info() is None or os.strerror(errno.ENOSPC) not in str(error):
                raise
            return _Refusal(
                "the shared memory that loader workers pass images through is full (/dev/shm): use fewer "
                "--num_workers or a smaller batch, or enlarge it (docker run --shm-size 16g)",
                False,
            )


def _share(batch) -> None:
    """Move tensors into shared memory here: in the queue's own thread a failure would leave the reader waiting."""
    for tensor in _tensors(batch):
        tensor.share_memory_()


def _tensors(batch) -> Iterator[torch.Tensor]:
    """The tensors of a batch: itself, or those in (named) tuples and lists."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from _tensors(part)


def _as_it_is(batch):
    """The data set makes whole batches; nothing is left to collate."""
    return batch


def _start_worker(_worker: int) -> None:
    """Leave signals to the training process: it finishes its step and saves, and needs its workers until then.

    SIGTERM is obeyed from the training process alone, which ends its workers so; a scheduler's goes to all processes
    of a job. Where the system does not tell who sent it (macOS), SIGTERM keeps its usual meaning.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
