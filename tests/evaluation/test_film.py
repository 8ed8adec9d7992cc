"""Films: every frame, at its time, one at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from evaluation import film


def test_a_film_holds_every_frame_at_its_time(tmp_path):
    """Frames come back in order and nearly in their colours, and last 1 / fps each, rounding not added up."""
    frames = [np.full((20, 30, 3), (10 * i, 200, 255 - 10 * i), np.uint8) for i in range(12)]
    assert film.write_gif(iter(frames), tmp_path / "a.gif", 30) == 12
    with Image.open(tmp_path / "a.gif") as opened:
        assert (opened.n_frames, opened.info["loop"]) == (12, 0)
        total = 0
        for i, frame in enumerate(frames):
            opened.seek(i)
            total += opened.info["duration"]
            shown = np.asarray(opened.convert("RGB")).astype(int)
            assert np.abs(shown - frame).max() <= 8
    assert total == 400  # milliseconds


def test_frames_are_written_as_they_come(tmp_path):
    """When a frame is asked for, the one before it is in the file: none waits in memory."""
    sizes = []

    def frames():
        noise = np.random.default_rng(0)
        for _ in range(5):
            sizes.append(next(tmp_path.iterdir()).stat().st_size)  # still under its temporary name
            yield noise.integers(0, 256, (200, 300, 3), dtype=np.uint8)

    film.write_gif(frames(), tmp_path / "a.gif", 10)
    assert all(later > earlier for earlier, later in itertools.pairwise(sizes))


def test_a_film_without_frames_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        film.write_gif([], tmp_path / "a.gif", 10)
