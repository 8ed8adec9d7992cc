"""Reports: what lies in a run's folder stands on its page, and the page needs no other file."""

from __future__ import annotations

import json
import re

import pytest

from evaluation import plots, records, report
from runtime.guards import InputError


def write_run(folder):
    rows = [
        {
            "epoch": e, "train_loss": 5 - e, "train_entropy": 3.0, "train_kl": 2 - e, "train_lr": 0.1 * e,
            "monitors": {"entropy": 0.9, "mean_cosine": 0.5, "effective_rank": 9.0, "center_norm": 1.0},
            **({"k-NN": {"10": {"top1": 40.0 + e, "top5": 80.0}}} if e % 2 else {}),
        }
        for e in range(4)
    ]  # fmt: skip
    (folder / "log.txt").write_text("\n".join(map(json.dumps, rows)) + '\n{"epoch": 4, "train_lo')
    (folder / "config.json").write_text(json.dumps({"arch": "vit_small", "mode": "simpool", "note": "<b>bold</b>"}))
    knn = {"knn": [{"k": 10, "temperature": 0.07, "top1": 61.25, "top5": 90.0}]}
    (folder / "eval_knn.json").write_text(json.dumps({"results": knn, "settings": {}}))


def test_a_page_holds_curves_tables_and_configuration_in_itself(tmp_path):
    """Every number source stands on the page, pictures are embedded, nothing is fetched, and text is escaped."""
    write_run(tmp_path)
    page = report.write_report(tmp_path).read_text()
    assert "61.25" in page
    assert "vit_small SimPool" in page
    assert "&lt;b&gt;bold" in page
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 1
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_torn_line_and_missing_values_do_not_stop_a_report(tmp_path):
    """A log cut in the middle of a line, with nulls in it, is plotted as far as it goes."""
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": null}\n{"epoch": 1, "train_loss": 3.0}\n{"epo')
    assert plots.series(plots.read_log(tmp_path / "log.txt"), "train_loss") == ([1], [3.0])
    assert report.write_report(tmp_path).is_file()


def test_an_empty_folder_has_nothing_to_report(tmp_path):
    """A folder without a log or an evaluation is an error that names it."""
    with pytest.raises(InputError, match="nothing to report"):
        report.write_report(tmp_path)


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    """An output folder below a file is an error that names it; without one, results lie beside the checkpoint."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        records.output_folder(tmp_path / "file" / "x", None)
    assert records.output_folder(None, tmp_path / "checkpoint.pth") == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
