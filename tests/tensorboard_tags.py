"""What a run's TensorBoard files hold."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c


def events(folder: Path) -> Iterator[Any]:
    """All events under `folder/tensorboard`, checksums checked (records: length, its CRC, the event, its CRC)."""
    for path in sorted((folder / "tensorboard").glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length, length_crc = struct.unpack_from("<QI", data, at)
            content = data[at + 12 : at + 12 + length]
            (crc,) = struct.unpack_from("<I", data, at + 12 + length)
            assert (masked_crc32c(data[at : at + 8]), masked_crc32c(content)) == (length_crc, crc)
            yield event_pb2.Event.FromString(content)
            at += 12 + length + 4


def tags(folder: Path) -> set[str]:
    """Tags of all scalars."""
    return {value.tag for event in events(folder) for value in event.summary.value}


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """Step -> value of a tag; of what several starts wrote for a step, the last, as TensorBoard shows it."""
    return {e.step: v.simple_value for e in events(folder) for v in e.summary.value if v.tag == tag}


def steps(folder: Path, tag: str) -> list[int]:
    """The steps at which a tag was written, in the files' order."""
    return [event.step for event in events(folder) for value in event.summary.value if value.tag == tag]
