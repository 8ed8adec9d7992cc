"""The scalar tags in a run's TensorBoard files."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboardX.proto import event_pb2


def tags(folder: Path) -> set[str]:
    """Tags of all scalars under `folder/tensorboard` (records: length, its CRC, the event, its CRC)."""
    found = set()
    for path in (folder / "tensorboard").glob("events.*"):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            found |= {value.tag for value in event.summary.value}
            at += 12 + length + 4
    return found
