"""This process among the others: rank, world size, device, and the process group.

`launch_environment` reads them from the variables of torchrun, SLURM's srun or OpenMPI; without any it is one process.
A single process gets a process group too (over an in-memory store, without a port), so that code that calls
torch.distributed directly works the same everywhere.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import datetime
import os
import re
import socket
import time
import urllib.parse
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from runtime.guards import InputError, RunStopped

T = TypeVar("T")

_LONGEST_TIMEOUT_S = 30 * 86400


@dataclass(frozen=True)
class Launch:
    """One process's place in the job, and where the processes meet (None if there is only one)."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str
    address: str | None = None
    port: int | None = None


def launch_environment(env: Mapping[str, str]) -> Launch:
    """Rank, world size, local rank and meeting point from a launcher's environment variables.

    torchrun's variables take precedence (torchrun inside a SLURM job is common), then OpenMPI's (whose mpirun may use
    srun to reach other nodes), then srun's.
    A SLURM batch step without srun is one process, however many tasks the job reserved.
    Raises InputError if the variables are incomplete or contradict each other.
    """
    if "RANK" in env or ("WORLD_SIZE" in env and "LOCAL_RANK" in env):
        return _from_torchrun(env)
    if "OMPI_COMM_WORLD_RANK" in env:
        return _from_openmpi(env)
    if "SLURM_PROCID" in env and _number(env, "SLURM_STEP_NUM_TASKS", "SLURM", 1) > 1:
        return _from_slurm(env)
    return Launch(rank=0, world_size=1, local_rank=0, launcher="none")


def _number(env: Mapping[str, str], name: str, launcher: str, default: int | None = None) -> int:
    """A variable's whole number, 0 or more. Raises InputError for anything else, or if it is unset without default."""
    if name not in env and default is not None:
        return default
    if name not in env:
        raise InputError(f"{launcher} set some of its variables but not {name}; start with torchrun, srun or mpirun")
    if re.fullmatch(r"[0-9]{1,18}", env[name]) is None:
        raise InputError(f"{name}={env[name]!r} is not a number; unset it or use one launcher")
    return int(env[name])


def _port(env: Mapping[str, str]) -> int | None:
    if "MASTER_PORT" not in env:
        return None
    port = _number(env, "MASTER_PORT", "the launcher")
    if not 0 < port < 65536:
        raise InputError(f"MASTER_PORT={port} is not a valid port; set one from 1024 to 65535, or unset it")
    return port


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.world_size:
        raise InputError(
            f"{launch.launcher}: rank {launch.rank} is outside a world of {launch.world_size} processes; "
            "unset leftover RANK / WORLD_SIZE variables or start all processes with one launcher"
        )
    return launch


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    launch = _checked(
        Launch(
            rank=_number(env, "RANK", "torchrun"),
            world_size=_number(env, "WORLD_SIZE", "torchrun"),
            local_rank=_number(env, "LOCAL_RANK", "torchrun", 0),
            launcher="torchrun",
            address=env.get("MASTER_ADDR"),
            port=_port(env),
        )
    )
    if "TORCHELASTIC_RUN_ID" not in env:
        _check_others_agree(launch, env)
    return launch


def _check_others_agree(launch: Launch, env: Mapping[str, str]) -> None:
    """RANK and WORLD_SIZE, if torchrun did not set them, may be leftovers: srun or mpirun must agree with them."""
    for name, rank, size in (
        ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ):
        other = (_number(env, rank, name, 0), _number(env, size, name, 1))
        if other[1] > 1 and other != (launch.rank, launch.world_size):
            raise InputError(
                f"two launchers disagree: RANK={launch.rank} WORLD_SIZE={launch.world_size}, but {name} says "
                f"{rank}={other[0]} of {other[1]} tasks; unset RANK and WORLD_SIZE, or start torchrun with one task "
                "per node"
            )


def _from_slurm(env: Mapping[str, str]) -> Launch:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    job = _number(env, "SLURM_JOB_ID" if "SLURM_JOB_ID" in env else "SLURM_JOBID", "SLURM", 0)
    step = _number(env, "SLURM_STEP_ID" if "SLURM_STEP_ID" in env else "SLURM_STEPID", "SLURM", 0)
    return _checked(
        Launch(
            rank=_number(env, "SLURM_PROCID", "SLURM"),
            world_size=_number(env, "SLURM_STEP_NUM_TASKS", "SLURM"),
            local_rank=_number(env, "SLURM_LOCALID", "SLURM"),
            launcher="slurm",
            address=env.get("MASTER_ADDR") or first_host(nodes),
            # Every process computes the same port from the job's numbers, below the range that systems assign to
            # outgoing connections; two jobs on a node get different ports.
            port=_port(env) or 20000 + (job * 31 + step * 7) % 12000,
        )
    )


def _from_openmpi(env: Mapping[str, str]) -> Launch:
    world = _number(env, "OMPI_COMM_WORLD_SIZE", "OpenMPI")
    address = env.get("MASTER_ADDR")
    if address is None:
        if _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", "OpenMPI", world) != world:
            raise InputError("OpenMPI over several nodes needs MASTER_ADDR: mpirun -x MASTER_ADDR=<first host> ...")
        address = "127.0.0.1"
    job = env.get("PMIX_NAMESPACE", env.get("OMPI_MCA_ess_base_jobid", ""))
    return _checked(
        Launch(
            rank=_number(env, "OMPI_COMM_WORLD_RANK", "OpenMPI"),
            world_size=world,
            local_rank=_number(env, "OMPI_COMM_WORLD_LOCAL_RANK", "OpenMPI"),
            launcher="openmpi",
            address=address,
            port=_port(env) or 20000 + zlib.crc32(job.encode()) % 12000,
        )
    )


def first_host(node_list: str) -> str:
    """First host of a SLURM node list: `gpu[03-05,9],login` -> `gpu03`; this machine if the list is empty."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", node_list)
    if match is None:
        return "127.0.0.1"
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")


def choose_device(name: str = "auto", local_rank: int = 0, one_each: bool = False) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises InputError for a device that does not exist.

    one_each: the launcher may show each process only its own GPU (srun --gpus-per-task 1), which is then number 0.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} is unknown; use auto, cuda, cuda:N, mps or cpu") from None
    if device.type == "cuda":
        return _cuda_device(device, 0 if one_each and torch.cuda.device_count() == 1 else local_rank)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps was asked for, but this machine has no MPS; use --device auto or cpu")
    if device.type not in ("cpu", "mps"):
        raise InputError(f"--device {name!r} is not supported; use auto, cuda, cuda:N, mps or cpu")
    return device


def _cuda_device(device: torch.device, local_rank: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise InputError("--device cuda was asked for, but torch sees no CUDA device; use --device auto or cpu")
    index = device.index if device.index is not None else local_rank
    if index >= count:
        raise InputError(
            f"GPU index {index} is not there: this node shows {count} CUDA device(s); start at most {count} "
            "processes per node, or check CUDA_VISIBLE_DEVICES and the job's GPU request"
        )
    return torch.device("cuda", index)


def init_distributed_mode(args: argparse.Namespace) -> None:
    """Join the process group and set `args.rank`, `world_size`, `gpu`, `distributed` and `torch_device`.

    Reads `args.device`, `args.backend`, `args.dist_url` and `args.timeout` (seconds) if they exist, as DINO's
    function does with `args.dist_url`. A second call in one process keeps the existing group.
    """
    launch = launch_environment(os.environ)
    device = choose_device(getattr(args, "device", None) or "auto", launch.local_rank, launch.launcher == "slurm")
    args.rank, args.world_size, args.gpu = launch.rank, launch.world_size, launch.local_rank
    args.distributed = launch.world_size > 1
    args.launcher = launch.launcher
    args.torch_device = device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = _checked_backend(getattr(args, "backend", None), device)
        dist_url = _checked_url(getattr(args, "dist_url", None) or "env://")
        timeout_s = getattr(args, "timeout", None)
        _join(launch, backend, dist_url, _checked_timeout(1800.0 if timeout_s is None else timeout_s))


def _checked_backend(name: str | None, device: torch.device) -> str:
    name = name or ("nccl" if device.type == "cuda" else "gloo")
    known = [backend for backend in dist.Backend.backend_list if backend not in ("undefined", "fake")]
    unknown = [part for part in re.split(r"[,:]", name) if part not in (*known, "cpu", "cuda", "mps")]
    if unknown:
        raise InputError(f"--backend {name!r} is unknown; leave it out, or choose {', '.join(known)}")
    if name == "nccl" and device.type != "cuda":
        raise InputError(f"--backend nccl needs CUDA, but the device is {device}; leave --backend out or use gloo")
    return name


def _checked_url(url: str) -> str:
    """The meeting point's address. Raises InputError unless it is env://, tcp://HOST:PORT or file:///PATH."""
    try:
        parts = urllib.parse.urlsplit(url)
        whole = {"env": True, "tcp": bool(parts.hostname and parts.port), "file": bool(parts.path)}
    except ValueError:  # an invalid port
        whole = {}
    if not whole.get(url.partition("://")[0]) or "://" not in url:
        raise InputError(f"--dist_url {url!r} is not a valid address; use env://, tcp://HOST:PORT or file:///PATH")
    return url


def _checked_timeout(seconds: float) -> float:
    seconds = float(seconds)
    if not 0 < seconds <= _LONGEST_TIMEOUT_S:  # NaN too
        raise InputError(f"--timeout {seconds:g}: must be seconds above 0 and at most {_LONGEST_TIMEOUT_S} (30 days)")
    return seconds


def _join(launch: Launch, backend: str, dist_url: str, timeout_s: float) -> None:
    timeout = datetime.timedelta(seconds=timeout_s)
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if dist_url == "env://":
        dist_url = f"tcp://{launch.address or '127.0.0.1'}:{launch.port or 29500}"
    torchrun = launch.launcher == "torchrun" and launch.address is not None and launch.port is not None
    # torchrun's agent may already hold the port; it says so in variables that only torch reads.
    meeting = "env://" if torchrun else dist_url
    try:
        store, _, _ = next(dist.rendezvous(meeting, launch.rank, launch.world_size, timeout=timeout))
        if torchrun:
            store = dist.PrefixStore(agreed_name(store, launch.rank, launch.world_size, timeout_s), store)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise InputError(
            f"rank {launch.rank} on {socket.gethostname()} could not meet the others at {dist_url}: "
            f"{str(error).splitlines()[0]}; if the port is in use, set MASTER_PORT (or torchrun --master-port) to a "
            "free one, and check that every process uses one launcher"
        ) from error


def agreed_name(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name for this start of the processes, the same on all and never used before in this store.

    torchrun keeps one store across restarts: without a fresh name, a restarted process would find the addresses of the
    killed ones. No variable of torchrun counts the starts equally on all nodes, so rank 0 makes up the name. It answers
    each process with a token that only that process knows, so that an answer left by an earlier start is not accepted.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", word)
        store.wait([f"welcome/{word}"], datetime.timedelta(seconds=timeout_s))
        name = store.get(f"welcome/{word}").decode()
        store.set(f"{name}/{rank}", "here")
        return name
    missing, deadline = set(range(1, world_size)), time.monotonic() + timeout_s
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):  # perhaps from an earlier start: answered again until it confirms
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", word)
        missing = {other for other in missing if not store.check([f"{word}/{other}"])}
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError(f"ranks {sorted(missing)} did not appear within {timeout_s:g} s")
        time.sleep(0.01)
    return word


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Turn a failed exchange between processes into `RunStopped`, with a message that a user can act on.

    gloo reports at once that another process is gone, and after `--timeout` that it hangs; NCCL after `--timeout`.
    """
    try:
        yield
    except RunStopped:
        raise
    except RuntimeError as error:
        text = str(error).strip().splitlines()
        lost = isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)
        if get_world_size() == 1 or not lost:
            raise
        raise RunStopped(
            f"process {get_rank()} on {socket.gethostname()} waited in vain for another process of the run "
            f"({text[0] if text else type(error).__name__}). One died, was killed, or hangs longer than --timeout; its "
            "own output tells why. The last save is whole: start the same command to continue from it"
        ) from error


# Phrases that identify errors of gloo's exchanges, which are plain RuntimeErrors.
_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")


def leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() > 1:
            # gloo's thread may still be releasing the last exchange's tensors, for which it needs the interpreter lock.
            # The group's destructor waits for that thread without releasing the lock (torch 2.6 hangs there).
            time.sleep(0.1)
        dist.destroy_process_group()


def is_dist_avail_and_initialized() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return get_rank() == 0


def barrier() -> None:
    """Wait for all processes; does nothing if there is only one."""
    if get_world_size() > 1:
        dist.barrier()


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Rank `source`'s value on every rank."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def on_main_process(work: Callable[[], T], keep_local: bool = False) -> T | None:
    """Do `work` on rank 0 and send its result to all ranks; an InputError there is raised on all of them.

    `keep_local`: the result stays on rank 0 (it cannot be sent, or is of no use elsewhere); the others get None.
    """
    result, refusal = None, None
    if is_main_process():
        try:
            result = work()
        except InputError as error:
            refusal = str(error)
    refusal, shared = broadcast_object((refusal, None if keep_local else result))
    if refusal is not None:
        raise InputError(refusal)
    return result if is_main_process() else shared


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    if get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict[str, torch.Tensor]:
    """Sum or mean over the processes of each 0-d tensor of the dictionary (DINO's `reduce_dict`)."""
    if get_world_size() == 1:
        return input_dict
    names = sorted(input_dict)  # the same order on every rank, in whatever order the dictionaries were built
    with torch.no_grad():
        values = torch.stack([input_dict[name] for name in names])
        dist.all_reduce(values)
        if average:
            values /= get_world_size()
    return dict(zip(names, values, strict=True))


def setup_for_distributed(is_master: bool) -> None:
    """Silence `print` on all ranks except the master, unless `force=True` (for scripts written against DINO).

    The programs here do not use it: they print through `runtime.terminal.say`.
    """
    original = builtins.print

    def print_on_master(*args: Any, force: bool = False, **kwargs: Any) -> None:
        if is_master or force:
            original(*args, **kwargs)

    builtins.print = print_on_master
