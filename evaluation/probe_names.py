"""The names of probes on a command line: `linear`, `ep`, or with settings of its pooling, `ep:queries=16,d_out=2`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from poolings.choose import PROBES, build_pooling, check_settings, read_settings, settings_of
from runtime.guards import InputError

LINEAR = "linear"
NAMES = (LINEAR, "ep", "ep_all", "simpool", "abmilp", "aim", "cae", "coca", "vjepa", "capi")
_FIXED = {"capi": ("classes",), "simpool": ("gamma", "use_beta", "value_min")}  # not the user's choice


@dataclass(frozen=True)
class ProbeName:
    """One probe of a run."""

    label: str  # as it was written, which is also its name in tables and files
    name: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_attentive(self) -> bool:
        """Whether it pools tokens; the linear probe sees the model's own feature."""
        return self.name != LINEAR

    @property
    def takes_cls(self) -> bool:
        """Whether the [CLS] token is among its tokens."""
        return self.is_attentive and self.name in PROBES and PROBES[self.name].takes_cls

    @property
    def file_name(self) -> str:
        """The label as a part of a file's name."""
        return self.label.replace(":", "_").replace(",", "_")

    def build(self, dim: int, classes: int) -> nn.Module:
        """Its pooling for tokens of width `dim`. Raises InputError if the width does not suit it."""
        fixed = {"classes": classes} if self.name == "capi" else {}
        try:
            return build_pooling(self.name, dim, **self.settings, **fixed)
        except ValueError as error:
            text = str(error).removeprefix(f"{self.name}: ")
            raise InputError(f"--probes {self.label}: {text}{self._remedy(dim, text)}") from error

    def _remedy(self, dim: int, error: str) -> str:
        """How to write a setting that divides the width, if that is what is wrong."""
        width = dim // self.settings.get("d_out", 1)
        for key in ("queries", "heads"):
            most = self.settings.get(key, settings_of(self.name).get(key))
            if f"choose {key} that divides it" in error and isinstance(most, int):
                best = max(value for value in range(1, most + 1) if width % value == 0)
                return f", as in --probes {self.name}:{key}={best}"
        return ""


def read_probes(texts: Iterable[str]) -> list[ProbeName]:
    """The probes that a command line names, each once. Raises InputError for an unknown name or setting."""
    return [_read(text) for text in dict.fromkeys(texts)]


def _read(text: str) -> ProbeName:
    name, colon, listed = text.partition(":")
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower(), NAMES, n=3, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise InputError(f"--probes {text}: there is no probe {name!r}{hint}; choose among {', '.join(NAMES)}")
    if not colon:
        return ProbeName(text, name)
    try:
        settings = read_settings(listed.split(","))
        if name == LINEAR:
            raise ValueError("the linear probe has no settings")
        if name in _FIXED:
            given = [key for key in settings if key in _FIXED[name]]
            if given:
                raise ValueError(f"{given[0]} of {name} can't be set in a probe; leave it out")
        check_settings(name, settings)
    except ValueError as error:
        raise InputError(f"--probes {text}: {error}") from error
    return ProbeName(text, name, settings)
