"""Reports: what lies in a run's folder stands on its page, whatever else lies there."""

from __future__ import annotations

import base64
import json
import os
import re
import time

import pytest

from evaluation import records, report
from runtime.guards import InputError

KNN = {"knn": [{"k": 10, "temperature": 0.07, "top1": 61.25, "top5": 90.0}]}


def write_evaluation(folder, name, results, checkpoint=None, sha=None, date="2026-01-01", settings=None):
    folder.mkdir(parents=True, exist_ok=True)
    model = {"checkpoint": checkpoint, "checkpoint_sha256": sha, "config": {"arch": "vit_tiny", "mode": "simpool"}}
    content = {"date": date, "model": model, "data": {"data_path": "/images"}, "settings": settings or {},
               "results": results}  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(content))


def write_run(folder, rows=4):
    log = [
        {
            "epoch": e, "train_loss": 5 - e, "train_entropy": 3.0, "train_kl": 2 - e, "train_lr": 0.1 * e, "time_s": 60,
            "monitors": {"entropy": 0.9, "mean_cosine": 0.5, "effective_rank": 9.0, "center_norm": 1.0},
            **({"k-NN": {"10": {"top1": 40.0 + e, "top5": 80.0}}} if e % 2 else {}),
        }
        for e in range(rows)
    ]  # fmt: skip
    (folder / "log.txt").write_text("\n".join(map(json.dumps, log)) + '\n{"epoch": 4, "train_lo')
    config = {"arch": "vit_small", "mode": "simpool", "note": "<b>bold</b>", "out_dim": 1024, "epochs": 10}
    (folder / "config.json").write_text(json.dumps(config))
    write_evaluation(folder, "eval_knn", KNN)


def test_a_page_holds_curves_tables_and_configuration_in_itself(tmp_path):
    """Every number source stands on the page, pictures are embedded, nothing is fetched, and text is escaped."""
    write_run(tmp_path)
    text = report.write_report(tmp_path).read_text()
    assert "61.25" in text
    assert "vit_small SimPool" in text
    assert "43.00 (epoch 4)" in text
    assert "&lt;b&gt;bold" in text
    assert len(re.findall(r'src="data:image/png;base64,', text)) == 8
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert text.index("61.25") < text.index("<h2>Training") < text.index("<h2>Main settings")


def test_the_settings_that_are_not_the_defaults_stand_open(tmp_path):
    """Named ones are shown as such; all of them are there, folded."""
    write_run(tmp_path)
    text = report.write_report(tmp_path, changed=["note"]).read_text()
    section = text[text.index("<h2>Settings that are not the defaults") : text.index("<summary>All settings")]
    assert "bold" in section
    assert "out_dim" not in section


def test_evaluations_are_found_where_they_lie(tmp_path):
    """Those in folders below, and in folders next to the run if their checkpoint is the run's, by path or by hash."""
    from runtime.checkpoint import file_sha256

    run = tmp_path / "run"
    run.mkdir()
    write_run(run)
    (run / "checkpoint.pth").write_bytes(b"weights")
    sha = file_sha256(run / "checkpoint.pth")
    knn = lambda top1: {"knn": [{"k": 10, "temperature": 0.07, "top1": top1, "top5": 90.0}]}  # noqa: E731
    write_evaluation(run / "before", "eval_knn", knn(11.11), date="2025-01-01")
    write_evaluation(run / "after", "eval_knn", knn(22.22), str(run / "checkpoint.pth"), sha, date="2027-01-01")
    write_evaluation(tmp_path / "by_hash", "eval_knn", knn(33.33), "/moved/away.pth", sha)
    write_evaluation(tmp_path / "by_path", "eval_knn", knn(44.44), str(run / "checkpoint.pth"), "an older one")
    write_evaluation(tmp_path / "other", "eval_knn", knn(55.55), "/elsewhere.pth", "another")
    text = report.write_report(run).read_text()
    assert all(number in text for number in ("11.11", "22.22", "33.33", "44.44"))
    assert "55.55" not in text
    columns, ((name, *values),) = report.comparison([e for e in report.find_evaluations(run) if not e.problem])
    assert name == "k-NN, k 10, temperature 0.07"
    assert (columns[0], values[0]) == ("before", "11.11")
    assert (columns[-1], values[-1]) == ("after", "22.22")


def test_localization_and_backgrounds_are_compared_too(tmp_path):
    """MaxBoxAccV2, CorLoc and ImageNet-9 stand in the comparison, baselines and small objects apart, with pictures."""
    accuracy = {"30": 80.0, "50": 60.0, "70": 40.0, "mean": 61.21}
    box = {"images": 7, "accuracy": accuracy, "baselines": {"whole image": {**accuracy, "mean": 33.3}}}
    write_evaluation(tmp_path, "eval_localization_maxboxacc", {**box, "small": {"images": 0}})
    found = {"images": 9, "corloc": 52.5, "mean_iou": 0.5}
    part = {**found, "baselines": {"whole image": {**found, "corloc": 11.5}}}
    write_evaluation(tmp_path, "eval_localization_lost", {**part, "small": {**part, "images": 3, "corloc": 22.75}},
                     settings={"protocol": "lost"})  # fmt: skip
    measures = {name: {"mean": 0.0123, "std": 0} for name in ("entropy", "central", "largest")}
    write_evaluation(tmp_path, "eval_localization_summary", {"images": 5, **measures})
    variants = {"original": {"top1": 91.5}, "mixed_same": {"top1": 80.25}, "bg_gap": 9.125}
    write_evaluation(tmp_path, "eval_background", variants, settings={"classifier": "knn"})
    (tmp_path / "eval_localization_lost_worst.png").write_bytes(b"PNG of the worst")
    text, summary = report.write_report(tmp_path).read_text(), report.summary(tmp_path)
    for words in ("MaxBoxAccV2 (7 images), mean of the three: model", "61.21", "33.30",
                  "LOST (9 images), CorLoc: whole image", "11.50", "LOST, small objects (3 images)", "22.75",
                  "Maps without boxes (5 images), percent: central", "1.23",
                  "ImageNet-9 (knn), variant BG-gap", "91.50", "9.12"):  # fmt: skip
        assert words in text
        assert words in summary
    assert base64.b64encode(b"PNG of the worst").decode() in text


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"results": 3}', '{"results": {"knn": [{"k": "x"}]}}', '{"results": {"knn": null}}',
     "[" * 100_000, '{"results": {"knn": [{"k": 1, "temperature": 0.1, "top1": null, "top5": 1}]}}'],
)  # fmt: skip
def test_a_damaged_evaluation_is_a_line_on_the_page(tmp_path, content):
    """Whatever stands in an eval_*.json, the page is written, names the file, and shows the rest."""
    write_run(tmp_path)
    (tmp_path / "after").mkdir()
    (tmp_path / "after" / "eval_knn.json").write_text(content)
    text = report.write_report(tmp_path).read_text()
    assert "not the results of an evaluation" in text
    assert "61.25" in text


def test_odd_content_never_stops_a_page(tmp_path):
    """Logs of nulls, lists and huge numbers, a config that is a list, a picture that is a folder, odd names."""
    rows = [
        {"epoch": 0, "train_loss": None, "k-NN": [1], "monitors": "x"},
        {"epoch": 1, "train_loss": 1e400, "k-NN": {"10": 3}, "monitors": {"entropy": "high"}},
        {"epoch": "two", "train_loss": 1.0},
        {"epoch": 3, "train_loss": 10**400, "train_new": 7.5, "time_s": "long", "k-NN": {"10": {"top1": None}}},
    ]
    (tmp_path / "log.txt").write_bytes(b"\xff\xfe\n" + "\n".join(map(json.dumps, rows)).encode())
    (tmp_path / "config.json").write_text("[1]")
    (tmp_path / "attention.png").mkdir()
    (tmp_path / os.fsdecode(b"od\xff\x1b[31md")).mkdir()
    write_evaluation(tmp_path / os.fsdecode(b"od\xff\x1b[31md"), "eval_knn", KNN)
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "New" in text
    assert "holds a list" in text
    assert "\x1b" not in text


def test_a_run_is_called_what_it_is(tmp_path):
    """Markers decide; without one a sign of life does, and the caller's word over all."""
    write_run(tmp_path)
    assert report.state_of(tmp_path) == "running"
    assert report.state_of(tmp_path, time.time() + 2 * report.STALE_S) == "stopped"
    (tmp_path / "PREEMPTED").touch()
    assert report.state_of(tmp_path) == "preempted"
    (tmp_path / "PREEMPTED").unlink()
    (tmp_path / "DONE").touch()
    assert report.state_of(tmp_path) == "done"
    text = report.write_report(tmp_path, "running").read_text()
    assert 'class="state running"' in text
    assert "4 of 10 epochs, 60 s each, about 6 min left" in text
    assert "refresh" in text
    with pytest.raises(ValueError, match="asleep"):
        report.write_report(tmp_path, "asleep")


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    """Before the first epoch ends there is a page, which says so."""
    (tmp_path / "config.json").write_text(json.dumps({"arch": "vit_small", "epochs": 3}))
    assert "No epoch is finished yet" in report.write_report(tmp_path, "running").read_text()


def test_a_folder_of_evaluations_names_model_checkpoint_and_images(tmp_path):
    """Without a run the page, and the summary on the terminal, say what was evaluated on what."""
    write_evaluation(tmp_path, "eval_knn", KNN, "/runs/a/checkpoint.pth", "abc123")
    text = report.write_report(tmp_path).read_text()
    for words in ("vit_tiny SimPool", "/runs/a/checkpoint.pth", "abc123", "/images"):
        assert words in text
        assert words in report.summary(tmp_path)
    assert "running" not in text.split("<header>")[1].split("</header>")[0]
    report.summary(tmp_path).encode("ascii")


def test_the_page_does_not_follow_links(tmp_path):
    """A link under the page's name is replaced, and what it points to stays."""
    run = tmp_path / "run"
    run.mkdir()
    write_run(run, rows=1)
    (tmp_path / "precious").write_text("precious")
    (run / "report.html").symlink_to(tmp_path / "precious")
    report.write_report(run)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        report.write_report(tmp_path / "nowhere")


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    """An output folder below a file is an error that names it; without one, results lie beside the checkpoint."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        records.output_folder(tmp_path / "file" / "x", None)
    assert records.output_folder(None, tmp_path / "a" / "checkpoint.pth") == tmp_path / "a"


def test_an_evaluation_refreshes_the_page_of_its_run(tmp_path, monkeypatch, capsys):
    """The page of the checkpoint's run is written again; without one nothing happens, and a failure is a warning."""
    report.refresh_report(tmp_path / "checkpoint.pth")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "report.html").write_text("old")
    write_evaluation(tmp_path / "after", "eval_knn", KNN)
    report.refresh_report(tmp_path / "checkpoint.pth")
    assert "Results" in (tmp_path / "report.html").read_text()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(report, "write_text_atomic", full)
    report.refresh_report(tmp_path / "checkpoint.pth")
    assert "was not refreshed (no space left)" in capsys.readouterr().out


def test_probes_have_a_row_each_and_their_maps_are_shown(tmp_path):
    """The best head of every probe is on the page, compared by probe and not by head; so is what they look at."""
    write_run(tmp_path)
    best = {"head": "ep, lr 0.1", "epoch": 3, "val_top1": 71.5, "val_top5": 95.0}
    for folder, top1 in (("before", 71.5), ("after", 82.25)):
        rows = {"linear": {**best, "head": "linear on 1 block, lr 1"}, "ep": {**best, "val_top1": top1}}
        write_evaluation(tmp_path / folder, "eval_linear", {"selected": best, "probes": rows, "heads": []},
                         date=folder, settings={"selected_on": "val"})  # fmt: skip
    (tmp_path / "after" / "probe_maps").mkdir()
    (tmp_path / "after" / "probe_maps" / "probes.png").write_bytes(b"picture")
    text = report.write_report(tmp_path).read_text()
    assert "Probes (heads chosen on val)" in text
    assert base64.b64encode(b"picture").decode() in text
    _, rows = report.comparison([e for e in report.find_evaluations(tmp_path) if not e.problem])
    (ep,) = [values for name, *values in rows if name.endswith("probe ep")]
    assert sorted(filter(None, ep)) == ["71.50", "82.25"]
