"""Signals that ask a run to stop, and the queue of SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from runtime.preempt import StopRequest, requeue_slurm_job
from tests.patience import PATIENCE_S, on_this_machine


def test_stop_signals():
    """TERM and USR1 are noted, however often; the first INT too, a second would abort; handlers are put back."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert not stop.requested
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_requeue(tmp_path, monkeypatch):
    """scontrol requeue is called once with the job's number, unless the job was cancelled; outside a job, and where
    scontrol fails, it is said.
    """
    said: list[str] = []
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    requeue_slurm_job(said.append)
    assert "outside a SLURM job" in said[0]
    calls = tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    for state in ("COMPLETING", "RUNNING"):
        (tmp_path / "scontrol").write_text(
            f"#!/bin/sh\necho $1 $2 >> {calls}\necho JobId=77 JobState={state} Reason=None\n"
        )
        (tmp_path / "scontrol").chmod(0o755)
        requeue_slurm_job(said.append)
    assert calls.read_text().splitlines() == ["show job", "show job", "requeue 77"]
    assert "COMPLETING" in said[1]
    assert said[2] == "job 77 is back in the queue"
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho no controller >&2\nexit 1\n")
    requeue_slurm_job(said.append)
    assert said[3] == "warning: job 77 was not requeued: no controller"


BUSY = """
import hashlib
from runtime.preempt import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000_000)  # one library call of minutes
    print("returned", flush=True)
"""


def test_ctrl_c_is_answered_while_a_library_works():
    """The line comes during the call, before Python can run a handler; a second Ctrl-C ends the process at once."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert "finishing this step, then saving" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        # 130 if our thread ended it, the signal itself if Python had run the first handler by then.
        assert process.wait(on_this_machine(30)) in (130, -signal.SIGINT)
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.communicate()


def test_one_answer_per_signal():
    """A repeated SIGTERM is answered once."""
    code = "import os, signal\nfrom runtime.preempt import StopRequest\nwith StopRequest():\n" \
           "    for _ in range(3):\n        os.kill(os.getpid(), signal.SIGTERM)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stderr.split("\n")[:-1] == ["SIGTERM: finishing this step, then saving and leaving"]


def test_a_job_number_that_is_none(monkeypatch):
    """SLURM_JOB_ID goes to scontrol only if it is a job's number."""
    said: list[str] = []
    monkeypatch.setenv("SLURM_JOB_ID", "--all")
    requeue_slurm_job(said.append)
    assert "is no job's number" in said[0]
