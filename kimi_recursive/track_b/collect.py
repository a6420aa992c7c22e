"""The folder of an experiment: the logs of its seeds, and links to their students.

logs/train_logs.parquet, .jsonl   rows of all seeds, with a column `seed`
logs/train_summary.json           run_id, status, and the summary of each seed
logs/sweep_seed<N>.log            output of the run
checkpoints/seed<N>               link to the checkpoints of that seed
checkpoints/student_best.*, student_step_<N>.*   links to those of the best seed
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from kimi_recursive.files import write_json
from kimi_recursive.layout import StudentFolder
from kimi_recursive.track_b.status import SCORED, read_logs, write_logs
from kimi_recursive.track_b.summary import Result


def seed_logs(results: Sequence[Result], students_dir: Path) -> dict[str, pl.DataFrame]:
    """The logs of all seeds of each experiment, if they can be read, with a column `seed`."""
    logs = {}
    for result in results:
        tables = []
        for seed, run in result.runs.items():
            if result.experiment and run.status in SCORED:
                table = read_logs(students_dir / result.experiment.keys[seed])
                assert table is not None
                tables.append(table.insert_column(0, pl.lit(seed).alias("seed")))
        if tables:
            logs[result.name] = pl.concat(tables, how="diagonal_relaxed")
    return logs


def collect_experiment(
    result: Result,
    students_dir: Path,
    run_logs: Mapping[int, Path],
    run_dir: Path,
) -> None:
    """Fill an experiment's folder from the runs of its seeds that exist.

    Args:
        students_dir: Folder of the runs, by key.
        run_logs: File with the output of each seed's run.
        run_dir: The folder; its name is the run id.
    """
    assert result.experiment is not None
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    for logs in seed_logs([result], students_dir).values():
        write_logs(run_dir, logs)
    seeds = {str(seed): run.summary for seed, run in result.runs.items()}
    facts = {"run_id": run_dir.name, "status": result.status, "seeds": seeds}
    write_json(StudentFolder(run_dir).summary, facts)
    for seed, path in run_logs.items():
        target = run_dir / f"logs/sweep_seed{seed}.log"
        if path.is_file() and path != target:
            shutil.copyfile(path, target)
    folders = {s: students_dir / key / "checkpoints" for s, key in result.experiment.keys.items()}
    _link_checkpoints(result, folders, run_dir / "checkpoints")


def _link_checkpoints(result: Result, found: Mapping[int, Path], folder: Path) -> None:
    def link(name: str, target: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(os.path.relpath(target, folder))

    for seed, target in found.items():
        if target.is_dir():
            link(f"seed{seed}", target)
    best = max(found, key=lambda seed: result.runs[seed].best_recall or -1.0)
    for target in sorted(found[best].glob("student_*.safetensors")):
        link(target.name, target)
