"""Figures of the report, as matplotlib figures; one of them is a PNG of its own as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from kimi_recursive.drawing import COLOURS, LINES, MARKERS, legend, panels, save_png
from kimi_recursive.files import read_json_object
from kimi_recursive.matrix.comparison import Comparison
from kimi_recursive.matrix.runs import TRAINED_STAGES, Training
from kimi_recursive.report.composition import BASE, CHAIN_OF_THOUGHT, UNSEEN
from kimi_recursive.report.curves import Curve, validation_column
from kimi_recursive.training.arms import ARMS, PHASES

# Colour and marker of each verdict; the marker tells verdicts apart without colour.
VERDICT_LOOKS = {
    "helps": {"color": COLOURS[1], "marker": "o"},
    "hurts": {"color": COLOURS[2], "marker": "s"},
    "not distinguishable": {"color": "#595959", "marker": "D", "mfc": "white"},
}
BAR_LOOKS = [
    {"color": COLOURS[number], "hatch": hatch, "edgecolor": "white"}
    for number, hatch in enumerate(("", "//", ".."), start=1)
]
ARM_LOOKS = {
    arm: {"color": COLOURS[number], "marker": MARKERS[number]}
    for number, arm in enumerate(ARMS, start=1)
}
# The last line is for runs that are not finished.
ARM_LINES = dict(zip(ARM_LOOKS, cycle(LINES[:-1]), strict=False))
MOST_POINTS = 25


def draw_verdicts(comparisons: Sequence[Comparison]) -> Figure:
    """Forest plot: each comparison's difference in perplexity with its 95 % interval.

    Args:
        comparisons: Those of `compare_arms` that have a difference.
    """
    places, headings = [], []
    for _, group in groupby(comparisons, key=lambda pair: pair.arm):
        headings.append(1 + len(places) + len(headings))
        places += [headings[-1] + 1 + i for i, _ in enumerate(group)]
    figure, (axes,) = panels(1, size=(9.5, 1.2 + 0.28 * places[-1]))
    axes.axvline(0, color=COLOURS[0], linewidth=1)
    beside = {"xycoords": ("axes fraction", "data"), "va": "center", "size": 9}
    for y, pair in zip(places, comparisons, strict=True):
        if y - 1 in headings:
            text = f"{pair.arm}, step {pair.arm_step}"
            axes.annotate(text, (0.01, y - 1), **beside, weight="bold")
        axes.annotate(pair.verdict, (1.01, y), **beside)
        mean, low, high = pair.percent
        look = VERDICT_LOOKS[pair.verdict or ""]
        axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], capsize=3, **look)
    axes.set_yticks(places, [f"against {pair.reference}" for pair in comparisons], size=9)
    axes.set_ylim(places[-1] + 0.7, 0.3)
    axes.set_xlabel("difference in perplexity, % of the reference's (left of 0 is better)")
    return figure


def draw_training(curves: Sequence[Curve]) -> Figure:
    """Validation and training loss at the last inner step over target tokens: a column for each
    phase, a line for each arm and seed; runs that are not finished are dotted."""
    phases = sorted({curve.run.phase for curve in curves})
    figure = Figure(figsize=(max(7.0, 3.4 * len(phases) + 0.8), 6.4), layout="constrained")
    grid = figure.subplots(2, len(phases), squeeze=False, sharey="row", sharex="col")
    for column, phase in zip(grid.T, phases, strict=True):
        named: set[str] = set()
        for curve in curves:
            if curve.run.phase != phase:
                continue
            arm = curve.run.arm
            look = ARM_LOOKS[arm] | {"linestyle": ARM_LINES[arm] if curve.finished else LINES[-1]}
            name = None if arm in named else arm
            named.add(arm)
            last = validation_column(curve.logs)
            if last:
                rows = curve.logs.drop_nulls(last)
                column[0].plot(rows["tokens"], rows[last], markersize=4, label=name, **look)
            rows = averaged(curve.logs, "tokens", "loss_final")
            column[1].plot(rows["tokens"], rows["loss_final"], **(look | {"marker": ""}))
        column[0].set_title(f"phase {phase}")
        column[1].set_xlabel("target tokens of this phase")
        column[1].xaxis.set_major_formatter(EngFormatter(sep=""))
        column[1].xaxis.set_major_locator(MaxNLocator(5))
        for axes in column:
            axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("validation loss, nats per token")
    grid[1][0].set_ylabel("training loss, nats per token")
    legend(grid[0][0], list(grid[0]))
    return figure


def draw_base(logs: pl.DataFrame) -> Figure:
    """Training and validation loss of a base that is trained from scratch."""
    figure, (axes,) = panels(1)
    rows = averaged(logs, "step", "loss")
    axes.plot(rows["step"], rows["loss"], color=COLOURS[1], label="training")
    if "validation_loss" in logs.columns:
        rows = logs.drop_nulls("validation_loss")
        look = {"color": COLOURS[2], "marker": "s", "markersize": 5}
        axes.plot(rows["step"], rows["validation_loss"], label="validation", **look)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    legend(axes)
    return figure


def draw_inner_steps(counts: Sequence[Mapping[str, Any]]) -> Figure:
    """Shares of chunks and of rounds by the inner steps that they took, a bar for each stage.

    Args:
        counts: `stage`, `chunks` and `rounds`: how many took 1, 2, ... inner steps.
    """
    figure, row = panels(2, sharey=True)
    titles = {"chunks": "scored chunks, if stopped early", "rounds": "rounds of generation"}
    for axes, (kind, title) in zip(row, titles.items(), strict=True):
        width = 0.8 / len(counts)
        most = max(len(count[kind]) for count in counts)
        for i, count in enumerate(counts):
            total = sum(count[kind])
            if not total:
                continue
            x = [step + (i - (len(counts) - 1) / 2) * width for step in range(1, most + 1)]
            heights = [100 * n / total for n in count[kind]]
            axes.bar(x[: len(heights)], heights, width, label=count["stage"], **BAR_LOOKS[i % 3])
        axes.set_xticks(range(1, most + 1))
        axes.set_title(title)
        axes.set_xlabel("inner steps")
        axes.set_ylim(0, 105)
        axes.set_axisbelow(True)
        axes.grid(axis="x", visible=False)
    row[0].set_ylabel("share, %")
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def averaged(logs: pl.DataFrame, x: str, y: str) -> pl.DataFrame:
    """At most `MOST_POINTS` rows, each the mean over as many consecutive ones."""
    rows = logs.select(x, y).drop_nulls()
    size = -(-rows.height // MOST_POINTS) or 1
    return (
        rows.with_row_index("bin")
        .group_by(pl.col("bin") // size, maintain_order=True)
        .agg(pl.mean(x), pl.mean(y))
    )


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
            stage = Training(arm, phase, 0, None).stage
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
    legend(row[0], row)
    figure.supxlabel(
        "inner steps (0: the base, which trains from phase b on; open: beyond the trained depth)",
        size=10,
    )
    return figure


def plot_composition(table: Path, figure: Path) -> None:
    """Write `draw_composition` as PNG, of the CSV that `compare_composition` wrote."""
    save_png(draw_composition(pl.read_csv(table)), figure)


def draw_composition(accuracy: pl.DataFrame) -> Figure:
    """Accuracy on unseen people by inner step: left the loop, a line for each number of hops; right
    the references at the trained depth, by hops."""
    unseen = accuracy.filter(pl.col("entities") == UNSEEN)
    mean = (
        unseen.group_by("arm", "hops", "step").agg(pl.col("accuracy").mean()).sort("hops", "step")
    )
    figure, (left, right) = panels(2, size=(9.5, 3.6))
    every = sorted(set(mean["hops"]))
    for number, hops in enumerate(every):
        line = mean.filter((pl.col("arm") == "recursive") & (pl.col("hops") == hops))
        look = {"color": COLOURS[number + 1], "marker": MARKERS[number + 1]}
        left.plot(line["step"], 100 * line["accuracy"], label=f"{hops}", **look)
    left.set_xlabel("inner step of the loop")
    left.set_ylabel("exact answers, %")
    left.set_xticks(sorted(set(mean.filter(pl.col("arm") == "recursive")["step"])))
    legend(left, title="facts needed")
    present = set(mean["arm"])
    arms = [arm for arm in (*ARMS, BASE, CHAIN_OF_THOUGHT) if arm in present]
    for number, arm in enumerate(arms):
        mine = mean.filter(pl.col("arm") == arm)
        if arm == "recursive":  # each question at the first step that can answer it
            mine = mine.filter(pl.col("step") == pl.col("hops") - 1)
        else:
            mine = mine.filter(pl.col("step") == mine["step"].max())
        look = {"color": COLOURS[number + 1], "marker": MARKERS[number + 1]}
        line = LINES[number % len(LINES)]
        right.plot(mine["hops"], 100 * mine["accuracy"], label=arm, linestyle=line, **look)
    right.set_xlabel("facts that a question needs")
    right.set_xticks(every)
    legend(right)
    for axes in (left, right):
        axes.set_ylim(-4, 104)
    return figure
