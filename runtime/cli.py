"""Command-line helpers: DINO's argument types, flags that may be spelt with dashes, config files, one-line errors."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from runtime.guards import InputError

_TRUE = {"on", "true", "1", "yes"}
_FALSE = {"off", "false", "0", "no"}
_MOST_CONFIG_BYTES = 1_000_000


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


def gamma_flag(value: str | float | None) -> float | str | None:
    """Parse SimPool's exponent: a number, `None`, or `auto` for the architecture's own."""
    return "auto" if isinstance(value, str) and value.lower() == "auto" else float_or_none(value)


def path_flag(value: str) -> str:
    """Parse a path: `~` is the home folder, also after `=`, which the shell leaves alone. Empty is an error."""
    if not value.strip() or "\0" in value:
        raise argparse.ArgumentTypeError(f"{value!r} is no path; give one, or leave the flag out")
    path = os.path.expanduser(value)
    if path.startswith("~"):  # no such user, or no home folder
        raise argparse.ArgumentTypeError(
            f"{value!r}: there is no such home folder here; write the whole path, or ./ before the ~"
        )
    return path


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each flag under its underscored name only, and its default unless the help text tells it."""

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
    """`; did you mean this, that?`, or nothing if no known word is near."""
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


def parse_described(
    flags: argparse.ArgumentParser, doc: str | None, argv: list[str] | None, name: str | None = None
) -> argparse.Namespace:
    """The arguments of a small program; its --help begins with `doc`, the module's, as it is laid out.

    name: how the program is started, if that is not its file's name.
    """
    parser = ProgramParser(
        name, parents=[flags], description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ config files


def given_flags(make_parser: Callable[[], argparse.ArgumentParser], argv: list[str] | None) -> list[str]:
    """Names of the flags that are given on the command line."""
    parser = argparse.ArgumentParser(add_help=False, parents=[make_parser()])
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()  # of set_defaults
    return list(vars(parser.parse_args(argv)))


def read_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Values of a --config file (JSON or YAML), converted and checked as the parser's flags are. Raises InputError."""
    values = _parse_config(path)
    if not isinstance(values, dict):
        raise InputError(f"--config {path} must hold one object of flags and values, not a {type(values).__name__}")
    actions = {action.dest: action for action in parser._actions}
    for key in values:
        if not isinstance(key, str):
            raise InputError(f"--config {path}: key {key!r} is no flag's name (YAML reads on, yes and 1 as values)")
        if key not in actions:
            raise InputError(f"--config {path}: unknown key {key[:80]!r}{near_hint(key[:80], actions)}")
    return {key: _as_flag(actions[key], value, path) for key, value in values.items() if key != "config"}


def _parse_config(path: Path) -> Any:
    """What a config file holds. Raises InputError if it is too large, not UTF-8, or not JSON or YAML."""
    if not path.is_file():
        raise InputError(f"--config {path} does not exist, or is no file")
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_CONFIG_BYTES + 1)
    except OSError as error:
        raise InputError(f"--config {path} cannot be read ({error})") from error
    if len(data) > _MOST_CONFIG_BYTES:
        raise InputError(f"--config {path} is larger than 1 MB; it should hold one object of flags and values")
    try:
        text = data.decode("utf-8")
        if path.suffix in (".yaml", ".yml"):
            return _parse_yaml(text)
        return json.loads(text, object_pairs_hook=_unique)
    except Exception as error:  # of utf-8, yaml and json, which say where
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"--config {path} cannot be parsed: {reason}") from error


def _parse_yaml(text: str) -> Any:
    """YAML without aliases: a few lines of them can stand for more than any memory holds."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"aliases (*{event.anchor}) are not accepted; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 10:
            raise ValueError("it is nested too deeply")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode):
        _unique([(key.value, None) for key, _ in root.value if isinstance(key, yaml.ScalarNode)])
    return yaml.safe_load(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dictionary; ValueError if a key is there twice, of which one value would be lost silently."""
    keys = [key for key, _ in pairs]
    twice = [key for key in keys if keys.count(key) > 1] if len(set(keys)) < len(keys) else []
    if twice:
        raise ValueError(f"key {twice[0][:80]!r} is there twice")
    return dict(pairs)


def _as_flag(action: argparse.Action, value: Any, path: Path) -> Any:
    """A config's value as its flag would read it. Raises InputError."""
    shown = f"--config {path}: {action.dest} {str(value)[:80]!r}"
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{shown}: write true or false")
        return value
    if value is None:
        if action.default is not None and not _means_none(action):
            raise InputError(f"{shown}: give a value, or leave the key out")
        return None
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and (action.nargs is None or not items):
        raise InputError(f"{shown}: give one value" if action.nargs is None else f"{shown}: give at least one value")
    if isinstance(action.nargs, int) and len(items) != action.nargs:
        raise InputError(f"{shown}: give {action.nargs} values")
    if any(isinstance(item, list | dict) or item is None for item in items) or (
        action.type is None and any(isinstance(item, bool) for item in items)
    ):
        raise InputError(f"{shown}: give a number or a text")
    try:
        items = [action.type(str(item)) if action.type else str(item) for item in items]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{shown}: {error}") from error
    for item in items:
        if action.choices and item not in action.choices:
            raise InputError(f"{shown}; choose {', '.join(map(str, action.choices))}")
    return items if action.nargs else items[0]


def _means_none(action: argparse.Action) -> bool:
    """Whether None is a value of the flag, as it is of --gamma."""
    try:
        return action.type is not None and action.type("None") is None
    except (ValueError, argparse.ArgumentTypeError):
        return False
