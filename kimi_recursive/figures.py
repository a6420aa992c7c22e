"""Figures of the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kimi_recursive.config import read_json_object

# Okabe and Ito's colours, told apart with any kind of colour vision.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKERS = ("", "o", "s", "^", "D", "v")


def plot_perplexity_by_step(results: Sequence[Path], output_path: Path) -> None:
    """Perplexity over the number of inner steps, a line for each stage and seed; the baseline is a
    dashed line across, steps beyond the trained depth are open markers.

    Args:
        results: `<name>_results.json` files, the baseline among them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    stages: dict[str, int] = {}
    for found in map(read_json_object, results):
        stage, steps = found["stage"], found["perplexity"]["by_step"]
        if stage == "baseline":
            level = steps[0]["perplexity"]
            axes.axhline(level, color=COLOURS[0], linestyle="--", label="baseline", zorder=1)
            continue
        new = stage not in stages
        style = stages.setdefault(stage, len(stages) + 1)
        x = [row["step"] for row in steps]
        y = [row["perplexity"] for row in steps]
        look = {"color": COLOURS[style], "marker": MARKERS[style]}
        axes.plot(x, y, **look, label=stage if new else None)
        beyond = [i for i, t in enumerate(x) if t > found["inner_steps"]]
        axes.plot([x[i] for i in beyond], [y[i] for i in beyond], **look, linestyle="", mfc="white")
    axes.set_xlabel("inner steps (0 is the base; open markers: beyond the trained depth)")
    axes.set_ylabel("perplexity on held-out documents")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    output_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_path, dpi=150)
    plt.close(figure)
