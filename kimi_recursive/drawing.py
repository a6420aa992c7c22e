"""Figures of the results: drawn by one function each, written as PNG, or as SVG for a page."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text

from kimi_recursive.files import replacing

# Okabe and Ito's colours, told apart with any kind of colour vision.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKERS = ("", "o", "s", "^", "D", "v")
LINES = ("-", "--", "-.", ":")
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    _without_formulas(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def to_svg(figure: Figure, name: str, text: str) -> str:
    """A figure as an `<svg>` element to be put into a page.

    Args:
        name: Goes before every id, which have to be unique in the page.
        text: Says what can be seen, for those who cannot see it.
    """
    _without_formulas(figure)
    written = io.BytesIO()
    # Text stays text; the same figure gives the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "kimi"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(written.getvalue())
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key in ("href", f"{{{XLINK}}}href"):
                element.set(key, value.replace("#", f"#{name}-", 1))
            elif "url(#" in value:
                element.set(key, re.sub(r"url\(#", f"url(#{name}-", value))
    root.attrib |= {"role": "img", "aria-label": text}
    return ElementTree.tostring(root, encoding="unicode")


def _without_formulas(figure: Figure) -> None:
    """A name with dollar signs is a name."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def panels(
    columns: int, size: tuple[float, float] | None = None, **options: Any
) -> tuple[Figure, list[Any]]:
    """A figure of so many axes side by side, with a grid."""
    size = size or (max(7.0, 3.4 * columns + 0.8), 4.2)
    figure = Figure(figsize=size, layout="constrained")
    row = list(figure.subplots(1, columns, squeeze=False, **options)[0])
    for axes in row:
        axes.grid(alpha=0.3)
    return figure, row


def legend(axes: Any, row: Sequence[Any] | None = None, **options: Any) -> None:
    """A legend without a frame, where anything has a label.

    Args:
        row: All axes whose labels it explains; by default its own.
    """
    handles: dict[str, Any] = {}
    for one in [axes] if row is None else row:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        axes.legend(handles.values(), handles.keys(), frameon=False, **options)
