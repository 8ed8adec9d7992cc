"""results.csv, the table and the picture of an experiment come from its runs' own files, and --check proves it."""

from __future__ import annotations

import json

import pytest

from experiments import tables
from experiments.summary import BEGIN, END
from runtime.guards import InputError
from tests.experiments.runs import write_run


def run(*flags) -> int:
    return tables.main([str(flag) for flag in flags])


@pytest.fixture
def experiment(tmp_path):
    """experiments/poolings with new runs of two labels and two seeds next to it."""
    folder = tmp_path / "experiments" / "poolings"
    folder.mkdir(parents=True)
    (folder / "table.json").write_text(json.dumps(
        {"title": "Poolings", "baseline": "gap", "columns": {"val average top1": "top-1", "eval_knn k top1": "k-NN"}}
    ))  # fmt: skip
    for label, gain in (("gap", 0.0), ("simpool", 2.0)):
        for seed in (0, 1):
            write_run(tmp_path / "new", label, seed, 50.0 + gain + seed)
    write_run(tmp_path / "new", "gem", 0, 70.0, done=False)
    return folder


def test_new_runs_become_tables_that_can_be_checked(experiment, tmp_path, capsys):
    """Texts of finished runs are kept, without weights and private folders; every file is made, and --check agrees."""
    assert run("poolings", "--folder", experiment.parent, "--runs", tmp_path / "new") == 0
    assert "left out: gem/seed0 is not finished" in capsys.readouterr().out
    kept = sorted(path.relative_to(experiment / "runs").as_posix() for path in experiment.rglob("seed0/*"))
    assert kept == [
        f"{label}/seed0/{name}"
        for label in ("gap", "simpool")
        for name in ("DONE", "config.json", "log.txt", "untrained.json")
    ]
    texts = "".join(path.read_text() for path in experiment.rglob("*.json"))
    assert str(tmp_path) not in texts
    assert "/somewhere" not in texts
    assert '"data_path": "images"' in texts

    table = (experiment / "table.md").read_text()
    assert "| [simpool](runs/simpool) | 0, 1 | 53.50 ± 0.71 | +2.00 ± 0.00 (n = 2) |" in table
    assert (experiment / "results.csv").read_text().splitlines()[1:4] == [
        "gap,0,train_loss,0.0,runs/gap/seed0/log.txt", "gap,0,val model top1,50.0,runs/gap/seed0/log.txt",
        "gap,0,val model top5,70.0,runs/gap/seed0/log.txt",
    ]  # fmt: skip
    assert (experiment / "table.png").read_bytes().startswith(b"\x89PNG")
    assert run("--folder", experiment.parent, "--check") == 0

    log = experiment / "runs" / "gap" / "seed0" / "log.txt"
    log.write_text(log.read_text().replace("50.0", "49.0"))
    before = (experiment / "table.md").read_text()
    assert run("--folder", experiment.parent, "--check") == 1
    assert (experiment / "table.md").read_text() == before
    assert run("--folder", experiment.parent) == 0
    assert run("--folder", experiment.parent, "--check") == 0


def test_the_readme_has_a_line_for_each_experiment(experiment, tmp_path):
    """Made with the tables, checked with them; a page without a place for it is an error that names the marks."""
    page = tmp_path / "README.md"
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    assert run("poolings", "--folder", experiment.parent, "--runs", tmp_path / "new") == 0
    row = "| [Poolings](experiments/poolings/README.md) | top-1 | gap 51.5 ± 0.7, simpool 53.5 ± 0.7 | 2 |"
    assert row in page.read_text().splitlines()
    assert page.read_text().startswith(f"# Title\n\n{BEGIN}\n")
    assert page.read_text().endswith(f"{END}\n\nThe end.\n")
    assert run("--folder", experiment.parent, "--check") == 0
    page.write_text(page.read_text().replace("53.5", "54.5"))
    assert run("--folder", experiment.parent, "--check") == 1
    page.write_text("# Title\n")
    with pytest.raises(InputError, match="no place for the measurements"):
        run("--folder", experiment.parent)


def test_results_without_their_raw_files_still_make_the_table(experiment, tmp_path):
    """results.csv alone is enough for the table and the picture."""
    assert run("poolings", "--folder", experiment.parent, "--runs", tmp_path / "new") == 0
    table = (experiment / "table.md").read_text()
    (experiment / "runs").rename(tmp_path / "elsewhere")
    (experiment / "table.md").unlink()
    assert run("--folder", experiment.parent, "--check") == 1
    assert run("--folder", experiment.parent) == 0
    assert (experiment / "table.md").read_text() == table


def test_runs_of_a_label_are_replaced_and_others_stay(experiment, tmp_path):
    """A second collection adds its labels."""
    assert run("poolings", "--folder", experiment.parent, "--runs", tmp_path / "new") == 0
    write_run(tmp_path / "more", "gap", 0, 10.0, {"eval_knn": {"knn": [{"k": 20, "top1": 33.0}]}})
    write_run(tmp_path / "more", "lse", 0, 11.0)
    assert run("poolings", "--folder", experiment.parent, "--runs", tmp_path / "more") == 0
    text = (experiment / "results.csv").read_text()
    assert "gap,0,eval_knn knn 20 top1,33.0,runs/gap/seed0/eval_knn.json" in text
    assert "gap,0,val model top1,10.0" in text
    assert "gap,1,val model top1,51.0" in text
    assert "lse,0,val model top1,11.0" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing"], "there is no experiment 'nothing' in .*there are: poolings"),
        (["--runs", "x"], "--runs belongs to one experiment"),
        (["poolings", "--runs", "x", "--check"], "--runs belongs to one experiment"),
        (["poolings", "--runs", "/no/such/folder"], "/no/such/folder is not a folder of runs"),
        (["poolings"], r"results\.csv can't be read"),
    ],
)
def test_bad_input(experiment, flags, message):
    """One line with the name and the remedy."""
    with pytest.raises(InputError, match=message):
        run(*flags, "--folder", experiment.parent)


def test_runs_without_a_column_or_a_baseline(experiment, tmp_path, capsys):
    """Columns that no run has are an error that lists those there; a missing baseline is said and left out."""
    (experiment / "table.json").write_text('{"title": "T", "baseline": "cls"}')
    assert run("poolings", "--folder", experiment.parent, "--runs", tmp_path / "new") == 0
    assert "the baseline cls has no run" in capsys.readouterr().out
    assert "| val model top1 | val average top1 |" in (experiment / "table.md").read_text()
    (experiment / "table.json").write_text('{"title": "T", "columns": {"auc": "AUC"}}')
    with pytest.raises(InputError, match="no run has a column of the table; there are: train_loss, val model top1"):
        run("--folder", experiment.parent)
    (experiment / "table.json").write_text('{"titel": "T"}')
    with pytest.raises(InputError, match=r"table\.json has titel: give a title"):
        run("--folder", experiment.parent)


def test_the_tables_of_this_project_are_those_of_its_runs():
    """What is committed, the README's table too, is what the raw files give."""
    assert run("--check") == 0
