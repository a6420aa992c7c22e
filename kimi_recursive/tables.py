"""One table: its rows are built once, then shown as text, HTML, markdown or CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from html import escape
from typing import Any

from kimi_recursive.text import WIDTH, cut, fit

LEAST_CUT = 8  # characters that a cut column keeps
LEAST_NAME = 12  # of the column of names, where long names have lines to themselves
LEAST_FLOW = 48  # of a last column of text, which is wrapped
# HTML class and sign of words that judge; the sign tells them apart without colour.
MARKS = {
    "helps": ("good", "▼"), "hurts": ("bad", "▲"), "not distinguishable": ("same", "◆"),
    "failed": ("bad", "✖"), "damaged": ("bad", "✖"), "parse_error": ("bad", "✖"),
    "beats SVD": ("good", "▲"), "loses to SVD": ("bad", "▼"), "same as SVD": ("same", "◆"),
}  # fmt: skip


class Kind(StrEnum):
    """What a column holds: a name tells rows apart, a verdict is a word that judges."""

    NAME = "name"
    NUMBER = "number"
    TEXT = "text"
    VERDICT = "verdict"


NAME, NUMBER, TEXT, VERDICT = Kind


@dataclass(frozen=True)
class Column:
    """Attributes:
    optional: The other columns imply it, so a text leaves it out rather than be too wide.
    """

    heading: str
    kind: Kind = TEXT
    optional: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells. A cell is text, a number, a time, or None where there is nothing to show.

    Attributes:
        columns: The first one holds the headings of the rows.
        notes: Sentences below the table.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()

    @classmethod
    def of_records(cls, headings: Sequence[str], records: Iterable[Mapping[str, Any]]) -> Table:
        """One row a record; a key that a record lacks is an empty cell."""
        rows = [[record.get(heading) for heading in headings] for record in records]
        return cls("", [Column(heading) for heading in headings], rows)

    def to_csv(self) -> str:
        """Headings and cells, without caption and notes."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(column.heading for column in self.columns)
        writer.writerows(self.rows)
        return file.getvalue()

    def to_markdown(self) -> str:
        """A table of GitHub's kind: names as code, verdicts bold."""
        marks = {NAME: "`{}`", VERDICT: "**{}**"}
        lines = [[column.heading for column in self.columns]]
        lines.append(["---:" if column.kind is NUMBER else "---" for column in self.columns])
        for row in self._shown(""):
            cells = zip(map(_markdown_cell, row), self.columns, strict=True)
            lines.append([x and marks.get(c.kind, "{}").format(x) for x, c in cells])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (self.caption, table, *self.notes) if part)

    def to_html(self) -> str:
        """A `<table>` that scrolls sideways, and its notes. All cells are escaped."""
        head = "".join(
            f'<th scope="col" class="{column.kind}">{escape(column.heading)}</th>'
            for column in self.columns
        )
        rows = [
            f'<tr><th scope="row">{escape(row[0])}</th>'
            + "".join(map(_html_cell, row[1:], self.columns[1:]))
            + "</tr>"
            for row in self._shown("–")
        ]
        rows = rows or [f'<tr><td colspan="{len(self.columns)}">nothing is there yet</td></tr>']
        caption = escape(self.caption)
        return "\n".join([
            f'<div class="wide" tabindex="0" role="region" aria-label="{caption}">',
            "<table>", f"<caption>{caption}</caption>", f"<thead><tr>{head}</tr></thead>",
            "<tbody>", *rows, "</tbody>", "</table>", "</div>",
            *(f'<p class="note">{escape(note)}</p>' for note in self.notes),
        ])  # fmt: skip

    def to_text(self, width: int = WIDTH) -> str:
        """Caption, rows and notes in lines of at most `width` characters.

        Names are never cut: one that is too long has a line to itself. One that repeats the name
        above is left out.
        """
        rows = self._shown("-")
        lines = self._layout(rows, width).lines(self.columns, rows) if rows else ["(none)"]
        return fit([*([self.caption] if self.caption else []), *lines, *self.notes], width)

    def to_terminal(self, width: int | None) -> str:
        """Headings and rows, a line each. Cells are cut until the lines are `width` wide, names
        last; with None nothing is cut."""
        lines = [[column.heading for column in self.columns]]
        lines += [[" ".join(cell.split()) for cell in row] for row in self._shown("-")]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for names in (False, True):
            cuttable = [i for i, c in enumerate(self.columns) if (c.kind is NAME) is names]
            while width is not None and cuttable and sum(widths) + 2 * (len(widths) - 1) > width:
                longest = max(cuttable, key=widths.__getitem__)
                if widths[longest] <= LEAST_CUT:
                    break
                widths[longest] -= 1
        return "\n".join(
            "  ".join(cut(x, n).ljust(n) for x, n in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def _shown(self, nothing: str) -> list[list[str]]:
        return [[_cell(value, nothing) for value in row] for row in self.rows]

    def _layout(self, rows: Sequence[Sequence[str]], width: int) -> _Layout:
        """The first that fits: with all columns, without the optional ones, closer together, with
        names on lines of their own. The headings take as few lines as they can."""
        every = list(range(len(self.columns)))
        kept = [i for i in every if not self.columns[i].optional]
        most = max(len(column.heading.split()) for column in self.columns)
        tries = ((every, 2, False), (kept, 2, False), (kept, 1, False), (kept, 2, True))
        for shown, gap, alone in tries:
            for num_lines in range(1, most + 1):
                widths = [self._width(rows, i, num_lines) for i in shown]
                layout = _Layout(shown, widths, gap, width)
                if layout.settle(alone, self.columns[shown[-1]].kind is TEXT):
                    return layout
        layout = _Layout(kept, [self._width(rows, i, most) for i in kept], 1, width)
        layout.settle(True, self.columns[kept[-1]].kind is TEXT)
        return layout

    def _width(self, rows: Sequence[Sequence[str]], column: int, num_lines: int) -> int:
        """The narrowest that holds the cells, and the heading in so many lines."""
        heading = self.columns[column].heading
        least = max(map(len, ("-", *heading.split(), *(row[column] for row in rows))))
        widths = range(least, max(least, len(heading)))
        return next((n for n in widths if len(_wrapped(heading, n)) <= num_lines), widths.stop)


@dataclass
class _Layout:
    """Where the cells of a text stand: the columns shown, their widths, and the gap between."""

    shown: list[int]
    widths: list[int]
    gap: int
    width: int

    def settle(self, alone: bool, flows: bool) -> bool:
        """Whether the columns fit, after those have given way that can: the first where long
        names stand alone, the last where it `flows`, that is, holds text that may be wrapped."""
        spare = self.width - sum(self.widths) - self.gap * (len(self.widths) - 1)
        give_way = [(0, LEAST_NAME)] * alone + [(-1, LEAST_FLOW)] * (flows and len(self.widths) > 1)
        for column, least in give_way:
            given = min(max(-spare, 0), max(0, self.widths[column] - least))
            self.widths[column] -= given
            spare += given
        return spare >= 0

    def lines(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
        shown = [columns[i] for i in self.shown]
        pad: list[Callable[[str, int], str]] = [
            str.rjust if column.kind is NUMBER else str.ljust for column in shown
        ]
        headings = [_wrapped(c.heading, n) for c, n in zip(shown, self.widths, strict=True)]
        most = max(map(len, headings))
        found = [[*[""] * (most - len(parts)), *parts] for parts in headings]
        lines = [list(line) for line in zip(*found, strict=True)]
        above, alone = None, set()
        for row in rows:
            cells = [row[i] for i in self.shown]
            if columns[0].kind is NAME:
                above, cells[0] = cells[0], "" if cells[0] == above else cells[0]
            if len(cells) > 1 and len(cells[0]) > self.widths[0]:
                alone.add(len(lines))
                lines.append([cells[0]])
                cells[0] = ""
            last = _wrapped(cells[-1], self.widths[-1]) if len(cells) > 1 else [cells[-1]]
            lines.append([*cells[:-1], last[0] if last else ""])
            lines += [[*[""] * (len(cells) - 1), part] for part in last[1:]]
        space = " " * self.gap
        for number, line in enumerate(lines):
            if number not in alone:
                line = [p(x, n) for p, x, n in zip(pad, line, self.widths, strict=True)]
            lines[number] = line
        return [space.join(line).rstrip() for line in lines]


def percent(value: float) -> str:
    """A difference in percent."""
    return f"{value:+.3f} %" if abs(value) < 1e4 else f"{value:+.1e} %"


def interval(low: float, high: float) -> str:
    """Two bounds in percent."""
    return f"[{percent(low)[:-2]}, {percent(high)[:-2]}] %"


def perplexity(value: float) -> str:
    """That of a model that diverged is too long to be written out."""
    return f"{value:.4f}" if value < 1e6 else f"{value:.4e}"


def count(number: float) -> str:
    """Tokens in thousands, or in millions from one million on."""
    return f"{number / 1e3:.0f}k" if number < 1e6 else f"{number / 1e6:.1f}M"


def _cell(value: Any, nothing: str) -> str:
    if value is None:
        return nothing
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _html_cell(text: str, column: Column) -> str:
    if column.kind is VERDICT and text in MARKS:
        look, sign = MARKS[text]
        sign = f'<span aria-hidden="true">{sign}</span>'
        return f'<td class="verdict {look}">{sign} {escape(text)}</td>'
    return f'<td class="{column.kind}{" long" * (len(text) > 30)}">{escape(text)}</td>'


def _markdown_cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)
