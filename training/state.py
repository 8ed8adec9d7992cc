"""A run as a checkpoint: DINO's keys, plus what an exact resume and a reader of the file need."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data.source import ImageSource
from optim import sharding
from pretrained import MODEL_KEYS, NEWEST_FORMAT, POLICY_KEYS, without_prefix
from runtime.guards import InputError
from runtime.terminal import say
from training import arguments
from training.backbone import pooling_config
from training.flags import FORMER_DEFAULTS
from training.method import Method
from training.run import Run


def training_state(run: Run, method: Method) -> dict[str, Any]:
    """The training state, independent of the number of processes and sharding; all processes must call this."""
    state = {
        "student": {f"module.{name}": value for name, value in run.bare_student.state_dict().items()},
        "optimizer": run.optimizer.state_dict(),
    }
    if run.teacher is not None:
        state["teacher"] = run.teacher.state_dict()
    if method.loss_key is not None:
        state[method.loss_key] = run.loss.state_dict()
    if run.scaler.is_enabled():
        state["fp16_scaler"] = run.scaler.state_dict()
    return sharding.gathered(state)


def load_training_state(run: Run, method: Method, state: dict[str, Any], path: Path) -> None:
    """The inverse of `training_state`. Raises InputError if the file's model does not match the arguments."""
    try:
        _load(run, method, state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(
            f"{path} does not fit the model of these arguments ({reason}); restore them, or start a new run in another "
            "--output_dir"
        ) from error


def _load(run: Run, method: Method, state: dict[str, Any]) -> None:
    sharding.load_model(run.bare_student, without_prefix(state["student"], "module."))
    if run.teacher is not None:
        sharding.load_model(run.teacher, state["teacher"])
    sharding.load_optimizer(run.optimizer, state["optimizer"])
    if method.loss_key is not None:
        run.loss.load_state_dict(state[method.loss_key])
    if run.scaler.is_enabled() and "fp16_scaler" in state:
        run.scaler.load_state_dict(state["fp16_scaler"])


def model_config(run: Run, method: Method, train: ImageSource) -> dict[str, Any]:
    """What is needed to build the model from the checkpoint, and what identifies the run."""
    args = run.args
    left_to_the_pooling = ("gamma", "use_beta", "pool_position", "pooling_args")
    config = {key: getattr(args, key) for key in (*MODEL_KEYS, *POLICY_KEYS) if key not in left_to_the_pooling}
    config |= pooling_config(run.bare_student.backbone)
    config |= {"method": method.name, "format": NEWEST_FORMAT} | method.config(args)
    config |= {"global_batch": run.plan.global_batch, "steps_per_epoch": run.plan.steps_per_epoch}
    return config | {"data": train.fingerprint()}


def check_method(method: Method, state: dict[str, Any], path: Path) -> None:
    """Raise InputError if a checkpoint's run is of another method."""
    before = (state.get("config") or {}).get("method", "dino")
    if before != method.name:
        raise InputError(
            f"{path} is from a run by {before}, which {method.name} can't continue; start a new run in another "
            f"--output_dir, from its backbone with --init_from {path}"
        )


def check_same_run(run: Run, method: Method, train: ImageSource, state: dict[str, Any], path: Path) -> None:
    """Report changed arguments. Raises InputError if they change the run's mathematics."""
    if "iteration" not in state or "config" not in state:
        raise InputError(
            f"{path} was not written by this program, so its run cannot be continued exactly; start a new one in "
            f"another --output_dir with --init_from {path}"
        )
    check_method(method, state, path)
    serious, harmless = _changes(run, method, train, state)
    if harmless:
        say(f"changed since the run was saved: {', '.join(harmless)}")
    if serious and not run.args.allow_changed_args:
        raise InputError(
            f"{path} is from a run with other arguments: {'; '.join(serious)}. Restore them, choose another "
            "--output_dir, or accept the change with --allow_changed_args true"
        )
    if serious:
        say(f"warning: the run continues with changed arguments: {'; '.join(serious)}")


def _changes(run: Run, method: Method, train: ImageSource, state: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What changed since the run was saved: changes that affect its mathematics, and those that don't."""
    old, new = {**FORMER_DEFAULTS, **state["args"]}, arguments.saved(run.args, method)
    old |= {key: state["config"].get(key) for key in ("global_batch", "data")}
    new |= {"global_batch": run.plan.global_batch, "data": train.fingerprint()}
    changed = {
        key: f"{key}: {old[key]} -> {new[key]}" for key in new if key in old and _listed(old[key]) != _listed(new[key])
    }
    cosmetic = arguments.COSMETIC | method.cosmetic
    serious = [text for key, text in changed.items() if key not in cosmetic]
    return serious, [text.replace(": ", " ", 1) for key, text in changed.items() if key in cosmetic]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def replay_arguments(args: argparse.Namespace, content: dict[str, Any]) -> argparse.Namespace:
    """The arguments of a replay file's run, for one process on this device."""
    saved = argparse.Namespace(**{**vars(args), **FORMER_DEFAULTS, **content["args"]})
    saved.device, saved.max_steps, saved.global_batch_size, saved.grad_accum = args.device, None, None, 1
    saved.fsdp = False
    if args.sources.get("data_path") == "flag":
        saved.data_path = args.data_path
    saved.batch_size_per_gpu = len(content["replay"]["images"][0][0])
    return saved
