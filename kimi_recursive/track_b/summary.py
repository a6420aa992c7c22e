"""What the experiments and references of Track-B scored: the rows of its summaries."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl

from kimi_recursive.evaluation.bootstrap import Difference, paired_bootstrap
from kimi_recursive.files import read_parquet
from kimi_recursive.layout import StudentFolder
from kimi_recursive.track_b.evaluate import PRECISIONS, bytes_per_vector
from kimi_recursive.track_b.sheet import SheetRow
from kimi_recursive.track_b.status import STATUSES, SUCCESS, RunStatus, read_status

COLUMNS = (
    "timestamp", "run_id", "experiment", "steps", "seeds", "lr", "warmup", "tau", "k", "neg_m",
    "queue_size", "false_neg_mode", "threshold", "status", "vs_teacher_recall10",
    "vs_teacher_ndcg10",
)  # fmt: skip
COMPARED = (
    "name", "precision", "bytes_per_vector", "dim", "num_parameters", "num_seeds",
    "test_recall@10", "test_recall@10_std", "test_ndcg@10", "train_recall@10",
    "difference_to_svd", "low", "high", "verdict",
)  # fmt: skip
SCORES = ("method", "precision", "split", "row", "recall@10", "ndcg@10")
BASELINE = "reference_svd_{dim}"  # what a student of that length has to beat, in float32
WORDS = {"helps": "beats SVD", "hurts": "loses to SVD", "not distinguishable": "same as SVD"}


@dataclass
class Result:
    """An experiment or a reference, with the runs and scores that it has so far.

    Attributes:
        runs: Status of each seed's run; empty for a reference.
        tables: `evaluation.parquet` of each seed that has one; of a reference under 0.
        problems: Why a table of a successful run cannot be read.
    """

    name: str
    dim: int
    experiment: SheetRow | None = None
    runs: dict[int, RunStatus] = field(default_factory=dict)
    tables: dict[int, pl.DataFrame] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        found = [run.status for run in self.runs.values()]
        return min(found, key=STATUSES.index, default=SUCCESS)

    @property
    def recall(self) -> float | None:
        """Best on the validation queries, mean over seeds; None unless all seeds succeeded."""
        if self.status != SUCCESS:
            return None
        return mean([run.best_recall for run in self.runs.values()] or self.scores("validation"))

    @property
    def ndcg(self) -> float | None:
        """Last on the validation queries, mean over seeds; None unless all seeds succeeded."""
        if self.status != SUCCESS:
            return None
        found = [run.final_ndcg for run in self.runs.values()]
        return mean(found or self.scores("validation", metric="ndcg@10"))

    def scores(
        self, split: str, precision: str = "float32", metric: str = "recall@10"
    ) -> list[float]:
        """Mean over queries, for each seed."""
        return [
            cast(float, _part(t, split, precision)[metric].mean()) for t in self.tables.values()
        ]


def read_results(
    experiments: Sequence[SheetRow], students_dir: Path, references_path: Path | None = None
) -> list[Result]:
    """Experiments in the order of the sheet, then the references."""
    results = []
    for e in experiments:
        folders = {seed: students_dir / key for seed, key in e.keys.items()}
        runs = {seed: read_status(f, e.settings["steps"]) for seed, f in folders.items()}
        done = {seed: f for seed, f in folders.items() if runs[seed].status == SUCCESS}
        result = Result(e.name, e.settings["dim"], e, runs)
        for seed, f in done.items():
            try:
                result.tables[seed] = read_parquet(StudentFolder(f).scores, SCORES)
            except ValueError as error:
                result.problems.append(str(error))
        results.append(result)
    if references_path is None:
        return results
    with suppress(ValueError):  # without references there is nothing to compare with
        references = read_parquet(references_path, (*SCORES, "dim"))
        for (name, dim), table in references.group_by("method", "dim", maintain_order=True):
            results.append(Result(f"reference_{name}", dim, tables={0: table}))
    return results


def score_methods(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows of `comparison.csv`: every method and precision, scored on the test queries."""
    by_name, rows = {result.name: result for result in results}, []
    for result in results:
        baseline = by_name.get(BASELINE.format(dim=result.dim))
        for precision in PRECISIONS if result.tables else ():
            recall = result.scores("test", precision)
            row = {
                "name": result.name,
                "precision": precision,
                "bytes_per_vector": bytes_per_vector(result.dim, precision),
                "dim": result.dim,
                "num_parameters": _num_parameters(result),
                "num_seeds": len(recall) if result.experiment else None,
                "test_recall@10": mean(recall),
                "test_recall@10_std": float(np.std(recall, ddof=1)) if len(recall) > 1 else None,
                "test_ndcg@10": mean(result.scores("test", precision, "ndcg@10")),
                "train_recall@10": mean(result.scores("train", precision)),
            }
            if baseline and (result is not baseline or precision != "float32"):
                reference = baseline.tables[0]
                tables = [(table, reference) for table in result.tables.values()]
                found = recall_difference(tables, precision)
                row |= {"difference_to_svd": -found.mean, "low": -found.high, "high": -found.low}
                row["verdict"] = WORDS[found.verdict]
            rows.append(row)
    return rows


def recall_difference(
    tables: Sequence[tuple[pl.DataFrame, pl.DataFrame]], precision: str = "float32"
) -> Difference:
    """Recall of a reference minus recall of a result on the test queries; negative is better.

    Args:
        tables: For each seed, the scores of the result and of its reference.
        precision: Of the result; the reference is in float32.
    """
    differences = []
    for result, reference in tables:
        own, other = _part(result, "test", precision), _part(reference, "test", "float32")
        assert own["row"].equals(other["row"])
        differences.append((other["recall@10"] - own["recall@10"]).to_numpy())
    return paired_bootstrap(np.stack(differences), np.ones(differences[0].size))


def _part(table: pl.DataFrame, split: str, precision: str) -> pl.DataFrame:
    return table.filter((pl.col("split") == split) & (pl.col("precision") == precision)).sort("row")


def _num_parameters(result: Result) -> int | None:
    found = [run.summary.get("num_parameters") for run in result.runs.values()]
    return next((number for number in found if number), None)


def mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def run_id(result: Result) -> str:
    """Names the experiment in `summary.csv`, and its folder: `SheetRow.run_id`, with the time at
    which the first run began, if one has begun."""
    assert result.experiment is not None
    started = [run.summary.get("started_at") for run in result.runs.values()]
    first = min((time for time in started if time), default=None)
    stamp = first and f"_{first[:10].replace('-', '')}_{first[11:19].replace(':', '')}"
    return f"{result.experiment.run_id}{stamp or ''}"


def summary_row(result: Result) -> dict[str, Any]:
    """The row of an experiment in `summary.csv`."""
    assert result.experiment is not None
    ended = [run.summary.get("ended_at") for run in result.runs.values()]
    return {
        **{name: result.experiment.settings[name] for name in COLUMNS[5:13]},
        "experiment": result.name,
        "status": result.status,
        "vs_teacher_recall10": result.recall,
        "vs_teacher_ndcg10": result.ndcg,
        "steps": result.experiment.settings["steps"],
        "seeds": ",".join(map(str, result.experiment.seeds)),
        "timestamp": max((time for time in ended if time), default=None),
        "run_id": run_id(result),
    }
