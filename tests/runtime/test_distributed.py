"""Every launcher's variables become a rank, a world and a meeting point."""

from __future__ import annotations

import argparse
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from runtime import distributed
from runtime.distributed import choose_device, first_host, init_distributed_mode, launch_environment
from runtime.guards import InputError

SLURM = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[03-04]",
}  # fmt: skip


def test_torchrun():
    """torchrun's variables, with its own meeting point."""
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    launch = launch_environment(env)
    assert (launch.rank, launch.world_size, launch.local_rank) == (3, 4, 1)
    assert (launch.address, launch.port, launch.launcher) == ("a", 5, "torchrun")


def test_slurm():
    """srun's variables; the first host, and a port that is the job's own."""
    launch = launch_environment(SLURM)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.launcher) == (5, 8, 1, "slurm")
    assert launch.address == "gpu03"
    assert 20000 <= launch.port < 60000
    assert launch_environment({**SLURM, "SLURM_JOB_ID": "1235"}).port != launch.port
    assert launch_environment({**SLURM, "SLURM_PROCID": "0"}).port == launch.port


def test_torchrun_inside_slurm():
    """torchrun started by srun, one task a node: torchrun's variables count."""
    env = {**SLURM, "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert launch_environment(env).world_size == 16


def test_sbatch_without_srun_is_one_process():
    """Python called in a batch script, without srun, does not wait for tasks that nobody started."""
    env = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_LOCALID": "0"}
    assert launch_environment(env).world_size == 1


def test_openmpi():
    """mpirun's variables; several nodes need MASTER_ADDR."""
    env = {
        "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }  # fmt: skip
    launch = launch_environment(env)
    assert (launch.rank, launch.world_size, launch.address) == (1, 2, "127.0.0.1")
    assert launch_environment({**SLURM, **env}).world_size == 2  # mpirun may reach its nodes by srun
    with pytest.raises(InputError, match="MASTER_ADDR"):
        launch_environment({**env, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


def test_nothing():
    """Without a launcher: one process."""
    assert launch_environment({}) == distributed.Launch(0, 1, 0, "none")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "rank 4 is outside"),
        ({"RANK": "zero", "WORLD_SIZE": "4"}, "RANK='zero'"),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "4"}, "two launchers disagree: .* SLURM_PROCID=5 of 8"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            "two launchers disagree: .* OMPI_COMM_WORLD_RANK=1 of 2",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "tcp"}, "MASTER_PORT='tcp' is not a number"),
        ({**SLURM, "MASTER_PORT": "tcp"}, "MASTER_PORT='tcp' is not a number"),
    ],
)
def test_wrong_combinations(env, message):
    """Incomplete or contradicting variables are named."""
    with pytest.raises(InputError, match=message):
        launch_environment(env)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-05,9],login", "gpu03"), ("a,b", "a"), ("n1", "n1"), ("n[7,9]-ib", "n7-ib"), ("", "127.0.0.1")],
)
def test_first_host(nodes, first):
    """The first host of a SLURM list."""
    assert first_host(nodes) == first


def test_devices():
    """auto finds one; what is not there, or unknown, is named."""
    assert isinstance(choose_device("auto"), torch.device)
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="gpu"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="cuda"):
            choose_device("cuda")
    else:
        with pytest.raises(InputError, match="GPU index 99"):
            choose_device("cuda:99")


def test_a_gpu_that_is_not_there(monkeypatch):
    """More processes than GPUs: the index, the number of GPUs and the remedy are named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", local_rank=1) == torch.device("cuda", 1)
    for name, local_rank in (("auto", 2), ("cuda:2", 0)):
        with pytest.raises(InputError, match=r"GPU index 2 is not there: this node shows 2 .* CUDA_VISIBLE_DEVICES"):
            choose_device(name, local_rank)


def names(store: dist.Store, ranks: list[int], timeout_s: float) -> list[str | None]:
    """The names that the living ones of three ranks give their start; None for a rank that gave up."""

    def name(rank: int) -> str | None:
        try:
            return distributed.agreed_name(store, rank, 3, timeout_s)
        except dist.DistError:
            return None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(name, ranks))


def test_restarted_processes_agree_on_a_fresh_name():
    """Whatever killed processes left in the store, all of a start get one name, and every start another one."""
    store = dist.HashStore()
    store.set("hello/1", "left by a process that is gone")
    assert names(store, [0, 1], 0.3)[0] is None  # rank 2 was killed before it came
    assert names(store, [1, 2], 0.3) == [None, None]  # and now rank 0
    first, second = names(store, [0, 1, 2], 10), names(store, [2, 1, 0], 10)
    assert None not in first + second
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]


def test_a_group_of_one():
    """Without a launcher there is a process group of one, so that code calling torch.distributed works."""
    args = argparse.Namespace(device="cpu")
    distributed.init_distributed_mode(args)
    try:
        assert (args.rank, args.world_size, args.gpu, args.distributed) == (0, 1, 0, False)
        dist.barrier()
        assert distributed.on_main_process(lambda: 5) == 5
        with pytest.raises(InputError, match="no"):
            distributed.on_main_process(refuse)
    finally:
        distributed.leave()
    assert distributed.get_world_size() == 1


def refuse():
    raise InputError("no")


def test_nccl_needs_cuda():
    """A backend that the device cannot use is refused before anything waits."""
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="nccl needs CUDA"):
            distributed.init_distributed_mode(argparse.Namespace(device="cpu", backend="nccl"))


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS='x'"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "a"}, "SLURM_JOB_ID"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a valid port"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "0"}, "MASTER_PORT=0 is not a valid port"),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "a", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID='a'"),
        ({"RANK": "9" * 30, "WORLD_SIZE": "2"}, "RANK="),
    ],
)  # fmt: skip
def test_odd_variables_of_launchers(env, name):
    """Each is one line with the variable and its value."""
    with pytest.raises(InputError, match=re.escape(name)):
        launch_environment(env)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("dist_url", "foo://"), ("dist_url", "tcp://host"), ("dist_url", "tcp://host:99999"), ("dist_url", "x"),
        ("backend", "glooo"), ("timeout", float("inf")), ("timeout", float("nan")), ("timeout", -1.0),
        ("timeout", 1e12), ("timeout", 0.0),
    ],
)  # fmt: skip
def test_odd_launcher_flags(flag, value):
    """Each is one line with the flag and its value, before the processes try to meet."""
    args = argparse.Namespace(device="cpu", **{flag: value})
    with pytest.raises(InputError, match=rf"--{flag}"):
        init_distributed_mode(args)
