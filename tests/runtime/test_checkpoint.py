"""Checkpoints can neither tear nor lie nor run code."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime import checkpoint
from runtime.guards import InputError
from tests.reference import reference_checkpoint_path, tensor


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "checkpoint.pth"
    checkpoint.save_checkpoint({"w": tensor(1, (100, 10)), "b": [1, 2.5, None, "x"], "c": {"d": (1, 2)}}, path)
    return path


def test_round_trip_without_an_allow_list(saved):
    """Plain torch.load(weights_only=True) reads our files, and so do we."""
    for content in (torch.load(saved, weights_only=True), checkpoint.read_checkpoint(saved)):
        assert torch.equal(content["w"], tensor(1, (100, 10)))
        assert content["b"] == [1, 2.5, None, "x"]
        assert content["c"] == {"d": (1, 2)}


def content_or_refusal(path: Path):
    try:
        return checkpoint.read_checkpoint(path)
    except InputError:
        return None


def same(one, other) -> bool:
    return torch.equal(one["w"], other["w"]) and all(one[k] == other[k] for k in ("b", "c")) and set(one) == set(other)


@pytest.mark.parametrize("flips", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_every_flipped_bit_that_changes_content_is_found(saved, tmp_path, flips):
    """A random flipped bit anywhere is either detected or changed nothing of the content."""
    data, good, rng = saved.read_bytes(), checkpoint.read_checkpoint(saved), random.Random(0)
    damaged = tmp_path / "damaged.pth"
    detected = 0
    for _ in range(flips):
        at = rng.randrange(len(data))
        damaged.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        content = content_or_refusal(damaged)
        detected += content is None
        assert content is None or same(content, good), f"byte {at}"
    assert detected > 0.9 * flips


@pytest.mark.parametrize("pages", [20, pytest.param(100, marks=pytest.mark.full)])
def test_zeroed_pages_and_cuts_are_found(tmp_path, pages):
    """A page of zeros, and a file cut at any 4 KiB, are detected."""
    path = tmp_path / "big.pth"
    checkpoint.save_checkpoint({"w": tensor(1, (pages * 1024,))}, path)
    data = path.read_bytes()
    damaged = tmp_path / "damaged.pth"
    for start in range(0, len(data), 4096):
        page = data[start : start + 4096]
        if page.strip(b"\0"):
            damaged.write_bytes(data[:start] + bytes(len(page)) + data[start + len(page) :])
            assert content_or_refusal(damaged) is None, f"zeroed page at {start}"
        damaged.write_bytes(data[:start])
        assert content_or_refusal(damaged) is None, f"cut at {start}"


def test_a_foreign_file_is_checked_by_its_entries(tmp_path):
    """A file of torch.save's own has no digest; its zip CRCs are checked, which torch.load does not do."""
    path = tmp_path / "foreign.pth"
    torch.save({"w": tensor(1, (5000,))}, path)
    assert torch.equal(checkpoint.read_checkpoint(path)["w"], tensor(1, (5000,)))
    data = bytearray(path.read_bytes())
    at = data.find(tensor(1, (5000,)).numpy().tobytes()) + 1000
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        checkpoint.read_checkpoint(path)


def test_a_failed_write_leaves_the_old_file_and_no_orphan(saved):
    """What cannot be pickled raises, the file under the name stays, nothing else is left."""
    before = saved.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        checkpoint.save_checkpoint({"f": lambda: 0}, saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_the_reference_checkpoint_is_read_as_plain_data():
    """The published format, an argparse.Namespace inside, is read safely; the Namespace becomes a dictionary."""
    content = checkpoint.read_checkpoint(reference_checkpoint_path())
    assert content["args"]["arch"] == "vit_small"
    assert {"student", "teacher", "optimizer", "epoch", "dino_loss"} <= set(content)


def test_numpy_scalars_and_paths_become_plain(tmp_path):
    """A learning rate that was a numpy scalar, as schedules leave it in an optimizer, is read as a float."""
    path = tmp_path / "c.pth"
    torch.save({"lr": np.float64(0.5), "n": np.int64(3), "args": argparse.Namespace(out=Path("x"))}, path)
    content = checkpoint.read_checkpoint(path)
    assert type(content["lr"]) is float
    assert type(content["n"]) is int
    assert content["args"] == {"out": "x"}


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Local:
    pass


def malicious(marker: str) -> dict[str, object]:
    command = f"touch {marker}"
    return {
        "os.system": Calls(os.system, command),
        "subprocess": Calls(subprocess.check_call, ["touch", marker]),
        "popen": Calls(subprocess.Popen, ["touch", marker]),
        "eval": Calls(eval, f"open({marker!r}, 'w')"),
        "exec": Calls(exec, f"open({marker!r}, 'w')"),
        "open": Calls(open, marker, "w"),
        "getattr": Calls(getattr, "x", "upper"),
        "import": Calls(__import__, "antigravity"),
        "torch.load": Calls(torch.load, marker),
        "torch.hub": Calls(torch.hub.load_state_dict_from_url, "file://" + marker),
        "class": Local(),
        "nested": {"a": [{"b": Calls(os.mkdir, marker)}]},
    }


@pytest.mark.parametrize("kind", sorted(malicious("x")))
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_never_runs(tmp_path, kind, form):
    """Twelve kinds of malicious content, in each format, are refused by the name of what they hold, and not run."""
    marker = tmp_path / "executed"
    content = {"teacher": {"w": torch.zeros(2)}, "args": malicious(str(marker))[kind]}
    path = tmp_path / "evil.pth"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError, match="code or an object") as refusal:
        checkpoint.read_checkpoint(path)
    assert not marker.exists()
    name = {"class": "Local", "nested": "mkdir", "import": "__import__", "subprocess": "check_call", "popen": "Popen"}
    assert name.get(kind, kind.rpartition(".")[2]).split("load")[0] in str(refusal.value)


def test_other_bad_files_say_what_they_are(tmp_path):
    """Missing, a folder, empty, text, a picture's bytes, a list: each a line that names the file."""
    cases = {
        "text.pth": b"hello world",
        "empty.pth": b"",
        "short.pth": b"\x80\x02",
        "png.pth": b"\x89PNG" * 9,
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            checkpoint.read_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds a list"):
        checkpoint.read_checkpoint(tmp_path / "list.pth")
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.read_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(InputError, match="is a folder"):
        checkpoint.read_checkpoint(tmp_path)


def test_json_is_strict(tmp_path):
    """NaN and infinities are written as null, tuples as lists."""
    checkpoint.write_json_atomic(tmp_path / "x.json", {"a": float("nan"), "b": (1, np.float32(2)), "c": Path("p")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1, 2.0], "c": "p"}


def test_files_get_the_usual_permissions(saved):
    """A checkpoint is as readable as any file that the user makes, though it began as a private temporary one."""
    script = "import os; print(oct(os.umask(0)))"
    umask = int(subprocess.check_output([sys.executable, "-c", script], text=True), 8)
    assert saved.stat().st_mode & 0o777 == 0o666 & ~umask


def test_only_temporaries_of_a_run_are_swept(tmp_path):
    """What a killed run left goes; a user's own files, links and folders of a similar name stay."""
    ours = [".tmp-checkpoint.pth.a1b2c3d4", ".tmp-checkpoint_step00000012.pth.abcdefgh", ".tmp-config.json.abcd_123",
            ".tmp-DONE.abcdefgh", ".tmp-probe.abcdefgh"]  # fmt: skip
    theirs = [".tmp-notes", ".tmp-checkpoint.pth", ".tmp-eval_knn.json.abcdefgh", ".tmp-thesis.pth.abcdefgh"]
    for name in ours + theirs:
        (tmp_path / name).touch()
    (tmp_path / ".tmp-log.txt.abcdefgh").mkdir()
    (tmp_path / ".tmp-log.txt.abcdefgi").symlink_to(tmp_path / ".tmp-notes")
    assert checkpoint.sweep_temporaries(tmp_path) == sorted(ours)
    assert {path.name for path in tmp_path.iterdir()} == {*theirs, ".tmp-log.txt.abcdefgh", ".tmp-log.txt.abcdefgi"}


def test_what_a_killed_writer_leaves_is_swept(tmp_path):
    """The names that a writer really uses are those that are recognised."""
    for name in ("checkpoint.pth", "checkpoint_step00000001.pth", "checkpoint0020.pth", "config.json", "DONE"):
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write_atomic(tmp_path / name, leave_it)
    assert len(checkpoint.sweep_temporaries(tmp_path)) == 5


def leave_it(temporary: Path) -> None:
    """Die in the middle of writing; the file stays under another name of the same kind."""
    os.link(temporary, temporary.with_name(temporary.name[:-1] + "_"))
    raise KeyboardInterrupt
