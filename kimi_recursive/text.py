"""Text that several rooms format alike: one-line errors, names in a first column, line width."""

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
    """Join lines, wrapped at 100 columns; continuation lines are indented."""
    whole = (
        textwrap.wrap(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False) or [""]
        for text in lines
        for line in text.split("\n")
    )
    return "\n".join(line for parts in whole for line in parts) + "\n"


def label(name: str, width: int = NAME_WIDTH) -> str:
    """A name as the first column of a table; a name that is too long gets its own line."""
    return f"{name:<{width}}" if len(name) < width else f"{name}\n{'':<{width}}"


def first_line(error: Exception) -> str:
    """The first line of an error's message; without a message, the error's type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
