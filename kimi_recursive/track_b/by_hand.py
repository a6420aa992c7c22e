"""Run one experiment by hand: a row of the sheet with some hyperparameters changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kimi_recursive.files import file_digest
from kimi_recursive.processes.logs import logging_to
from kimi_recursive.text import unknown_key_message
from kimi_recursive.track_b.collect import collect_experiment
from kimi_recursive.track_b.sheet import SheetRow, neighbour_settings, parse_row, read_sheet
from kimi_recursive.track_b.summary import Result, read_results
from kimi_recursive.track_b.train import train_student
from kimi_recursive.track_b.truth import find_neighbours


def run_by_hand(
    sheet: Path,
    name: str,
    changed: Mapping[str, str],
    teacher_dir: Path,
    output_dir: Path,
    run_id: str | None = None,
) -> tuple[Result, Path]:
    """Train all seeds of an experiment into one folder.

    Args:
        sheet, name: The row to start from.
        changed: Texts by column that replace those of the row.
        teacher_dir: Folder that `encode_sentences` or `import_vectors` wrote.
        run_id: Name of the folder; by default `SheetRow.run_id`, so that a rerun resumes.

    Returns: the result, and the folder: see `track_b.collect`, with `students/<key>` for each seed.

    Raises:
        ValueError: the experiment is unknown, hyperparameters are invalid, or a run diverged.
    """
    rows = {experiment.name: experiment for experiment in read_sheet(sheet)}
    if name not in rows:
        raise ValueError(unknown_key_message(name, rows, f"--experiment, {sheet}"))
    row = rows[name]
    values = {"experiment": name, "seeds": list(row.seeds), **row.settings, **changed}
    if changed.get("steps", "").isdigit() and "warmup" not in changed:
        values["warmup"] = min(row.settings["warmup"], int(changed["steps"]))
    experiment = parse_row(values, "track-b run")
    folder = output_dir / (run_id or experiment.run_id)
    folder.mkdir(parents=True, exist_ok=True)
    neighbours = _neighbours(experiment, teacher_dir, folder)
    logs = {seed: folder / f"logs/sweep_seed{seed}.log" for seed in experiment.seeds}
    try:
        for seed, key in experiment.keys.items():
            target = folder / "students" / key
            with logging_to(logs[seed], append=True):
                train_student(experiment.settings, seed, teacher_dir, neighbours, target, key)
    finally:
        result = read_results([experiment], folder / "students")[0]
        collect_experiment(result, folder / "students", logs, folder)
    return result, folder


def _neighbours(experiment: SheetRow, teacher_dir: Path, folder: Path) -> Path:
    """The file of the teacher's neighbours for these settings; made if missing."""
    vectors = file_digest(teacher_dir / "vectors.npy")
    (settings,) = neighbour_settings([experiment])
    name = f"neighbours_k{settings['k']}_{settings['false_neg_mode']}{settings['threshold']:g}"
    path = folder / f"{name}_{vectors[:8]}.npz"
    if not path.is_file():
        find_neighbours(teacher_dir, [settings], path)
    return path
