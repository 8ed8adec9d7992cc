"""The training loop: the order of steps, and the reading, logging, evaluating and saving around them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.bad_images import BadImages
from data.loader import ahead_on_device, build_loader
from data.source import ImageSource
from evaluation.features import Interrupted
from runtime.delayed_results import LateReader
from runtime.distributed import all_gather_objects, is_main_process
from runtime.guards import EXIT_BAD_INPUT, InputError, RunStopped
from runtime.json_log import JsonLog
from runtime.meters import MetricLogger
from runtime.pace import Pace
from runtime.preempt import StopRequest
from runtime.progress import Progress
from runtime.saver import CheckpointSaver
from runtime.tensorboard import TensorBoard
from runtime.terminal import say
from training import arguments
from training.method import Method
from training.page import write_page
from training.refused import RefusedSteps
from training.run import Run, Wishes
from training.state import check_same_run, load_training_state, model_config, training_state
from training.untrained import evaluate_untrained
from training.watch import result_lines, result_scalars


@dataclasses.dataclass
class Outputs:
    """A run's output channels; only rank 0 has a saver."""

    saver: CheckpointSaver | None
    log: JsonLog
    board: TensorBoard


class Loop:
    """A run's steps and epochs, from its current position to its end."""

    def __init__(
        self, run: Run, method: Method, train: ImageSource, val: ImageSource | None, stop: StopRequest
    ) -> None:
        args = run.args
        self.run, self.method, self.train, self.stop = run, method, train, stop
        self.folder = Path(args.output_dir)
        self.sampler = run.plan.sampler(len(train), args.seed)
        dataset = run.views.dataset(train, args.seed, args.on_bad_image)
        pin_memory = run.hardware.device.type == "cuda"
        self.loader = build_loader(dataset, self.sampler, args.num_workers, pin_memory, prefetch_factor=2)
        self.meters = MetricLogger()
        self.results = LateReader(run.hardware.device)
        self.refused = RefusedSteps(run, method, train, self.folder)
        self.epoch, self.step = 0, 0  # the next step, counted from the start of the run, and its epoch
        self.bad_images = BadImages(train, args.max_bad_fraction)
        self.failure: InputError | RunStopped | None = None  # of this process alone, until `share_failure`
        self.watch = method.watch(run, train, val)
        self.best: float | None = None  # the watch's best score so far
        self.is_best = False  # whether the next save is of the epoch with that score
        self.pace = Pace(run.plan.global_batch)
        self.out: Outputs | None = None

    # ---- state

    def state(self) -> dict[str, Any]:
        """The checkpoint's content; all processes must call this."""
        return training_state(self.run, self.method) | {
            "epoch": self.epoch,
            "args": arguments.saved(self.run.args, self.method),
            "iteration": self.step,
            "config": model_config(self.run, self.method, self.train),
            "meters": self.meters.state_dict(),
            "bad_in_a_row": self.refused.in_a_row,
            "best": self.best,
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Continue from a checkpoint of this run. Raises InputError if it is of a different run."""
        check_same_run(self.run, self.method, self.train, state, path)
        load_training_state(self.run, self.method, state, path)
        self.meters.load_state_dict(state["meters"])
        self.refused.in_a_row = state["bad_in_a_row"]
        self.best = state.get("best")
        self.epoch, self.step = state["epoch"], state["iteration"]
        before, plan = state["config"]["global_batch"], self.run.plan
        if before != plan.global_batch:  # accepted by the user: continue from the same fraction of the data
            seen = (self.step - self.epoch * state["config"]["steps_per_epoch"]) * before
            self.step = self.epoch * plan.steps_per_epoch + min(seen // plan.global_batch, plan.steps_per_epoch)

    def save(self) -> dict[str, Any]:
        """Start saving the state, on rank 0; returns it."""
        self.read_results(everything=True)
        self.out.board.flush()  # before the save: a resumed run will not write these values again
        state = self.state()
        if self.out.saver is not None:
            with self.deferred_errors():
                self.out.saver.save(state, self.step, self.kept_name(), self.is_best)
        return state

    def kept_name(self) -> str | None:
        """The name under which a save is kept for good, or None if --saveckp_freq does not keep it."""
        every, at_end_of_epoch = self.run.args.saveckp_freq, self.step == self.epoch * self.run.plan.steps_per_epoch
        due = every and self.epoch and self.epoch % every == 0 and at_end_of_epoch
        return f"checkpoint{self.epoch:04d}.pth" if due else None

    @contextlib.contextmanager
    def deferred_errors(self) -> Iterator[None]:
        """Defer an error that only this process sees to `share_failure`, because the others wait in the step."""
        try:
            yield
        except (InputError, RunStopped) as error:
            self.failure = self.failure or error

    def share_failure(self) -> None:
        """Raise the same error on all processes if one of them has deferred it."""
        mine = None if self.failure is None else (str(self.failure), getattr(self.failure, "exit_code", EXIT_BAD_INPUT))
        met = [failure for failure in all_gather_objects(mine) if failure is not None]
        if self.failure is not None:
            raise self.failure
        if met:
            message, code = met[0]
            raise RunStopped(f"another process of the run stopped it: {message}", code)

    def finish(self, done: bool, saved: dict[str, Any] | None = None) -> bool:
        """Write the final checkpoint, retrying until it succeeds, on all processes; returns `done`.

        `saved` is the state if it is already being saved.
        """
        state, saver = saved or self.save(), self.out.saver
        if saver is not None:
            with self.deferred_errors():
                saver.finish(
                    lambda: saver.save(state, self.step, self.kept_name(), self.is_best), pause_s=1.0 if done else 0.0
                )
        self.share_failure()
        return done

    # ---- the run

    def go(self, out: Outputs) -> bool:
        """Train to the end. Returns True once there, False if asked to stop (the state is then saved)."""
        self.out, run, args = out, self.run, self.run.args
        untrained = self.step == 0 and args.eval_every and args.report and not args.init_from  # for the page
        if untrained and not evaluate_untrained(self.watch, len(self.train), self.folder, lambda: self.stop.requested):
            return self.finish(done=False)
        while self.epoch < args.epochs:
            if not self.train_epoch():
                return self.finish(done=False)
            finished = self.step == (self.epoch + 1) * run.plan.steps_per_epoch
            row = self.epoch_row() | {"bad_images": self.bad_images.end_epoch()}
            due = False
            if self.watch is not None:
                row["monitors"] = self.monitor()
                due = args.eval_every and ((self.epoch + 1) % args.eval_every == 0 or self.step == run.total_steps)
                if due and self.watch.can_evaluate:
                    results = self.evaluate()
                    if results is None:
                        return False
                    row |= results
                    self.judge(row, finished)
            if is_main_process():
                out.log.append(row)
            if args.report and self.watch is not None and due:
                write_page(args, self.folder, "running")
            if not finished:  # --max_steps within an epoch
                break
            self.epoch += 1
            self.meters = MetricLogger()
            if self.step >= run.total_steps:
                break
            self.save()
            self.is_best = False
        return self.finish(done=True)

    def judge(self, row: dict[str, Any], finished: bool) -> None:
        """Compare an epoch's score with the best so far, if the best checkpoint is to be kept.

        The score of an epoch that --max_steps ends early is not remembered: a longer run repeats its evaluation.
        """
        score = self.watch.score(row) if self.run.args.keep_best else None
        if score is not None and (self.best is None or (finished and score > self.best)):
            self.best, self.is_best = score if finished else None, True

    def monitor(self) -> dict[str, float]:
        """The watch's monitors, also written to TensorBoard, with their warning."""
        values, warning = self.watch.monitor(self.epoch)
        self.out.board.scalars({f"monitor/{name}": value for name, value in values.items()}, self.step)
        if warning:
            say(warning)
        return values

    def evaluate(self) -> dict[str, dict[str, Any]] | None:
        """The watch's evaluation; None if the run was asked to stop during it, and has been saved."""
        saved = self.save()  # an evaluation takes a while; being killed during it loses no training
        try:
            results = self.watch.evaluate(lambda: self.stop.requested)
        except Interrupted:
            say(f"the evaluation of epoch {self.epoch} was interrupted; it starts over when the run continues")
            self.finish(done=False, saved=saved)
            return None
        for line in result_lines(results):
            say(f"epoch {self.epoch}: {line}")
        self.out.board.scalars(result_scalars(results), self.step)
        return results

    def train_epoch(self) -> bool:
        """Run the remaining steps of this epoch; False if the run was asked to stop before the end."""
        run, args, per_epoch = self.run, self.run.args, self.run.plan.steps_per_epoch
        first = self.step - self.epoch * per_epoch
        last = min(per_epoch, run.total_steps - self.epoch * per_epoch)
        self.sampler.set_position(self.epoch, first)
        self.pace, saved_at = Pace(run.plan.global_batch), time.monotonic()
        later = run.total_steps - self.epoch * per_epoch - last
        bar = Progress(
            self.step_batches(last - first), last, f"epoch {self.epoch}", start=first, unit="step",
            run_left=lambda: later,
        )  # fmt: skip
        for batches in bar:
            save = 0 < args.checkpoint_every_minutes * 60 <= time.monotonic() - saved_at
            self.refused.remember(self.step, batches)
            wishes = Wishes(self.stop.requested or self.failure is not None, save)
            self.results.push(self.step, self.method.step(run, batches, self.step, wishes))
            self.step += 1
            self.pace.steps += 1
            agreed = self.read_results()
            bar.set_text(self.progress_text)
            if agreed.stop:
                return False
            by_steps = args.checkpoint_every_steps and self.step % args.checkpoint_every_steps == 0
            if (agreed.save or by_steps) and self.step != (self.epoch + 1) * per_epoch:
                self.save()
                saved_at = time.monotonic()
        self.read_results(everything=True)
        return True

    def step_batches(self, steps: int) -> Iterator[list[Any]]:
        """The micro-batches of each of the next `steps` steps, on the device; the waiting time is measured."""
        if steps == 0:
            return
        wanted = itertools.islice(self.loader, steps * self.run.plan.accum)
        batches = ahead_on_device(wanted, self.run.hardware.device)
        for _ in range(steps):
            with self.pace.waiting():
                group = list(itertools.islice(batches, self.run.plan.accum))
            for batch in group:
                with self.deferred_errors():
                    self.bad_images.see(batch)
            yield group

    # ---- results and logs

    def read_results(self, everything: bool = False) -> Wishes:
        """Read the results of the steps that are due; returns whether any process wanted to stop or to save."""
        stop = save = False
        for step, values in self.results.read(everything):
            result = dict(zip(self.method.results, values, strict=True))
            stop, save = stop or bool(result["stop"]), save or bool(result["save"])
            if result["bad"]:
                self.refused.handle(step, result, self.state)
                continue
            self.refused.in_a_row = 0
            self.meters.update(**{name: result[name] for name in (*self.method.terms, "grad_norm")})
            self.out.board.scalars(self.scalars(step, result), step)
        return Wishes(stop, save)

    def scalars(self, step: int, result: dict[str, float]) -> dict[str, float]:
        """A step's values for TensorBoard."""
        values = {f"train/{name}": result[name] for name in (*self.method.terms, "grad_norm")}
        values |= {f"optim/{name}": schedule[step] for name, schedule in self.run.schedules.items()}
        return values | {"perf/images_per_s": self.pace.images_per_s, "perf/data_wait": self.pace.data_wait}

    @property
    def progress_text(self) -> str:
        """The numbers of the progress line."""
        meters = self.meters.meters
        terms = "  ".join(f"{name} {meters[name].avg:.4f}" for name in self.method.terms) if meters else ""
        lr = self.run.schedules["lr"][self.step - 1]
        return f"{terms}  lr {lr:.2e}  {self.pace.images_per_s:.1f} images/s  data wait {self.pace.data_wait:.0%}"

    def epoch_row(self) -> dict[str, Any]:
        """The object that log.txt gets for this epoch."""
        last, schedules = self.step - 1, self.run.schedules
        row: dict[str, Any] = {"epoch": self.epoch, "iteration": self.step}
        row |= {f"train_{name}": value for name, value in self.meters.averages().items()}
        row |= {f"train_{name}": float(schedules[name][last]) for name in ("lr", "wd")}
        row["time_s"] = round(self.pace.time_s, 3)
        row["images_per_s"] = round(self.pace.images_per_s, 2)
        row["data_wait"] = round(self.pace.data_wait, 4)
        return row
