"""Figures of the results: drawn by one function each, written as PNG, or as SVG for a page."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter

from kimi_recursive.config import read_json_object
from kimi_recursive.files import replacing
from kimi_recursive.matrix import ARMS, PHASES, TRAINED_STAGES
from kimi_recursive.track_b.metrics import RECALL

if TYPE_CHECKING:
    from kimi_recursive.track_b.summary import Result

# Okabe and Ito's colours, told apart with any kind of colour vision.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKERS = ("", "o", "s", "^", "D", "v")
LINES = ("-", "--", "-.", ":")
ARM_LOOKS = {
    arm: {"color": COLOURS[number], "marker": MARKERS[number]}
    for number, arm in enumerate(ARMS, start=1)
}
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
# Text stays text; the same figure gives the same bytes.
SVG_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "kimi"}


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
    with rc_context(SVG_SETTINGS):
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


def plot_perplexity_by_step(results: Sequence[Path], output_path: Path) -> None:
    """`draw_perplexity_by_step` of `<name>_results.json` files as PNG."""
    found = [read_json_object(path) for path in results]
    found = [{**result, "by_step": result["perplexity"]["by_step"]} for result in found]
    save_png(draw_perplexity_by_step(found), output_path)


def draw_perplexity_by_step(found: Sequence[Mapping[str, Any]]) -> Figure:
    """Perplexity over the number of inner steps: a panel for each phase, a line for each arm and
    seed; the baseline is a dashed line across, steps beyond the trained depth are open markers.

    Args:
        found: `stage`, `inner_steps` and `by_step` of each evaluation.
    """
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for result in found:
        by_stage.setdefault(result["stage"], []).append(result)
    trained = [t for t in TRAINED_STAGES if t.stage in by_stage]
    phases = [p for p in PHASES if any(t.phase == p for t in trained)] or PHASES[:1]
    figure, row = panels(len(phases), sharey=True)
    for axes, phase in zip(row, phases, strict=True):
        for result in by_stage.get("baseline", [])[:1]:
            level = result["by_step"][0]["perplexity"]
            axes.axhline(level, color=COLOURS[0], linestyle="--", label="baseline", zorder=1)
        for arm, look in ARM_LOOKS.items():
            stage = next(t.stage for t in TRAINED_STAGES if (t.arm, t.phase) == (arm, phase))
            for i, result in enumerate(by_stage.get(stage, [])):
                x = [step["step"] for step in result["by_step"]]
                y = [step["perplexity"] for step in result["by_step"]]
                axes.plot(x, y, **look, label=None if i else arm)
                beyond = [k for k, t in enumerate(x) if t > result["inner_steps"]]
                points = ([x[k] for k in beyond], [y[k] for k in beyond])
                axes.plot(*points, **look, linestyle="", mfc="white")
        axes.set_title(f"phase {phase}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    row[0].set_ylabel("perplexity on held-out documents")
    legend(row[0])
    figure.supxlabel(
        "inner steps (0: the base, which trains from phase b on; open: beyond the trained depth)",
        size=10,
    )
    return figure


def draw_recall_by_step(results: Sequence[Result], curves: Mapping[str, pl.DataFrame]) -> Figure:
    """vs_teacher_recall@10 on the validation queries over optimizer steps: a line for each
    experiment, the mean over its seeds with their range; references are lines across.

    Args:
        results: Of `track_b.summary.read_results`.
        curves: By experiment the logs of all its seeds, of those that have one.
    """
    figure, (axes,) = panels(1, size=(8.5, 4.8))
    experiments = [r for r in results if r.experiment is not None]
    for number, result in enumerate(experiments):
        if result.name not in curves:
            continue
        curve = (
            curves[result.name]
            .drop_nulls(RECALL)
            .group_by("step")
            .agg(mean=pl.mean(RECALL), low=pl.min(RECALL), high=pl.max(RECALL))
            .filter(pl.col("step") > 0)
            .sort("step")
        )
        look = {"color": COLOURS[1:][number % 5], "linestyle": LINES[number // 5 % len(LINES)]}
        axes.plot(curve["step"], curve["mean"], **look, label=result.name)
        axes.fill_between(
            curve["step"], curve["low"], curve["high"], color=look["color"], alpha=0.15
        )
    for result in results:
        shown = result.experiment is None and result.recall is not None
        if shown and result.name != "reference_teacher":
            axes.axhline(result.recall, color=COLOURS[0], linestyle=":", linewidth=1)
            name = result.name.removeprefix("reference_").replace("_", " ")
            place = {"xy": (1.01, result.recall), "xycoords": ("axes fraction", "data")}
            axes.annotate(name, **place, va="center", size=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("vs_teacher_recall@10, validation queries")
    legend(axes, fontsize=8)
    return figure


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


def legend(axes: Any, **options: Any) -> None:
    """A legend without a frame, where anything has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, **options)
