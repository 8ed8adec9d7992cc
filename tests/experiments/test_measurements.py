"""The numbers of a run are found in its log and in the JSON of its evaluations."""

from __future__ import annotations

import pytest

from experiments import measurements
from runtime.guards import InputError
from tests.experiments.runs import write_run

KNN = {"knn": [{"k": 10, "temperature": 0.07, "top1": 61.25}, {"k": 20, "temperature": 0.07, "top1": 62.5}]}
BOXES = {"maxboxacc_v2": {"mean": 55.5, "at": {"0.5": 60.0}}, "map": "simpool", "thresholds": [0.1, 0.2], "ok": True}


def numbers(folder) -> dict[str, float]:
    (run,) = measurements.find_runs(folder)
    return {entry.metric: entry.value for entry in measurements.read_run(run, folder)}


def test_the_last_evaluation_of_the_log_and_every_json(tmp_path):
    """Training, k-NN and localisation alike, by the path to the number; what is no finite number is left out."""
    write_run(tmp_path, "simpool", 1, 40.0, {"eval_knn": KNN, "after/eval_localization_wsol": BOXES})
    assert numbers(tmp_path) == {
        "train_loss": 0.0, "val model top1": 40.0, "val model top5": 60.0, "val average top1": 41.0,
        "untrained k-NN 20 top1": 21.5, "untrained k-NN 20 top5": 60.0,
        "eval_knn knn 10 temperature": 0.07, "eval_knn knn 10 top1": 61.25,
        "eval_knn knn 20 temperature": 0.07, "eval_knn knn 20 top1": 62.5,
        "after eval_localization_wsol maxboxacc_v2 mean": 55.5,
        "after eval_localization_wsol maxboxacc_v2 at 0.5": 60.0,
    }  # fmt: skip


def test_runs_lie_under_label_and_seed(tmp_path):
    """Labels can have folders inside; order is by label and number, not by the text of the number."""
    for label, seed in (("gem", 10), ("gem", 2), ("deep/cls", 0)):
        write_run(tmp_path, label, seed, 1.0)
    assert [(run.label, run.seed) for run in measurements.find_runs(tmp_path)] == [
        ("deep/cls", 0),
        ("gem", 2),
        ("gem", 10),
    ]
    with pytest.raises(InputError, match="is not a folder"):
        measurements.find_runs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no runs; a run is a folder LABEL/seedN"):
        measurements.find_runs(tmp_path / "empty")


def test_results_csv_keeps_every_digit(tmp_path):
    """What is written is read back bit for bit, and a file of another form is refused."""
    entries = [measurements.Measurement("a, b", 3, "val top1", 0.1 + 0.2, "runs/a/log.txt")]
    path = tmp_path / "results.csv"
    path.write_text(measurements.to_csv(entries))
    assert measurements.read_csv(path) == entries
    for text in ("", "label,value\n", "label,seed,metric,value,file\na,x,m,1,f\n"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"results\.csv can't be read"):
            measurements.read_csv(path)


def test_files_that_are_not_what_they_should_be(tmp_path):
    """A torn log, a JSON that is none, and a run under another seed's name are errors that name the file."""
    folder = write_run(tmp_path, "gap", 0, 1.0)
    (run,) = measurements.find_runs(tmp_path)
    log = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(log[:-5])
    with pytest.raises(InputError, match=r"log\.txt, line 3, is no JSON"):
        measurements.read_run(run, tmp_path)
    (folder / "log.txt").write_text(log)
    (folder / "eval_knn.json").write_text("[1]")
    with pytest.raises(InputError, match=r"eval_knn\.json holds a list"):
        measurements.read_run(run, tmp_path)
    (folder / "eval_knn.json").unlink()
    (folder / "config.json").write_text('{"seed": 7}')
    with pytest.raises(InputError, match="is of seed 7, but lies in gap/seed0"):
        measurements.read_run(run, tmp_path)
