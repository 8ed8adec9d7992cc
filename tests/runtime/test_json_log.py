"""log.txt keeps whole lines."""

from __future__ import annotations

import json
import os

import pytest

from runtime import json_log


def test_log_rows_survive_a_full_disk(tmp_path, monkeypatch, capsys):
    """A row that could not be written is written before the next one, and no line is torn."""
    path = tmp_path / "log.txt"
    rows = json_log.JsonLog(path)
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
    json_log.cut_json_lines(path, first_epoch=2)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == kept
    assert path.read_text().endswith("\n") or not kept


@pytest.mark.parametrize(
    "row", ['{"epoch": "0"}', '{"epoch": [1]}', '{"epoch": null}', "[" * 100_000, "[]", "{}", "\x00"]
)
def test_lines_that_are_no_rows_are_dropped(tmp_path, row):
    """Whatever a damaged log holds, the good rows stay and the run goes on."""
    path = tmp_path / "log.txt"
    path.write_text(f'{{"epoch": 0}}\n{row}\n{{"epoch": 1}}\n')
    assert json_log.cut_json_lines(path, first_epoch=9) == 1
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1]


def test_a_last_line_without_its_end_gets_one(tmp_path):
    """Else the next row would be appended to it."""
    path = tmp_path / "log.txt"
    path.write_text('{"epoch": 0}\n{"epoch": 1}')
    json_log.cut_json_lines(path, first_epoch=9)
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 1}\n'
