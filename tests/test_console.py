"""console.main: commands find their programs."""

from __future__ import annotations

import pytest

import console
from tests.test_house import PROGRAMS, modules


def test_every_program_is_a_command(capsys):
    """Each command names a module that is there; no program and no tool lacks one; the help lists them all."""
    named = {module for module, _ in console.COMMANDS.values()}
    tools = {name for name in modules() if name.startswith("tools.")}
    assert named == {*PROGRAMS, *tools} - {"hubconf"}
    assert console.main(["--help"]) == console.main([]) == 0
    shown = capsys.readouterr().out
    assert all(shown.count(f"\n  {name:12}") == 2 for name in console.COMMANDS)


def test_a_command_runs_its_program(tmp_path, capsys):
    """The arguments behind the name are the program's, and so is the exit code."""
    for arguments, code in ((["check", "--data_path", "demo:32", "--num_workers", "0"], 0), (["pack"], 2)):
        with pytest.raises(SystemExit) as ended:
            console.main(arguments)
        assert ended.value.code == code
    shown = capsys.readouterr()
    assert "images" in shown.out
    assert "required: --data_path" in shown.err


def test_an_unknown_command_is_one_line(capsys):
    """With the nearest name, and exit code 2."""
    assert console.main(["pretrian"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'pretrian'; did you mean pretrain?\n"
    assert console.main(["7"]) == 2
    assert "choose one of pretrain, attmask" in capsys.readouterr().err
