"""experiments/gpu.sh: everything that it would do on a GPU works, at toy size on a CPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "gpu.sh"


def rehearse(output: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SCRIPT), "--rehearse", "--output_dir", str(output), *flags],
        capture_output=True, text=True, timeout=3 * PATIENCE_S, check=False,
    )  # fmt: skip


@pytest.mark.full
def test_every_part_runs_and_is_left_out_the_next_time(tmp_path):
    """A rehearsal of all parts ends well, each with what it printed; started again, it has nothing to do."""
    done = rehearse(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = sorted(path.stem for path in tmp_path.glob("*.done"))
    assert len(parts) == 12
    assert all((tmp_path / f"{part}.md").stat().st_size for part in parts)
    assert "equal bit for bit" in (tmp_path / "resume.md").read_text()
    for name in ("simpool", "attmask", "pooling"):
        assert (tmp_path / "tables" / name / "results.csv").is_file()
    again = rehearse(tmp_path)
    assert again.returncode == 0
    assert again.stdout.count(": done, see") == 12


def test_parts_are_chosen_by_name(tmp_path):
    """An unknown part is an error that lists those there are, before anything runs."""
    done = rehearse(tmp_path, "--only", "knn", "knm")
    assert (done.returncode, "no such part; there are tests rates" in done.stderr) == (2, True)
    assert not list(tmp_path.iterdir())


def test_images_are_needed_without_a_rehearsal(tmp_path):
    """The parts that load images say so at once."""
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, "--data_path" in done.stderr) == (2, True)
