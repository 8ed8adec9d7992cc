"""The command line's small change: DINO's argument types, flags that may be spelt with dashes, errors of one line."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from runtime.guards import InputError

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


class ProgramParser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, as InputError: a hundred flags' usage would bury it."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown and unknown[0].startswith("--"):
            flag = "--" + unknown[0][2:].split("=")[0].replace("-", "_")
            known = [name for name in self._option_string_actions if "-" not in name[2:]]
            self.error(f"unknown flag {flag}{near_hint(flag, known)}")
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}; a flag begins with --")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")


def near_hint(word: str, known: Iterable[str]) -> str:
    """`; did you mean this, that?`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, known, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def parse_program(
    name: str, flags: argparse.ArgumentParser, doc: str | None, argv: list[str] | None, allow_abbrev: bool = False
) -> argparse.Namespace:
    """The arguments of a program; its --help begins with the first paragraph of `doc`, the module's."""
    parser = ProgramParser(
        name, usage="%(prog)s [flags]", description=(doc or "").split("\n\n")[0], parents=[flags],
        formatter_class=HelpFormatter, allow_abbrev=allow_abbrev,
    )  # fmt: skip
    return parser.parse_args(argv)


def parse_described(flags: argparse.ArgumentParser, doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a small program; its --help begins with `doc`, the module's, as it is laid out."""
    parser = ProgramParser(
        parents=[flags], description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ config files


def given_flags(make_parser: Callable[[], argparse.ArgumentParser], argv: list[str] | None) -> list[str]:
    """Names of the flags that stand on the command line."""
    parser = argparse.ArgumentParser(add_help=False, parents=[make_parser()])
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return list(vars(parser.parse_args(argv)))


def read_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Values of a --config file (JSON or YAML), converted and checked as the parser's flags are. Raises InputError."""
    if not path.is_file():
        raise InputError(f"--config {path} does not exist")
    text = path.read_text()
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            values = yaml.safe_load(text)
        else:
            values = json.loads(text)
    except Exception as error:  # yaml's and json's own errors, which say where
        raise InputError(f"--config {path} cannot be parsed: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path} must hold one object of flags and values, not a {type(values).__name__}")
    actions = {action.dest: action for action in parser._actions}
    for key in values:
        if key not in actions:
            raise InputError(f"--config {path}: unknown key {key!r}{near_hint(key, actions)}")
    return {key: _as_flag(actions[key], value, path) for key, value in values.items() if key != "config"}


def _as_flag(action: argparse.Action, value: Any, path: Path) -> Any:
    """A config's value as its flag would read it."""
    if value is None or action.nargs == 0:
        return value
    items = value if isinstance(value, list) else [value]
    try:
        items = [action.type(str(item)) if action.type else str(item) for item in items]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"--config {path}: {action.dest} {value!r}: {error}") from error
    if action.choices and items[0] not in action.choices:
        raise InputError(f"--config {path}: {action.dest} {value!r}; choose {', '.join(action.choices)}")
    return items if action.nargs else items[0]
