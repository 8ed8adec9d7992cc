"""Flags, help, and values from --config files."""

from __future__ import annotations

import argparse

import pytest

from runtime.cli import (
    HelpFormatter,
    add_flag,
    bool_flag,
    float_or_none,
    given_flags,
    parse_program,
    path_flag,
    read_config,
)
from runtime.guards import InputError


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


def config_parser() -> argparse.ArgumentParser:
    p = parser()
    add_flag(p, "--lr", type=float, default=0.1)
    add_flag(p, "--gamma", type=float_or_none, default=1.25)
    add_flag(p, "--steps", type=int)
    add_flag(p, "--ks", type=int, nargs="+", default=[10])
    add_flag(p, "--dry_run", action="store_true")
    return p


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"lr: [0.1, 5]", "lr.*give one value"), (b"lr: []", "lr.*give one value"), (b"ks: []", "at least one value"),
        (b"lr:", "lr.*give a value, or leave the key out"), (b"scale: [0.1]", "give 2 values"),
        (b"ks: [1, null]", "a number or a text"), (b"lr: {a: 1}", "a number or a text"),
        (b"mode: true", "a number or a text"), (b"dry_run: 3", "true or false"), (b"1: 2", "key 1 is no flag"),
        (b"on: 2", "key True is no flag"), (b"lr: \xff", "cannot be parsed: 'utf-8'"),
        (b"a: &a [1]\nb: *a", "aliases"), (b"lr: 1\nlr: 2", "'lr' is there twice"), (b"[" * 5000, "cannot be parsed"),
        (b"lr: " + b" " * 1_000_001 + b"1", "larger than 1 MB"), (b"lr: .nan\nsteps: x", "steps"),
        (b"mode: !!python/object/apply:os.system [ls]", "cannot be parsed"),
    ],
)  # fmt: skip
def test_odd_yaml(tmp_path, text, message):
    """What YAML can hold beyond one value per flag is refused by name, in little time and memory."""
    (tmp_path / "c.yaml").write_bytes(text)
    with pytest.raises(InputError, match=message):
        read_config(tmp_path / "c.yaml", config_parser())


@pytest.mark.parametrize("text", ['{"lr": 1, "lr": 2}', "[" * 100_000, '{"lr": null}', '{"lr": [0.1, 5]}', "null"])
def test_odd_json(tmp_path, text):
    """The same for JSON."""
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match="--config"):
        read_config(tmp_path / "c.json", config_parser())


def test_null_where_none_is_a_value(tmp_path):
    """A run's own config.json has null for flags that were not given, and for gamma None."""
    (tmp_path / "c.json").write_text('{"gamma": null, "steps": null, "ks": [5, 6], "dry_run": true, "lr": 1}')
    assert read_config(tmp_path / "c.json", config_parser()) == {
        "gamma": None, "steps": None, "ks": [5, 6], "dry_run": True, "lr": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "expected"), [("~/runs", "/home/me/runs"), ("~", "/home/me"), ("a/~b", "a/~b"), ("./~", "./~"), ("x", "x")]
)
def test_paths_begin_at_home(monkeypatch, path, expected):
    """`--output_dir=~/runs` reaches the program with its ~, which the shell expands only at a word's beginning."""
    monkeypatch.setenv("HOME", "/home/me")
    assert path_flag(path) == expected


@pytest.mark.parametrize("path", ["", "  ", "~nosuchuser/x", "a\0b"])
def test_paths_that_are_none(path):
    """Empty, of an unknown user, with a zero byte."""
    with pytest.raises(argparse.ArgumentTypeError, match=r"path|home"):
        path_flag(path)
