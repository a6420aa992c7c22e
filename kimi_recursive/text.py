"""Wording that several rooms share: errors in one line, lines that fit."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


def unknown_key_message(key: str, allowed: Iterable[str], where: str) -> str:
    """One line that names an unknown key, where it stands, and the nearest valid one."""
    return f"{where}: unknown key {shown(key)}; {did_you_mean(key, allowed, 'allowed')}"


def did_you_mean(word: str, known: Iterable[str], title: str) -> str:
    """The nearest known word as a question; where none is near, `title` and all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"{title}: {', '.join(known)}"


WIDTH = 100


def cut(text: str, length: int) -> str:
    """At most so many characters of a text, the last of them an ellipsis where it was cut."""
    return text if len(text) <= length else text[: length - 1] + "…"


def shown(value: object) -> str:
    """A value as a message shows it: as Python writes it, and cut where it is long."""
    return cut(repr(value), WIDTH)


def fit(lines: Iterable[str], width: int = WIDTH) -> str:
    """Lines of at most `width` characters; the rest of a longer one is indented below it."""
    whole = (
        textwrap.wrap(line, width, subsequent_indent="    ", break_on_hyphens=False) or [""]
        for text in lines
        for line in text.split("\n")
    )
    return "\n".join(line for parts in whole for line in parts)


def first_line(error: Exception) -> str:
    """The first line of an error's message; without a message, the error's type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
