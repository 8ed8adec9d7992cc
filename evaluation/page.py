"""The parts of an HTML page that needs no other file and no network: text is escaped, pictures are embedded."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any


def text(value: Any) -> str:
    """A value as text of the page: escaped, and whatever is no character (of odd file names) written out."""
    plain = str(value).encode("utf-8", "backslashreplace").decode()
    return html.escape("".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in plain))


def heading(title: str, state: str | None, facts: Sequence[str]) -> str:
    """The title with the state of the run as a badge, and facts below it."""
    badge = f' <span class="state {state}">{state}</span>' if state else ""
    lines = "".join(f"<li>{text(fact)}</li>" for fact in facts)
    return f'<header><h1>{text(title)}{badge}</h1><ul class="facts">{lines}</ul></header>'


def section(title: str, body: str) -> str:
    """A part of the page that stands open; nothing if it is empty."""
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def folded(title: str, body: str) -> str:
    """A part that opens on a click; nothing if it is empty."""
    return f"<details><summary>{text(title)}</summary>{body}</details>" if body else ""


def notes(title: str, lines: Sequence[str]) -> str:
    """Lines that should be read."""
    if not lines:
        return ""
    return f'<section class="notes"><h2>{text(title)}</h2>' + "".join(f"<p>{text(x)}</p>" for x in lines) + "</section>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header; nothing without rows."""
    if not rows:
        return ""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = line(header, "th") if any(header) else ""
    return f'<div class="scroll"><table>{head}{"".join(line(row, "td") for row in rows)}</table></div>'


def image(png: bytes, what: str) -> str:
    """A PNG, as wide as its place."""
    return f'<img alt="{text(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def wide(png: bytes, what: str) -> str:
    """A PNG that a narrow window scrolls sideways instead of shrinking it beyond recognition."""
    return f'<div class="scroll wide">{image(png, what)}</div>'


def document(title: str, sections: Sequence[str], refresh: bool = False) -> str:
    """The whole page; with `refresh` a browser reads it again every minute."""
    again = '<meta http-equiv="refresh" content="60">' if refresh else ""
    body = "\n".join(part for part in sections if part)
    return _PAGE.format(title=text(title), again=again, style=_STYLE, body=body)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{again}<title>{title}</title><style>{style}</style></head><body>
{body}
</body></html>
"""
_STYLE = """
:root { --ink: #1d2433; --soft: #667085; --line: #e4e7ec; --paper: #fff; --accent: #3b528b; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); background: var(--paper);
  max-width: 82rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.8rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .9rem; margin: .9rem 0 .2rem; color: var(--soft); font-weight: 600; }
.facts { margin: 0; padding: 0; list-style: none; color: var(--soft); font-size: .88rem; overflow-wrap: anywhere; }
.state { display: inline-block; font-size: .8rem; font-weight: 600; padding: .1rem .6rem; border-radius: 1rem;
  vertical-align: middle; white-space: nowrap; }
.running { background: #e0edff; color: #1849a9; } .done { background: #dcfae6; color: #085d3a; }
.preempted { background: #fef0c7; color: #93370d; } .stopped { background: #fee4e2; color: #912018; }
.notes p { margin: .3rem 0; padding: .4rem .7rem; background: #fffaeb; border-left: 3px solid #f79009;
  overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .6rem; }
.panels img { border: 1px solid var(--line); border-radius: 6px; padding: .3rem; }
img { width: 100%; height: auto; display: block; }
.wide img { width: auto; max-width: 100%; max-height: 70rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .2rem 0 .6rem; font-size: .9rem; font-variant-numeric: tabular-nums; }
td, th { padding: .22rem 1.2rem .22rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td + td { overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .35rem .8rem; }
details[open] { padding-bottom: .7rem; }
summary { cursor: pointer; color: var(--accent); font-weight: 600; }
@media (max-width: 600px) { .wide img { max-width: none; width: 760px; } td, th { padding-right: .8rem; } }
@media print { details { border: none; } }
"""
