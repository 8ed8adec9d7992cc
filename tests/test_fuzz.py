"""The quick form of the fuzzing, and what it promises about itself."""

from __future__ import annotations

import pytest

from tests import fuzz


@pytest.mark.parametrize("name", sorted(fuzz.formats()))
@pytest.mark.parametrize("cases", [25, pytest.param(1000, marks=pytest.mark.full)])
def test_every_format_is_read_or_refused(name, cases):
    """Damaged and made-up files end in a result or in a clear error."""
    outcomes = fuzz.fuzz(name, fuzz.formats()[name], seed=0, cases=cases)
    assert sum(outcomes.values()) == cases


def test_a_case_can_be_made_again():
    """A case depends on seed, format and number only."""
    seen: list[float] = []

    def case(rng, _folder):
        seen.append(rng.random())
        return "read"

    fuzz.fuzz("x", case, 3, 4)
    fuzz.fuzz("x", case, 3, 4)
    assert seen[:4] == seen[4:]
    assert len(set(seen)) == 4


def test_any_other_end_is_a_failure():
    """An exception of the code under test names the format, the seed and the case."""

    def case(_rng, _folder):
        raise KeyError("x")

    with pytest.raises(AssertionError, match="y, seed 1, case 0: KeyError"):
        fuzz.fuzz("y", case, 1, 2)
