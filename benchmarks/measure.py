"""Helpers of the benchmarks: timing both sides in turn, peak memory, and relative errors."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler announces every start and stop on stderr


def timed_in_turn(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each side. A round runs every side once; the first one warms them up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextlib.contextmanager
def run_apart(make: Callable[..., Callable[..., object]], *args: object) -> Iterator[Callable[..., None]]:
    """A side in a separate process with its own settings: `run(...)` here calls `make(*args)(...)` there.

    It takes its turns like any other side, waiting in between. Raises EOFError if it died; its traceback is printed.
    """
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, args), daemon=True)
    process.start()
    there.close()  # so that the end of the process is the end of the pipe

    def run(*arguments: object) -> None:
        here.send(arguments)
        here.recv()

    try:
        here.recv()  # it is ready
        yield run
    finally:
        here.close()
        process.join()


def _serve(pipe: Connection, make: Callable[..., Callable[..., object]], args: tuple[object, ...]) -> None:
    run = make(*args)
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # the parent is done
        while True:
            run(*pipe.recv())
            synchronize()
            pipe.send("done")


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The peak of tensor memory during run(), beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, divided by the norm of the expected tensor."""
    return ((actual - expected).norm() / expected.norm()).item()
