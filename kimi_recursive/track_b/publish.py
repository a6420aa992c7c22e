"""Publish what the students scored: summaries, experiment folders, figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_recursive.drawing import save_png
from kimi_recursive.files import publishing
from kimi_recursive.layout import Layout
from kimi_recursive.track_b.answers import heading, summarize
from kimi_recursive.track_b.collect import collect_experiment, seed_logs
from kimi_recursive.track_b.figure import draw_recall_by_step
from kimi_recursive.track_b.sheet import select_experiments
from kimi_recursive.track_b.summary import Result, read_results, run_id


def summarize_track_b(
    track_b: Mapping[str, Any],
    results_dir: Path,
    table: str,
    text: str,
    comparison: str,
    pairs: str,
    runs: str,
    figure: str,
) -> None:
    """Write summaries, experiment folders and figure of the students that are in `results/track_b`.

    Args:
        track_b: Section `track_b` of the workflow config.
        table, text, comparison, pairs, runs, figure: Paths to write.
    """
    layout = Layout(results_dir)
    results = read_track_b(track_b, results_dir)
    summarize(results, heading(track_b, results_dir), table, text, comparison, pairs)
    with publishing(runs) as folder:
        for result in results:
            if result.experiment is not None:
                keys = result.experiment.keys.items()
                logs = {s: layout.log("train_student", key) for s, key in keys}
                # The temporary folder is a sibling of the final one: links stay valid in its place.
                run_dir = folder / run_id(result)
                collect_experiment(result, layout.track_b.students, logs, run_dir)
    save_png(
        draw_recall_by_step(results, seed_logs(results, layout.track_b.students)), Path(figure)
    )


def read_track_b(track_b: Mapping[str, Any], results_dir: Path) -> list[Result]:
    """Results of the experiments that the config asks for, as far as `results/track_b` has them."""
    place = Layout(results_dir).track_b
    experiments = select_experiments(track_b)
    return read_results(experiments, place.students, place.references)
