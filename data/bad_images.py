"""Files that can't be used: each is named once, all are counted, and a run stops when there are too many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data.decode import BadImage
from data.source import ImageSource
from data.train_set import CropBatch
from runtime.distributed import all_gather_objects, is_main_process
from runtime.guards import InputError
from runtime.terminal import say

_LISTED = 20  # files that the final message names


class BadImages:
    """Records the bad files that this process's batches report.

    max_fraction: part of the data set that may be bad; beyond it `see` or `end_epoch` raises `InputError`.
    report: takes one line per bad file, on rank 0: at once if rank 0 met the file, else at the end of the epoch.
    """

    def __init__(self, source: ImageSource, max_fraction: float = 0.01, report: Callable[[str], None] = say):
        if not 0 <= max_fraction <= 1:
            raise InputError(f"--max_bad_fraction {max_fraction}: give a part of the images from 0 to 1")
        self.source, self.max_fraction, self._report = source, max_fraction, report
        self._known: set[int] = set()  # met by this process
        self._named: set[int] = set()  # reported, on rank 0
        self._in_epoch = 0

    def see(self, batch: CropBatch) -> None:
        """Record one batch, and name each bad file the first time."""
        if not bool(batch.bad.any()):
            return
        bad = (batch.index[batch.bad] % len(self.source)).tolist()  # repeated augmentation counts on
        self._in_epoch += len(bad)
        self._known.update(bad)
        self._name(bad)
        self._check(self._known)

    def end_epoch(self) -> int:
        """Substituted images since the last call, over all ranks. Every rank calls it, and all raise alike."""
        gathered = all_gather_objects((self._in_epoch, sorted(self._known)))
        self._in_epoch = 0
        everywhere = {i for _, known in gathered for i in known}
        self._name(sorted(everywhere))
        self._check(everywhere)
        return sum(count for count, _ in gathered)

    def _name(self, indices: Sequence[int]) -> None:
        if not is_main_process():
            return
        for i in indices:
            if i not in self._named:
                self._named.add(i)
                self._report(f"warning: {describe(self.source, i)}; another image stands in for it")

    def _check(self, known: set[int]) -> None:
        if len(known) <= self.max_fraction * len(self.source):
            return
        lines = "".join(f"\n  {describe(self.source, i)}" for i in sorted(known)[:_LISTED])
        more = f"\n  and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
        raise InputError(
            f"{len(known)} of {len(self.source)} images are bad so far, more than --max_bad_fraction "
            f"{self.max_fraction:g}:{lines}{more}\nfix or remove them (python -m tools.check_images lists all such "
            "files), or raise the limit"
        )


def describe(source: ImageSource, i: int) -> str:
    """A bad file's name and the reason, found by reading it once more: workers send only the index."""
    try:
        source.load(i)
        reason = "could not be used a moment ago"
    except BadImage as error:
        reason = str(error)
    return f"{source.name(i)} {reason}"


def skipped_line(source: ImageSource, skipped: Sequence[int], most: int = 3) -> str:
    """One line on the images that an evaluation left out, for a loader with on_bad_image="skip"."""
    some = "; ".join(describe(source, int(i)) for i in skipped[:most])
    more = f"; and {len(skipped) - most} more" if len(skipped) > most else ""
    return f"warning: {len(skipped)} of the {len(source)} images of {source.where} are left out ({some}{more})"
