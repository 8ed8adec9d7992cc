"""A disk that is full, read-only or gone: training goes on, the last good checkpoint stays, the end is the same."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from runtime import saver as saver_module
from runtime.checkpoint import read_checkpoint
from runtime.saver import CheckpointSaver
from tests import processes
from tests.patience import PATIENCE_S
from tests.pretraining import assert_equal_states, rows
from tests.reliability import injection
from tests.reliability.conftest import Whole

# ---- 50 points of one save


def state(step: int) -> dict:
    return {"iteration": step, "w": torch.arange(200_000.0), "more": [torch.full((3000,), float(step))] * 5}


def saved_in_child(folder: Path, fault: Callable[[], None]) -> list[str]:
    """In a child process: save step 1, then step 2 while `fault` is in force; what the saver said, as lines."""
    parent, child = multiprocessing.Pipe()

    def work() -> None:
        said: list[str] = []
        saver = CheckpointSaver(folder, 2, 5, said.append)
        saver.save(state(1), 1)
        saver.wait()
        fault()
        saver.save(state(2), 2)
        saver.wait()
        child.send(said)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    answered = parent.poll(PATIENCE_S)
    process.join(PATIENCE_S)
    assert answered, f"the writer ended its process with {process.exitcode}"
    return parent.recv()


def limit_file_size(size: int) -> None:
    """Let the kernel refuse whatever a file would hold beyond `size` bytes, in Python's writes and torch's alike."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def assert_last_good_stays(folder: Path, said: list[str]) -> None:
    """One save acknowledged, one failed; every file under a checkpoint's name is whole; no torn one is left."""
    assert len(said) == 2
    assert said[0].endswith("at step 1")
    assert "not saved" in said[1]
    assert read_checkpoint(folder / "checkpoint.pth")["iteration"] in (1, 2)
    assert read_checkpoint(folder / "checkpoint_step00000001.pth")["iteration"] == 1
    for path in folder.iterdir():
        assert path.name.startswith("checkpoint"), path
        read_checkpoint(path)


@pytest.mark.parametrize("fortieth", [0, 1, 13, 39, *(pytest.param(i, marks=pytest.mark.full) for i in range(40))])
def test_the_disk_is_full_after_some_bytes(tmp_path, fortieth):
    """The kernel takes a part of the file only: 40 places from its begin to its end."""
    torch.save(state(2), tmp_path / "size")
    size = (tmp_path / "size").stat().st_size
    (tmp_path / "size").unlink()
    said = saved_in_child(tmp_path, partial(limit_file_size, size * fortieth // 40))
    assert_last_good_stays(tmp_path, said)


CALLS = [("mkstemp", 0), ("fsync", 0), ("fsync", 1), ("fsync", 2), ("replace", 0), ("replace", 1), ("link", 0),
         ("open", 0), ("open", 1), ("chmod", 0)]  # fmt: skip


@pytest.mark.parametrize(("call", "nth"), CALLS)
def test_the_disk_is_full_at_a_call(tmp_path, call, nth):
    """10 more places: creating the file, sealing it, making it durable, naming and linking it."""

    def fault() -> None:
        calls = iter(range(1000))
        module = {"mkstemp": saver_module.tempfile, "open": __import__("builtins"), "chmod": Path}.get(call, os)
        real = getattr(module, call)

        def failing(*args, **kwargs):
            if next(calls) == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        setattr(module, call, failing)
        if call == "link":  # a failed link means a copy, which fails as well
            saver_module.shutil.copyfile = failing
            calls = iter([0, 0])

    said = saved_in_child(tmp_path, fault)
    assert_last_good_stays(tmp_path, said)


# ---- whole runs


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_training_goes_on_while_nothing_can_be_written(whole: Whole, tmp_path, error):
    """From step 2 to 5, the end of an epoch with its log row included, the disk refuses all; then it works again."""
    folder = tmp_path / "run"
    patch = partial(injection.disk_fails_during, folder=folder, steps=range(2, 6), error=error)
    flags = [*whole.flags, "--output_dir", folder, "--max_failed_saves", 9]
    ranks = processes.run(flags, tmp_path, patch=patch)
    assert 2 <= ranks.text().count("warning: checkpoint not saved") <= 8
    assert "log.txt not written" in ranks.text()
    assert "tensorboard not written" in ranks.text()
    assert_equal_states(whole.folder, folder)
    from tests.tensorboard_tags import steps

    assert steps(folder, "train/loss") == list(range(9))


def test_a_folder_that_vanishes_and_comes_back(whole: Whole, tmp_path):
    """A lost mount costs the saves meanwhile, and nothing else."""
    folder = tmp_path / "run"
    patch = partial(injection.folder_vanishes_during, folder=folder, steps=range(2, 5))
    ranks = processes.run([*whole.flags, "--output_dir", folder, "--max_failed_saves", 9], tmp_path, patch=patch)
    assert "warning: checkpoint not saved" in ranks.text()
    assert_equal_states(whole.folder, folder)


def test_a_disk_that_stays_full_stops_all_ranks(whole: Whole, tmp_path):
    """After --max_failed_saves both ranks stop with the reason, and the run can be continued when there is room."""
    folder = tmp_path / "run"
    flags = [*whole.flags, "--global_batch_size", 16, "--output_dir", folder]
    patch = partial(injection.disk_fails_during, folder=folder, steps=range(2, 99))
    ranks = processes.start([*flags, "--max_failed_saves", 3], tmp_path, world=2, patch=patch)
    assert ranks.wait() == [1, 1]
    assert "3 saves" in ranks.text(0)
    assert "another process of the run stopped it: 3 saves" in ranks.text(1)
    assert read_checkpoint(folder / "checkpoint.pth")["iteration"] in (1, 2)  # the save of step 2 may be under way
    processes.run(flags, tmp_path, world=2)
    assert [row["epoch"] for row in rows(folder)] == [0, 1, 2]


def test_a_run_is_not_done_before_its_last_save(whole: Whole, tmp_path):
    """A disk that is full at the end: the last save is tried until it is good, and fails the run if it never is."""
    folder = tmp_path / "run"
    patch = partial(injection.disk_fails_during, folder=folder, steps=range(8, 99))
    flags = [*whole.flags, "--output_dir", folder]
    ranks = processes.start([*flags, "--max_failed_saves", 3], tmp_path, patch=patch)
    assert ranks.wait() == [1]
    assert not (folder / "DONE").exists()
    processes.run(flags, tmp_path)
    assert (folder / "DONE").exists()
    assert_equal_states(whole.folder, folder)
