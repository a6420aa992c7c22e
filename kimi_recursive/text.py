"""Wording that several rooms share: errors in one line, names beside numbers, lines that fit."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


def unknown_key_message(key: str, allowed: Iterable[str], where: str) -> str:
    """One line that names an unknown key, where it stands, and the nearest valid one."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(allowed)}"
    return f"{where}: unknown key '{key}'; {hint}"


WIDTH = 100
NAME_WIDTH = 29


def fit(lines: Iterable[str]) -> str:
    """A text of lines of at most 100 columns; the rest of a longer one is indented below it."""
    whole = (
        textwrap.wrap(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False) or [""]
        for text in lines
        for line in text.split("\n")
    )
    return "\n".join(line for parts in whole for line in parts) + "\n"


def label(name: str, width: int = NAME_WIDTH) -> str:
    """A name as the first column of a table; one that is too long has a line to itself."""
    return f"{name:<{width}}" if len(name) < width else f"{name}\n{'':<{width}}"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
