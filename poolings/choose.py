"""build_pooling: the only place that turns a name into a pooling operator.

All of them take tokens or maps and return one vector per image, so any of them can take the place of SimPool. POOLINGS
are the operators of backbones; PROBES are trained with a classifier on features of a frozen backbone:

    pool = build_pooling("gem", 384, p=2.0)
    feature = pool(tokens)                  # (B, N, 384) -> (B, pool.num_features);  maps (B, 384, H, W) work as well
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from poolings.clusters import KMeans
from poolings.efficient import Ep, EpAll
from poolings.gates import Cbam, GatherExcite, Se
from poolings.how import How
from poolings.multiple_instance import AbMilp
from poolings.otk import Otk
from poolings.probes import Aim, Cae, Capi, Coca, VJepa
from poolings.shapes import Grid
from poolings.simple import AvgMax, Gap, GeM, Lse, Max
from poolings.simpool import SimPool
from poolings.slot import Slot
from poolings.tokens import Cait, Cls

CLASSES = (Gap, Max, AvgMax, GeM, Lse, How, Otk, KMeans, Slot, Se, Cbam, GatherExcite, Cls, Cait, SimPool)
POOLINGS: dict[str, type[nn.Module]] = {operator.name: operator for operator in CLASSES}
PROBE_CLASSES = (Ep, EpAll, AbMilp, Aim, Cae, Coca, VJepa, Capi)  # SimPool, gamma None, is a probe as well
PROBES: dict[str, type[nn.Module]] = {probe.name: probe for probe in PROBE_CLASSES}
OPERATORS = {**POOLINGS, **PROBES}
PUBLISHED_NAMES = {"avg": "gap", "learnlse": "lse", "vit": "cls"}  # in the code that SimPool was compared with


class Pooling(Protocol):
    """What every operator offers."""

    num_features: int
    needs_map: bool
    takes_cls: bool

    def __call__(
        self, x: Tensor, return_attention: bool = False, grid: Grid | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, D) or (B, D, H, W) -> (B, num_features); with return_attention also (B, heads, N)."""


def build_pooling(name: str, dim: int, gamma: float | None = None, **settings: Any) -> nn.Module:
    """A newly initialised operator (it satisfies `Pooling`).

    Args:
        name: a key of OPERATORS.
        dim: width of the tokens or maps that are to be pooled.
        gamma: exponent of simpool; the others have none.
        settings: the operator's own, by the names of its class's arguments.

    Raises:
        ValueError: for an unknown name or setting (with near matches), for gamma without simpool, and for a value that
            can't work.
    """
    if name not in OPERATORS:
        if name in PUBLISHED_NAMES:
            raise ValueError(f"unknown pooling {name!r}: it is called {PUBLISHED_NAMES[name]} here")
        raise ValueError(f"unknown pooling {name!r}{_near(name, OPERATORS)}; known are {', '.join(OPERATORS)}")
    if "gamma" in settings_of(name):
        settings["gamma"] = gamma
    elif gamma is not None:
        raise ValueError(f"{name} has no gamma, got {gamma}; only simpool has one: leave it out")
    check_settings(name, settings)
    return OPERATORS[name](dim, **settings)


def check_settings(name: str, settings: Iterable[str]) -> None:
    """Raise ValueError, with near matches, for the name of a setting that the operator does not have."""
    known = settings_of(name)
    for setting in settings:
        if setting not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"{name} has no setting {setting!r}{_near(setting, known)}; it has {listed}")


def read_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Settings from a command line: ["p=2.5", "learn=false"] -> {"p": 2.5, "learn": False}.

    A value is none, true or false, a whole number, a number, a list of these with commas (map_size=7,7), or a word.
    Raises ValueError for a text without `=` or a key that is there twice.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = str(text).partition("=")
        if not equals or not key or not value:
            raise ValueError(f"{text!r} is no setting of a pooling: write key=value, as in p=2.5")
        if key in settings:
            raise ValueError(f"{key} is set twice, to {settings[key]!r} and {value!r}; leave one out")
        settings[key] = tuple(map(_value, value.split(","))) if "," in value else _value(value)
    return settings


_WORDS = {"none": None, "true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _value(text: str) -> bool | int | float | str | None:
    """What a word of a command line means."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def settings_of(name: str) -> dict[str, Any]:
    """The settings of an operator and their defaults."""
    parameters = inspect.signature(OPERATORS[name]).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "dim"}


def _near(word: str, known: Any) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
