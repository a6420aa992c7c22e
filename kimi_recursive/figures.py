"""Figures of the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

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


def plot_perplexity_by_step(results: Sequence[Path], output_path: Path) -> None:
    """Perplexity over the number of inner steps: a panel for each phase, a line for each arm and
    seed; the baseline is a dashed line across, steps beyond the trained depth are open markers.

    Args:
        results: `<name>_results.json` files, the baseline among them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = [read_json_object(path) for path in results]
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for result in found:
        by_stage.setdefault(result["stage"], []).append(result)
    level = by_stage["baseline"][0]["perplexity"]["by_step"][0]["perplexity"]
    trained = [t for t in TRAINED_STAGES if t.stage in by_stage]
    phases = [p for p in PHASES if any(t.phase == p for t in trained)]
    width = max(7.0, 3.4 * len(phases) + 0.8)
    figure, row = plt.subplots(
        1, len(phases) or 1, figsize=(width, 4.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, phase in zip(row[0], phases or PHASES[:1], strict=True):
        axes.axhline(level, color=COLOURS[0], linestyle="--", label="baseline", zorder=1)
        for number, arm in enumerate(ARMS, start=1):
            look = {"color": COLOURS[number], "marker": MARKERS[number]}
            stage = next(t.stage for t in TRAINED_STAGES if (t.arm, t.phase) == (arm, phase))
            for i, result in enumerate(by_stage.get(stage, [])):
                steps = result["perplexity"]["by_step"]
                x = [step["step"] for step in steps]
                y = [step["perplexity"] for step in steps]
                axes.plot(x, y, **look, label=None if i else arm)
                beyond = [k for k, t in enumerate(x) if t > result["inner_steps"]]
                points = ([x[k] for k in beyond], [y[k] for k in beyond])
                axes.plot(*points, **look, linestyle="", mfc="white")
        axes.set_title(f"phase {phase}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    row[0][0].set_ylabel("perplexity on held-out documents")
    row[0][0].legend(frameon=False)
    figure.supxlabel(
        "inner steps (0: the base, which trains from phase b on; open: beyond the trained depth)",
        size=10,
    )
    output_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_path, dpi=150)
    plt.close(figure)


def plot_recall_by_step(results: Sequence[Result], runs_dir: Path, output_path: Path) -> None:
    """vs_teacher_recall@10 on the validation queries over optimizer steps: a line for each
    experiment, the mean over its seeds with their range; references are lines across.

    Args:
        results: Of `track_b.summary.read_results`.
        runs_dir: The experiments' folders.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    experiments = [r for r in results if r.experiment is not None]
    for number, result in enumerate(experiments):
        path = runs_dir / result.experiment.run_id / "logs/train_logs.parquet"
        if not path.is_file():
            continue
        curve = (
            pl.read_parquet(path)
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
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("vs_teacher_recall@10, validation queries")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    with replacing(output_path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
