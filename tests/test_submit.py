"""The batch scripts and submit.py against stand-ins for sbatch, srun and scontrol; tests/slurm has the real SLURM."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed.run

from tests.patience import PATIENCE_S
from tests.pretraining import VIT

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "run_scripts" / "slurm"

# Each stand-in notes its words in $NOTES. sbatch hands out numbers from 100 on; scontrol knows two nodes; where RUN is
# set, srun runs its command on every task, with the variables that the real one sets.
SBATCH = """
import json, os, sys
with open(os.environ["NOTES"], "a+") as notes:
    notes.seek(0)
    number = 100 + sum(json.loads(line)[0] == "sbatch" for line in notes)
    notes.write(json.dumps(["sbatch", *sys.argv[1:]]) + "\\n")
if "REFUSAL" in os.environ:
    sys.exit(os.environ["REFUSAL"])
print(f"{number};cluster")
"""
SRUN = """
import json, os, subprocess, sys
names = ("MASTER_ADDR", "MASTER_PORT", "SRUN_CPUS_PER_TASK")
with open(os.environ["NOTES"], "a") as notes:
    print(json.dumps(["srun", *sys.argv[1:], {name: os.environ.get(name) for name in names}]), file=notes)
if "RUN" in os.environ:
    words = sys.argv[1:]
    output = next(word.partition("=")[2] for word in words if word.startswith("--output="))
    while words[0].startswith("--"):
        words.pop(0)
    tasks, count = [], os.environ["SLURM_NTASKS"]
    for rank in range(int(count)):
        own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": count}
        path = output.replace("%t", str(rank)).replace("%x", os.environ["SLURM_JOB_NAME"])
        file = open(path, "a")
        tasks.append(subprocess.Popen(words, env={**os.environ, **own}, stdout=file, stderr=subprocess.STDOUT))
    sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print(os.environ.get("FIRST_HOST", "gpu03") + "\\ngpu04")
"""


@dataclass
class Cluster:
    """A PATH with the stand-ins, and what they were asked."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER_", "SRUN"))}
        return {**kept, "PATH": path, "NOTES": str(self.folder / "notes"), "OMP_NUM_THREADS": "1"}

    def asked(self, program: str) -> list[list]:
        """The words of each call of a stand-in."""
        notes = (self.folder / "notes").read_text().splitlines()
        return [words[1:] for words in map(json.loads, notes) if words[0] == program]

    def submit(self, *words: object, **env: str) -> subprocess.CompletedProcess:
        """run_scripts/submit.py."""
        command = [sys.executable, str(ROOT / "run_scripts" / "submit.py"), *map(str, words)]
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def batch(self, script: Path, *words: str, job: int = 100, tasks: int = 2, nodes: int = 1, **env: str):
        """A batch script as SLURM would start it on the first node: a copy, run in the folder of submission."""
        copy = self.folder / "slurm_script"
        copy.write_text(script.read_text())
        slurm = {
            "SLURM_JOB_ID": str(job), "SLURM_JOB_NAME": script.stem, "SLURM_JOB_NODELIST": "gpu[03-04]",
            "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS": str(tasks), "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_CPUS_PER_TASK": "3",
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(copy), *words], cwd=self.folder, env={**self.env, **slurm, **env},
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.write_text(f"#!{sys.executable} -S\n{text}")
        path.chmod(0o755)
    (tmp_path / "notes").touch()
    return Cluster(tmp_path)


def options(script: str) -> dict[str, str]:
    """The #SBATCH options of a batch script."""
    return {name: value for name, _, value in re.findall(r"^#SBATCH --([a-z-]+)(=?)(.*)$", script, re.MULTILINE)}


# ---- the batch scripts


@pytest.mark.parametrize("name", ["pretrain", "eval_knn", "eval_linear"])
def test_batch_scripts(name):
    """They can be parsed, come back after a node's failure, and go on in the same files; one task per GPU."""
    path = SCRIPTS / f"{name}.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    found = options(path.read_text())
    assert found["open-mode"] == "append"
    assert "requeue" in found
    assert found["ntasks-per-node"] == found["gpus-per-node"]
    # Behind a failed run an evaluation would wait for ever.
    assert found.get("kill-on-invalid-dep") == (None if name == "pretrain" else "yes")
    # Without "B:" the signal goes to the tasks, which save; the batch shell would only die of it.
    assert found.get("signal") == ("USR1@120" if name == "pretrain" else None)


def test_the_command_of_a_task(cluster):
    """srun starts the program on every task, with the flags given, a file per rank, and cores for its loaders."""
    flags = ["--arch", "vit_small", "--titles", "two words", "it's", "$HOME"]
    done = cluster.batch(SCRIPTS / "pretrain.sbatch", *flags, DATA="demo", OUT=str(cluster.folder / "my run"))
    assert done.returncode == 0, done.stderr
    ((*words, variables),) = cluster.asked("srun")
    assert "--open-mode=append" in words
    assert "--kill-on-bad-exit=1" in words
    assert f"--output={cluster.folder}/my run/logs/%x-%t.txt" in words
    program = words[words.index("main_dino.py") :]
    assert program[1:5] == ["--data_path", "demo", "--output_dir", str(cluster.folder / "my run")]
    assert program[5:] == ["--requeue", "true", *flags]
    assert variables["SRUN_CPUS_PER_TASK"] == "3"


def test_the_meeting_point(cluster):
    """The first host that scontrol names, and a port that all tasks of a job share and other jobs do not."""
    for job in (7, 7, 8, 4_000_000):
        assert cluster.batch(SCRIPTS / "pretrain.sbatch", job=job, DATA="demo", OUT=str(cluster.folder)).returncode == 0
    seen = [words[-1] for words in cluster.asked("srun")]
    assert {variables["MASTER_ADDR"] for variables in seen} == {"gpu03"}
    first, again, other, large = (int(variables["MASTER_PORT"]) for variables in seen)
    assert first == again != other
    assert all(1024 < port < 32768 for port in (first, other, large))  # the system hands out those above


def test_the_torchrun_form(cluster):
    """One task per node: a torchrun with a process per GPU, and all torchruns at one rendezvous."""
    env = {"DATA": "demo", "OUT": str(cluster.folder), "LAUNCHER": "torchrun"}
    done = cluster.batch(SCRIPTS / "pretrain.sbatch", tasks=16, nodes=2, **env)
    assert done.returncode == 0, done.stderr
    ((*words, variables),) = cluster.asked("srun")
    assert {"--ntasks=2", "--ntasks-per-node=1"} <= set(words)
    value = dict(itertools.pairwise(words[: words.index("main_dino.py")]))
    assert (value["--nnodes"], value["--nproc_per_node"], value["--rdzv_backend"]) == ("2", "8", "c10d")
    assert value["--rdzv_endpoint"] == f"gpu03:{variables['MASTER_PORT']}"
    assert value["--rdzv_id"] == "100"
    known = torch.distributed.run.get_args_parser().format_help()
    assert ("SIGUSR1" in value.get("--signals-to-handle", "")) == ("--signals-to-handle" in known)


@pytest.mark.parametrize("name", ["eval_knn", "eval_linear"])
def test_an_evaluation_looks_for_done(cluster, name):
    """Behind a preempted run, which may have ended well too, it says so and fails; behind a complete one it starts."""
    run = cluster.folder / "run"
    run.mkdir()
    (run / "PREEMPTED").touch()
    done = cluster.batch(SCRIPTS / f"{name}.sbatch", DATA="demo", OUT=str(run))
    assert done.returncode == 1
    assert f"{run} has no DONE marker" in done.stderr
    assert cluster.asked("srun") == []
    (run / "DONE").touch()
    assert cluster.batch(SCRIPTS / f"{name}.sbatch", "--nb_knn", "5", DATA="demo", OUT=str(run)).returncode == 0
    ((*words, _),) = cluster.asked("srun")
    assert words[-2:] == ["--nb_knn", "5"]
    assert words[words.index(f"{name}.py") + 1 :][:2] == ["--pretrained_weights", f"{run}/checkpoint.pth"]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"OUT": "x"}, "set DATA, for instance"),
        ({"DATA": "demo"}, "set OUT, for instance"),
        ({"OUT": "x", "DATA": "demo", "SLURM_SUBMIT_DIR": "/tmp"}, "/tmp/run_scripts/slurm/common.sh"),
    ],
)
def test_a_batch_script_that_lacks_something(cluster, env, message):
    """The first line of the job's output tells what to set, or where to submit from; nothing is started."""
    done = cluster.batch(SCRIPTS / "pretrain.sbatch", **env)
    assert done.returncode != 0
    assert message in done.stderr
    assert cluster.asked("srun") == []


def test_a_job_trains(cluster, small):
    """What submit.py writes, run on two tasks: they find each other, train, and leave DONE and a file per rank."""
    out = cluster.folder / "run"
    flags = [*VIT, "--data_path", small, "--output_dir", out, "--max_steps", 2, "--eval_every", 0, "--epochs", 1]
    done = cluster.submit("--ngpus", 0, "--tasks", 2, "--cpus_per_task", 1, "--", *flags, "--global_batch_size", 16)
    assert done.returncode == 0, done.stderr
    done = cluster.batch(out / "slurm" / "pretrain.sbatch", RUN="yes", FIRST_HOST="localhost")
    log = (out / "logs" / "pretrain-0.txt").read_text()
    assert done.returncode == 0, done.stderr + log
    assert "2 process(es)" in log
    assert (out / "logs" / "pretrain-1.txt").exists()
    assert (out / "DONE").exists()


# ---- submit.py

FLAGS = ["--arch", "vit_small", "--data_path", "demo", "--output_dir", "run"]


def test_submit_chains(cluster):
    """The pretraining first, each evaluation after its good end; the scripts stay in the output folder."""
    done = cluster.submit("--eval_knn", "--eval_linear", "--nodes", 2, "--partition", "gpu", "--", *FLAGS)
    assert done.returncode == 0, done.stderr
    slurm = cluster.folder / "run" / "slurm"
    assert cluster.asked("sbatch") == [
        ["--parsable", f"{slurm}/pretrain.sbatch"],
        ["--parsable", "--dependency=afterok:100", f"{slurm}/eval_knn.sbatch"],
        ["--parsable", "--dependency=afterok:100", f"{slurm}/eval_linear.sbatch"],
    ]
    assert "pretrain: job 100" in done.stdout
    for path in slurm.glob("*.sbatch"):
        found = options(path.read_text())
        assert (found["nodes"], found["partition"], found["ntasks-per-node"]) == ("2", "gpu", "8")
        assert found["output"] == f"{slurm}/{path.stem}-%j.out"


def test_options_of_a_job(cluster):
    """Every option reaches the script in place of the script's own, once; without GPUs none are asked for."""
    given = {
        "nodes": "3", "cpus_per_task": "4", "time": "01:00:00", "account": "a1", "qos": "low", "constraint": "h100",
        "mem": "100G", "job_name": "mine",
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    more = ["--signal_s", 300, "--sbatch", "exclude=node7", "--ngpus", 0, "--tasks", 2, "--dry_run"]
    done = cluster.submit(*words, *more, "--", *FLAGS)
    assert done.returncode == 0, done.stderr
    found = options(done.stdout)
    assert {name.replace("_", "-"): value for name, value in given.items()}.items() <= found.items()
    assert (found["signal"], found["exclude"], found["ntasks-per-node"]) == ("USR1@300", "node7", "2")
    assert "gpus-per-node" not in found
    names = re.findall(r"^#SBATCH --([a-z-]+)", done.stdout, re.MULTILINE)
    assert len(names) == len(set(names))


def test_dry_run_submits_nothing(cluster):
    """It prints scripts that bash can parse, without sbatch, and leaves no file."""
    done = cluster.submit("--eval_knn", "--dry_run", "--", *FLAGS, PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/usr/bin/env bash") == 2
    assert not (cluster.folder / "run").exists()
    assert cluster.asked("sbatch") == []


def test_flags_reach_the_program(cluster):
    """Words with spaces, quotes and dollars arrive as they were given, and data and output folder as full paths."""
    flags = ["--arch", "vit small", "--note=it's $HOME", "--data-path=demo", "--output-dir", "my run"]
    assert cluster.submit("--", *flags).returncode == 0
    done = cluster.batch(cluster.folder / "my run" / "slurm" / "pretrain.sbatch")
    assert done.returncode == 0, done.stderr
    ((*words, _),) = cluster.asked("srun")
    program = words[words.index("main_dino.py") + 1 :]
    expected = f"--data_path demo --output_dir '{cluster.folder}/my run' --requeue true --arch 'vit small'"
    assert program == [*shlex.split(expected), "--note=it's $HOME"]


SUBMITIT = """
import json, os, types
class SlurmExecutor:
    def __init__(self, folder):
        self.asked = {"folder": str(folder)}
    def update_parameters(self, **parameters):
        self.asked |= parameters
    def submit(self, job):
        with open(os.environ["NOTES"], "a") as notes:
            print(json.dumps(["submitit", self.asked, job.flags, os.environ["SUBMITIT_PREEMPT_SIGNAL"]]), file=notes)
        return types.SimpleNamespace(job_id="77")
"""


def test_the_submitit_form(cluster):
    """Nodes, tasks, time, the signal that the program catches and the requeue reach submitit, and the flags the job."""
    (cluster.folder / "submitit.py").write_text(SUBMITIT)
    words = ["--submitit", "--nodes", 2, "--ngpus", 4, "--partition", "gpu", "--signal_s", 90, "--", *FLAGS]
    done = cluster.submit(*words, PYTHONPATH=str(cluster.folder))
    assert done.stdout == "pretrain: job 77\n", done.stderr
    ((asked, flags, signal),) = cluster.asked("submitit")
    assert (asked["nodes"], asked["ntasks_per_node"], asked["gpus_per_node"], asked["signal_delay_s"]) == (2, 4, 4, 90)
    assert asked["additional_parameters"] == {"requeue": True, "partition": "gpu"}
    assert (flags, signal) == ([*FLAGS], "USR1")


SECRET = "x\n#SBATCH --uid=0\ntouch hacked"


@pytest.mark.parametrize(
    "words",
    [
        ["--partition", SECRET, "--", *FLAGS], ["--job_name", SECRET, "--", *FLAGS],
        ["--sbatch", f"comment={SECRET}", "--", *FLAGS], ["--sbatch", f"{SECRET}=1", "--", *FLAGS],
        ["--time", "1\r2", "--", *FLAGS], ["--", *FLAGS[:-1], SECRET], ["--", *FLAGS, "--note", SECRET],
        ["--sbatch", "wrap=a\\b\"c", "--", *FLAGS],
    ],
)  # fmt: skip
def test_no_value_becomes_a_line_of_the_script(cluster, words):
    """A newline would end the directive that it stands in, and what follows would run: refused, nothing is written."""
    done = cluster.submit(*words)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert cluster.asked("sbatch") == []
    assert not (cluster.folder / "run").exists()


def test_spaces_hashes_and_percents_in_values(cluster):
    """sbatch parts a directive at spaces, takes # for a comment and % for a pattern: quoted, and doubled in paths."""
    done = cluster.submit("--job_name", "my run #2", "--", *FLAGS[:-1], "runs 50% #1")
    assert done.returncode == 0, done.stderr
    folder = cluster.folder / "runs 50% #1" / "slurm"
    script = (folder / "pretrain.sbatch").read_text()
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    read = dict(word.removeprefix("--").partition("=")[::2] for line in directives
                for word in shlex.split(line, comments=True))  # fmt: skip
    assert read["job-name"] == "my run #2"
    assert read["output"] == f"{cluster.folder}/runs 50%% #1/slurm/pretrain-%j.out"
    assert cluster.batch(folder / "pretrain.sbatch").returncode == 0
    ((*words, _),) = cluster.asked("srun")
    assert str(cluster.folder / "runs 50% #1") in words
    assert f"--output={cluster.folder}/runs 50%% #1/logs/%x-%t.txt" in words


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (["--submitit", "--eval_knn", "--", *FLAGS], {}, "--submitit submits the pretraining alone"),
        (["--submitit", "--", *FLAGS], {"PYTHONPATH": "missing"}, "package submitit"),
        (["--", *FLAGS], {"PATH": "/nowhere"}, "sbatch is not on this machine's PATH"),
        (["--", *FLAGS], {"REFUSAL": "invalid partition specified: gpu"}, "invalid partition specified: gpu"),
        (["--", "--data_path", "demo"], {}, "--output_dir is missing"),
        (["--", "--output_dir", "run"], {}, "--data_path is missing"),
        (["--", "--output_dir"], {}, "--output_dir is missing"),
        ([], {}, "flags are missing; give them after --"),
        (["--nodes", "0", "--", *FLAGS], {}, "--nodes 0: must be at least 1"),
        (["--tasks", "2", "--", *FLAGS], {}, "--tasks 2 with --ngpus 8"),
        (["--sbatch", "exclusive", "--", *FLAGS], {}, "give OPTION=VALUE"),
        (["--arch", "vit_small"], {}, "--arch"),
    ],
)
def test_what_cannot_be_submitted(cluster, words, env, message):
    """One line names what is wrong; no traceback."""
    (cluster.folder / "missing").mkdir()
    (cluster.folder / "missing" / "submitit.py").write_text("raise ImportError")
    done = cluster.submit(*words, **env)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_submit_starts_quickly():
    """A login node has no time for torch: submit.py imports the standard library only."""
    code = "import sys, runpy; runpy.run_path('run_scripts/submit.py'); assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
