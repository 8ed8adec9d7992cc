"""Flags, help, and values from --config files."""

from __future__ import annotations

import argparse

import pytest

from runtime.cli import HelpFormatter, add_flag, bool_flag, float_or_none, given_flags, parse_program, read_config
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
