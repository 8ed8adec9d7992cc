"""The bounds that a file must keep to count as an image, and `BadImage` for one that is damaged or exceeds them."""

from __future__ import annotations

import re

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a GiB of RGB
MAX_FILE_BYTES = 2**30  # of an encoded image; a larger file is refused before it is read


class BadImage(Exception):
    """An image that can't be used; the message is the reason, without the name of the file."""


def one_line(error: BaseException) -> str:
    """The error's text in one line, without the place in a C++ source that torchvision puts before it."""
    text = re.sub(r"^\w+, \S+:\d+, ", "", " ".join(str(error).split()))
    return text[:160] or type(error).__name__
