"""Files that can't be used: named once, counted, and a limit to how many a run bears."""

from __future__ import annotations

from collections.abc import Callable

from data.decode import BadImage
from data.source import ImageSource
from data.train_set import CropBatch
from runtime.distributed import all_gather_objects
from runtime.guards import InputError

_LISTED = 20  # files that the final message names


class BadImages:
    """Keeps account of the bad files that the batches of this process report.

    max_fraction: part of the data set that may be bad; beyond it `see` or `end_epoch` raises `InputError`.
    report: where a bad file's line goes, on the rank that met it.
    """

    def __init__(self, source: ImageSource, max_fraction: float = 0.01, report: Callable[[str], None] | None = None):
        if not 0 <= max_fraction <= 1:
            raise InputError(f"--max_bad_fraction {max_fraction}: give a part of the images from 0 to 1")
        self.source, self.max_fraction = source, max_fraction
        self._report = report or (lambda line: print(line, flush=True))
        self._known: set[int] = set()
        self._in_epoch = 0

    def see(self, batch: CropBatch) -> None:
        """Take in one batch; names each bad file the first time."""
        if not bool(batch.bad.any()):
            return
        for i in batch.index[batch.bad].tolist():
            self._in_epoch += 1
            if i not in self._known:
                self._known.add(i)
                self._report(f"warning: {self._line(i)}; another image stands in for it")
        self._check(self._known)

    def end_epoch(self) -> int:
        """Substituted images since the last call, over all ranks. Every rank calls it, and all raise alike."""
        gathered = all_gather_objects((self._in_epoch, sorted(self._known)))
        self._in_epoch = 0
        self._check({i for _, known in gathered for i in known})
        return sum(count for count, _ in gathered)

    def _line(self, i: int) -> str:
        """The file and the reason, found by reading it once more: the worker sends only the index."""
        try:
            self.source.load(i)
            reason = "could not be used a moment ago"
        except BadImage as error:
            reason = str(error)
        return f"{self.source.name(i)} {reason}"

    def _check(self, known: set[int]) -> None:
        if len(known) <= self.max_fraction * len(self.source):
            return
        lines = "".join(f"\n  {self._line(i)}" for i in sorted(known)[:_LISTED])
        more = f"\n  and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
        raise InputError(
            f"{len(known)} of {len(self.source)} images are bad so far, more than --max_bad_fraction "
            f"{self.max_fraction:g}:{lines}{more}\nmend or remove them (python -m tools.check_images lists all such "
            "files), or raise the limit"
        )
