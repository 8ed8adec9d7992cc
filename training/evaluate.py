"""--evaluate: the validation of a checkpoint, without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluation.features import Interrupted
from runtime.checkpoint import read_checkpoint, write_json_atomic
from runtime.distributed import is_main_process
from runtime.guards import EXIT_DONE, EXIT_PREEMPTED, InputError, input_errors
from runtime.preempt import StopRequest
from runtime.terminal import say
from training.images import open_data
from training.method import Method
from training.state import check_method, load_training_state
from training.watch import result_lines


def evaluate_checkpoint(args: argparse.Namespace, method: Method, stop: StopRequest) -> int:
    """Evaluate the run of `args.resume` as its watch does; returns the exit code.

    Prints the results and writes them to validation.json next to the checkpoint. Raises InputError.
    """
    if not args.eval_every:
        raise InputError("--evaluate with --eval_every 0: nothing is evaluated; leave --eval_every out")
    path = Path(args.resume)
    state = read_checkpoint(path)
    check_method(method, state, path)
    train, val = open_data(args, method)
    method.fit(args, train)
    run = method.build(args, len(train), args.torch_device)
    load_training_state(run, method, state, path)
    try:
        results = method.watch(run, train, val).evaluate(lambda: stop.requested)
    except Interrupted:
        say("the evaluation was interrupted")
        return EXIT_PREEMPTED
    for line in result_lines(results):
        say(f"{path} (epoch {state['epoch']}): {line}")
    if is_main_process():
        found = path.parent / "validation.json"
        with input_errors(f"{found} cannot be written"):
            write_json_atomic(found, {"checkpoint": str(path), "epoch": state["epoch"], "images": len(val), **results})
        say(f"wrote {found}")
    return EXIT_DONE
