"""A few hundred damaged files of every kind that the data package reads; tests/fuzzing/data_formats.py makes them."""

import collections

import numpy as np
import pytest

from tests.fuzzing.data_formats import FORMATS, READ, REFUSED

CASES = 30


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_refused_in_one_line_or_read_as_something_sound(name, tmp_path):
    """No traceback, no silent loss, whatever bits are flipped, cut off or moved; and damage is mostly noticed."""
    outcomes = collections.Counter()
    for case in range(CASES):
        folder = tmp_path / str(case)
        folder.mkdir()
        outcomes[FORMATS[name](np.random.default_rng([case, len(name)]), folder)] += 1
    assert set(outcomes) <= {READ, REFUSED}
    assert sum(outcomes.values()) == CASES
    sealed = name in ("folder_cache", "shard_index", "jpeg_exif")  # damage there changes nothing that is read
    assert sealed or outcomes[REFUSED] > 0
