"""Flags, guards, lock, signals, log, device choices."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from runtime import hardware, log
from runtime.cli import HelpFormatter, add_flag, bool_flag, float_or_none, given_flags, parse_program, read_config
from runtime.guards import InputError, NonFiniteError, input_errors, run_program
from runtime.late import LateReader
from runtime.lock import FolderLock
from runtime.preempt import StopRequest, requeue_slurm_job
from runtime.reproduce import fix_random_seeds, get_sha, seed_step


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(add_help=False, formatter_class=HelpFormatter)
    add_flag(p, "--data_path", default="x", help="where")
    add_flag(p, "--scale", type=float, nargs=2, help="area")
    add_flag(p, "--mode", choices=("a", "b"), default="a", help="how")
    add_flag(p, "--flag", type=bool_flag, default=False, help="whether")
    return p


def test_dashes_and_underscores():
    """Both spellings are accepted, and help shows the underscored one only."""
    assert parser().parse_args(["--data-path", "y"]).data_path == "y"
    assert parser().parse_args(["--data_path", "y"]).data_path == "y"
    assert "--data-path" not in parser().format_help()
    assert "where (default: x)" in parser().format_help()


def test_argument_types():
    """DINO's boolean words, and numbers that may be None."""
    assert [bool_flag(w) for w in ("true", "on", "1", "False", "off", "0")] == [True, True, True, False, False, False]
    assert float_or_none("None") is None
    assert float_or_none("1.25") == 1.25
    for function, word in ((bool_flag, "maybe"), (float_or_none, "x")):
        with pytest.raises(argparse.ArgumentTypeError, match=word):
            function(word)


def test_given_flags_are_those_on_the_line():
    """A flag set to its default still counts as given."""
    assert given_flags(parser, ["--mode", "a"]) == ["mode"]


@pytest.mark.parametrize(("name", "text"), [("c.json", '{"scale": [0.1, 1], "flag": "true"}'),
                                            ("c.yaml", "scale: [0.1, 1]\nflag: true\n")])  # fmt: skip
def test_config_files(tmp_path, name, text):
    """JSON and YAML give the values that the flags would."""
    (tmp_path / name).write_text(text)
    assert read_config(tmp_path / name, parser()) == {"scale": [0.1, 1.0], "flag": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"data_pth": 1}', "did you mean data_path"), ('{"mode": "c"}', "choose a, b"), ("{", "cannot be parsed"),
     ("[1]", "one object"), ('{"scale": ["x", 1]}', "scale")],
)  # fmt: skip
def test_bad_config_files(tmp_path, text, message):
    """Each mistake is named."""
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(tmp_path / "c.json", parser())


@pytest.mark.parametrize(("error", "code"), [(InputError("bad value 3"), 2), (NonFiniteError("step 7"), 3), (None, 0)])
def test_exit_codes(capsys, error, code):
    """A program leaves with its documented code, and errors of input are one line."""

    def main(_):
        if error:
            raise error

    with pytest.raises(SystemExit) as leaving:
        run_program(main)
    assert leaving.value.code == code
    if error:
        assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--data-pth", "x"], r"unknown flag --data_pth; did you mean --data_path\?"),
     (["--zzz=3"], r"unknown flag --zzz \("), (["x"], "unexpected argument 'x'"), (["--mode", "c"], "--mode.*'c'")],
)  # fmt: skip
def test_wrong_flags_are_named_with_those_near(argv, message):
    """An unknown flag, however spelt, comes with the known ones that are near it."""
    with pytest.raises(InputError, match=message):
        parse_program("program.py", parser(), __doc__, argv)
    assert parse_program("program.py", parser(), __doc__, ["--data-path=z"]).data_path == "z"


def test_input_errors_are_translated():
    """ValueError and OSError in set-up become InputError; a TypeError stays a defect."""
    with pytest.raises(InputError, match="ctx: nope"), input_errors("ctx"):
        raise ValueError("nope")
    with pytest.raises(TypeError), input_errors():
        raise TypeError


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    """A second run is refused with host and process; a killed holder's lock is free at once."""
    code = f"from runtime.lock import FolderLock; from pathlib import Path; l = FolderLock(Path({str(tmp_path)!r})); " \
           "print('held', flush=True); import time; time.sleep(60)"  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"host .*, process {holder.pid}"):
        FolderLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    FolderLock(tmp_path).release()
    FolderLock(tmp_path).release()


def test_the_lock_is_not_held_by_forked_workers(tmp_path):
    """A loader worker that outlives its killed parent for a while does not keep the folder locked."""
    code = f"from runtime.lock import FolderLock; from pathlib import Path; l = FolderLock(Path({str(tmp_path)!r})); " \
           "import os, time; pid = os.fork(); pid or print(os.getpid(), flush=True); time.sleep(60)"  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())  # it has begun
    with pytest.raises(InputError, match="another run is using"):
        FolderLock(tmp_path)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    try:
        FolderLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)


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


def test_log_rows_survive_a_full_disk(tmp_path, monkeypatch, capsys):
    """A row that could not be written is written before the next one, and no line is torn."""
    path = tmp_path / "log.txt"
    rows = log.JsonLog(path)
    rows.append({"epoch": 0, "x": float("nan")})
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    rows.append({"epoch": 1})
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0]
    assert "not written" in capsys.readouterr().out
    monkeypatch.setattr(os, "fsync", real)
    rows.append({"epoch": 2})
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n', [0, 1]),
        ('{"epoch": 0}\n{"epo', [0]),
        ('{"epoch": 0}\n{"epoch": 0}\n{"epoch": 1}', [0, 1]),
        ("", []),
    ],
)
def test_rows_ahead_of_the_checkpoint_are_cut(tmp_path, text, kept):
    """Rows of epochs that run again, torn lines and doubles go; the file ends in a newline."""
    path = tmp_path / "log.txt"
    path.write_text(text)
    log.cut_json_lines(path, first_epoch=2)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == kept
    assert path.read_text().endswith("\n") or not kept


def test_meters():
    """Tensors are read late; window and global means, and a round trip through the state."""
    meters = log.MetricLogger()
    for value in (1.0, torch.tensor(2.0), torch.tensor(6.0)):
        meters.update(loss=value)
    assert meters.loss.global_avg == 3
    assert meters.loss.value == 6
    assert meters.loss.median == 2
    other = log.MetricLogger()
    other.load_state_dict(meters.state_dict())
    assert other.state_dict() == meters.state_dict()
    with pytest.raises(AttributeError, match="nothing"):
        _ = meters.nothing


def test_progress_lines(capsys):
    """Off a terminal progress is a few plain lines, the last one complete."""
    bar = log.Progress(range(5), desc="work", every_s=1000)
    for i in bar:
        bar.set_text(f"i {i}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[-1] == "work 5/5  i 4"


def test_precision_is_chosen_by_its_error(monkeypatch):
    """The fast CPU library is taken only where a probe shows float32's accuracy."""
    for error, expected in ((1e-7, "medium"), (1e-3, "highest")):
        monkeypatch.setattr(hardware, "product_error", lambda _, error=error: error)
        choice = hardware.choose(torch.device("cpu"), "auto", "auto", convolutional=True)
        assert choice.matmul_precision == expected
        assert torch.get_float32_matmul_precision() == expected
    assert choice.channels_last
    assert choice.amp == "none"
    assert hardware.choose(torch.device("cpu"), "bf16", "highest", False).amp_dtype == torch.bfloat16
    with pytest.raises(InputError, match="fp8"):
        hardware.choose(torch.device("cpu"), "fp8", "auto", False)


def test_product_error_is_float32s_at_highest():
    """The probe itself: at full precision the error is that of float32 sums."""
    assert hardware.product_error("highest") < 2e-6
    assert torch.get_float32_matmul_precision() == "highest"


def test_late_reader_off_cuda_is_not_late():
    """On a CPU results are read at once, in order."""
    reader = LateReader(torch.device("cpu"))
    reader.push(3, torch.tensor([1.0, 2.0]))
    assert reader.read() == [(3, [1.0, 2.0])]
    assert reader.read(everything=True) == []


def test_seeds():
    """A step's draws depend on seed, step and rank, on nothing else."""
    draws = []
    for key in ((0, 1, 0), (0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)):
        torch.rand(3)
        seed_step(*key)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4
    fix_random_seeds(3)


def test_sha():
    """One line, in a checkout or not."""
    assert get_sha().startswith("sha: ")
