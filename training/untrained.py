"""What the evaluation says of a run's random weights: where its curves start, and what they must be compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from evaluation.features import Interrupted
from runtime.checkpoint import write_json_atomic
from runtime.distributed import is_main_process
from runtime.terminal import say
from training.watch import Watch, result_lines

UNTRAINED = "untrained.json"
MOST_IMAGES = 20_000  # of the training set; a pass over more would keep the user waiting for the first step


def evaluate_untrained(watch: Watch | None, images: int, folder: Path, should_stop: Callable[[], bool]) -> bool:
    """Evaluate before the first step, and write the results to untrained.json; all processes must call this.

    Nothing is done for a watch that can't evaluate, or to which random weights say nothing, and for more than
    MOST_IMAGES training images. Returns False if the run was asked to stop meanwhile.
    """
    told = getattr(watch, "tells_before_training", False)
    if watch is None or not (watch.can_evaluate and told) or images > MOST_IMAGES:
        return True
    try:
        results = watch.evaluate(should_stop)
    except Interrupted:
        return False
    for line in result_lines(results):
        say(f"untrained: {line}")
    if is_main_process():
        try:
            write_json_atomic(folder / UNTRAINED, results)
        except OSError as error:  # a curve's first point is not worth a run
            say(f"warning: {folder / UNTRAINED} not written ({error})")
    return True
