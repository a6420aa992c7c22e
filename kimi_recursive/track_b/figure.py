"""Track-B's figure: recall over optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from kimi_recursive.drawing import COLOURS, LINES, legend, panels
from kimi_recursive.track_b.metrics import RECALL

if TYPE_CHECKING:
    from kimi_recursive.track_b.summary import Result


def draw_recall_by_step(results: Sequence[Result], curves: Mapping[str, pl.DataFrame]) -> Figure:
    """vs_teacher_recall@10 on the validation queries over optimizer steps: a line for each
    experiment, the mean over its seeds with their range. References are horizontal lines.

    Args:
        results: From `track_b.summary.read_results`.
        curves: Logs of all seeds by experiment, from `track_b.collect.seed_logs`.
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
