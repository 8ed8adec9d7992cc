"""Exit codes, and errors of one line."""

from __future__ import annotations

import pytest

from runtime.guards import InputError, NonFiniteError, input_errors, run_program


@pytest.mark.parametrize(("error", "code"), [(InputError("bad value 3"), 2), (NonFiniteError("step 7"), 3), (None, 0)])
def test_exit_codes(capsys, error, code):
    """A program leaves with its documented code, and errors of input are one line."""

    def main(_):
        if error:
            raise error

    with pytest.raises(SystemExit) as leaving:
        run_program(main)
    assert leaving.value.code == code
    if error:
        assert capsys.readouterr().err == f"error: {error}\n"


def test_input_errors_are_translated():
    """ValueError and OSError in set-up become InputError; a TypeError stays a defect."""
    with pytest.raises(InputError, match="ctx: nope"), input_errors("ctx"):
        raise ValueError("nope")
    with pytest.raises(TypeError), input_errors():
        raise TypeError


def test_torchruns_report_ends_with_our_line(tmp_path, monkeypatch):
    """Under torchrun the reason also goes into the file that the launcher's own report quotes."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def main(_):
        raise InputError("--lr -1: must be above 0")

    with pytest.raises(SystemExit):
        run_program(main)
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message == "error: --lr -1: must be above 0"
    assert failure.timestamp > 0
