"""Runs of a training program in processes of their own, forked from one parent that has imported torch already."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE_S

CONTEXT = multiprocessing.get_context("forkserver")
# Everything that a run imports on its way: then a tiny run takes a second, not four.
CONTEXT.set_forkserver_preload(
    ["main_dino", "tests.processes", "torchvision.io", "tensorboardX.proto.event_pb2", "tensorboardX.record_writer"]
)


@dataclass
class Ranks:
    """The processes of one run, and where their output goes."""

    processes: list[Any]
    outputs: list[Path]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def wait(self, timeout_s: float = PATIENCE_S) -> list[int]:
        """Exit codes by rank; processes that outlast the time are killed and fail the test."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        late = [process for process in self.processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"{len(late)} process(es) still running after {timeout_s} s:\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def text(self, rank: int | None = None) -> str:
        """What a rank printed; of all ranks, one after the other, without a number."""
        chosen = self.outputs if rank is None else [self.outputs[rank]]
        return "\n".join(path.read_text(errors="replace") for path in chosen if path.exists())

    def wait_for(self, words: str, rank: int = 0, timeout_s: float = PATIENCE_S) -> None:
        """Wait until a rank has printed `words`."""
        deadline = time.monotonic() + timeout_s
        while words not in self.text(rank):
            assert time.monotonic() < deadline, f"{words!r} not printed:\n{self.text()}"
            assert self.processes[rank].is_alive() or words in self.text(rank), f"died:\n{self.text()}"
            time.sleep(0.01)


def start(
    argv: list[str], folder: Path, world: int = 1, env: dict[str, str] | None = None, patch: Callable | None = None,
    program: str = "main_dino",
) -> Ranks:  # fmt: skip
    """Start a program's `main(argv)` on `world` ranks; `patch(rank)` runs in each child first, to inject faults."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"OMP_NUM_THREADS": "1", **(env or {})}
    if world > 1:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    stamp = f"{time.monotonic_ns()}"
    outputs = [folder / f"output-{stamp}-{rank}.txt" for rank in range(world)]
    processes = []
    for rank in range(world):
        own = variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
        args = ([str(a) for a in argv], own, str(outputs[rank]), rank, patch, program)
        process = CONTEXT.Process(target=_child, args=args)
        process.start()
        processes.append(process)
    return Ranks(processes, outputs)


def run(argv: list[str], folder: Path, world: int = 1, **kwargs: Any) -> Ranks:
    """Start, wait, and check that every rank ended well."""
    ranks = start(argv, folder, world, **kwargs)
    codes = ranks.wait()
    assert codes == [0] * world, f"exit codes {codes}:\n{ranks.text()}"
    return ranks


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(argv: list[str], env: dict[str, str], output: str, rank: int, patch: Callable | None, program: str) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    import torch

    from runtime.guards import run_program

    torch.set_num_threads(1)
    if patch is not None:
        patch(rank)
    run_program(importlib.import_module(program).main, argv)
