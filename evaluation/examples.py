"""Photographs to look at: the ones that the built-in patches are cut from."""

from __future__ import annotations

from data.decode import Picture
from data.demo import PHOTOGRAPHS, read_photograph
from data.source import ImageSource

# Those with an object in front of a background first: a texture has nothing to attend to.
_ORDER = ("cat", "astronaut", "coffee", "rocket", "flower", "camera", "coins", "motorcycle")


class Photographs(ImageSource):
    """The built-in photographs, whole, without labels."""

    def __init__(self):
        first = [name for name in _ORDER if name in PHOTOGRAPHS]
        self._names = first + [name for name in PHOTOGRAPHS if name not in first]
        super().__init__(len(self._names), identity=b"photographs", where="demo")

    def open(self, i: int) -> Picture:
        return Picture.from_array(read_photograph(self._names[i]))

    def name(self, i: int) -> str:
        return f"demo/{self._names[i]}"
