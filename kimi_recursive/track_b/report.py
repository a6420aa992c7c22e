"""All that is made of the students once they are there: summaries, experiment folders, figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_recursive.drawing import save_png
from kimi_recursive.files import publishing, read_json_object
from kimi_recursive.layout import Layout
from kimi_recursive.track_b.collect import collect_experiment, seed_logs
from kimi_recursive.track_b.figure import draw_recall_by_step
from kimi_recursive.track_b.sheet import select_experiments
from kimi_recursive.track_b.summary import Result, read_results, summarize

TEACHER_KEYS = ("name", "dim", "num_train", "num_validation", "num_test")


def summarize_track_b(
    track_b: Mapping[str, Any],
    results_dir: Path,
    table: str,
    text: str,
    comparison: str,
    runs: str,
    figure: str,
) -> None:
    """Write everything from whatever is in `results/track_b`.

    Args:
        track_b: That subtree of the workflow config.
        table, text, comparison, runs, figure: What to write.
    """
    layout = Layout(results_dir)
    results = read_track_b(track_b, results_dir)
    summarize(results, heading(track_b, results_dir), table, text, comparison)
    with publishing(runs) as folder:
        for result in results:
            if result.experiment is not None:
                keys = result.experiment.keys.items()
                logs = {s: layout.log("train_student", key) for s, key in keys}
                # The temporary folder is a sibling: links from it hold in its final place.
                run_dir = folder / result.experiment.run_id
                collect_experiment(result, layout.track_b.students, logs, run_dir)
    save_png(
        draw_recall_by_step(results, seed_logs(results, layout.track_b.students)), Path(figure)
    )


def read_track_b(track_b: Mapping[str, Any], results_dir: Path) -> list[Result]:
    """Whatever is in `results/track_b`, of the experiments that the config asks for."""
    place = Layout(results_dir).track_b
    experiments = select_experiments(track_b)
    return read_results(experiments, place.students, place.references)


def heading(track_b: Mapping[str, Any], results_dir: Path) -> str:
    """What the numbers were made on."""
    path = Layout(results_dir).track_b.teacher_facts
    if not path.is_file():
        return "Track-B: the teacher's vectors are not there yet"
    try:
        teacher = read_json_object(path)
    except ValueError as error:
        return f"Track-B: {error}"
    if absent := [key for key in TEACHER_KEYS if key not in teacher]:
        return f"Track-B: {path}: has no {absent[0]!r}"
    scale = (
        "quick: 10 steps each" if track_b["quick"] else f"{track_b['scale']:g} of the sheet's steps"
    )
    return (
        f"Track-B: {teacher['num_train']} training sentences, "
        f"{teacher['num_validation']} validation and {teacher['num_test']} test queries\n"
        f"Teacher {Path(teacher['name']).name} ({teacher['dim']}-d); {scale}"
    )
