"""The same command under every launcher: torchrun, its older form, several agents, srun, mpirun. All end as one run.

The runs share their two ranks' arithmetic (a sum of two numbers has no order), so their ends are compared bit for bit.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import processes
from tests.patience import PATIENCE_S
from tests.pretraining import VIT, assert_equal_states

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# main_dino.py whose steps can be held up: step 4 of the first start waits for HOLD to vanish, or kills rank 1.
WRAPPED = f"""
import dataclasses, os, pathlib, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import main_dino
from runtime.guards import run_program

real, marker = main_dino.train_step, pathlib.Path(os.environ["MARKER"])

def train_step(run, batches, step, *rest):
    if step == 4 and os.environ["FAULT"] == "kill" and os.environ["RANK"] == "1" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 4 and os.environ["FAULT"] == "hold":
        marker.with_name("held-" + os.environ["RANK"]).touch()
        while not marker.exists():
            time.sleep(0.02)
    return real(run, batches, step, *rest)

main_dino.METHOD = dataclasses.replace(main_dino.METHOD, step=train_step)
run_program(main_dino.main, sys.argv[1:])
"""


@dataclass
class Baseline:
    """Two ranks started by hand, undisturbed: what every launcher's run must end as."""

    flags: list[str]  # without --output_dir
    folder: Path


@pytest.fixture(scope="module")
def baseline(small, tmp_path_factory) -> Baseline:
    """Three epochs of three steps of 16 images, saved at every step."""
    flags = [*VIT, "--data_path", small, "--subset", 24, "--epochs", 3, "--eval_every", 0, "--global_batch_size", 16]
    flags = [str(flag) for flag in [*flags, "--checkpoint_every_steps", 1]]
    folder = tmp_path_factory.mktemp("baseline")
    processes.run([*flags, "--output_dir", folder / "run"], folder, world=2)
    return Baseline(flags, folder / "run")


def clean_environment(**variables: str) -> dict[str, str]:
    """This environment without a launcher's variables, one thread per process, and `variables`."""
    prefixes = ("SLURM", "OMPI", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def begin(command: list, output: Path, **variables: str) -> subprocess.Popen:
    """Start a command in the project's folder, its output in a file."""
    with output.open("a") as file:
        return subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, env=clean_environment(**variables),
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(process: subprocess.Popen, output: Path, timeout_s: float = PATIENCE_S) -> int:
    """The exit code; a process that outlasts the time is killed and fails the test."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"still running after {timeout_s} s:\n{output.read_text()}") from None


def wait_for(paths: list[Path], process: subprocess.Popen, output: Path, timeout_s: float = PATIENCE_S) -> None:
    """Wait until all the files are there."""
    deadline = time.monotonic() + timeout_s
    while not all(path.exists() for path in paths):
        assert process.poll() is None, f"ended early:\n{output.read_text()}"
        assert time.monotonic() < deadline, f"{paths} not written:\n{output.read_text()}"
        time.sleep(0.02)


@pytest.fixture
def wrapped(tmp_path) -> Path:
    """A file that runs main_dino.py with faults that MARKER and FAULT choose."""
    path = tmp_path / "wrapped.py"
    path.write_text(WRAPPED)
    return path


def test_torchrun_survives_a_killed_worker(baseline, tmp_path, wrapped):
    """kill -9 of one worker: --max_restarts starts both again, and the run ends as an undisturbed one."""
    output, run = tmp_path / "output.txt", tmp_path / "run"
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", 2, "--max_restarts", 1, wrapped, *baseline.flags]
    process = begin([*command, "--output_dir", run], output, MARKER=str(tmp_path / "killed"), FAULT="kill")
    assert finish(process, output) == 0, output.read_text()
    assert (tmp_path / "killed").exists()
    assert output.read_text().count("a new run") == 1
    assert f"continuing {run}" in output.read_text()
    assert_equal_states(baseline.folder, run)


def test_sigterm_to_torchrun(baseline, tmp_path, wrapped):
    """A scheduler ends torchrun: PREEMPTED is left, nothing is restarted, and the next start goes on."""
    output, run = tmp_path / "output.txt", tmp_path / "run"
    launch = [*TORCHRUN, "--standalone", "--nproc_per_node", 2, "--max_restarts", 1]
    flags = [*baseline.flags, "--output_dir", run]
    process = begin([*launch, wrapped, *flags], output, MARKER=str(tmp_path / "go"), FAULT="hold")
    wait_for([tmp_path / "held-0", tmp_path / "held-1"], process, output)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)  # torchrun's own loop looks at its workers every 0.1 s
    (tmp_path / "go").touch()
    finish(process, output)  # torchrun itself ends with its own error about the signal; the workers' code is 0:
    assert "exitcode" not in output.read_text()
    assert json.loads((run / "PREEMPTED").read_text())["signal"] == "SIGTERM"
    assert not (run / "DONE").exists()
    assert output.read_text().count("a new run") == 1
    assert "continuing" not in output.read_text()
    assert finish(begin([*launch, ROOT / "main_dino.py", *flags], output), output) == 0, output.read_text()
    assert (run / "DONE").exists()
    assert not (run / "PREEMPTED").exists()
    assert_equal_states(baseline.folder, run)


def test_two_agents_of_one_rendezvous(baseline, tmp_path):
    """Two "nodes" on one machine: two torchrun agents meet at a c10d rendezvous and train one run."""
    run, port = tmp_path / "run", processes.free_port()
    outputs = [tmp_path / f"node{node}.txt" for node in range(2)]
    command = [*TORCHRUN, "--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_id", "job"]
    command += ["--rdzv_endpoint", f"127.0.0.1:{port}", "main_dino.py", *baseline.flags, "--output_dir", run]
    nodes = [begin(command, output) for output in outputs]
    codes = [finish(node, output) for node, output in zip(nodes, outputs, strict=True)]
    assert codes == [0, 0], "\n".join(output.read_text() for output in outputs)
    assert_equal_states(baseline.folder, run)


def test_the_older_launcher(baseline, tmp_path):
    """`python -m torch.distributed.launch` adds --local-rank=N to the flags, which is accepted."""
    output, run = tmp_path / "output.txt", tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node", 2]
    command += ["--master_port", processes.free_port(), "main_dino.py", *baseline.flags, "--output_dir", run]
    assert finish(begin(command, output), output) == 0, output.read_text()
    assert_equal_states(baseline.folder, run)


def slurm(rank: int, port: int) -> dict[str, str]:
    """What srun tells one of two tasks on this machine."""
    return {
        "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip


def openmpi(rank: int, port: int) -> dict[str, str]:
    """What mpirun tells one of two processes on this machine."""
    sizes = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": str(port)}
    return {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank), **sizes}


@pytest.mark.parametrize("variables", [slurm, openmpi])
def test_tasks_of_srun_and_mpirun(baseline, tmp_path, variables):
    """Two processes that know of each other by srun's or mpirun's variables only."""
    port, run = processes.free_port(), tmp_path / "run"
    flags = [*baseline.flags, "--output_dir", run]
    tasks = [processes.start(flags, tmp_path / str(rank), env=variables(rank, port)) for rank in range(2)]
    assert [task.wait() for task in tasks] == [[0], [0]], "\n".join(task.text() for task in tasks)
    assert_equal_states(baseline.folder, run)


def test_a_port_in_use(baseline, tmp_path):
    """An occupied meeting point is one line that names it and the remedy, and code 2."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        task = processes.start([*baseline.flags, "--output_dir", tmp_path / "run"], tmp_path, env=slurm(0, port))
        assert task.wait() == [2]
    assert f"could not meet the others at tcp://localhost:{port}" in task.text()
    assert "set MASTER_PORT" in task.text()
    assert "Traceback" not in task.text()


@pytest.mark.parametrize("program", ["main_dino", "eval_knn", "eval_linear", "visualize_attention"])
@pytest.mark.parametrize("spelling", ["--local_rank", "--local-rank"])
def test_local_rank_is_accepted(program, spelling):
    """Launchers pass it with an underscore or a dash, as one word or two."""
    parser = importlib.import_module(program).get_args_parser()
    assert parser.parse_known_args([f"{spelling}=1"])[0].local_rank == 1
    assert parser.parse_known_args([spelling, "1"]) == parser.parse_known_args([f"{spelling}=1"])
