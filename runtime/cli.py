"""The command line's small change: DINO's argument types, and flags that may be spelt with dashes."""

from __future__ import annotations

import argparse

_TRUE = {"on", "true", "1", "yes"}
_FALSE = {"off", "false", "0", "no"}


def bool_flag(value: str | bool) -> bool:
    """Parse a boolean argument: on/off, true/false, 1/0, yes/no (DINO's `bool_flag`)."""
    if isinstance(value, bool):
        return value
    lowered = value.lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is not a boolean; write true or false")


def float_or_none(value: str | float | None) -> float | None:
    """Parse a number, or `None` / `none` for "without" (as in `--gamma None`)."""
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        return None
    try:
        return float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is neither a number nor None") from error


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each flag under its underscored name only, and a default where the help text does not tell it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = [s for s in action.option_strings if "-" not in s[2:]] or action.option_strings
        if not action.option_strings or action.nargs == 0:
            return ", ".join(shown) or super()._format_action_invocation(action)
        return f"{', '.join(shown)} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or (isinstance(action.default, bool) and action.nargs == 0):
            return action.help
        if action.help and "default" in action.help:
            return action.help
        return super()._get_help_string(action)


def add_flag(group: argparse._ActionsContainer, name: str, *aliases: str, **kwargs) -> argparse.Action:
    """`group.add_argument(name)` that also accepts the name with dashes: `--data_path` and `--data-path`."""
    spellings = []
    for spelling in (name, *aliases):
        spellings += [spelling, spelling[:2] + spelling[2:].replace("_", "-")]
    return group.add_argument(*dict.fromkeys(spellings), **kwargs)


def add_launcher_flags(group: argparse._ActionsContainer) -> None:
    """The flags that launchers pass or DINO's scripts set, the same for every program."""
    add_flag(group, "--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    add_flag(group, "--backend", default=None, help="torch.distributed backend (default: nccl on CUDA, gloo elsewhere)")
    add_flag(group, "--dist_url", default="env://", help="where the processes meet; see torch.distributed")
    add_flag(group, "--local_rank", type=int, default=0, help="accepted and ignored: launchers set LOCAL_RANK")
