"""TensorBoard's numbers, texts and pictures, written so that a full disk never stops a run.

The events are tensorboardX's, but it does not write them: its writer passes them to a thread through a queue of ten,
and if the disk fails, that thread dies and training waits for the queue forever. Here events wait in memory and are
written together every half minute and at every save; whatever a failing disk wrote of them is removed again.

A file is a sequence of records (TFRecord): length, its checksum, an event, its checksum.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from pathlib import Path

from runtime.checkpoint import append_bytes
from runtime.distributed import is_main_process
from runtime.terminal import say

_MOST_WAITING = 100_000  # events kept while the disk fails; about 30 MB
_files = itertools.count()  # distinguishes files that one process opens within one second


class TensorBoard:
    """Events under `folder`, written by rank 0 only. TensorBoard hides values from `first_step` on that an earlier
    start wrote, because a resumed run computes them again.
    """

    def __init__(self, folder: Path, first_step: int, every_s: float = 30.0) -> None:
        self._active = is_main_process()
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        self._path, self._every_s = folder / name, every_s
        self._flushed = time.monotonic()
        self._failing = False
        self._waiting: list[bytes] = []
        if self._active:
            from tensorboardX.proto import event_pb2

            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._waiting += [
                _record(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")),
                _record(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start)),
            ]

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Queue each value under its tag at `step`; all queued values are written every `every_s` seconds."""
        if not self._active:
            return
        from tensorboardX.proto import summary_pb2

        pairs = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(summary_pb2.Summary(value=pairs), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Show a text under its tag."""
        if self._active:
            from tensorboardX.summary import text

            self._add(text(tag, markdown), step)

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """Show the picture of a PNG file under its tag."""
        if not self._active:
            return
        from tensorboardX.proto import summary_pb2

        width, height = struct.unpack(">II", png[16:24])  # from the header, which every PNG file starts with
        image = summary_pb2.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, image=image)]), step)

    def _add(self, summary, step: int) -> None:
        from tensorboardX.proto import event_pb2

        self._waiting.append(_record(event_pb2.Event(wall_time=time.time(), step=step, summary=summary)))
        if time.monotonic() - self._flushed >= self._every_s:
            self.flush()

    def flush(self) -> None:
        """Write the queue to the disk; if that fails, warn once and keep it for the next time."""
        if not self._waiting:
            return
        self._flushed = time.monotonic()
        try:
            self._path.parent.mkdir(exist_ok=True)  # not its parents: a lost mount must not become a local folder
            append_bytes(self._path, b"".join(self._waiting))
        except OSError as error:
            if not self._failing:
                say(f"warning: {self._path.parent} not written ({error}); its numbers wait in memory")
            self._failing = True
            self._waiting = self._waiting[:2] + self._waiting[2:][-_MOST_WAITING:]
        else:
            self._failing = False
            self._waiting.clear()

    def close(self) -> None:
        """Write the queue."""
        self.flush()


def _record(event) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
