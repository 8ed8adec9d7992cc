"""The batch scripts on a real SLURM: what a job does at its time limit, when it is requeued or cancelled, and chained.

    bash tests/slurm/start_slurm.sh                   # as root: a SLURM of one machine with 2 CPUs
    python tests/slurm/trial.py /tmp/trial            # about 12 minutes; prints one line per property
    bash tests/slurm/start_slurm.sh stop

Not collected by pytest. Any other SLURM with a default partition of 2 CPUs will do. Two tasks train a tiny ViT on the
built-in images over gloo; docs/cluster.md has what was seen.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.pretraining import VIT, assert_equal_states  # noqa: E402

FLAGS = [
    *VIT, "--data_path", "demo:32", "--num_workers", "1", "--global_batch_size", "16", "--epochs", "2",
    "--saveckp_freq", "0", "--eval_every", "0", "--device", "cpu",
]  # fmt: skip


def command(*words: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def submit(folder: Path, *options: str, minutes: int = 10) -> dict[str, str]:
    """Submit a run of two CPU tasks; job numbers by kind."""
    sizes = ["--ngpus", "0", "--tasks", "2", "--cpus_per_task", "1", "--time", str(minutes), *options]
    out = command(
        sys.executable, "run_scripts/submit.py", *sizes, "--", *FLAGS, "--output_dir", str(folder)
    )  # fmt: skip
    return dict(re.findall(r"^(\w+): job (\d+)", out, re.MULTILINE))


def job(number: str) -> dict[str, str]:
    """What SLURM says of a job."""
    text = command("scontrol", "show", "job", number)
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def wait(what: str, met: Callable[[], bool], seconds: float = 600) -> float:
    """Seconds until `met()`."""
    begin = time.monotonic()
    while not met():
        assert time.monotonic() - begin < seconds, f"{what}: not within {seconds} s\n{command('squeue')}"
        time.sleep(0.5)
    return time.monotonic() - begin


def ended(number: str) -> bool:
    """Whether SLURM is finished with a job."""
    return job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")


def printed(folder: Path, words: str) -> int:
    """How often rank 0 printed something, over all starts."""
    path = folder / "logs" / "pretrain-0.txt"
    return path.read_text().count(words) if path.exists() else 0


def report(property_: str, seen: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {property_}: {seen}", flush=True)


def alone(base: Path) -> Path:
    """The run that nothing disturbs, with its evaluations behind it."""
    folder = base / "alone"
    jobs = submit(folder, "--eval_knn", "--eval_linear")
    waiting = job(jobs["eval_knn"])
    report("an evaluation waits", f"{waiting['JobState']} ({waiting['Reason']}), {waiting['Dependency']}")
    wait("the run", lambda: ended(jobs["pretrain"]))
    assert job(jobs["pretrain"])["JobState"] == "COMPLETED"
    wait("its evaluations", lambda: ended(jobs["eval_knn"]) and ended(jobs["eval_linear"]), 900)
    states = [job(jobs[kind])["JobState"] for kind in ("pretrain", "eval_knn", "eval_linear")]
    assert states == ["COMPLETED"] * 3, states
    results = json.loads((folder / "eval_knn.json").read_text())["results"]
    report("pretraining and evaluations on two tasks", f"{', '.join(states)}; k-NN {results}")
    return folder


def limited(base: Path, reference: Path) -> None:
    """Two time limits of a minute: signalled, saved, requeued by itself; then time enough to end, bit-identical."""
    folder = base / "limited"
    number = submit(folder, "--signal_s", "35", minutes=1)["pretrain"]
    wait("two time limits", lambda: printed(folder, "is back in the queue") == 2)
    wait("the queue", lambda: job(number)["JobState"] == "PENDING")
    command("scontrol", "update", f"JobId={number}", "TimeLimit=20")
    wait("the run", lambda: ended(number), 900)
    seen = job(number)
    requeued, preempted = printed(folder, "is back in the queue"), printed(folder, "stopped by SIGUSR1")
    assert seen["JobState"] == "COMPLETED", seen["JobState"]
    assert requeued == preempted == int(seen["Restarts"]) == 2, (requeued, preempted, seen["Restarts"])
    assert_equal_states(reference, folder)
    report("time limit of 1 minute", "signalled, saved and requeued twice, COMPLETED, bit-identical")


def ends_after_a_restart(number: str, folder: Path, reference: Path) -> None:
    """Wait until a job that was put back into the queue once has ended well, with the reference's state."""
    wait("the run", lambda: (folder / "DONE").exists() and ended(number), 900)
    seen = job(number)
    assert (seen["JobState"], seen["Restarts"]) == ("COMPLETED", "1"), seen
    assert_equal_states(reference, folder)


def requeued(base: Path, reference: Path) -> None:
    """`scontrol requeue` by hand, in the middle of an epoch: starts again and ends bit-identical."""
    folder = base / "requeued"
    number = submit(folder)["pretrain"]
    wait("the first line", lambda: printed(folder, "epoch 0 ") > 0)
    command("scontrol", "requeue", number)
    ends_after_a_restart(number, folder, reference)
    how = "it had saved" if printed(folder, "continuing ") else "it started over"
    report("scontrol requeue", f"1 restart ({how}), COMPLETED, bit-identical")


def cancelled(base: Path) -> None:
    """`scancel`: the run saves and leaves, and does not come back."""
    folder = base / "cancelled"
    number = submit(folder)["pretrain"]
    wait("the first line", lambda: printed(folder, "epoch 0 ") > 0)
    command("scancel", number)
    seconds = wait("its end", lambda: ended(number) and job(number)["JobState"] == "CANCELLED", 60)
    time.sleep(10)
    assert job(number)["JobState"] == "CANCELLED", job(number)["JobState"]
    marker = "PREEMPTED" if (folder / "PREEMPTED").exists() else "no marker"
    report("scancel", f"CANCELLED after {seconds:.0f} s, {marker}, not requeued")


def under_torchrun(base: Path, reference: Path) -> None:
    """The torchrun form, signalled once in between: requeued, and the same result."""
    folder = base / "torchrun"
    number = submit(folder, "--launcher", "torchrun")["pretrain"]
    wait("the first line", lambda: printed(folder, "epoch 0 ") > 0)
    command("scancel", "--signal=USR1", number)
    ends_after_a_restart(number, folder, reference)
    report("torchrun, SIGUSR1 to the job", "saved, requeued once, COMPLETED, bit-identical")


def main(base: Path) -> None:
    os.environ.update(OMP_NUM_THREADS="1", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    base.mkdir(parents=True)
    report("SLURM", command("scontrol", "--version").strip())
    reference = alone(base)
    requeued(base, reference)
    limited(base, reference)
    cancelled(base)
    under_torchrun(base, reference)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
